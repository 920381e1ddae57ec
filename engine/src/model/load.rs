//! Moves a checkpoint's tensors onto a backend: names them, checks their shapes, fuses and quantises what belongs together.

use quire_kernels::{Backend, Format, MatrixPart};

use crate::checkpoint::{Checkpoint, CheckpointError, TensorView, Tensors};

use super::ModelConfig;

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

/// The parameters of one decoder layer.
pub(super) struct Layer<B: Backend> {
    pub attention_norm: B::Vector,
    pub qkv: B::Matrix,
    pub qkv_bias: Option<B::Vector>,
    pub q_norm: Option<B::Vector>,
    pub k_norm: Option<B::Vector>,
    pub output: B::Matrix,
    pub output_bias: Option<B::Vector>,
    pub mlp_norm: B::Vector,
    pub gate_up: B::Matrix,
    pub gate_up_bias: Option<B::Vector>,
    pub down: B::Matrix,
    pub down_bias: Option<B::Vector>,
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
        done: 0,
        progress,
    };
    let embedding = loader.matrix(&[("model.embed_tokens.weight", config.vocab_size)], hidden)?;
    let layers = (0..config.layers)
        .map(|layer| loader.layer(config, layer))
        .collect::<Result<_, _>>()?;
    let norm = loader.vector(&[("model.norm.weight", hidden)])?;
    let head = if config.tied_head {
        None
    } else {
        Some(loader.matrix(&[("lm_head.weight", config.vocab_size)], hidden)?)
    };
    Ok(Weights {
        embedding,
        layers,
        norm,
        head,
    })
}

struct Loader<'a, B: Backend> {
    tensors: &'a Tensors,
    backend: &'a B,
    quantize: Option<Format>,
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
        let qkv = [
            ("self_attn.q_proj", q),
            ("self_attn.k_proj", kv),
            ("self_attn.v_proj", kv),
        ];
        let gate_up = [("mlp.gate_proj", inner), ("mlp.up_proj", inner)];
        let output = [("self_attn.o_proj", hidden)];
        let down = [("mlp.down_proj", hidden)];
        Ok(Layer {
            attention_norm: self.vector(&parts(&[("input_layernorm.weight", hidden)]))?,
            qkv: self.matrix(&suffixed(&parts(&qkv), ".weight"), hidden)?,
            qkv_bias: self.vector_if(config.qkv_bias, &suffixed(&parts(&qkv), ".bias"))?,
            q_norm: self.vector_if(
                config.qk_norm,
                &parts(&[("self_attn.q_norm.weight", config.head_dim)]),
            )?,
            k_norm: self.vector_if(
                config.qk_norm,
                &parts(&[("self_attn.k_norm.weight", config.head_dim)]),
            )?,
            output: self.matrix(&suffixed(&parts(&output), ".weight"), q)?,
            output_bias: self.vector_if(config.output_bias, &suffixed(&parts(&output), ".bias"))?,
            mlp_norm: self.vector(&parts(&[("post_attention_layernorm.weight", hidden)]))?,
            gate_up: self.matrix(&suffixed(&parts(&gate_up), ".weight"), hidden)?,
            gate_up_bias: self.vector_if(config.mlp_bias, &suffixed(&parts(&gate_up), ".bias"))?,
            down: self.matrix(&suffixed(&parts(&down), ".weight"), inner)?,
            down_bias: self.vector_if(config.mlp_bias, &suffixed(&parts(&down), ".bias"))?,
        })
    }

    /// One matrix whose rows are those of the named tensors, one after the other.
    fn matrix<S: AsRef<str>>(
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
        let matrix = self
            .backend
            .matrix(&views, self.quantize_to(parts))
            .map_err(|source| device(parts, source))?;
        self.advance(views.iter().map(|view| view.data.len()).sum());
        Ok(matrix)
    }

    /// What these tensors are quantised to. A ternary model is so in its layers: its embedding and its head stay as they are.
    fn quantize_to<S: AsRef<str>>(&self, parts: &[(S, usize)]) -> Option<Format> {
        let in_layers = parts
            .iter()
            .any(|part| part.0.as_ref().contains(".layers."));
        self.quantize
            .filter(|&format| in_layers || format != Format::Tq2_0)
    }

    /// One vector made of the named tensors, one after the other.
    fn vector<S: AsRef<str>>(&mut self, parts: &[(S, usize)]) -> Result<B::Vector, LoadError> {
        let mut values = Vec::with_capacity(parts.iter().map(|part| part.1).sum());
        let mut bytes = 0;
        for (name, len) in parts {
            let view = self.tensors.get(name.as_ref(), &[*len])?;
            bytes += view.data.len();
            widen(name.as_ref(), &view, &mut values)?;
        }
        let vector = self
            .backend
            .vector(&values)
            .map_err(|source| device(parts, source))?;
        self.advance(bytes);
        Ok(vector)
    }

    fn vector_if<S: AsRef<str>>(
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

fn device<S: AsRef<str>>(parts: &[(S, usize)], source: quire_kernels::Error) -> LoadError {
    let names: Vec<&str> = parts.iter().map(|part| part.0.as_ref()).collect();
    LoadError::Device {
        what: names.join(" + "),
        source,
    }
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
