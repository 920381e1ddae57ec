//! Pictures of what was measured, as SVG or PNG by the file's ending. Nothing of the system is needed: what draws the letters of a PNG is a font in this program.

mod axis;
mod bars;
mod file;
mod latency;
mod legend;
mod percentiles;

pub use bars::{Bar, Group, ratios};
pub use file::File;
pub use latency::{Point, sweep};
pub use percentiles::{Curve, percentiles};
