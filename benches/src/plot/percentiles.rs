//! Latencies of one load by how many requests waited no longer.

use std::ops::Range;

use plotters::coord::Shift;
use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};
use plotters::prelude::*;

use super::axis::{SHORTEST, decades, label};
use super::file::{Drawing, File};
use super::legend::{BLUE, GREEN, PURPLE, RED, legend, piece};

/// One latency.
#[derive(Debug, Clone, PartialEq)]
pub struct Curve {
    /// In the legend.
    pub name: &'static str,
    /// By nines: at `x`, all but one of 10^x were no longer than so many milliseconds. Half is at 0.3, 99 of 100 at 2.
    pub points: Vec<(f64, f64)>,
}

/// Draws latencies over percentiles, both logarithmic: the last of a hundred and of a thousand have as much room as all before them.
///
/// # Errors
/// The file cannot be written.
pub fn percentiles(file: &File, title: &str, curves: &[Curve]) -> anyhow::Result<()> {
    file.write(&Percentiles { title, curves })
}

struct Percentiles<'a> {
    title: &'a str,
    curves: &'a [Curve],
}

const COLORS: [RGBColor; 4] = [BLUE, RED, GREEN, PURPLE];

/// What is written below the axis.
const MARKS: [(f64, &str); 7] = [
    (0.0, "0"),
    (0.301, "50"),
    (1.0, "90"),
    (1.301, "95"),
    (2.0, "99"),
    (3.0, "99.9"),
    (4.0, "99.99"),
];

/// The axis of percentiles, from 0 to so many nines.
struct Nines(f64);

impl Ranged for Nines {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, x: &f64, (from, to): (i32, i32)) -> i32 {
        from + (x / self.0 * f64::from(to - from)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        let marks = MARKS.iter().map(|(x, _)| *x);
        marks.filter(|x| *x <= self.0).collect()
    }

    fn range(&self) -> Range<f64> {
        0.0..self.0
    }
}

impl ValueFormatter<f64> for Nines {
    fn format(x: &f64) -> String {
        let mark = MARKS.iter().find(|(at, _)| at == x);
        mark.map_or(String::new(), |(_, text)| format!("{text} %"))
    }
}

impl Drawing for Percentiles<'_> {
    fn size(&self) -> (u32, u32) {
        (720, 420)
    }

    fn draw<DB>(&self, root: &DrawingArea<DB, Shift>) -> anyhow::Result<()>
    where
        DB: DrawingBackend<ErrorType: 'static>,
    {
        root.fill(&WHITE)?;
        let points = || self.curves.iter().flat_map(|curve| &curve.points);
        // A load of one request ends where it begins.
        let most = points().map(|(x, _)| *x).fold(1.0, f64::max);
        let mut chart = ChartBuilder::on(root)
            .caption(self.title, ("sans-serif", 18))
            .margin(12)
            .x_label_area_size(40)
            .y_label_area_size(56)
            .build_cartesian_2d(
                Nines(1.02 * most),
                decades(points().map(|(_, ms)| *ms)).log_scale(),
            )?;
        chart
            .configure_mesh()
            .x_desc("were no longer than")
            .y_desc("ms")
            .y_label_formatter(&|ms| label(*ms))
            .max_light_lines(0)
            .draw()?;
        for (curve, color) in self.curves.iter().zip(COLORS.iter().cycle().copied()) {
            let line = curve.points.iter().map(|&(x, ms)| (x, ms.max(SHORTEST)));
            chart
                .draw_series(LineSeries::new(line, color.stroke_width(2)))?
                .label(curve.name)
                .legend(piece(color));
        }
        legend(&mut chart, SeriesLabelPosition::LowerRight)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::file::svg;
    use super::*;

    #[test]
    fn a_picture_has_a_line_for_each_latency_and_the_percentiles_that_there_are() {
        let curve = |name, ms: f64| Curve {
            name,
            points: (0..=18)
                .map(|x| (0.1 * f64::from(x), ms * f64::from(x + 1)))
                .collect(),
        };
        let curves = [curve("TTFT", 20.0), curve("end to end", 300.0)];
        let title = "32 clients";
        let picture = svg(&Percentiles {
            title,
            curves: &curves,
        })
        .unwrap();
        for text in [title, "TTFT", "end to end", "50 %", "90 %", "95 %"] {
            assert!(picture.contains(text), "{text} is missing");
        }
        // A load of 64 has no hundredth.
        assert!(!picture.contains("99 %"), "{picture}");
        for color in ["#4575B4", "#D73027"] {
            let lines = picture
                .lines()
                .filter(|line| line.starts_with("<polyline") && line.contains(color));
            assert_eq!(lines.count(), 2, "{color} in\n{picture}");
        }
    }

    #[test]
    fn a_load_of_one_request_is_drawn_too() {
        let curves = [Curve {
            name: "TTFT",
            points: vec![(0.0, 12.0)],
        }];
        for curves in [&curves[..], &[]] {
            let title = "one";
            assert!(svg(&Percentiles { title, curves }).is_ok());
        }
    }
}
