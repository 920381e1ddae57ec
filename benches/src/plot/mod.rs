//! Pictures of what was measured, as SVG: nothing but text goes in and out, no fonts and no libraries of the system.

mod bars;
mod latency;

pub use bars::{Bar, Group, ratios};
pub use latency::{Point, sweep};
