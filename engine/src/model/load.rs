//! Moves a checkpoint's tensors onto a backend: names them, checks their shapes, fuses and quantises what belongs together.

use quire_kernels::{Backend, Format, MatrixPart};

use crate::checkpoint::{Checkpoint, CheckpointError, TensorView, Tensors};

use super::{ExpertsConfig, ModelConfig, NormPlacement, QkNorm};

/// What may be chosen when a model is loaded.
#[derive(Debug, Clone, Copy)]
pub struct LoadOptions {
    /// Quantise the float matrices to this format; `None` keeps the checkpoint's.
    pub quantize: Option<Format>,
    /// Most rows (tokens) of one step: sizes the activation buffers.
    pub max_rows: usize,
}

/// How far loading has come, in checkpoint bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadProgress {
    /// Bytes packed so far.
    pub done: u64,
    /// Bytes of all tensors the model uses.
    pub total: u64,
}

/// Why a model could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The checkpoint lacks a tensor, or has it in another shape.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The device refused a tensor.
    #[error("{what}: {source}")]
    Device {
        /// The tensor or buffer.
        what: String,
        /// What the device said.
        #[source]
        source: quire_kernels::Error,
    },
}

/// The parameters of one decoder layer. What a family does not have is `None`.
pub(super) struct Layer<B: Backend> {
    pub attention_norm: Option<B::Vector>,
    pub qkv: B::Matrix,
    pub qkv_bias: Option<B::Vector>,
    pub q_norm: Option<B::Vector>,
    pub k_norm: Option<B::Vector>,
    pub sinks: Option<B::Vector>,
    pub attention_sub_norm: Option<B::Vector>,
    pub output: B::Matrix,
    pub output_bias: Option<B::Vector>,
    pub attention_post_norm: Option<B::Vector>,
    pub mlp_norm: Option<B::Vector>,
    pub mlp: Mlp<B>,
    pub mlp_post_norm: Option<B::Vector>,
}

/// The parameters of a layer's MLP.
pub(super) enum Mlp<B: Backend> {
    Dense {
        gate_up: B::Matrix,
        gate_up_bias: Option<B::Vector>,
        sub_norm: Option<B::Vector>,
        down: B::Matrix,
        down_bias: Option<B::Vector>,
    },
    Experts {
        router: B::Matrix,
        router_bias: Option<B::Vector>,
        gate_up: B::Matrix,
        gate_up_bias: Option<B::Vector>,
        down: B::Matrix,
        down_bias: Option<B::Vector>,
        of: ExpertsConfig,
    },
}

/// The parameters of a decoder.
pub(super) struct Weights<B: Backend> {
    pub embedding: B::Matrix,
    pub layers: Vec<Layer<B>>,
    pub norm: B::Vector,
    /// `None`: the embedding table is the head.
    pub head: Option<B::Matrix>,
}

/// Packs all weights of `checkpoint`.
pub(super) fn weights<B: Backend>(
    checkpoint: &Checkpoint,
    backend: &B,
    quantize: Option<Format>,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Weights<B>, LoadError> {
    let config = &checkpoint.config;
    let hidden = config.hidden_size;
    let mut loader = Loader {
        tensors: &checkpoint.tensors,
        backend,
        quantize,
        norm_offset: config.norm_offset,
        done: 0,
        progress,
    };
    let embedding = loader.matrix(&[("model.embed_tokens.weight", config.vocab_size)], hidden)?;
    // The two largest matrices come first: while a matrix is packed it is in memory twice, and now there is nothing else there yet.
    let head = if config.tied_head {
        None
    } else {
        Some(loader.matrix(&[("lm_head.weight", config.vocab_size)], hidden)?)
    };
    let layers = (0..config.layers.len())
        .map(|layer| loader.layer(config, layer))
        .collect::<Result<_, _>>()?;
    let norm = loader.norm("model.norm.weight", hidden)?;
    Ok(Weights {
        embedding,
        layers,
        norm,
        head,
    })
}

pub(super) struct Loader<'a, B: Backend> {
    pub tensors: &'a Tensors,
    backend: &'a B,
    quantize: Option<Format>,
    norm_offset: f32,
    done: u64,
    progress: &'a mut dyn FnMut(LoadProgress),
}

impl<B: Backend> Loader<'_, B> {
    fn layer(&mut self, config: &ModelConfig, layer: usize) -> Result<Layer<B>, LoadError> {
        let hidden = config.hidden_size;
        let inner = config.intermediate_size;
        let q = config.heads * config.head_dim;
        let kv = config.kv_heads * config.head_dim;
        let name = |rest: &str| format!("model.layers.{layer}.{rest}");
        let parts = |parts: &[(&str, usize)]| -> Vec<(String, usize)> {
            parts
                .iter()
                .map(|&(rest, rows)| (name(rest), rows))
                .collect()
        };
        let norm = |this: &mut Self, there: bool, rest: &str, len: usize| {
            there.then(|| this.norm(&name(rest), len)).transpose()
        };
        // Phi-3 stores what we fuse as one tensor already.
        let fused = |fused: (&'static str, usize), parts: &[(&'static str, usize)]| {
            if self.tensors.contains(&name(&format!("{}.weight", fused.0))) {
                vec![fused]
            } else {
                parts.to_vec()
            }
        };
        let qkv = fused(
            ("self_attn.qkv_proj", q + 2 * kv),
            &[
                ("self_attn.q_proj", q),
                ("self_attn.k_proj", kv),
                ("self_attn.v_proj", kv),
            ],
        );
        let gate_up = fused(
            ("mlp.gate_up_proj", 2 * inner),
            &[("mlp.gate_proj", inner), ("mlp.up_proj", inner)],
        );
        let output = [("self_attn.o_proj", hidden)];
        let down = [("mlp.down_proj", hidden)];
        let (before, after) = (
            config.norms != NormPlacement::After,
            config.norms != NormPlacement::Before,
        );
        let mlp_norm = match config.norms {
            NormPlacement::Before => "post_attention_layernorm.weight",
            _ => "pre_feedforward_layernorm.weight",
        };
        let (qk_norm, q_len, k_len) = match config.qk_norm {
            QkNorm::None => (false, 0, 0),
            QkNorm::Heads => (true, config.head_dim, config.head_dim),
            QkNorm::Together => (true, q, kv),
        };
        let attention_norm = norm(self, before, "input_layernorm.weight", hidden)?;
        let mlp = match &config.experts {
            Some(of) if config.layers[layer].experts => self.experts(of, hidden, layer)?,
            _ => Mlp::Dense {
                gate_up: self.matrix(&suffixed(&parts(&gate_up), ".weight"), hidden)?,
                gate_up_bias: self
                    .vector_if(config.mlp_bias, &suffixed(&parts(&gate_up), ".bias"))?,
                sub_norm: norm(self, config.sub_norms, "mlp.ffn_sub_norm.weight", inner)?,
                down: self.matrix(&suffixed(&parts(&down), ".weight"), inner)?,
                down_bias: self.vector_if(config.mlp_bias, &suffixed(&parts(&down), ".bias"))?,
            },
        };
        Ok(Layer {
            attention_norm,
            qkv: self.matrix(&suffixed(&parts(&qkv), ".weight"), hidden)?,
            qkv_bias: self.vector_if(config.qkv_bias, &suffixed(&parts(&qkv), ".bias"))?,
            q_norm: norm(self, qk_norm, "self_attn.q_norm.weight", q_len)?,
            k_norm: norm(self, qk_norm, "self_attn.k_norm.weight", k_len)?,
            sinks: self.vector_if(config.sinks, &parts(&[("self_attn.sinks", config.heads)]))?,
            attention_sub_norm: norm(self, config.sub_norms, "self_attn.attn_sub_norm.weight", q)?,
            output: self.matrix(&suffixed(&parts(&output), ".weight"), q)?,
            output_bias: self.vector_if(config.output_bias, &suffixed(&parts(&output), ".bias"))?,
            attention_post_norm: norm(self, after, "post_attention_layernorm.weight", hidden)?,
            mlp_norm: norm(self, before, mlp_norm, hidden)?,
            mlp,
            mlp_post_norm: norm(self, after, "post_feedforward_layernorm.weight", hidden)?,
        })
    }

    /// One matrix whose rows are those of the named tensors, one after the other.
    pub fn matrix<S: AsRef<str>>(
        &mut self,
        parts: &[(S, usize)],
        cols: usize,
    ) -> Result<B::Matrix, LoadError> {
        let views = parts
            .iter()
            .map(|(name, rows)| self.tensors.get(name.as_ref(), &[*rows, cols]))
            .collect::<Result<Vec<_>, _>>()?;
        let views: Vec<MatrixPart<'_>> = views
            .iter()
            .map(|view| MatrixPart {
                rows: view.shape[0],
                cols,
                format: view.format,
                data: &view.data,
                order: view.order.as_deref(),
            })
            .collect();
        let names: Vec<&str> = parts.iter().map(|part| part.0.as_ref()).collect();
        self.pack(&names.join(" + "), &views)
    }

    /// Packs a matrix; `what` names it in errors.
    pub fn pack(&mut self, what: &str, parts: &[MatrixPart<'_>]) -> Result<B::Matrix, LoadError> {
        let matrix = self
            .backend
            .matrix(parts, self.quantize_to(what))
            .map_err(|source| LoadError::Device {
                what: what.to_owned(),
                source,
            })?;
        // What was packed is not read again.
        self.tensors.release();
        self.advance(parts.iter().map(|part| part.data.len()).sum());
        Ok(matrix)
    }

    /// What the tensors `what` are quantised to. A ternary model is so in its layers, routers left out: the rest stays as it is.
    fn quantize_to(&self, what: &str) -> Option<Format> {
        let ternary = what.contains("_proj");
        self.quantize
            .filter(|&format| ternary || format != Format::Tq2_0)
    }

    /// One vector made of the named tensors, one after the other.
    fn vector<S: AsRef<str>>(&mut self, parts: &[(S, usize)]) -> Result<B::Vector, LoadError> {
        let mut values = Vec::with_capacity(parts.iter().map(|part| part.1).sum());
        for (name, len) in parts {
            self.values(name.as_ref(), &[*len], &mut values)?;
        }
        let names: Vec<&str> = parts.iter().map(|part| part.0.as_ref()).collect();
        self.upload(&names.join(" + "), &values)
    }

    /// A norm's weights, as the decoder multiplies with them.
    fn norm(&mut self, name: &str, len: usize) -> Result<B::Vector, LoadError> {
        let mut values = Vec::with_capacity(len);
        self.values(name, &[len], &mut values)?;
        for value in &mut values {
            *value += self.norm_offset;
        }
        self.upload(name, &values)
    }

    /// Appends a tensor's elements as f32.
    pub fn values(
        &mut self,
        name: &str,
        shape: &[usize],
        out: &mut Vec<f32>,
    ) -> Result<(), LoadError> {
        let view = self.tensors.get(name, shape)?;
        widen(name, &view, out)?;
        self.advance(view.data.len());
        Ok(())
    }

    /// A vector on the device; `what` names it in errors.
    pub fn upload(&self, what: &str, values: &[f32]) -> Result<B::Vector, LoadError> {
        self.backend
            .vector(values)
            .map_err(|source| LoadError::Device {
                what: what.to_owned(),
                source,
            })
    }

    pub fn vector_if<S: AsRef<str>>(
        &mut self,
        wanted: bool,
        parts: &[(S, usize)],
    ) -> Result<Option<B::Vector>, LoadError> {
        wanted.then(|| self.vector(parts)).transpose()
    }

    fn advance(&mut self, bytes: usize) {
        self.done += bytes as u64;
        (self.progress)(LoadProgress {
            done: self.done,
            total: self.tensors.total_bytes().max(self.done),
        });
    }
}

fn suffixed(parts: &[(String, usize)], suffix: &str) -> Vec<(String, usize)> {
    parts
        .iter()
        .map(|(name, rows)| (format!("{name}{suffix}"), *rows))
        .collect()
}

/// Appends a vector's elements as f32.
fn widen(name: &str, view: &TensorView<'_>, out: &mut Vec<f32>) -> Result<(), LoadError> {
    if view.format.is_quantised() {
        return Err(LoadError::Device {
            what: name.to_owned(),
            source: quire_kernels::Error::Shape(format!(
                "a vector of parameters is stored as {:?}, expected f32, f16 or bf16",
                view.format
            )),
        });
    }
    view.format.dequantize(&view.data, out);
    Ok(())
}
