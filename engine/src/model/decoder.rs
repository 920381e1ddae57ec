//! [`Decoder`]: a transformer decoder over any [`Backend`].

use quire_kernels::{AttentionShape, Backend, Error, KvDtype, KvShape, QkvLayer, Step};

use crate::checkpoint::Checkpoint;

use super::load::{self, LoadError, LoadOptions, LoadProgress, Weights};
use super::{ModelConfig, rope};

/// A loaded model: weights on the device, and buffers for the largest step it will be asked to run.
pub struct Decoder<B: Backend> {
    backend: B,
    config: ModelConfig,
    weights: Weights<B>,
    frequencies: B::Vector,
    buffers: Buffers<B>,
    max_rows: usize,
}

/// Activations of one step, each `[max_rows, …]`; reused by every layer.
struct Buffers<B: Backend> {
    /// The residual stream. `[rows, hidden]`
    hidden: B::Activations,
    /// Its normalised copy. `[rows, hidden]`
    normed: B::Activations,
    /// `[rows, (heads + 2·kv_heads) · head_dim]`
    qkv: B::Activations,
    /// `[rows, heads · head_dim]`
    attended: B::Activations,
    /// `[rows, 2 · intermediate]`
    gate_up: B::Activations,
    /// `[rows, intermediate]`
    gated: B::Activations,
    /// `[rows, head_dim]`
    rotary: B::Activations,
}

impl<B: Backend> std::fmt::Debug for Decoder<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decoder")
            .field("config", &self.config)
            .field("backend", &self.backend.description())
            .finish_non_exhaustive()
    }
}

impl<B: Backend> Decoder<B> {
    /// Loads the checkpoint's weights onto `backend`.
    ///
    /// # Errors
    /// A tensor is missing or has another shape than `config.json` says, or the device has no memory or no kernel for it.
    pub fn load(
        checkpoint: &Checkpoint,
        backend: B,
        options: LoadOptions,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, LoadError> {
        let config = checkpoint.config.clone();
        let weights = load::weights(checkpoint, &backend, options.quantize, progress)?;
        let device = |what: &str| {
            let what = what.to_owned();
            move |source| LoadError::Device { what, source }
        };
        let frequencies = backend
            .vector(&rope::frequencies(&config.rope, config.head_dim))
            .map_err(device("rotary frequencies"))?;
        let rows = options.max_rows;
        let buffer = |cols: usize| {
            backend
                .activations(rows, cols)
                .map_err(device("activation buffers"))
        };
        let buffers = Buffers {
            hidden: buffer(config.hidden_size)?,
            normed: buffer(config.hidden_size)?,
            qkv: buffer((config.heads + 2 * config.kv_heads) * config.head_dim)?,
            attended: buffer(config.heads * config.head_dim)?,
            gate_up: buffer(2 * config.intermediate_size)?,
            gated: buffer(config.intermediate_size)?,
            rotary: buffer(config.head_dim)?,
        };
        Ok(Self {
            backend,
            config,
            weights,
            frequencies,
            buffers,
            max_rows: rows,
        })
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Where it runs.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// Bytes the weight matrices occupy on the device.
    pub fn weight_bytes(&self) -> usize {
        let backend = &self.backend;
        let bytes = |matrix: &B::Matrix| backend.matrix_bytes(matrix);
        let layers: usize = self
            .weights
            .layers
            .iter()
            .map(|l| bytes(&l.qkv) + bytes(&l.output) + bytes(&l.gate_up) + bytes(&l.down))
            .sum();
        layers + bytes(&self.weights.embedding) + self.weights.head.as_ref().map_or(0, bytes)
    }

    /// The shape of a KV cache of `blocks` blocks for this model.
    pub fn kv_shape(
        config: &ModelConfig,
        blocks: usize,
        block_size: usize,
        dtype: KvDtype,
    ) -> KvShape {
        KvShape {
            layers: config.layers,
            blocks,
            block_size,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            dtype,
        }
    }

    /// Makes the model's KV cache.
    ///
    /// # Errors
    /// No memory, or no kernel for the block size.
    pub fn kv_cache(
        &self,
        blocks: usize,
        block_size: usize,
        dtype: KvDtype,
    ) -> Result<B::KvCache, Error> {
        self.backend
            .kv_cache(&Self::kv_shape(&self.config, blocks, block_size, dtype))
    }

    /// Runs one step: after it the keys and values of every row are in `kv` and `logits` holds `[logit rows, vocabulary]`.
    ///
    /// `copies` are block copies `(from, to)` to be done first (copy-on-write of forked sequences).
    ///
    /// # Errors
    /// More rows than the decoder was loaded for, a token outside the vocabulary, a block outside the cache, or a device failure.
    pub fn forward(
        &mut self,
        step: &Step,
        copies: &[(u32, u32)],
        kv: &mut B::KvCache,
        logits: &mut Vec<f32>,
    ) -> Result<(), Error> {
        if step.rows() > self.max_rows {
            return Err(Error::Shape(format!(
                "a step of {} rows, the decoder was loaded for at most {}",
                step.rows(),
                self.max_rows
            )));
        }
        let Self {
            backend,
            config,
            weights,
            frequencies,
            buffers: b,
            ..
        } = self;
        let eps = config.norm_eps;
        let shape = AttentionShape {
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            scale: 1.0 / (config.head_dim as f32).sqrt(),
        };

        backend.begin(step)?;
        backend.copy_blocks(kv, copies)?;
        backend.embed(&weights.embedding, 1.0, &mut b.hidden)?;
        backend.rotary(frequencies, 1.0, &mut b.rotary)?;
        for (index, layer) in weights.layers.iter().enumerate() {
            backend.rms_norm(&b.hidden, &layer.attention_norm, eps, &mut b.normed)?;
            backend.linear(&b.normed, &layer.qkv, layer.qkv_bias.as_ref(), &mut b.qkv)?;
            let qkv_layer = QkvLayer {
                layer: index,
                shape,
                q_norm: layer.q_norm.as_ref(),
                k_norm: layer.k_norm.as_ref(),
                eps,
                rotary: &b.rotary,
            };
            backend.norm_rope_store(&mut b.qkv, &qkv_layer, kv)?;
            backend.attention(&b.qkv, index, &shape, kv, &mut b.attended)?;
            backend.linear_add(
                &b.attended,
                &layer.output,
                layer.output_bias.as_ref(),
                &mut b.hidden,
            )?;
            backend.rms_norm(&b.hidden, &layer.mlp_norm, eps, &mut b.normed)?;
            backend.linear(
                &b.normed,
                &layer.gate_up,
                layer.gate_up_bias.as_ref(),
                &mut b.gate_up,
            )?;
            backend.gate(&b.gate_up, config.activation, &mut b.gated)?;
            backend.linear_add(
                &b.gated,
                &layer.down,
                layer.down_bias.as_ref(),
                &mut b.hidden,
            )?;
        }
        let head = weights.head.as_ref().unwrap_or(&weights.embedding);
        backend.logits(&b.hidden, &weights.norm, eps, head, logits)
    }
}
