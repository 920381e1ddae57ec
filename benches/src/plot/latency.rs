//! Latency over throughput: what a server's users wait as more of them come.

use plotters::coord::Shift;
use plotters::prelude::*;

use super::axis::{SHORTEST, decades, label};
use super::file::{Drawing, File};
use super::legend::{BLUE, RED, legend, piece};

/// What one rate of a sweep found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Point {
    /// Output tokens a second.
    pub throughput: f64,
    /// TTFT in milliseconds, half and 99 of 100 were no longer; `None`: nothing came.
    pub ttft: Option<(f64, f64)>,
    /// Time between tokens in milliseconds, likewise; `None`: every answer came in one piece.
    pub inter_token: Option<(f64, f64)>,
}

/// A latency's percentiles.
type Of = fn(&Point) -> Option<(f64, f64)>;

/// Draws TTFT and inter-token latency over throughput, both logarithmic.
///
/// # Errors
/// The file cannot be written.
pub fn sweep(file: &File, title: &str, points: &[Point]) -> anyhow::Result<()> {
    file.write(&Sweep { title, points })
}

struct Sweep<'a> {
    title: &'a str,
    points: &'a [Point],
}

impl Drawing for Sweep<'_> {
    fn size(&self) -> (u32, u32) {
        (960, 420)
    }

    fn draw<DB>(&self, root: &DrawingArea<DB, Shift>) -> anyhow::Result<()>
    where
        DB: DrawingBackend<ErrorType: 'static>,
    {
        let points = self.points;
        root.fill(&WHITE)?;
        let root = root.titled(self.title, ("sans-serif", 20))?;
        let most = points.iter().map(|p| p.throughput).fold(1.0, f64::max);
        let of: [(&str, Of); 2] = [
            ("TTFT, ms", |point| point.ttft),
            ("between tokens, ms", |point| point.inter_token),
        ];
        for (area, (name, latency)) in root.split_evenly((1, 2)).iter().zip(of) {
            let values = points.iter().filter_map(latency);
            let values = values.flat_map(|(p50, p99)| [p50, p99]);
            let mut chart = ChartBuilder::on(area)
                .caption(name, ("sans-serif", 15))
                .margin(12)
                .x_label_area_size(36)
                .y_label_area_size(56)
                .build_cartesian_2d(0.0..1.05 * most, decades(values).log_scale())?;
            chart
                .configure_mesh()
                .x_desc("output tokens a second")
                .max_light_lines(0)
                .y_label_formatter(&|ms| label(*ms))
                .draw()?;
            for (label, color) in [("p50", BLUE), ("p99", RED)] {
                let line: Vec<(f64, f64)> = points
                    .iter()
                    .filter_map(|point| {
                        let (p50, p99) = latency(point)?;
                        let ms = if label == "p50" { p50 } else { p99 };
                        Some((point.throughput, ms.max(SHORTEST)))
                    })
                    .collect();
                chart
                    .draw_series(LineSeries::new(line, color.stroke_width(2)).point_size(3))?
                    .label(label)
                    .legend(piece(color));
            }
            legend(&mut chart, SeriesLabelPosition::UpperLeft)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::file::svg;
    use super::*;

    fn drawn(title: &str, points: &[Point]) -> String {
        svg(&Sweep { title, points }).unwrap()
    }

    #[test]
    fn a_picture_has_both_latencies_and_both_percentiles() {
        let points = [
            Point {
                throughput: 100.0,
                ttft: Some((20.0, 50.0)),
                inter_token: Some((5.0, 9.0)),
            },
            Point {
                throughput: 180.0,
                ttft: Some((90.0, 1500.0)),
                inter_token: Some((8.0, 40.0)),
            },
        ];
        let picture = drawn("a sweep", &points);
        for text in ["a sweep", "TTFT, ms", "between tokens, ms", "p50", "p99"] {
            assert!(picture.contains(text), "{text} is missing");
        }
        // A line and its piece of the legend, on both sides.
        for color in ["#4575B4", "#D73027"] {
            let lines = picture
                .lines()
                .filter(|line| line.starts_with("<polyline") && line.contains(color));
            assert_eq!(lines.count(), 4, "{color} in\n{picture}");
        }
    }

    #[test]
    fn a_rate_whose_answers_came_in_one_piece_keeps_its_first() {
        let points = [50.0, 100.0].map(|throughput| Point {
            throughput,
            ttft: Some((20.0, 50.0)),
            inter_token: None,
        });
        let picture = drawn("a sweep", &points);
        // A point is a circle: two of each percentile.
        assert_eq!(picture.matches("<circle").count(), 4, "{picture}");
    }

    #[test]
    fn nothing_measured_is_drawn_too() {
        assert!(drawn("nothing", &[]).contains("nothing"));
    }
}
