//! Packs the experts of a layer: each projection of all experts becomes one matrix, however the checkpoint stores them.
//!
//! | stored as | by |
//! |---|---|
//! | `experts.3.gate_proj.weight`, one tensor for each expert and projection | Qwen3-MoE |
//! | `experts.gate_proj.weight` `[experts, n, hidden]` | GGUF (`ffn_gate_exps`) |
//! | `experts.gate_up_proj` `[experts, 2n, hidden]` | transformers 5 |
//! | `experts.gate_up_proj` `[experts, hidden, 2n]`, gate and input columns in turn | gpt-oss in bf16 |
//! | `experts.gate_up_proj_blocks` and `_scales`, rows in turn | gpt-oss in MXFP4 |

use std::borrow::Cow;

use quire_kernels::{Backend, Format, MatrixPart, Shard};

use super::ExpertsConfig;
use super::load::{LoadError, Loader, Mlp};
use super::slices::{self, Rows};
use crate::checkpoint::{CheckpointError, Tensors};

/// Elements of an MXFP4 block.
const BLOCK: usize = 32;

/// A matrix part, borrowed or made.
struct Part<'a> {
    rows: usize,
    cols: usize,
    format: Format,
    data: Cow<'a, [u8]>,
    /// The input feature of each column, where they are sorted.
    order: Option<Vec<u32>>,
}

impl Part<'_> {
    fn as_matrix(&self) -> MatrixPart<'_> {
        MatrixPart {
            rows: self.rows,
            cols: self.cols,
            format: self.format,
            data: &self.data,
            order: self.order.as_deref(),
        }
    }
}

impl<B: Backend> Loader<'_, B> {
    /// The mixture of experts of layer `layer`.
    pub fn experts(
        &mut self,
        of: &ExpertsConfig,
        hidden: usize,
        layer: usize,
    ) -> Result<Mlp<B>, LoadError> {
        let mlp = format!("model.layers.{layer}.mlp");
        let count = of.count;
        // gpt-oss calls it `router`, others `gate`.
        let router = if self.tensors.contains(&format!("{mlp}.router.weight")) {
            "router"
        } else {
            "gate"
        };
        let stored = Stored {
            tensors: self.tensors,
            experts: format!("{mlp}.experts"),
        };
        let gate_up = stored.gate_up(of, hidden)?;
        let gate_up = self.gate_up(&format!("{mlp}.experts.gate_up_proj"), &gate_up, of)?;
        let down = stored.down(of, hidden)?;
        let down = self.down(&format!("{mlp}.experts.down_proj"), &down)?;
        let router_bias =
            self.vector_if(of.bias, &[Rows::all(format!("{mlp}.{router}.bias"), count)])?;
        let (gate_up_bias, down_bias) = if of.bias {
            let gate_up = self.gate_up_bias(&mlp, of)?;
            let mut down = Vec::new();
            let name = self.either(&mlp, "experts.down_proj_bias", "experts.down_proj.bias");
            self.values(&name, &[count, hidden], &mut down)?;
            let down = self.cuts.is_first().then_some(down);
            (
                Some(self.upload(&format!("{mlp}.experts.gate_up_proj_bias"), &gate_up)?),
                down.map(|down| self.upload(&name, &down)).transpose()?,
            )
        } else {
            (None, None)
        };
        Ok(Mlp::Experts {
            router: self.matrix(
                &[Rows::all(format!("{mlp}.{router}.weight"), count)],
                hidden,
            )?,
            router_bias,
            gate_up,
            gate_up_bias,
            down,
            down_bias,
            of: ExpertsConfig {
                intermediate_size: self.cuts.expert.len(),
                ..of.clone()
            },
        })
    }

    /// Which of two names of a layer's tensor there is; the first if neither.
    fn either(&self, mlp: &str, first: &str, second: &str) -> String {
        let [first, second] = [first, second].map(|rest| format!("{mlp}.{rest}"));
        if !self.tensors.contains(&first) && self.tensors.contains(&second) {
            second
        } else {
            first
        }
    }

    /// Packs this rank's rows of the experts' gates and inputs. A part is one of the two, or both.
    fn gate_up(
        &mut self,
        what: &str,
        stored: &[Part<'_>],
        of: &ExpertsConfig,
    ) -> Result<B::Matrix, LoadError> {
        let (n, keep) = (of.intermediate_size, self.cuts.expert.clone());
        let parts: Vec<MatrixPart<'_>> = stored
            .iter()
            .flat_map(|part| {
                let firsts = (0..part.rows).step_by(n);
                firsts.map(|first| {
                    slices::rows(&part.as_matrix(), &(first + keep.start..first + keep.end))
                })
            })
            .collect();
        let read = stored.iter().map(|part| part.data.len()).sum();
        self.pack(what, &parts, None, read)
    }

    /// Packs this rank's columns of the experts' outputs.
    fn down(&mut self, what: &str, stored: &[Part<'_>]) -> Result<B::Matrix, LoadError> {
        let keep = self.cuts.expert.clone();
        let data = stored
            .iter()
            .map(|part| self.columns_of(what, &part.as_matrix(), &keep))
            .collect::<Result<Vec<_>, _>>()?;
        let parts: Vec<MatrixPart<'_>> = stored
            .iter()
            .zip(&data)
            .map(|(part, data)| MatrixPart {
                cols: keep.len(),
                data,
                ..part.as_matrix()
            })
            .collect();
        let read = stored.iter().map(|part| part.data.len()).sum();
        self.pack(what, &parts, Some(Shard::Columns), read)
    }

    /// This rank's part of `[experts · 2n]`, of each expert its gate's, then its input's.
    fn gate_up_bias(&mut self, mlp: &str, of: &ExpertsConfig) -> Result<Vec<f32>, LoadError> {
        let whole = self.whole_gate_up_bias(mlp, of)?;
        let halves = whole.chunks_exact(of.intermediate_size);
        let keep = self.cuts.expert.clone();
        Ok(halves
            .flat_map(|half| &half[keep.clone()])
            .copied()
            .collect())
    }

    fn whole_gate_up_bias(&mut self, mlp: &str, of: &ExpertsConfig) -> Result<Vec<f32>, LoadError> {
        let (count, n) = (of.count, of.intermediate_size);
        let mut out = Vec::with_capacity(count * 2 * n);
        let separate = format!("{mlp}.experts.gate_proj.bias");
        if self.tensors.contains(&separate) {
            let (mut gate, mut up) = (Vec::new(), Vec::new());
            self.values(&separate, &[count, n], &mut gate)?;
            self.values(&format!("{mlp}.experts.up_proj.bias"), &[count, n], &mut up)?;
            for (gate, up) in gate.chunks_exact(n).zip(up.chunks_exact(n)) {
                out.extend_from_slice(gate);
                out.extend_from_slice(up);
            }
            return Ok(out);
        }
        let mut fused = Vec::new();
        let name = format!("{mlp}.experts.gate_up_proj_bias");
        self.values(&name, &[count, 2 * n], &mut fused)?;
        for expert in fused.chunks_exact(2 * n) {
            if of.interleaved {
                out.extend(expert.iter().step_by(2));
                out.extend(expert.iter().skip(1).step_by(2));
            } else {
                out.extend_from_slice(expert);
            }
        }
        Ok(out)
    }
}

/// The tensors of a layer's experts, as they are stored.
struct Stored<'a> {
    tensors: &'a Tensors,
    /// What their names begin with.
    experts: String,
}

impl<'a> Stored<'a> {
    /// Gate and input projections: of each expert in turn its gate's rows, then its input's.
    fn gate_up(&self, of: &ExpertsConfig, hidden: usize) -> Result<Vec<Part<'a>>, CheckpointError> {
        let (count, n) = (of.count, of.intermediate_size);
        let experts = &self.experts;
        if self
            .tensors
            .contains(&format!("{experts}.gate_proj.weight"))
        {
            let gate = self.stacked(&format!("{experts}.gate_proj.weight"), count, n, hidden)?;
            let up = self.stacked(&format!("{experts}.up_proj.weight"), count, n, hidden)?;
            return Ok(in_turn(gate, up));
        }
        if self
            .tensors
            .contains(&format!("{experts}.gate_up_proj_blocks"))
        {
            let name = format!("{experts}.gate_up_proj");
            let rows = self.mxfp4(&name, count, 2 * n, hidden)?;
            return Ok(rows.into_iter().map(halves_apart).collect());
        }
        let fused = format!("{experts}.gate_up_proj");
        if self.tensors.contains(&fused) {
            if !of.interleaved {
                return self.stacked(&fused, count, 2 * n, hidden);
            }
            let rows = self.transposed(&fused, count, hidden, 2 * n)?;
            return Ok(rows.into_iter().map(halves_apart).collect());
        }
        let mut rows = Vec::with_capacity(2 * count);
        for expert in 0..count {
            for projection in ["gate_proj", "up_proj"] {
                let name = format!("{experts}.{expert}.{projection}.weight");
                rows.push(self.single(&name, n, hidden)?);
            }
        }
        Ok(rows)
    }

    /// Output projections, one expert after the other.
    fn down(&self, of: &ExpertsConfig, hidden: usize) -> Result<Vec<Part<'a>>, CheckpointError> {
        let (count, n) = (of.count, of.intermediate_size);
        let experts = &self.experts;
        if self
            .tensors
            .contains(&format!("{experts}.down_proj.weight"))
        {
            return self.stacked(&format!("{experts}.down_proj.weight"), count, hidden, n);
        }
        if self
            .tensors
            .contains(&format!("{experts}.down_proj_blocks"))
        {
            return self.mxfp4(&format!("{experts}.down_proj"), count, hidden, n);
        }
        let fused = format!("{experts}.down_proj");
        if self.tensors.contains(&fused) {
            return if of.interleaved {
                self.transposed(&fused, count, n, hidden)
            } else {
                self.stacked(&fused, count, hidden, n)
            };
        }
        (0..count)
            .map(|expert| self.single(&format!("{experts}.{expert}.down_proj.weight"), hidden, n))
            .collect()
    }

    fn single(&self, name: &str, rows: usize, cols: usize) -> Result<Part<'a>, CheckpointError> {
        let view = self.tensors.get(name, &[rows, cols])?;
        Ok(Part {
            rows,
            cols,
            format: view.format,
            data: view.data,
            order: view.order,
        })
    }

    /// A tensor `[count, rows, cols]`, taken apart.
    fn stacked(
        &self,
        name: &str,
        count: usize,
        rows: usize,
        cols: usize,
    ) -> Result<Vec<Part<'a>>, CheckpointError> {
        let view = self.tensors.get(name, &[count, rows, cols])?;
        let bytes = view.data.len() / count;
        let part = |at: usize| match &view.data {
            Cow::Borrowed(data) => Cow::Borrowed(&data[at * bytes..(at + 1) * bytes]),
            Cow::Owned(data) => Cow::Owned(data[at * bytes..(at + 1) * bytes].to_vec()),
        };
        Ok((0..count)
            .map(|at| Part {
                rows,
                cols,
                format: view.format,
                data: part(at),
                order: view.order.clone(),
            })
            .collect())
    }

    /// A float tensor `[count, cols, rows]`, taken apart and transposed.
    fn transposed(
        &self,
        name: &str,
        count: usize,
        cols: usize,
        rows: usize,
    ) -> Result<Vec<Part<'a>>, CheckpointError> {
        let parts = self.stacked(name, count, cols, rows)?;
        Ok(parts
            .into_iter()
            .map(|part| {
                let size = part.data.len() / (rows * cols);
                let mut data = Vec::with_capacity(part.data.len());
                for row in 0..rows {
                    for col in 0..cols {
                        let at = (col * rows + row) * size;
                        data.extend_from_slice(&part.data[at..at + size]);
                    }
                }
                Part {
                    rows,
                    cols,
                    format: part.format,
                    data: Cow::Owned(data),
                    order: None,
                }
            })
            .collect())
    }

    /// `NAME_blocks` `[count, rows, cols / 32, 16]` and `NAME_scales` `[count, rows, cols / 32]` as GGML's MXFP4 blocks, which keep the scale
    /// before the elements and elements 16 apart, not neighbours, in a byte.
    fn mxfp4(
        &self,
        name: &str,
        count: usize,
        rows: usize,
        cols: usize,
    ) -> Result<Vec<Part<'a>>, CheckpointError> {
        let blocks = cols / BLOCK;
        let shape = [count, rows, blocks, BLOCK / 2];
        let elements = self.tensors.bytes(&format!("{name}_blocks"), &shape)?;
        let scales = self.tensors.bytes(&format!("{name}_scales"), &shape[..3])?;
        let per_expert = rows * blocks;
        Ok(elements
            .chunks_exact(per_expert * BLOCK / 2)
            .zip(scales.chunks_exact(per_expert))
            .map(|(elements, scales)| {
                let mut data = Vec::with_capacity(elements.len() + scales.len());
                for (pairs, scale) in elements.as_chunks::<16>().0.iter().zip(scales) {
                    data.push(*scale);
                    let at = |i: usize| pairs[i / 2] >> (4 * (i % 2)) & 15;
                    data.extend((0..BLOCK / 2).map(|i| at(i) | at(i + BLOCK / 2) << 4));
                }
                Part {
                    rows,
                    cols,
                    format: Format::Mxfp4,
                    data: Cow::Owned(data),
                    order: None,
                }
            })
            .collect())
    }
}

/// The parts of two lists in turn.
fn in_turn<'a>(first: Vec<Part<'a>>, second: Vec<Part<'a>>) -> Vec<Part<'a>> {
    first
        .into_iter()
        .zip(second)
        .flat_map(|(first, second)| [first, second])
        .collect()
}

/// Even rows, then odd ones.
fn halves_apart(part: Part<'_>) -> Part<'_> {
    let bytes = part.data.len() / part.rows;
    let rows = || part.data.chunks_exact(bytes);
    let mut data = Vec::with_capacity(part.data.len());
    for row in rows().step_by(2).chain(rows().skip(1).step_by(2)) {
        data.extend_from_slice(row);
    }
    Part {
        data: Cow::Owned(data),
        ..part
    }
}
