//! The axis of latencies: milliseconds, logarithmic.

use std::ops::Range;

/// The shortest latency that is drawn: a logarithmic axis has no 0.
pub const SHORTEST: f64 = 0.01;

/// Whole decades around all of them: only their ends are sure to have labels.
pub fn decades(values: impl Iterator<Item = f64>) -> Range<f64> {
    let (least, most) = values.fold((f64::MAX, SHORTEST), |(least, most), ms| {
        (least.min(ms.max(SHORTEST)), most.max(ms))
    });
    let decade = |value: f64, round: fn(f64) -> f64| 10_f64.powf(round(value.log10()));
    decade(least.min(most), f64::floor)..decade(1.01 * most, f64::ceil)
}

/// A label, without zeros that say nothing.
pub fn label(ms: f64) -> String {
    format!("{ms:.4}")
        .trim_end_matches('0')
        .trim_end_matches('.')
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_axis_begins_and_ends_with_a_decade() {
        let ends = |values: &[f64]| {
            let range = decades(values.iter().copied());
            [range.start, range.end].map(label)
        };
        assert_eq!(ends(&[20.0, 50.0, 1500.0]), ["10", "10000"]);
        assert_eq!(ends(&[0.0, 0.5]), ["0.01", "1"]);
        assert_eq!(ends(&[100.0]), ["100", "1000"]);
        assert_eq!(ends(&[]), ["0.01", "0.1"]);
    }
}
