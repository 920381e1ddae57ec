//! [`Slo`]: what users were promised, and whether an answer kept it.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Serialize, Serializer};

/// Longest latencies a request may have to count as good ("goodput", Zhong et al. 2024). What is not said is not asked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Slo {
    /// Until the first piece.
    pub ttft: Option<Duration>,
    /// Between two pieces, the longest gap of an answer.
    pub itl: Option<Duration>,
    /// From the first piece to the last, by token.
    pub tpot: Option<Duration>,
    /// Until the end.
    pub e2e: Option<Duration>,
}

/// The latencies of one answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Latencies {
    /// `None`: nothing came.
    pub ttft: Option<Duration>,
    /// `None`: it came in one piece.
    pub longest_gap: Option<Duration>,
    /// `None`: it had one token.
    pub per_token: Option<Duration>,
    /// Until the end.
    pub end_to_end: Duration,
}

impl Slo {
    /// Whether the answer was as promised.
    pub fn kept(&self, of: &Latencies) -> bool {
        let within = |limit: Option<Duration>, took: Option<Duration>| {
            limit.is_none_or(|limit| took.is_none_or(|took| took <= limit))
        };
        // An answer without a first piece did not come in time.
        (self.ttft.is_none() || of.ttft.is_some())
            && within(self.ttft, of.ttft)
            && within(self.itl, of.longest_gap)
            && within(self.tpot, of.per_token)
            && within(self.e2e, Some(of.end_to_end))
    }

    fn named(&self) -> [(&'static str, Option<Duration>); 4] {
        [
            ("ttft", self.ttft),
            ("itl", self.itl),
            ("tpot", self.tpot),
            ("e2e", self.e2e),
        ]
    }
}

impl FromStr for Slo {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut slo = Self::default();
        for part in text.split(',') {
            let expected = || {
                format!(
                    "`{part}`: expected ttft=MS, itl=MS, tpot=MS or e2e=MS, several with commas between them"
                )
            };
            let (name, ms) = part.split_once('=').ok_or_else(expected)?;
            let ms = ms.parse::<f64>().ok().filter(|ms| *ms > 0.0 && *ms <= 1e9);
            let limit = Duration::from_secs_f64(ms.ok_or_else(expected)? / 1000.0);
            let place = match name {
                "ttft" => &mut slo.ttft,
                "itl" => &mut slo.itl,
                "tpot" => &mut slo.tpot,
                "e2e" => &mut slo.e2e,
                _ => return Err(expected()),
            };
            *place = Some(limit);
        }
        Ok(slo)
    }
}

impl fmt::Display for Slo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let said = self.named().into_iter();
        let said = said.filter_map(|(name, limit)| {
            limit.map(|limit| format!("{name}={}", 1000.0 * limit.as_secs_f64()))
        });
        f.write_str(&said.collect::<Vec<_>>().join(","))
    }
}

impl Serialize for Slo {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    #[test]
    fn a_promise_is_kept_when_every_part_is() {
        let slo: Slo = "ttft=500,itl=50".parse().unwrap();
        assert_eq!(slo.to_string(), "ttft=500,itl=50");
        let good = Latencies {
            ttft: Some(MS(500)),
            longest_gap: Some(MS(50)),
            per_token: Some(MS(900)),
            end_to_end: MS(90_000),
        };
        assert!(slo.kept(&good));
        let slow = Latencies {
            ttft: Some(MS(501)),
            ..good
        };
        assert!(!slo.kept(&slow));
        let gap = Latencies {
            longest_gap: Some(MS(51)),
            ..good
        };
        assert!(!slo.kept(&gap));
        let one_piece = Latencies {
            longest_gap: None,
            ..good
        };
        assert!(slo.kept(&one_piece));
        let nothing = Latencies { ttft: None, ..good };
        assert!(!slo.kept(&nothing));
        assert!(!"e2e=1000".parse::<Slo>().unwrap().kept(&good));
        assert!(!"tpot=800".parse::<Slo>().unwrap().kept(&good));
    }

    #[test]
    fn what_is_no_promise_says_what_would_be() {
        for text in ["", "ttft", "ttft=", "ttft=-1", "speed=3", "ttft=5,,itl=3"] {
            assert!(
                text.parse::<Slo>().unwrap_err().contains("ttft=MS"),
                "{text}"
            );
        }
    }
}
