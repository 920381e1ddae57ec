//! Attention: which kernels, over which work lists.

use super::backend::{CudaBackend, operand_precision};
use super::buffers::{Activations, KvCache, Vector};
use super::params;
use super::plan::{APART, Heads, List, TOGETHER};
use super::scratch::Purpose;
use crate::{AttentionShape, Error, KvLayer};

/// Heads of a block of the kernel without tensor cores, and the largest it takes.
const PLAIN_HEADS: usize = 4;
const PLAIN_D: usize = 512;

/// The head sizes that the tensor-core kernels are compiled for; others are padded to the next.
const SIZES: [usize; 3] = [64, 128, 256];

/// Shared memory of a block; as the kernels lay it out.
fn shared(size: usize, split: bool) -> usize {
    let positions = if !split && size > 128 { 32 } else { 64 };
    let stages = if split && size > 128 { 1 } else { 2 };
    let queries = if split { APART } else { TOGETHER } as usize;
    let tiles = (queries + 2 * stages * positions) * size * size_of::<u16>();
    if split {
        // The sums of four warps take their place.
        tiles.max(4 * 16 * (2 + size) * size_of::<f32>())
    } else {
        tiles
    }
}

impl CudaBackend {
    /// Records a layer's attention, whose shape and block tables were checked.
    pub(super) fn attend(
        &mut self,
        qkv: &Activations,
        layer: KvLayer,
        shape: &AttentionShape,
        sinks: Option<&Vector>,
        kv: &KvCache,
        out: &mut Activations,
    ) -> Result<(), Error> {
        let (heads, kv_heads, d) = (shape.heads, shape.kv_heads, shape.head_dim);
        let (rows, columns) = (self.rows(), (heads + 2 * kv_heads) * d);
        let size = SIZES.into_iter().find(|&size| d <= size);
        let size = size.filter(|_| d.is_multiple_of(8) && !kv.wide());
        if size.is_none() && d > PLAIN_D {
            return Err(Error::Shape(format!(
                "heads of {d} elements, on a GPU there are kernels up to {PLAIN_D}"
            )));
        }
        let of = Heads {
            group: (heads / kv_heads) as u32,
            of_kv: kv_heads as u32,
            tensor_cores: size.is_some(),
        };
        if !self.plan.attention(&self.step, of, self.deterministic) {
            return Err(Error::Shape(
                "layers whose heads are grouped differently".to_owned(),
            ));
        }
        out.check(rows, heads * d, "attention output")?;
        out.precision = operand_precision(heads * d);
        let partials = self.plan.partials;
        let attention = params::Attention {
            step: self.step_at(),
            qkv: qkv.floats(rows, columns, "queries, keys and values")?,
            cache: kv.layer(layer.index),
            sinks: match sinks {
                None => 0,
                Some(sinks) => sinks.of(heads, "attention sinks")?,
            },
            out: out.params(),
            partial: self
                .scratch
                .get(Purpose::Partial, partials * d * size_of::<f32>())?,
            softmax: self
                .scratch
                .get(Purpose::Softmax, partials * 2 * size_of::<f32>())?,
            list: 0,
            heads: heads as i32,
            kv_heads: kv_heads as i32,
            d: d as i32,
            qkv_stride: columns as i32,
            block_size: kv.shape.block_size as i32,
            page_groups: self.step.groups as i32,
            page_group: layer.group as i32,
            wide: i32::from(kv.wide()),
            window: shape.window.map_or(0, |window| window.min(i32::MAX as u32)) as i32,
            scale: shape.scale,
            softcap: shape.softcap.unwrap_or(0.0),
        };
        let lists: [(List, &'static str, usize, usize); 3] = match size {
            None => {
                let blocks = heads.div_ceil(PLAIN_HEADS);
                self.attention_list(List::Rows, "attention_plain", blocks, 0, attention);
                return Ok(());
            }
            Some(size) => {
                let (together, split) = match size {
                    64 => ("attention_together_64", "attention_split_64"),
                    128 => ("attention_together_128", "attention_split_128"),
                    _ => ("attention_together_256", "attention_split_256"),
                };
                [
                    (List::Together, together, kv_heads, shared(size, false)),
                    (List::Split, split, kv_heads, shared(size, true)),
                    (List::Merge, "attention_merge", kv_heads, 0),
                ]
            }
        };
        for (list, kernel, blocks, shared) in lists {
            self.attention_list(list, kernel, blocks, shared, attention);
        }
        Ok(())
    }

    fn attention_list(
        &mut self,
        list: List,
        kernel: &'static str,
        blocks: usize,
        shared: usize,
        attention: params::Attention,
    ) {
        let count = self.plan.count(list);
        let of_list = params::Attention {
            list: list as i32,
            ..attention
        };
        self.launch(kernel, (count, blocks), shared, &of_list);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_of_attention_fits_the_shared_memory_of_every_gpu() {
        for size in SIZES {
            assert!(shared(size, true) <= 99 << 10, "{size}");
            assert!(shared(size, false) <= 99 << 10, "{size}");
        }
    }
}
