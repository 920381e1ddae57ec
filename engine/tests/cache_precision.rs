//! What a KV cache of fewer bits costs: how far the next token's probabilities move.
#![allow(clippy::unwrap_used)]

mod common;

use common::sequence::{Sequence, argmax};
use common::{demo_checkpoint, divergence};
use quire_kernels::KvDtype;

/// Tokens of a text.
const TOKENS: usize = 240;

/// Logits after each token of each text, with keys and values kept as `dtype`.
fn logits(texts: &[Vec<u32>], dtype: KvDtype) -> Vec<f32> {
    let checkpoint = demo_checkpoint();
    let read = |text: &Vec<u32>| {
        let mut sequence = Sequence::with_cache(&checkpoint, dtype);
        // Chunks, so that most of what a token sees comes from the cache by way of other steps.
        let chunks = text.chunks(16);
        chunks
            .flat_map(|c| sequence.rows(c, c.len()))
            .collect::<Vec<f32>>()
    };
    texts.iter().flat_map(read).collect()
}

#[test]
fn fewer_bits_hardly_move_the_next_tokens_probabilities() {
    let checkpoint = demo_checkpoint();
    let tokenizer = &checkpoint.tokenizer().unwrap();
    let texts: Vec<Vec<u32>> = tokenizer
        .encode(common::TEXT, false)
        .unwrap()
        .chunks_exact(TOKENS)
        .take(6)
        .map(|text| text.iter().map(|token| token.0).collect())
        .collect();
    assert_eq!(texts.len(), 6);
    let vocab = checkpoint.config.vocab_size;
    let exact = logits(&texts, KvDtype::F32);
    for (dtype, limit) in [
        (KvDtype::F16, 1e-6),
        (KvDtype::Bf16, 1e-4),
        (KvDtype::Q8, 1e-3),
    ] {
        let rounded = logits(&texts, dtype);
        let rows = || exact.chunks(vocab).zip(rounded.chunks(vocab));
        let count = rows().count() as f64;
        let mean = rows().map(|(p, q)| divergence(p, q)).sum::<f64>() / count;
        let same = rows().filter(|(p, q)| argmax(p) == argmax(q)).count() as f64 / count;
        println!(
            "{}: mean KL divergence {mean:.1e} from f32, the same greedy token after {:.2} % of {count}",
            dtype.name(),
            100.0 * same
        );
        assert!(mean > 0.0, "{dtype:?} was to round");
        assert!(mean <= limit, "{dtype:?}: {mean}");
        assert!(same >= 0.98, "{dtype:?}: {same}");
    }
}
