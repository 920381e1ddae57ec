//! [`Model`]: a decoder of random weights, the operations of `quire::model::Decoder` without a checkpoint behind them.

use quire_kernels::cuda::{Activations, CudaBackend, KvCache, Matrix, Vector};
use quire_kernels::{
    Activation, AttentionShape, Backend, Error, Format, KvDtype, KvLayer, KvShape, QkvLayer,
    Rotary, Span, Step,
};

/// Positions of a KV block.
const BLOCK: usize = 16;
const EPS: f32 = 1e-6;

/// The shape of a decoder.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub name: &'static str,
    hidden: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    inner: usize,
    vocabulary: usize,
    qk_norm: bool,
}

/// From the models' `config.json`.
pub const SHAPES: [Shape; 3] = [
    Shape {
        name: "qwen3-0.6b",
        hidden: 1024,
        layers: 28,
        heads: 16,
        kv_heads: 8,
        head_dim: 128,
        inner: 3072,
        vocabulary: 151_936,
        qk_norm: true,
    },
    Shape {
        name: "qwen3-8b",
        hidden: 4096,
        layers: 36,
        heads: 32,
        kv_heads: 8,
        head_dim: 128,
        inner: 12_288,
        vocabulary: 151_936,
        qk_norm: true,
    },
    Shape {
        name: "llama3-8b",
        hidden: 4096,
        layers: 32,
        heads: 32,
        kv_heads: 8,
        head_dim: 128,
        inner: 14_336,
        vocabulary: 128_256,
        qk_norm: false,
    },
];

impl Shape {
    fn qkv(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Weights of one layer.
    fn layer_weights(&self) -> usize {
        let attention = self.hidden * (self.qkv() + self.heads * self.head_dim);
        attention + 3 * self.hidden * self.inner
    }

    /// Bytes of `tokens` keys and values.
    pub fn kv_bytes(&self, tokens: usize, dtype: KvDtype) -> usize {
        self.layers * self.kv_heads * dtype.head_bytes(tokens, self.head_dim)
    }

    /// Multiplications and additions of reading a prompt: of its layers, of causal attention, and of the last row's head.
    pub fn operations(&self, tokens: usize) -> f64 {
        let products = 2.0 * tokens as f64 * (self.layers * self.layer_weights()) as f64;
        let width = (self.layers * self.heads * self.head_dim) as f64;
        let attention = 2.0 * (tokens as f64).powi(2) * width;
        products + attention + 2.0 * (self.hidden * self.vocabulary) as f64
    }
}

struct Layer {
    qkv: Matrix,
    output: Matrix,
    gate_up: Matrix,
    down: Matrix,
}

/// A decoder on a GPU.
pub struct Model {
    backend: CudaBackend,
    shape: &'static Shape,
    embedding: Matrix,
    head: Matrix,
    layers: Vec<Layer>,
    norm: Vector,
    head_norm: Vector,
    frequencies: Vector,
    hidden: Activations,
    normed: Activations,
    qkv: Activations,
    attended: Activations,
    gate_up: Activations,
    gated: Activations,
    rotary: Activations,
}

impl Model {
    /// `rows`: most of a step.
    pub fn new(
        backend: CudaBackend,
        shape: &'static Shape,
        format: Format,
        rows: usize,
    ) -> Result<Self, Error> {
        let mut seed = 0;
        let mut matrix = |rows, cols, format| {
            seed += 1;
            backend.random_matrix(rows, cols, format, seed)
        };
        let (hidden, width) = (shape.hidden, shape.heads * shape.head_dim);
        let embedding = matrix(shape.vocabulary, hidden, Format::Bf16)?;
        let head = matrix(shape.vocabulary, hidden, format)?;
        let layers = (0..shape.layers)
            .map(|_| {
                Ok(Layer {
                    qkv: matrix(shape.qkv(), hidden, format)?,
                    output: matrix(hidden, width, format)?,
                    gate_up: matrix(2 * shape.inner, hidden, format)?,
                    down: matrix(hidden, shape.inner, format)?,
                })
            })
            .collect::<Result<_, Error>>()?;
        let pairs = shape.head_dim / 2;
        let frequency = |i: usize| 1e6_f32.powf(-(i as f32) / pairs as f32);
        let frequencies: Vec<f32> = (0..pairs).map(frequency).collect();
        Ok(Self {
            norm: backend.vector(&vec![1.0; hidden])?,
            head_norm: backend.vector(&vec![1.0; shape.head_dim])?,
            frequencies: backend.vector(&frequencies)?,
            hidden: backend.activations(rows, hidden)?,
            normed: backend.activations(rows, hidden)?,
            qkv: backend.activations(rows, shape.qkv())?,
            attended: backend.activations(rows, width)?,
            gate_up: backend.activations(rows, 2 * shape.inner)?,
            gated: backend.activations(rows, shape.inner)?,
            rotary: backend.activations(rows, shape.head_dim)?,
            backend,
            shape,
            embedding,
            head,
            layers,
        })
    }

    /// A cache of random keys and values for `sequences` of `tokens`.
    pub fn cache(&self, sequences: usize, tokens: usize, dtype: KvDtype) -> Result<KvCache, Error> {
        let kv = self.backend.kv_cache(&KvShape {
            layers: self.shape.layers,
            blocks: sequences * tokens.div_ceil(BLOCK),
            block_size: BLOCK,
            kv_heads: self.shape.kv_heads,
            head_dim: self.shape.head_dim,
            dtype,
        })?;
        self.backend.randomise(&kv)?;
        Ok(kv)
    }

    /// Bytes of the weights that a step reads: all but the embedding table.
    pub fn weight_bytes(&self) -> usize {
        let bytes = |matrix: &Matrix| self.backend.matrix_bytes(matrix);
        let layer =
            |l: &Layer| bytes(&l.qkv) + bytes(&l.output) + bytes(&l.gate_up) + bytes(&l.down);
        self.layers.iter().map(layer).sum::<usize>() + bytes(&self.head)
    }

    /// Launches a step, behind those that were launched and not collected; of a prompt without logits. It draws nothing.
    pub fn launch(&mut self, step: &Step, kv: &mut KvCache) -> Result<(), Error> {
        let shape = AttentionShape {
            heads: self.shape.heads,
            kv_heads: self.shape.kv_heads,
            head_dim: self.shape.head_dim,
            scale: 1.0 / (self.shape.head_dim as f32).sqrt(),
            window: None,
            softcap: None,
        };
        let b = &mut self.backend;
        b.begin(step)?;
        b.embed(&self.embedding, 1.0, &mut self.hidden)?;
        let rule = Rotary {
            frequencies: &self.frequencies,
            beyond: None,
            scale: 1.0,
        };
        b.rotary(&rule, &mut self.rotary)?;
        for (index, layer) in self.layers.iter().enumerate() {
            b.rms_norm(&self.hidden, &self.norm, EPS, &mut self.normed)?;
            b.linear(&self.normed, &layer.qkv, None, &mut self.qkv)?;
            let head_norm = self.shape.qk_norm.then_some(&self.head_norm);
            let of = QkvLayer {
                layer: KvLayer { group: 0, index },
                shape,
                q_norm: head_norm,
                k_norm: head_norm,
                eps: EPS,
                rotary: Some(&self.rotary),
            };
            b.norm_rope_store(&mut self.qkv, &of, kv)?;
            b.attention(&self.qkv, of.layer, &shape, None, kv, &mut self.attended)?;
            b.linear_add(&self.attended, &layer.output, None, &mut self.hidden)?;
            b.rms_norm(&self.hidden, &self.norm, EPS, &mut self.normed)?;
            b.linear(&self.normed, &layer.gate_up, None, &mut self.gate_up)?;
            b.gate(&self.gate_up, Activation::Silu, &mut self.gated)?;
            b.linear_add(&self.gated, &layer.down, None, &mut self.hidden)?;
        }
        if step.logit_rows.is_empty() {
            return b.finish_later();
        }
        b.rms_norm(&self.hidden, &self.norm, EPS, &mut self.normed)?;
        b.head_product(&self.normed, &self.head)?;
        b.finish_later()
    }

    /// Waits for the end of the oldest step that was launched.
    pub fn collect(&mut self) -> Result<(), Error> {
        self.backend.collect(&mut Vec::new())
    }
}

/// `sequences` with `context` tokens behind them, each with `rows` new ones, to be launched ahead. Those that generate want logits.
pub fn step(sequences: usize, context: usize, rows: usize) -> Step {
    let mut step = Step {
        deferred: true,
        ..Step::default()
    };
    let blocks = (context + rows).div_ceil(BLOCK) as u32;
    let all = sequences as u32 * blocks;
    // Blocks are scattered, as they are in a cache that is used.
    let mut stride = 7919;
    while gcd(stride, u64::from(all)) != 1 {
        stride += 1;
    }
    for sequence in 0..sequences as u32 {
        step.spans.push(Span {
            row: step.tokens.len() as u32,
            rows: rows as u32,
            start: context as u32,
            table: sequence * blocks,
            beyond: false,
        });
        let block = |i: u32| (u64::from(sequence * blocks + i) * stride % u64::from(all)) as u32;
        step.block_tables.extend((0..blocks).map(block));
        step.tokens
            .extend((0..rows).map(|i| (i * 37 % 1000) as u32));
        step.positions
            .extend((context..context + rows).map(|position| position as u32));
        if rows == 1 {
            step.logit_rows.push(sequence);
        }
    }
    step
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}
