//! One sequence on a decoder of its own.

use quire::checkpoint::Checkpoint;
use quire::model::{Decoder, LoadOptions};
use quire_kernels::cpu::CpuBackend;
use quire_kernels::{Backend, Format, KvDtype, Span, Step};

use super::Random;

const BLOCK: usize = 16;
/// Blocks of a sequence, in each page group.
const BLOCKS: usize = 16;

/// One sequence on a decoder of its own, its blocks scattered over the cache.
///
/// It does by hand what the scheduler does: block tables of several page groups, whose entries behind a window are gone, and all keys anew when the
/// sequence outgrows a rotary embedding's switch.
pub struct Sequence<B: Backend = CpuBackend> {
    pub decoder: Decoder<B>,
    kv: B::KvCache,
    /// Of each page group in turn: its block for 16 positions.
    blocks: Vec<u32>,
    known: Vec<u32>,
    /// How many of the known tokens' keys are in the cache.
    computed: usize,
    beyond: bool,
}

impl Sequence {
    /// On the CPU, with keys and values in f32.
    pub fn new(checkpoint: &Checkpoint) -> Self {
        Self::with_cache(checkpoint, KvDtype::F32)
    }

    /// On the CPU, with keys and values kept as `dtype`.
    pub fn with_cache(checkpoint: &Checkpoint, dtype: KvDtype) -> Self {
        Self::on(super::backend(1), checkpoint, None, dtype)
    }
}

impl<B: Backend> Sequence<B> {
    /// On a backend, which may be one of several ranks, with weights quantised when they are loaded and keys and values kept as `dtype`.
    pub fn on(
        backend: B,
        checkpoint: &Checkpoint,
        quantize: Option<Format>,
        dtype: KvDtype,
    ) -> Self {
        let options = LoadOptions {
            quantize,
            max_rows: 256,
        };
        let decoder = Decoder::load(checkpoint, backend, options, &mut |_| {}).unwrap();
        let blocks = BLOCKS * decoder.pages().windows.len();
        let kv = decoder.kv_cache(blocks, BLOCK, dtype).unwrap();
        let mut blocks: Vec<u32> = (0..blocks as u32).collect();
        Random::new(7).shuffle(&mut blocks);
        Self {
            decoder,
            kv,
            blocks,
            known: Vec::new(),
            computed: 0,
            beyond: false,
        }
    }

    /// The logits after `tokens`, computed in chunks of at most `chunk` of them.
    pub fn read(&mut self, tokens: &[u32], chunk: usize) -> Vec<f32> {
        self.learn(tokens);
        let mut last = Vec::new();
        while self.computed < self.known.len() {
            let count = chunk.min(self.known.len() - self.computed);
            last = self.compute(count, 1);
        }
        last
    }

    /// The logits after each of the last `rows` of `tokens`, computed in one step.
    pub fn rows(&mut self, tokens: &[u32], rows: usize) -> Vec<f32> {
        self.learn(tokens);
        self.compute(self.known.len() - self.computed, rows)
    }

    fn learn(&mut self, tokens: &[u32]) {
        self.known.extend_from_slice(tokens);
        let switch = self.decoder.config().rope_switch();
        let beyond = switch.is_some_and(|switch| self.known.len() > switch as usize);
        if beyond != self.beyond {
            self.beyond = beyond;
            self.computed = 0;
        }
    }

    fn compute(&mut self, count: usize, rows: usize) -> Vec<f32> {
        let (start, end) = (self.computed, self.computed + count);
        let windows = &self.decoder.pages().windows;
        let groups = windows.len();
        let mut block_tables = self.blocks.clone();
        for (at, block) in block_tables.iter_mut().enumerate() {
            let last = at / groups * BLOCK + BLOCK - 1;
            if windows[at % groups].is_some_and(|window| last + window as usize <= start) {
                *block = Step::NO_BLOCK;
            }
        }
        let step = Step {
            tokens: self.known[start..end].to_vec(),
            positions: (start as u32..end as u32).collect(),
            spans: vec![Span {
                row: 0,
                rows: count as u32,
                start: start as u32,
                table: 0,
                beyond: self.beyond,
            }],
            block_tables,
            groups,
            logit_rows: ((count - rows) as u32..count as u32).collect(),
            ..Step::default()
        };
        let mut logits = Vec::new();
        self.decoder
            .forward(&step, &[], &mut self.kv, &mut logits)
            .unwrap();
        self.computed = end;
        logits
    }
}

/// The place of the largest logit.
pub fn argmax(logits: &[f32]) -> u32 {
    let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
    best.unwrap() as u32
}
