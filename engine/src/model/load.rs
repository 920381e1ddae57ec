//! Moves a checkpoint's tensors onto a backend: names them, checks their shapes, fuses and quantises what belongs together.

use std::borrow::Cow;
use std::ops::Range;

use quire_kernels::{Backend, Format, MatrixPart, Shard};

use crate::checkpoint::{Checkpoint, CheckpointError, TensorView, Tensors};

use super::ranks::Cuts;
use super::slices::{self, Rows};
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
    #[error("{what}: {reason}")]
    Device {
        /// The tensor or buffer.
        what: String,
        /// What the device said. No source of this error, of whose text it is a part: who prints all of them would print it twice.
        reason: quire_kernels::Error,
    },
    /// It cannot be divided among so many devices.
    #[error("the model cannot be divided among {ranks} ranks: {problem}")]
    Ranks {
        /// How many there are.
        ranks: usize,
        /// What is in the way.
        problem: String,
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

/// Packs what `cuts` says of the weights of `checkpoint`.
pub(super) fn weights<B: Backend>(
    checkpoint: &Checkpoint,
    cuts: &Cuts,
    backend: &B,
    quantize: Option<Format>,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Weights<B>, LoadError> {
    let config = &checkpoint.config;
    let hidden = config.hidden_size;
    let mut loader = Loader {
        tensors: &checkpoint.tensors,
        cuts,
        backend,
        quantize,
        norm_offset: config.norm_offset,
        done: 0,
        progress,
    };
    let embedding = loader.table("model.embed_tokens.weight", config.vocab_size, hidden)?;
    // The two largest matrices come first: while a matrix is packed it is in memory twice, and now there is nothing else there yet.
    let head = if config.tied_head {
        None
    } else {
        Some(loader.table("lm_head.weight", config.vocab_size, hidden)?)
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
    pub cuts: &'a Cuts,
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
        let cuts = self.cuts;
        let d = config.head_dim;
        let (q_rows, kv_rows) = (
            cuts.heads.start * d..cuts.heads.end * d,
            cuts.kv_heads.start * d..cuts.kv_heads.end * d,
        );
        let name = |rest: &str| format!("model.layers.{layer}.{rest}");
        let norm = |this: &mut Self, there: bool, rest: &str, len: usize| {
            there.then(|| this.norm(&name(rest), len)).transpose()
        };
        // What we fuse: one tensor each, or, in Phi-3, one for all. Of each part the rank's rows.
        let fused = |fused: &str, parts: &[(&str, usize, &Range<usize>)]| {
            let mut rows = Vec::new();
            let whole = self.tensors.contains(&name(&format!("{fused}.weight")));
            let (mut keep, mut of) = (Vec::new(), 0);
            for &(part, part_rows, part_keep) in parts {
                if !whole {
                    rows.push(Rows::some(name(part), part_rows, part_keep.clone()));
                }
                keep.push(of + part_keep.start..of + part_keep.end);
                of += part_rows;
            }
            if whole {
                let name = name(fused);
                rows.push(Rows { name, of, keep });
            }
            rows
        };
        let qkv = fused(
            "self_attn.qkv_proj",
            &[
                ("self_attn.q_proj", q, &q_rows),
                ("self_attn.k_proj", kv, &kv_rows),
                ("self_attn.v_proj", kv, &kv_rows),
            ],
        );
        let gate_up = fused(
            "mlp.gate_up_proj",
            &[
                ("mlp.gate_proj", inner, &cuts.inner),
                ("mlp.up_proj", inner, &cuts.inner),
            ],
        );
        let output = name("self_attn.o_proj");
        let down = name("mlp.down_proj");
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
                gate_up: self.matrix(&suffixed(&gate_up, ".weight"), hidden)?,
                gate_up_bias: self.vector_if(config.mlp_bias, &suffixed(&gate_up, ".bias"))?,
                sub_norm: norm(self, config.sub_norms, "mlp.ffn_sub_norm.weight", inner)?,
                down: self.columns(&down, hidden, inner, &cuts.inner)?,
                down_bias: self.vector_if(
                    config.mlp_bias && cuts.is_first(),
                    &[Rows::all(format!("{down}.bias"), hidden)],
                )?,
            },
        };
        Ok(Layer {
            attention_norm,
            qkv: self.matrix(&suffixed(&qkv, ".weight"), hidden)?,
            qkv_bias: self.vector_if(config.qkv_bias, &suffixed(&qkv, ".bias"))?,
            q_norm: norm(self, qk_norm, "self_attn.q_norm.weight", q_len)?,
            k_norm: norm(self, qk_norm, "self_attn.k_norm.weight", k_len)?,
            sinks: self.vector_if(
                config.sinks,
                &[Rows::some(
                    name("self_attn.sinks"),
                    config.heads,
                    cuts.heads.clone(),
                )],
            )?,
            attention_sub_norm: norm(self, config.sub_norms, "self_attn.attn_sub_norm.weight", q)?,
            output: self.columns(&output, hidden, q, &q_rows)?,
            output_bias: self.vector_if(
                config.output_bias && cuts.is_first(),
                &[Rows::all(format!("{output}.bias"), hidden)],
            )?,
            attention_post_norm: norm(self, after, "post_attention_layernorm.weight", hidden)?,
            mlp_norm: norm(self, before, mlp_norm, hidden)?,
            mlp,
            mlp_post_norm: norm(self, after, "post_feedforward_layernorm.weight", hidden)?,
        })
    }

    /// One matrix whose rows are those named, one after the other.
    pub fn matrix(&mut self, rows: &[Rows], cols: usize) -> Result<B::Matrix, LoadError> {
        self.matrix_of(rows, cols, None)
    }

    fn matrix_of(
        &mut self,
        rows: &[Rows],
        cols: usize,
        shard: Option<Shard>,
    ) -> Result<B::Matrix, LoadError> {
        let views = rows
            .iter()
            .map(|rows| self.tensors.get(&rows.name, &[rows.of, cols]))
            .collect::<Result<Vec<_>, _>>()?;
        let read = views.iter().map(|view| view.data.len()).sum();
        let parts: Vec<MatrixPart<'_>> = rows
            .iter()
            .zip(&views)
            .flat_map(|(rows, view)| {
                let part = part(view, cols);
                rows.keep.iter().map(move |keep| slices::rows(&part, keep))
            })
            .collect();
        let names: Vec<&str> = rows.iter().map(|rows| rows.name.as_str()).collect();
        self.pack(&names.join(" + "), &parts, shard, read)
    }

    /// A table with a row for each token of the vocabulary: this rank's rows of it.
    fn table(&mut self, name: &str, of: usize, cols: usize) -> Result<B::Matrix, LoadError> {
        let rows = Rows::some(name, of, self.cuts.tokens.clone());
        self.matrix_of(&[rows], cols, Some(Shard::Vocabulary { of }))
    }

    /// The matrix of a projection back into the residual stream: this rank's columns of it.
    fn columns(
        &mut self,
        name: &str,
        rows: usize,
        cols: usize,
        keep: &Range<usize>,
    ) -> Result<B::Matrix, LoadError> {
        let name = format!("{name}.weight");
        let view = self.tensors.get(&name, &[rows, cols])?;
        let part = part(&view, cols);
        let data = self.columns_of(&name, &part, keep)?;
        let cut = MatrixPart {
            cols: keep.len(),
            data: &data,
            ..part
        };
        self.pack(&name, &[cut], Some(Shard::Columns), view.data.len())
    }

    /// The columns `keep` of the tensor `name`, of which `part` is all or some rows.
    pub fn columns_of<'p>(
        &self,
        name: &str,
        part: &MatrixPart<'p>,
        keep: &Range<usize>,
    ) -> Result<Cow<'p, [u8]>, LoadError> {
        let cut = slices::columns(part, keep, self.quantize_to(name));
        cut.map_err(|problem| LoadError::Ranks {
            ranks: self.cuts.rank.of,
            problem: format!("{name}: {problem}"),
        })
    }

    /// Packs a matrix; `what` names it in errors, `shard` is what it is of the whole where there are several ranks, `read` how many bytes of the
    /// checkpoint are done with.
    pub fn pack(
        &mut self,
        what: &str,
        parts: &[MatrixPart<'_>],
        shard: Option<Shard>,
        read: usize,
    ) -> Result<B::Matrix, LoadError> {
        let quantize = self.quantize_to(what);
        let matrix = match shard {
            Some(shard) if !self.cuts.rank.is_alone() => self.backend.shard(parts, quantize, shard),
            _ => self.backend.matrix(parts, quantize),
        };
        let matrix = matrix.map_err(|reason| LoadError::Device {
            what: what.to_owned(),
            reason,
        })?;
        // What was packed is not read again.
        self.tensors.release();
        self.advance(read);
        Ok(matrix)
    }

    /// What the tensors `what` are quantised to.
    fn quantize_to(&self, what: &str) -> Option<Format> {
        self.quantize
            .filter(|&format| is_quantised_to(format, what))
    }

    /// One vector made of the elements named, one after the other.
    fn vector(&mut self, parts: &[Rows]) -> Result<B::Vector, LoadError> {
        let mut values = Vec::new();
        for part in parts {
            let mut whole = Vec::with_capacity(part.of);
            self.values(&part.name, &[part.of], &mut whole)?;
            for keep in &part.keep {
                values.extend_from_slice(&whole[keep.clone()]);
            }
        }
        let names: Vec<&str> = parts.iter().map(|part| part.name.as_str()).collect();
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
            .map_err(|reason| LoadError::Device {
                what: what.to_owned(),
                reason,
            })
    }

    pub fn vector_if(
        &mut self,
        wanted: bool,
        parts: &[Rows],
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

/// Whether the tensors `what` are quantised where the model is, to `format`.
///
/// Routers never are: they are small, and an error in one chooses other experts. A ternary model is so in its layers; the rest stays as it is.
fn is_quantised_to(format: Format, what: &str) -> bool {
    let router = [".mlp.gate.weight", ".mlp.router.weight"]
        .iter()
        .any(|name| what.ends_with(name));
    !router && (format != Format::Tq2_0 || what.contains("_proj"))
}

fn suffixed(rows: &[Rows], suffix: &str) -> Vec<Rows> {
    let suffixed = |rows: &Rows| Rows {
        name: format!("{}{suffix}", rows.name),
        ..rows.clone()
    };
    rows.iter().map(suffixed).collect()
}

/// All of a tensor, as a part of a matrix of `cols` columns.
fn part<'a>(view: &'a TensorView<'_>, cols: usize) -> MatrixPart<'a> {
    MatrixPart {
        rows: view.shape[0],
        cols,
        format: view.format,
        data: &view.data,
        order: view.order.as_deref(),
    }
}

/// Appends a vector's elements as f32.
fn widen(name: &str, view: &TensorView<'_>, out: &mut Vec<f32>) -> Result<(), LoadError> {
    if view.format.is_quantised() {
        return Err(LoadError::Device {
            what: name.to_owned(),
            reason: quire_kernels::Error::Shape(format!(
                "a vector of parameters is stored as {}, expected f32, f16 or bf16",
                view.format.name()
            )),
        });
    }
    view.format.dequantize(&view.data, out);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routers_are_never_quantised() {
        for format in [Format::Q4_0, Format::Q8_0, Format::Tq2_0] {
            for router in ["gate", "router"] {
                let name = format!("model.layers.3.mlp.{router}.weight");
                assert!(!is_quantised_to(format, &name), "{name}");
            }
            let experts = "model.layers.3.mlp.experts.gate_up_proj";
            assert!(is_quantised_to(format, experts));
            assert!(is_quantised_to(
                format,
                "model.layers.3.mlp.gate_proj.weight"
            ));
        }
        assert!(is_quantised_to(Format::Q8_0, "lm_head.weight"));
        assert!(!is_quantised_to(Format::Tq2_0, "lm_head.weight"));
    }

    #[test]
    fn what_a_device_says_is_printed_once() {
        let error = anyhow::Error::new(LoadError::Device {
            what: "activation buffers".to_owned(),
            reason: quire_kernels::Error::OutOfMemory {
                what: "activations",
                bytes: 7,
            },
        });
        let text = format!("{error:#}");
        assert_eq!(text.matches("cannot allocate").count(), 1, "{text}");
    }
}
