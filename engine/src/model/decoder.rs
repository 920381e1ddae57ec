//! [`Decoder`]: a transformer decoder over any [`Backend`].

use quire_kernels::{
    AttentionShape, Backend, Error, Experts, KvDtype, KvShape, Norm, QkvLayer, Rotary, Step,
};

use crate::checkpoint::Checkpoint;

use super::load::{self, LoadError, LoadOptions, LoadProgress, Mlp, Weights};
use super::ranks::Cuts;
use super::{ModelConfig, NormPlacement, PageLayout, rope};

/// A loaded model: weights on the device, and buffers for the largest step it will be asked to run.
pub struct Decoder<B: Backend> {
    backend: B,
    config: ModelConfig,
    pages: PageLayout,
    weights: Weights<B>,
    /// Of each rotary embedding: the frequencies, and those beyond the switch.
    frequencies: Vec<(B::Vector, Option<B::Vector>)>,
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
    /// What joins the residual stream, where something is done to it first. `[rows, hidden]`
    branch: Option<B::Activations>,
    /// Of each rotary embedding. `[rows, rotated]`
    rotary: Vec<B::Activations>,
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
    /// Loads the checkpoint's weights onto `backend`: its part of them, if it is one of several ranks.
    ///
    /// # Errors
    /// A tensor is missing or has another shape than `config.json` says, or the device has no memory or no kernel for it.
    pub fn load(
        checkpoint: &Checkpoint,
        backend: B,
        options: LoadOptions,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, LoadError> {
        let cuts = Cuts::of(&checkpoint.config, backend.rank())?;
        let config = cuts.config(&checkpoint.config);
        let weights = load::weights(checkpoint, &cuts, &backend, options.quantize, progress)?;
        let device = |what: &str| {
            let what = what.to_owned();
            move |reason| LoadError::Device { what, reason }
        };
        let vector = |values: &[f32]| backend.vector(values).map_err(device("rotary frequencies"));
        let frequencies = config
            .ropes
            .iter()
            .map(|rope| {
                let beyond = rope::beyond(rope).map(|f| vector(&f)).transpose()?;
                Ok((vector(&rope::frequencies(rope))?, beyond))
            })
            .collect::<Result<_, LoadError>>()?;
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
            branch: (config.residual_scale != 1.0 || config.norms != NormPlacement::Before)
                .then(|| buffer(config.hidden_size))
                .transpose()?,
            rotary: config
                .ropes
                .iter()
                .map(|rope| buffer(rope.rotated))
                .collect::<Result<_, _>>()?,
        };
        Ok(Self {
            backend,
            pages: PageLayout::of(&config),
            config,
            weights,
            frequencies,
            buffers,
            max_rows: rows,
        })
    }

    /// How its layers share the blocks of the KV cache.
    pub fn pages(&self) -> &PageLayout {
        &self.pages
    }

    /// The model's shape, as this decoder computes it: of several ranks each has some of the heads and a part of the width.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Where it runs.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// What it runs on, for host work between the steps.
    pub fn backend_mut(&mut self) -> &mut B {
        &mut self.backend
    }

    /// Bytes the weight matrices occupy on the device.
    pub fn weight_bytes(&self) -> usize {
        let backend = &self.backend;
        let bytes = |matrix: &B::Matrix| backend.matrix_bytes(matrix);
        let mlp = |mlp: &Mlp<B>| match mlp {
            Mlp::Dense { gate_up, down, .. } => bytes(gate_up) + bytes(down),
            Mlp::Experts {
                router,
                gate_up,
                down,
                ..
            } => bytes(router) + bytes(gate_up) + bytes(down),
        };
        let layers: usize = self
            .weights
            .layers
            .iter()
            .map(|l| bytes(&l.qkv) + bytes(&l.output) + mlp(&l.mlp))
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
            layers: PageLayout::of(config).layers,
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

    /// Runs one step: after it the keys and values of every row are in `kv` and `logits` holds `[logit rows without a draw, vocabulary]`; what
    /// was drawn is with the backend.
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
            pages,
            weights,
            frequencies,
            buffers: b,
            ..
        } = self;
        let eps = config.norm_eps;
        let norm = |weight| Norm { weight, eps };

        backend.begin(step)?;
        backend.copy_blocks(kv, copies)?;
        backend.embed(&weights.embedding, config.embedding_scale, &mut b.hidden)?;
        for ((of, out), (frequencies, beyond)) in
            config.ropes.iter().zip(&mut b.rotary).zip(&*frequencies)
        {
            let rotary = Rotary {
                frequencies,
                beyond: beyond.as_ref(),
                scale: of.scale,
            };
            backend.rotary(&rotary, out)?;
        }
        for (index, layer) in weights.layers.iter().enumerate() {
            let of_layer = config.layers[index];
            let shape = AttentionShape {
                heads: config.heads,
                kv_heads: config.kv_heads,
                head_dim: config.head_dim,
                scale: config.attention_scale,
                window: of_layer.window,
                softcap: config.attention_softcap,
            };
            let input = match &layer.attention_norm {
                None => &b.hidden,
                Some(weight) => {
                    backend.rms_norm(&b.hidden, weight, eps, &mut b.normed)?;
                    &b.normed
                }
            };
            backend.linear(input, &layer.qkv, layer.qkv_bias.as_ref(), &mut b.qkv)?;
            let qkv_layer = QkvLayer {
                layer: pages.places[index],
                shape,
                q_norm: layer.q_norm.as_ref(),
                k_norm: layer.k_norm.as_ref(),
                eps,
                rotary: of_layer.rope.map(|rope| &b.rotary[rope]),
            };
            backend.norm_rope_store(&mut b.qkv, &qkv_layer, kv)?;
            let sinks = layer.sinks.as_ref();
            backend.attention(&b.qkv, qkv_layer.layer, &shape, sinks, kv, &mut b.attended)?;
            if let Some(weight) = &layer.attention_sub_norm {
                backend.rms_norm_in_place(&mut b.attended, &norm(weight))?;
            }
            let joins = Joins {
                norm: layer.attention_post_norm.as_ref().map(norm),
                scale: config.residual_scale,
            };
            let bias = layer.output_bias.as_ref();
            joins.join(
                backend,
                (&b.attended, &layer.output, bias),
                b.branch.as_mut(),
                &mut b.hidden,
            )?;

            let input = match &layer.mlp_norm {
                None => &b.hidden,
                Some(weight) => {
                    backend.rms_norm(&b.hidden, weight, eps, &mut b.normed)?;
                    &b.normed
                }
            };
            match &layer.mlp {
                Mlp::Dense {
                    gate_up,
                    gate_up_bias,
                    sub_norm,
                    down,
                    down_bias,
                } => {
                    backend.linear(input, gate_up, gate_up_bias.as_ref(), &mut b.gate_up)?;
                    backend.gate(&b.gate_up, config.activation, &mut b.gated)?;
                    if let Some(weight) = sub_norm {
                        backend.rms_norm_in_place(&mut b.gated, &norm(weight))?;
                    }
                    let joins = Joins {
                        norm: layer.mlp_post_norm.as_ref().map(norm),
                        scale: config.residual_scale,
                    };
                    joins.join(
                        backend,
                        (&b.gated, down, down_bias.as_ref()),
                        b.branch.as_mut(),
                        &mut b.hidden,
                    )?;
                }
                Mlp::Experts {
                    router,
                    router_bias,
                    gate_up,
                    gate_up_bias,
                    down,
                    down_bias,
                    of,
                } => {
                    let experts = Experts {
                        router,
                        router_bias: router_bias.as_ref(),
                        gate_up,
                        gate_up_bias: gate_up_bias.as_ref(),
                        down,
                        down_bias: down_bias.as_ref(),
                        experts: of.count,
                        top_k: of.top_k,
                        normalised: of.normalised,
                        activation: config.activation,
                    };
                    if layer.mlp_norm.is_none() {
                        return Err(Error::Shape(
                            "experts without a norm before them".to_owned(),
                        ));
                    }
                    backend.experts(&b.normed, &experts, &mut b.hidden)?;
                }
            }
        }
        let head = weights.head.as_ref().unwrap_or(&weights.embedding);
        backend.logits(&b.hidden, &norm(&weights.norm), head, config.logits, logits)
    }
}

/// How a projection joins the residual stream.
struct Joins<'a, B: Backend> {
    norm: Option<Norm<'a, B>>,
    scale: f32,
}

impl<B: Backend> Joins<'_, B> {
    /// Adds the projection `(x, matrix, bias)` to `hidden`, by way of `branch` where something is done to it first.
    fn join(
        &self,
        backend: &mut B,
        (x, matrix, bias): (&B::Activations, &B::Matrix, Option<&B::Vector>),
        branch: Option<&mut B::Activations>,
        hidden: &mut B::Activations,
    ) -> Result<(), Error> {
        match branch {
            None => backend.linear_add(x, matrix, bias, hidden),
            Some(branch) => {
                backend.linear(x, matrix, bias, branch)?;
                backend.add(branch, self.norm.as_ref(), self.scale, hidden)
            }
        }
    }
}
