//! Numbers of the command line, within bounds that what is computed of them can bear.

/// A rate, a factor or a number of seconds.
pub fn positive(text: &str) -> Result<f64, String> {
    within(text, |value| (1e-6..=1e6).contains(value))
        .ok_or_else(|| "expected a number from 0.000001 to 1000000".to_owned())
}

/// A temperature: 0 is greedy.
pub fn temperature(text: &str) -> Result<f32, String> {
    within(text, |value| (0.0..=1e6).contains(value))
        .map(|value| value as f32)
        .ok_or_else(|| "expected a number from 0 to 1000000".to_owned())
}

/// A probability above 0.
pub fn probability(text: &str) -> Result<f32, String> {
    within(text, |value| *value > 0.0 && *value <= 1.0)
        .map(|value| value as f32)
        .ok_or_else(|| "expected a number above 0, at most 1".to_owned())
}

fn within(text: &str, bounds: impl Fn(&f64) -> bool) -> Option<f64> {
    text.parse().ok().filter(bounds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_computed_with_is_refused() {
        for text in ["0", "-1", "nan", "inf", "1e-300", "2e6", "many"] {
            assert!(positive(text).is_err(), "{text}");
        }
        for text in ["nan", "inf", "-0.1"] {
            assert!(
                temperature(text).is_err() && probability(text).is_err(),
                "{text}"
            );
        }
        assert!(probability("0").is_err() && probability("1.1").is_err());
        assert_eq!(
            (positive("0.7"), temperature("0"), probability("1")),
            (Ok(0.7), Ok(0.0), Ok(1.0))
        );
    }
}
