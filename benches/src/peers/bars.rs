//! The bars: how many times as fast as llama.cpp each row is to be, by the format of the file. Set for AVX2, two threads, the shape of Qwen3-0.6B.

use super::work::{self, Work};

/// The formats of the short rows' bars, as checkpoints name what most of their bytes are stored in.
const FORMATS: [&str; 6] = ["q4_0", "q4_k", "q8_0", "q5_1", "f16", "bf16"];
/// By format: prefill, decode of one sequence, decode of [`work::BATCH`].
const SHORT: [[f64; 6]; 3] = [
    [2.8, 2.5, 2.3, 5.0, 1.25, 1.7],
    [1.7, 1.6, 1.45, 2.0, 1.2, 1.25],
    [3.0, 2.7, 2.5, 3.0, 1.5, 2.0],
];
/// A prompt of this many tokens or more is a long context.
const LONG: u32 = 8192;
const LONG_PREFILL: f64 = 2.5;
const LONG_DECODE: f64 = 5.0;

/// The ratio to reach; `None`: none is set.
pub fn bar(work: Work, format: &str) -> Option<f64> {
    let row = match work {
        Work::Prefill { tokens } if tokens >= LONG => return Some(LONG_PREFILL),
        Work::Decode { depth, .. } if depth >= LONG => return Some(LONG_DECODE),
        Work::Prefill {
            tokens: work::PROMPT,
        } => 0,
        Work::Decode {
            sequences: 1,
            depth: 0,
            ..
        } => 1,
        Work::Decode {
            sequences: work::BATCH,
            depth: work::BATCH_DEPTH,
            ..
        } => 2,
        _ => return None,
    };
    let column = FORMATS
        .iter()
        .position(|name| name.eq_ignore_ascii_case(format))?;
    Some(SHORT[row][column])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_has_its_bar_and_others_have_none() {
        let of = |format| work::short().map(|work| bar(work, format));
        assert_eq!(of("Q4_0"), [Some(2.8), Some(1.7), Some(3.0)]);
        assert_eq!(of("bf16"), [Some(1.7), Some(1.25), Some(2.0)]);
        assert_eq!(of("iq4_xs"), [None; 3]);
        let long = work::long(8192).map(|work| bar(work, "iq4_xs"));
        assert_eq!(long, [Some(2.5), Some(5.0), Some(5.0)]);
        assert_eq!(bar(Work::Prefill { tokens: 100 }, "q4_0"), None);
    }
}
