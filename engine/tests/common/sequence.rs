//! One sequence on a decoder of its own.

use quire::checkpoint::Checkpoint;
use quire::model::{Decoder, LoadOptions};
use quire_kernels::cpu::{CpuBackend, KvCache};
use quire_kernels::{KvDtype, Span, Step};

use super::Random;

const BLOCK: usize = 16;
const BLOCKS: usize = 16;

/// One sequence on a decoder of its own, its blocks scattered over the cache.
pub struct Sequence {
    pub decoder: Decoder<CpuBackend>,
    kv: KvCache,
    blocks: Vec<u32>,
    known: u32,
}

impl Sequence {
    pub fn new(checkpoint: &Checkpoint) -> Self {
        let options = LoadOptions {
            quantize: None,
            max_rows: 256,
        };
        let decoder = Decoder::load(checkpoint, super::backend(1), options, &mut |_| {}).unwrap();
        let kv = decoder.kv_cache(BLOCKS, BLOCK, KvDtype::F32).unwrap();
        let mut blocks: Vec<u32> = (0..BLOCKS as u32).collect();
        Random::new(7).shuffle(&mut blocks);
        Self {
            decoder,
            kv,
            blocks,
            known: 0,
        }
    }

    /// The logits after `tokens`, computed in chunks of at most `chunk` of them.
    pub fn read(&mut self, tokens: &[u32], chunk: usize) -> Vec<f32> {
        let mut last = Vec::new();
        for tokens in tokens.chunks(chunk) {
            last = self.rows(tokens, 1);
        }
        last
    }

    /// The logits after each of the last `rows` of `tokens`, computed in one step.
    pub fn rows(&mut self, tokens: &[u32], rows: usize) -> Vec<f32> {
        let count = tokens.len() as u32;
        let step = Step {
            tokens: tokens.to_vec(),
            positions: (self.known..self.known + count).collect(),
            spans: vec![Span {
                row: 0,
                rows: count,
                start: self.known,
                table: 0,
                beyond: false,
            }],
            block_tables: self.blocks.clone(),
            logit_rows: (count - rows as u32..count).collect(),
            ..Step::default()
        };
        let mut logits = Vec::new();
        self.decoder
            .forward(&step, &[], &mut self.kv, &mut logits)
            .unwrap();
        self.known += count;
        logits
    }
}

/// The place of the largest logit.
pub fn argmax(logits: &[f32]) -> u32 {
    let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
    best.unwrap() as u32
}
