//! [`Numa`]: which memory nodes a CPU backend reckons with.

use std::fmt;
use std::num::NonZero;
use std::str::FromStr;

/// The NUMA nodes that a backend divides threads, weights and KV cache among.
///
/// Results are the same bits whatever is chosen: rows of weights and heads are divided, never a sum. Written `auto`, `off` or a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Numa {
    /// Those of the machine that have CPUs which this process may use.
    #[default]
    Auto,
    /// None: all memory is alike.
    Off,
    /// So many, made of the CPUs this process may use: for experiments and tests.
    Emulated(NonZero<u16>),
}

impl fmt::Display for Numa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Off => f.write_str("off"),
            Self::Emulated(nodes) => nodes.fmt(f),
        }
    }
}

impl FromStr for Numa {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "off" => Ok(Self::Off),
            number => match number.parse::<NonZero<u16>>() {
                Ok(nodes) if nodes.get() <= MOST => Ok(Self::Emulated(nodes)),
                _ => Err(format!(
                    "expected `auto` (the machine's nodes), `off`, or how many nodes to emulate, 1 to {MOST}"
                )),
            },
        }
    }
}

/// More nodes than any machine has.
const MOST: u16 = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_written_as_it_is_read() {
        for text in ["auto", "off", "1", "64"] {
            assert_eq!(text.parse::<Numa>().map(|n| n.to_string()), Ok(text.into()));
        }
        for text in ["", "0", "65", "-1", "two"] {
            let error = text.parse::<Numa>().expect_err(text);
            assert!(error.contains("1 to 64"), "{error}");
        }
    }
}
