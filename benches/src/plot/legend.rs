//! Colors of what is drawn, and what says which is which.

use plotters::coord::CoordTranslate;
use plotters::prelude::*;

pub const BLUE: RGBColor = RGBColor(69, 117, 180);
pub const RED: RGBColor = RGBColor(215, 48, 39);
pub const GREEN: RGBColor = RGBColor(46, 125, 50);
pub const PURPLE: RGBColor = RGBColor(117, 112, 179);

/// A curve's piece of the legend.
pub fn piece(color: RGBColor) -> impl Fn((i32, i32)) -> PathElement<(i32, i32)> {
    move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2))
}

/// Draws what the series that were drawn are called.
///
/// # Errors
/// What it is drawn on cannot be.
pub fn legend<'a, DB, C>(
    chart: &mut ChartContext<'a, DB, C>,
    position: SeriesLabelPosition,
) -> Result<(), DrawingAreaErrorKind<DB::ErrorType>>
where
    DB: DrawingBackend + 'a,
    C: CoordTranslate,
{
    chart
        .configure_series_labels()
        .position(position)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .draw()
}
