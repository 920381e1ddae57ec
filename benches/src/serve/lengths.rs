//! [`Lengths`]: how long prompts and answers are — all alike, or drawn from a distribution.

use std::fmt;
use std::str::FromStr;

use serde::{Serialize, Serializer};

use crate::random::Random;

/// Longest that a prompt or an answer may be.
pub const LONGEST: u32 = 1_000_000;

/// A distribution of lengths in tokens. What is drawn is rounded, and at least 1 and at most [`LONGEST`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Lengths {
    /// All the same: `128`.
    Fixed(u32),
    /// Equally likely from the first to the second: `64..512`.
    Uniform(u32, u32),
    /// `normal:MEAN,DEVIATION`.
    Normal(f64, f64),
    /// `lognormal:MEDIAN,SIGMA`: the logarithm is normal, as lengths of people's prompts are.
    LogNormal(f64, f64),
    /// `exponential:MEAN`.
    Exponential(f64),
}

impl Lengths {
    /// The next one.
    pub fn draw(self, random: &mut Random) -> u32 {
        let drawn = match self {
            Self::Fixed(length) => return length,
            Self::Uniform(least, most) => {
                return least + random.below(u64::from(most - least) + 1) as u32;
            }
            Self::Normal(mean, deviation) => mean + deviation * normal(random),
            Self::LogNormal(median, sigma) => median * (sigma * normal(random)).exp(),
            Self::Exponential(mean) => -mean * random.unit().ln(),
        };
        drawn.round().clamp(1.0, f64::from(LONGEST)) as u32
    }

    /// No draw is longer; `None`: it has no bound of its own.
    pub fn most(self) -> Option<u32> {
        match self {
            Self::Fixed(length) | Self::Uniform(_, length) => Some(length),
            Self::Normal(..) | Self::LogNormal(..) | Self::Exponential(_) => None,
        }
    }
}

/// Of the standard normal distribution (Box & Muller 1958).
fn normal(random: &mut Random) -> f64 {
    let radius = (-2.0 * random.unit().ln()).sqrt();
    radius * (std::f64::consts::TAU * random.unit()).cos()
}

impl FromStr for Lengths {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || {
            format!(
                "`{text}`: expected a length of 1 to {LONGEST}, a range as 64..512, normal:MEAN,DEVIATION, lognormal:MEDIAN,SIGMA or exponential:MEAN"
            )
        };
        let length = |text: &str| {
            let length = text.parse::<u32>().ok();
            length
                .filter(|length| (1..=LONGEST).contains(length))
                .ok_or_else(expected)
        };
        let number = |text: &str| {
            let number = text.parse::<f64>().ok();
            number
                .filter(|number| *number > 0.0 && *number <= f64::from(LONGEST))
                .ok_or_else(expected)
        };
        if let Some((least, most)) = text.split_once("..") {
            let (least, most) = (length(least)?, length(most)?);
            return if least <= most {
                Ok(Self::Uniform(least, most))
            } else {
                Err(expected())
            };
        }
        let Some((name, numbers)) = text.split_once(':') else {
            return length(text).map(Self::Fixed);
        };
        match (name, numbers.split_once(',')) {
            ("normal", Some((mean, deviation))) => {
                Ok(Self::Normal(number(mean)?, number(deviation)?))
            }
            ("lognormal", Some((median, sigma))) => {
                Ok(Self::LogNormal(number(median)?, number(sigma)?))
            }
            ("exponential", None) => Ok(Self::Exponential(number(numbers)?)),
            _ => Err(expected()),
        }
    }
}

impl fmt::Display for Lengths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(length) => write!(f, "{length}"),
            Self::Uniform(least, most) => write!(f, "{least}..{most}"),
            Self::Normal(mean, deviation) => write!(f, "normal:{mean},{deviation}"),
            Self::LogNormal(median, sigma) => write!(f, "lognormal:{median},{sigma}"),
            Self::Exponential(mean) => write!(f, "exponential:{mean}"),
        }
    }
}

impl Serialize for Lengths {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draws(text: &str) -> Vec<f64> {
        let lengths: Lengths = text.parse().unwrap();
        assert_eq!(lengths.to_string(), text);
        let mut random = Random::nth(3, 0);
        (0..40_000)
            .map(|_| f64::from(lengths.draw(&mut random)))
            .collect()
    }

    fn mean(values: &[f64]) -> f64 {
        values.iter().sum::<f64>() / values.len() as f64
    }

    #[test]
    fn draws_have_the_moments_of_their_distribution() {
        assert!(draws("128").iter().all(|&x| x == 128.0));
        let uniform = draws("10..30");
        assert!(uniform.iter().all(|x| (10.0..=30.0).contains(x)));
        assert!(uniform.contains(&10.0) && uniform.contains(&30.0));
        assert!((mean(&uniform) - 20.0).abs() < 0.2);
        let normal = draws("normal:500,50");
        let m = mean(&normal);
        let variance = mean(&normal.iter().map(|x| (x - m).powi(2)).collect::<Vec<_>>());
        assert!((m - 500.0).abs() < 1.5 && (variance.sqrt() - 50.0).abs() < 1.5);
        let mut lognormal = draws("lognormal:200,0.8");
        lognormal.sort_by(f64::total_cmp);
        assert!((lognormal[20_000] - 200.0).abs() < 6.0);
        let above = lognormal.iter().filter(|&&x| x > 200.0 * 0.8_f64.exp());
        assert!((above.count() as f64 / 40_000.0 - 0.1587).abs() < 0.01);
        assert!((mean(&draws("exponential:100")) - 100.0).abs() < 2.0);
    }

    #[test]
    fn no_draw_is_empty() {
        assert!(draws("normal:2,50").iter().all(|&x| x >= 1.0));
    }

    #[test]
    fn what_is_no_distribution_says_what_would_be() {
        for text in [
            "",
            "0",
            "-3",
            "2..1",
            "0..4",
            "normal:3",
            "normal:a,b",
            "zipf:2",
            "exponential:0",
            "2000000",
            "lognormal:inf,1",
        ] {
            let error = text.parse::<Lengths>().unwrap_err();
            assert!(error.contains("lognormal:MEDIAN,SIGMA"), "{text}: {error}");
        }
    }
}
