//! Bars side by side in groups, each with the line it is to reach.

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::file::{Drawing, File};
use super::legend::{BLUE, GREEN};

/// One bar.
#[derive(Debug, Clone, PartialEq)]
pub struct Bar {
    /// Below it.
    pub label: String,
    /// How high it is.
    pub value: f64,
    /// How high it is to be.
    pub goal: Option<f64>,
}

/// Bars that belong together.
#[derive(Debug, Clone, PartialEq)]
pub struct Group {
    /// Below them.
    pub label: String,
    /// From left to right.
    pub bars: Vec<Bar>,
}

const REACHED: RGBColor = GREEN;
const MISSED: RGBColor = RGBColor(230, 145, 56);
const PLAIN: RGBColor = BLUE;

/// Draws ratios: green bars reach their goal, orange ones miss it, the line at 1 is the peer.
///
/// # Errors
/// The file cannot be written.
pub fn ratios(file: &File, title: &str, groups: &[Group]) -> anyhow::Result<()> {
    file.write(&Ratios { title, groups })
}

struct Ratios<'a> {
    title: &'a str,
    groups: &'a [Group],
}

impl Ratios<'_> {
    /// Places for bars, one of them free after each group.
    fn slots(&self) -> usize {
        self.groups.iter().map(|group| group.bars.len() + 1).sum()
    }
}

impl Drawing for Ratios<'_> {
    fn size(&self) -> (u32, u32) {
        ((120 + 90 * self.slots().max(4)) as u32, 420)
    }

    fn draw<DB>(&self, root: &DrawingArea<DB, Shift>) -> anyhow::Result<()>
    where
        DB: DrawingBackend<ErrorType: 'static>,
    {
        let slots = self.slots();
        let highest = self
            .groups
            .iter()
            .flat_map(|group| &group.bars)
            .map(|bar| bar.value.max(bar.goal.unwrap_or(0.0)))
            .fold(1.0_f64, f64::max);
        root.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(root)
            .caption(self.title, ("sans-serif", 20))
            .margin(12)
            .y_label_area_size(44)
            .x_label_area_size(48)
            .build_cartesian_2d(0.0..slots as f64, 0.0..1.15 * highest)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .y_max_light_lines(0)
            .x_labels(0)
            .y_label_formatter(&|y| format!("{y:.1}×"))
            .draw()?;
        let text = ("sans-serif", 13)
            .into_font()
            .color(&BLACK)
            .pos(Pos::new(HPos::Center, VPos::Top));
        // Outside of the chart: in pixels.
        let below = |at: &(i32, i32), pixels: i32, label: &str| {
            root.draw(&Text::new(
                label.to_owned(),
                (at.0, at.1 + pixels),
                text.clone(),
            ))
        };
        let above = ("sans-serif", 13)
            .into_font()
            .color(&BLACK)
            .pos(Pos::new(HPos::Center, VPos::Bottom));
        let unit = 1.15 * highest / 310.0;
        let mut at = 0.5;
        for group in self.groups {
            let middle = at + group.bars.len() as f64 / 2.0;
            below(&chart.backend_coord(&(middle, 0.0)), 22, &group.label)?;
            for bar in &group.bars {
                let color = match bar.goal {
                    None => PLAIN,
                    Some(goal) if bar.value >= goal => REACHED,
                    Some(_) => MISSED,
                };
                let corners = [(at + 0.1, 0.0), (at + 0.9, bar.value)];
                chart.draw_series([Rectangle::new(corners, color.filled())])?;
                if let Some(goal) = bar.goal {
                    let line = vec![(at + 0.02, goal), (at + 0.98, goal)];
                    chart.draw_series([PathElement::new(line, BLACK.stroke_width(2))])?;
                }
                chart.draw_series([Text::new(
                    format!("{:.2}", bar.value),
                    (
                        at + 0.5,
                        bar.value.max(bar.goal.unwrap_or(0.0)) + 2.0 * unit,
                    ),
                    above.clone(),
                )])?;
                below(&chart.backend_coord(&(at + 0.5, 0.0)), 6, &bar.label)?;
                at += 1.0;
            }
            at += 1.0;
        }
        let peer = vec![(0.0, 1.0), (slots as f64, 1.0)];
        chart.draw_series([PathElement::new(peer, RED.mix(0.7).stroke_width(1))])?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::file::svg;
    use super::*;

    #[test]
    fn a_picture_has_every_bar_with_its_label_and_value() {
        let bar = |label: &str, value, goal| Bar {
            label: label.to_owned(),
            value,
            goal,
        };
        let groups = [
            Group {
                label: "prefill".to_owned(),
                bars: vec![bar("q4_0", 3.21, Some(2.8)), bar("q8_0", 1.02, Some(2.3))],
            },
            Group {
                label: "decode".to_owned(),
                bars: vec![bar("f16", 1.55, None)],
            },
        ];
        let picture = svg(&Ratios {
            title: "ratios",
            groups: &groups,
        })
        .unwrap();
        assert!(picture.starts_with("<svg") && picture.trim_end().ends_with("</svg>"));
        for text in [
            "ratios", "prefill", "decode", "q4_0", "q8_0", "f16", "3.21", "1.02", "1.55",
        ] {
            assert!(picture.contains(text), "{text} is missing");
        }
        for color in ["#2E7D32", "#E69138", "#4575B4"] {
            assert_eq!(picture.matches(color).count(), 1, "{color} in\n{picture}");
        }
    }
}
