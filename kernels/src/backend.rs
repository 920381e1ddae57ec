//! [`Backend`]: what a device must be able to do to run a decoder.
//!
//! The decoder is written once against this trait; nothing above it knows where the numbers live. A step is described once
//! by a [`Step`], handed over with [`Backend::begin`], and then each operation works on the first [`Step::rows`] rows of its
//! activation buffers. Operations are fused where fusing saves a pass over memory. Buffers are sized when the model is
//! loaded: no operation allocates in steady state.

use crate::quantize::Grouped;
use crate::{Change, Draw, Draws, Error, Rank, Shard};

/// The number format of a stored matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// 32-bit IEEE float.
    F32,
    /// 16-bit IEEE float.
    F16,
    /// bfloat16: the upper half of an f32.
    Bf16,
    /// GGML Q8_0: blocks of 32 along k, one f16 scale, 32 signed bytes.
    Q8_0,
    /// GGML Q4_0: blocks of 32 along k, one f16 scale, 32 nibbles offset by 8.
    Q4_0,
    /// GGML Q4_1: blocks of 32, an f16 scale and minimum, nibbles.
    Q4_1,
    /// GGML Q5_0: blocks of 32, one f16 scale, five bits offset by 16.
    Q5_0,
    /// GGML Q5_1: blocks of 32, an f16 scale and minimum, five bits.
    Q5_1,
    /// GGML Q2_K: blocks of 256 in 16 sub-blocks with scale and minimum, two bits.
    Q2K,
    /// GGML Q3_K: blocks of 256 in 16 sub-blocks with a scale, three bits offset by 4.
    Q3K,
    /// GGML Q4_K: blocks of 256 in 8 sub-blocks with scale and minimum, nibbles.
    Q4K,
    /// GGML Q5_K: blocks of 256 in 8 sub-blocks with scale and minimum, five bits.
    Q5K,
    /// GGML Q6_K: blocks of 256 in 16 sub-blocks with a scale, six bits offset by 32.
    Q6K,
    /// GGML IQ4_NL: blocks of 32, one f16 scale, nibbles that name one of sixteen uneven values.
    Iq4Nl,
    /// GGML IQ4_XS: blocks of 256 in 8 sub-blocks with a scale, nibbles as in IQ4_NL.
    Iq4Xs,
    /// GGML TQ1_0: blocks of 256, one f16 scale, five of -1, 0, 1 in a byte.
    Tq1_0,
    /// GGML TQ2_0: blocks of 256, one f16 scale, two bits offset by 1.
    Tq2_0,
    /// OCP MXFP4: blocks of 32, a power of two, four-bit floats.
    Mxfp4,
    /// Integers in groups along k: what MLX, GPTQ, AWQ, BitNet and compressed-tensors checkpoints hold.
    Grouped(Grouped),
    /// OCP E4M3 floats in groups along k, each group under an f32 scale: what FP8 checkpoints hold. See [`crate::quantize::e4m3`].
    F8E4m3 {
        /// Elements that share a scale.
        group: usize,
    },
}

/// Rows of a matrix as a checkpoint stores them: row-major `[rows, cols]`, little-endian, in `format`.
#[derive(Debug, Clone, Copy)]
pub struct MatrixPart<'a> {
    /// Output features.
    pub rows: usize,
    /// Input features; the same for every part of one matrix.
    pub cols: usize,
    /// How `data` is encoded.
    pub format: Format,
    /// The encoded rows; exactly as long as `rows`, `cols` and `format` demand.
    pub data: &'a [u8],
    /// The input feature of each column, where columns do not stand in order: GPTQ sorts them so that a group has columns of like importance.
    /// A permutation of `0..cols`; only for [`Format::Grouped`]. `[cols]`
    pub order: Option<&'a [u32]>,
}

/// The precision in which keys and values are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KvDtype {
    /// 16-bit IEEE float.
    F16,
    /// bfloat16: the range of f32, three bits less than f16.
    Bf16,
    /// 32-bit IEEE float.
    F32,
    /// Signed bytes under bfloat16 scales: one for every [`KvDtype::KEY_GROUP`] elements of a key, whose channels differ much in size, and one
    /// for a value.
    Q8,
    /// OCP E4M3 floats under bfloat16 scales: one for a key of a head, and one for a value.
    Fp8,
}

impl KvDtype {
    /// Elements of a key under one scale in [`KvDtype::Q8`].
    pub const KEY_GROUP: usize = 32;

    /// What command lines and metrics call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::F32 => "f32",
            Self::Q8 => "q8",
            Self::Fp8 => "fp8",
        }
    }

    /// Several of them, as a list for messages.
    pub fn names(dtypes: &[Self]) -> String {
        let names: Vec<_> = dtypes.iter().map(|dtype| dtype.name()).collect();
        names.join(", ")
    }

    /// Bytes of `positions` keys and values of one head, scales included.
    pub fn head_bytes(self, positions: usize, head_dim: usize) -> usize {
        let elements = 2 * positions * head_dim;
        match self {
            Self::F16 | Self::Bf16 => 2 * elements,
            Self::F32 => 4 * elements,
            Self::Fp8 => elements + 2 * positions * size_of::<u16>(),
            Self::Q8 => elements + 2 * positions * (head_dim.div_ceil(Self::KEY_GROUP) + 1),
        }
    }
}

/// The shape of a paged KV cache: `layers × blocks × kv_heads × (K, V) × block_size × head_dim`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvShape {
    /// Layers of a block: those of one page group.
    pub layers: usize,
    /// Pages in the pool; block ids are `0..blocks`.
    pub blocks: usize,
    /// Positions in a page; a multiple of 16.
    pub block_size: usize,
    /// Key/value heads of a layer.
    pub kv_heads: usize,
    /// Elements of one head.
    pub head_dim: usize,
    /// Precision of the elements.
    pub dtype: KvDtype,
}

impl KvShape {
    /// Bytes of one block.
    pub fn block_bytes(&self) -> usize {
        self.layers * self.kv_heads * self.dtype.head_bytes(self.block_size, self.head_dim)
    }
}

/// The attention geometry of one layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; `heads` is a multiple of it (grouped-query attention).
    pub kv_heads: usize,
    /// Elements of one head.
    pub head_dim: usize,
    /// What scores are multiplied with before the softmax, usually `1/sqrt(head_dim)`.
    pub scale: f32,
    /// Sliding window: the query at position p sees the `window` positions up to and including p. `None`: all up to p. Not 0.
    pub window: Option<u32>,
    /// Scores become `cap · tanh(score / cap)` before the softmax (Gemma 2).
    pub softcap: Option<f32>,
}

/// Where a layer's keys and values are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvLayer {
    /// The page group whose blocks hold them; see [`Step::groups`].
    pub group: usize,
    /// Which of the group's layers it is: the layer of the cache.
    pub index: usize,
}

/// The non-linearity of a gated MLP, of a gate `g` and an input `u`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Activation {
    /// `g · sigmoid(g) · u` (SwiGLU, Shazeer 2020).
    Silu,
    /// `gelu(g) · u` with the tanh approximation of GELU (Hendrycks & Gimpel 2016).
    GeluTanh,
    /// `max(g, 0)² · u` (So et al. 2021; BitNet b1.58).
    Relu2,
    /// `g' · sigmoid(alpha · g') · (u' + 1)`, g' being g up to `limit` and u' being u within `±limit` (gpt-oss).
    ClampedSwiglu {
        /// Steepness of the sigmoid.
        alpha: f32,
        /// Bound of gate and input.
        limit: f32,
    },
}

/// The rotary frequencies of a step's rows.
pub struct Rotary<'a, B: Backend + ?Sized> {
    /// Radians per position, of each pair of elements. `[n]`
    pub frequencies: &'a B::Vector,
    /// Those of the rows of sequences that are [`Span::beyond`] the switch, where that makes a difference. `[n]`
    pub beyond: Option<&'a B::Vector>,
    /// What cosines and sines are multiplied with.
    pub scale: f32,
}

/// A norm's parameters.
pub struct Norm<'a, B: Backend + ?Sized> {
    /// `[width]`
    pub weight: &'a B::Vector,
    /// Added to the mean square.
    pub eps: f32,
}

/// What is done to logits after the output head.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LogitsRule {
    /// What they are multiplied with.
    pub scale: f32,
    /// Then they become `cap · tanh(logit / cap)` (Gemma 2).
    pub softcap: Option<f32>,
}

/// A mixture of experts: an MLP of which each row uses a few of many.
pub struct Experts<'a, B: Backend + ?Sized> {
    /// Scores the experts for a row. `[experts, hidden]`
    pub router: &'a B::Matrix,
    /// `[experts]`
    pub router_bias: Option<&'a B::Vector>,
    /// Of every expert, one after the other: its gate's rows, then its input's. `[experts · 2n, hidden]`, `2n` a multiple of 16.
    pub gate_up: &'a B::Matrix,
    /// `[experts · 2n]`
    pub gate_up_bias: Option<&'a B::Vector>,
    /// Of every expert, one after the other. `[experts · hidden, n]`, `hidden` a multiple of 16.
    pub down: &'a B::Matrix,
    /// `[experts · hidden]`
    pub down_bias: Option<&'a B::Vector>,
    /// How many experts there are.
    pub experts: usize,
    /// How many a row uses.
    pub top_k: usize,
    /// The weights of a row's experts are the softmax over them; otherwise over all experts.
    pub normalised: bool,
    /// The experts' non-linearity.
    pub activation: Activation,
}

/// Consecutive rows of a step that belong to one sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// First row of the step that belongs to the sequence.
    pub row: u32,
    /// How many rows do: 1 for a decode, the chunk's length for a prefill.
    pub rows: u32,
    /// Position in the sequence of the first of these rows; earlier positions are in the KV cache already.
    pub start: u32,
    /// Where the sequence's block table begins in [`Step::block_tables`].
    pub table: u32,
    /// The sequence is longer than the rotary tables' switch; see [`Rotary`].
    pub beyond: bool,
}

/// A row whose token the step before draws; the host may not know it yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DrawnRow {
    /// The row.
    pub row: u32,
    /// Which of the [`Step::draws`] of the step before.
    pub draw: u32,
}

/// One forward pass over rows of many sequences: what a device needs to know beside the weights.
///
/// Kept and refilled from step to step by its owner, so that it allocates only while it grows.
#[derive(Debug)]
pub struct Step {
    /// Token id of each row. `[rows]` Of no importance for [`Step::drawn_rows`].
    pub tokens: Vec<u32>,
    /// Position of each row in its sequence. `[rows]`
    pub positions: Vec<u32>,
    /// The sequences, in row order, covering every row once.
    pub spans: Vec<Span>,
    /// Page groups: ids for each `block_size` positions in a block table. Layers are divided into groups of equally many, and a block holds
    /// the positions of one group's layers.
    pub groups: usize,
    /// The sequences' block tables, one after the other. A block that the step writes to (that holds the position of one of its rows)
    /// belongs to one span only. Position `p` of a span lives, for the layers of group `g`, in block
    /// `block_tables[table + p / block_size * groups + g]`; [`Step::NO_BLOCK`] where no row of the step reads it.
    pub block_tables: Vec<u32>,
    /// Rows whose logits are wanted, ascending.
    pub logit_rows: Vec<u32>,
    /// Of those, the rows whose tokens are wanted instead; only for devices that draw ([`Backend::draws`]).
    pub draws: Vec<Draw>,
    /// What the draws change in their rows.
    pub changes: Vec<Change>,
    /// Rows whose tokens are those of draws of the step before, ascending; only for devices that do all draws.
    pub drawn_rows: Vec<DrawnRow>,
    /// [`Backend::logits`] waits for nothing, and what it is to bring is brought by [`Backend::collect`]; only for devices that do all draws. Until that
    /// is done the device may be given one more such step, which runs behind this one.
    pub deferred: bool,
}

impl Default for Step {
    /// An empty step of a model with one page group.
    fn default() -> Self {
        Self {
            tokens: Vec::new(),
            positions: Vec::new(),
            spans: Vec::new(),
            groups: 1,
            block_tables: Vec::new(),
            logit_rows: Vec::new(),
            draws: Vec::new(),
            changes: Vec::new(),
            drawn_rows: Vec::new(),
            deferred: false,
        }
    }
}

impl Clone for Step {
    fn clone(&self) -> Self {
        let mut step = Self::default();
        step.clone_from(self);
        step
    }

    /// Keeps the memory it has; the derived one would not.
    fn clone_from(&mut self, source: &Self) {
        self.tokens.clone_from(&source.tokens);
        self.positions.clone_from(&source.positions);
        self.spans.clone_from(&source.spans);
        self.groups = source.groups;
        self.block_tables.clone_from(&source.block_tables);
        self.logit_rows.clone_from(&source.logit_rows);
        self.draws.clone_from(&source.draws);
        self.changes.clone_from(&source.changes);
        self.drawn_rows.clone_from(&source.drawn_rows);
        self.deferred = source.deferred;
    }
}

impl Step {
    /// What a block table has where a group's window has passed.
    pub const NO_BLOCK: u32 = u32::MAX;

    /// Rows in the step.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// Empties the step and keeps its memory, its groups and whether it is deferred.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.spans.clear();
        self.block_tables.clear();
        self.logit_rows.clear();
        self.draws.clear();
        self.changes.clear();
        self.drawn_rows.clear();
    }
}

/// The per-layer inputs of [`Backend::norm_rope_store`].
pub struct QkvLayer<'a, B: Backend + ?Sized> {
    /// Where its keys and values go.
    pub layer: KvLayer,
    /// Heads and their size; the columns of a qkv row are `heads + 2·kv_heads` heads: queries, keys, values.
    pub shape: AttentionShape,
    /// RMS-norm weights, where the family has them: `[head_dim]` for each query head by itself, or `[heads · head_dim]` for all together.
    pub q_norm: Option<&'a B::Vector>,
    /// RMS-norm weights of the keys, as those of the queries.
    pub k_norm: Option<&'a B::Vector>,
    /// Epsilon of those norms.
    pub eps: f32,
    /// Output of [`Backend::rotary`] for this step; `None` where positions are not encoded.
    pub rotary: Option<&'a B::Activations>,
}

/// A device's own memory, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemory {
    /// Not yet taken by anybody.
    pub free: u64,
    /// In all.
    pub total: u64,
}

/// What a device must be able to do to run a decoder.
///
/// # Determinism
///
/// On the CPU every output row is a function of its own input row, the weights and (in attention) the sequence's own keys and
/// values: bit for bit the same whatever else is in the step, however the rows are chunked into steps, and on any number of threads.
pub trait Backend: Send + 'static {
    /// A buffer of activations, `[rows, cols]`, in the precision the device computes in.
    type Activations: Send;
    /// A weight matrix `[rows = output features, cols = input features]`, packed for the device.
    type Matrix: Send;
    /// A vector of f32 parameters: norm weights, biases, rotary frequencies.
    type Vector: Send;
    /// Paged keys and values of all layers.
    type KvCache: Send;

    /// One line for logs: device, instruction set, threads.
    fn description(&self) -> String;

    /// The memory of a device that has its own; `None`: it shares the host's.
    ///
    /// # Errors
    /// The device failed.
    fn memory(&self) -> Result<Option<DeviceMemory>, Error> {
        Ok(None)
    }

    /// Packs a matrix whose rows are the parts' rows, one part after the other. Float parts are quantised first where `quantize` says so.
    ///
    /// # Errors
    /// Data that does not match the shape, a shape the format cannot hold (Q8_0 and Q4_0 need `cols % 32 == 0`), TQ2_0 asked for weights that are not
    /// ternary, no memory.
    fn matrix(
        &self,
        parts: &[MatrixPart<'_>],
        quantize: Option<Format>,
    ) -> Result<Self::Matrix, Error>;

    /// Which of the ranks that compute the model together this device is.
    fn rank(&self) -> Rank {
        Rank::ALONE
    }

    /// As [`Backend::matrix`], of a matrix of which this rank has a part. (The exchange between ranks is inside the operations that use it, where a
    /// device may overlap or fuse it.)
    ///
    /// # Errors
    /// As [`Backend::matrix`]; or this kind of device is never one of several ranks.
    fn shard(
        &self,
        parts: &[MatrixPart<'_>],
        quantize: Option<Format>,
        shard: Shard,
    ) -> Result<Self::Matrix, Error> {
        let _ = (parts, quantize);
        Err(Error::Device(format!(
            "{} cannot hold {shard:?} of a matrix: it computes models alone",
            self.description()
        )))
    }

    /// Takes no part in the ranks' work any more: the others' operations fail instead of waiting for this one.
    fn leave(&mut self) {}

    /// Bytes a matrix occupies on the device.
    fn matrix_bytes(&self, matrix: &Self::Matrix) -> usize;

    /// Uploads a vector.
    ///
    /// # Errors
    /// No memory.
    fn vector(&self, values: &[f32]) -> Result<Self::Vector, Error>;

    /// Makes a zeroed activation buffer `[rows, cols]`.
    ///
    /// # Errors
    /// No memory.
    fn activations(&self, rows: usize, cols: usize) -> Result<Self::Activations, Error>;

    /// What keys and values may be kept as.
    fn kv_dtypes(&self) -> &'static [KvDtype];

    /// Makes an empty KV cache.
    ///
    /// # Errors
    /// No memory, or a shape or precision that the device's kernels do not support.
    fn kv_cache(&self, shape: &KvShape) -> Result<Self::KvCache, Error>;

    /// Claims part `part` of a cache's memory from the system, a few milliseconds' work; parts are in the order in which ascending blocks use them. Nothing in
    /// the cache changes: whoever writes there first need not wait for pages. Returns the part's bytes; 0 where there is no such part, or nothing to claim.
    fn claim(&mut self, _kv: &mut Self::KvCache, _part: usize) -> usize {
        0
    }

    /// Starts a step; every operation until the next call works on its rows.
    ///
    /// # Errors
    /// The device failed.
    fn begin(&mut self, step: &Step) -> Result<(), Error>;

    /// Copies whole blocks of every layer, `(from, to)` in order, before the step touches them (copy-on-write).
    ///
    /// # Errors
    /// The device failed.
    fn copy_blocks(&mut self, kv: &mut Self::KvCache, copies: &[(u32, u32)]) -> Result<(), Error>;

    /// `out[r] = scale · table[token(r)]`. `table` [vocabulary, hidden], `out` [rows, hidden].
    ///
    /// # Errors
    /// The device failed.
    fn embed(
        &mut self,
        table: &Self::Matrix,
        scale: f32,
        out: &mut Self::Activations,
    ) -> Result<(), Error>;

    /// Cosines and sines of the step's positions, made once a step and shared by the layers.
    ///
    /// `out[r] = [cos(p·f₀) … cos(p·fₙ₋₁), sin(p·f₀) … sin(p·fₙ₋₁)] · scale` where `p` is the row's position and `f` are the n
    /// frequencies for it. `out` [rows, 2n].
    ///
    /// # Errors
    /// The device failed.
    fn rotary(
        &mut self,
        rotary: &Rotary<'_, Self>,
        out: &mut Self::Activations,
    ) -> Result<(), Error>;

    /// `out[r] = x[r] / sqrt(mean(x[r]²) + eps) · weight`. Zhang & Sennrich 2019.
    ///
    /// # Errors
    /// The device failed.
    fn rms_norm(
        &mut self,
        x: &Self::Activations,
        weight: &Self::Vector,
        eps: f32,
        out: &mut Self::Activations,
    ) -> Result<(), Error>;

    /// As [`Backend::rms_norm`], in place.
    ///
    /// # Errors
    /// The device failed.
    fn rms_norm_in_place(
        &mut self,
        x: &mut Self::Activations,
        norm: &Norm<'_, Self>,
    ) -> Result<(), Error>;

    /// `out[r] += scale · x[r]`, x being normalised first where there is a norm: back into the residual stream. `x`, `out` [rows, hidden].
    ///
    /// # Errors
    /// The device failed.
    fn add(
        &mut self,
        x: &Self::Activations,
        norm: Option<&Norm<'_, Self>>,
        scale: f32,
        out: &mut Self::Activations,
    ) -> Result<(), Error>;

    /// `out[r] = matrix · x[r] + bias`. `x` [rows, cols], `out` [rows, matrix rows].
    ///
    /// # Errors
    /// The device failed.
    fn linear(
        &mut self,
        x: &Self::Activations,
        matrix: &Self::Matrix,
        bias: Option<&Self::Vector>,
        out: &mut Self::Activations,
    ) -> Result<(), Error>;

    /// `out[r] += matrix · x[r] + bias`: a projection back into the residual stream.
    ///
    /// # Errors
    /// The device failed.
    fn linear_add(
        &mut self,
        x: &Self::Activations,
        matrix: &Self::Matrix,
        bias: Option<&Self::Vector>,
        out: &mut Self::Activations,
    ) -> Result<(), Error>;

    /// Normalises (where the family does) and rotates the query and key heads of `qkv` in place, then stores keys and values in the cache.
    ///
    /// Rotation is the half-split ("NeoX") form over the first `2n` elements of a head, n being the number of frequencies: element
    /// `i < n` pairs with `i + n`. `qkv` [rows, (heads + 2·kv_heads) · head_dim].
    ///
    /// # Errors
    /// The device failed.
    fn norm_rope_store(
        &mut self,
        qkv: &mut Self::Activations,
        layer: &QkvLayer<'_, Self>,
        kv: &mut Self::KvCache,
    ) -> Result<(), Error>;

    /// Causal grouped-query attention of each row over its sequence's positions up to its own, as far as the window reaches, read from the cache
    /// through the block tables.
    ///
    /// `qkv` as [`Backend::norm_rope_store`] left it; `sinks` `[heads]`: a score of each head that takes its share of the softmax and stands for
    /// no value (Xiao et al. 2023, gpt-oss); `out` [rows, heads · head_dim].
    ///
    /// # Errors
    /// The device failed.
    fn attention(
        &mut self,
        qkv: &Self::Activations,
        layer: KvLayer,
        shape: &AttentionShape,
        sinks: Option<&Self::Vector>,
        kv: &Self::KvCache,
        out: &mut Self::Activations,
    ) -> Result<(), Error>;

    /// `out[r, i] = activation(gate_up[r, i], gate_up[r, n + i])`. `gate_up` [rows, 2n], `out` [rows, n].
    ///
    /// # Errors
    /// The device failed.
    fn gate(
        &mut self,
        gate_up: &Self::Activations,
        activation: Activation,
        out: &mut Self::Activations,
    ) -> Result<(), Error>;

    /// `out[r] += Σ weight · expert(x[r])` over the experts that the router scores highest for the row. `x`, `out` [rows, hidden].
    ///
    /// # Errors
    /// The device failed.
    fn experts(
        &mut self,
        x: &Self::Activations,
        experts: &Experts<'_, Self>,
        out: &mut Self::Activations,
    ) -> Result<(), Error>;

    /// Final norm and output head for the step's `logit_rows` only; what has no draw is brought to the host.
    ///
    /// `x` [rows, hidden], `head` [vocabulary, hidden]; `logits` is filled with [logit rows without a draw, vocabulary], unless the step is
    /// [`Step::deferred`].
    ///
    /// # Errors
    /// The device failed; or a step is deferred behind another one whose logits the host has yet to collect, or behind two.
    fn logits(
        &mut self,
        x: &Self::Activations,
        norm: &Norm<'_, Self>,
        head: &Self::Matrix,
        rule: LogitsRule,
        logits: &mut Vec<f32>,
    ) -> Result<(), Error>;

    /// Which [`Step::draws`] the device does. It is given no others, nor anything else that comes of them.
    fn draws(&self) -> Draws {
        Draws::None
    }

    /// Waits for the oldest [`Step::deferred`] step that was not collected, and brings what [`Backend::logits`] would have.
    ///
    /// # Errors
    /// The device failed, which may be this step's fault or an earlier one's; or there is no such step.
    fn collect(&mut self, logits: &mut Vec<f32>) -> Result<(), Error> {
        logits.clear();
        Err(Error::Device(format!(
            "{} has no step to be collected",
            self.description()
        )))
    }

    /// Whether the device works, asked after an operation that failed: it is lost for good by a fault of its own, and not by what it refused to do.
    fn is_usable(&mut self) -> bool {
        true
    }

    /// The tokens of a step's draws, in their order, once [`Backend::logits`] or [`Backend::collect`] has brought them.
    fn drawn(&self) -> &[u32] {
        &[]
    }

    /// Runs host work on the device's compute threads: `task(i)` once for every `i < tasks`, in any order and at once; returns when all are done.
    ///
    /// Serial by default: a device that is not the host has no threads to lend. Exclusive, like a step's operations, so that no task can ask for the
    /// threads that run it.
    ///
    /// # Panics
    /// When a task panicked.
    fn each(&mut self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        (0..tasks).for_each(task);
    }
}
