//! Attention: which kernels, over which work lists.

use super::backend::{CudaBackend, operand_precision};
use super::buffers::{Activations, KvCache, Vector};
use super::params;
use super::plan::{APART, Heads, List, TOGETHER, Wave};
use super::scratch::Purpose;
use crate::{AttentionShape, Error, KvDtype, KvLayer, Span, Step};

/// Heads of a block of the kernel without tensor cores, and the largest it takes.
const PLAIN_HEADS: usize = 4;
const PLAIN_D: usize = 512;

/// The head sizes that the tensor-core kernels are compiled for; others are padded to the next.
const SIZES: [usize; 3] = [64, 128, 256];

/// The kernels on tensor cores for heads of up to `size` elements: together, split. None for f32, which they do not multiply.
fn kernels(dtype: KvDtype, size: usize) -> Option<(&'static str, &'static str)> {
    Some(match (dtype, size) {
        (KvDtype::F16, 64) => ("attention_together_64_f16", "attention_split_64_f16"),
        (KvDtype::F16, 128) => ("attention_together_128_f16", "attention_split_128_f16"),
        (KvDtype::F16, 256) => ("attention_together_256_f16", "attention_split_256_f16"),
        (KvDtype::Bf16, 64) => ("attention_together_64_bf16", "attention_split_64_bf16"),
        (KvDtype::Bf16, 128) => ("attention_together_128_bf16", "attention_split_128_bf16"),
        (KvDtype::Bf16, 256) => ("attention_together_256_bf16", "attention_split_256_bf16"),
        (KvDtype::Fp8, 64) => ("attention_together_64_fp8", "attention_split_64_fp8"),
        (KvDtype::Fp8, 128) => ("attention_together_128_fp8", "attention_split_128_fp8"),
        (KvDtype::Fp8, 256) => ("attention_together_256_fp8", "attention_split_256_fp8"),
        _ => return None,
    })
}

/// Whether rows of `d` elements can be copied 16 bytes at a time.
fn has_whole_chunks(dtype: KvDtype, d: usize) -> bool {
    match dtype {
        KvDtype::Fp8 => d.is_multiple_of(16),
        _ => d.is_multiple_of(8),
    }
}

/// Shared memory of a block; as the kernels lay it out.
fn shared(dtype: KvDtype, size: usize, split: bool) -> usize {
    let positions = if !split && size > 128 { 32 } else { 64 };
    // Of a key and a value, scales included, and of a query.
    let (both, query) = (dtype.head_bytes(1, size), size * size_of::<u16>());
    let large = size > 128 && dtype != KvDtype::Fp8;
    let stages = if split && large { 1 } else { 2 };
    let queries = if split { APART } else { TOGETHER } as usize;
    let tiles = queries * query + stages * positions * both;
    if split {
        // The sums of four warps take their place, 8 floats between queries.
        tiles.max(4 * 16 * (2 + size + 8) * size_of::<f32>())
    } else {
        tiles
    }
}

/// What kernels multiply positions with instead of dividing them by a block's size: exact for the positions of this step.
fn block_inverse(step: &Step, block_size: usize) -> Result<u32, Error> {
    let size = block_size as u64;
    let exact = |span: &Span| u64::from(span.start + span.rows) * size <= 1 << 32;
    if size < 2 || !size.is_power_of_two() && !step.spans.iter().all(exact) {
        return Err(Error::Shape(format!(
            "KV blocks of {block_size} positions, which is no power of two, for a sequence of more than {}",
            (1_u64 << 32) / size.max(1)
        )));
    }
    Ok((1_u64 << 32).div_ceil(size) as u32)
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
        let dtype = kv.shape.dtype;
        let size = SIZES.into_iter().find(|&size| d <= size);
        let size = size.filter(|_| has_whole_chunks(dtype, d));
        let tensor_cores = size.and_then(|size| Some((kernels(dtype, size)?, size)));
        if tensor_cores.is_none() && d > PLAIN_D {
            return Err(Error::Shape(format!(
                "heads of {d} elements, on a GPU there are kernels up to {PLAIN_D}"
            )));
        }
        let of = Heads {
            group: (heads / kv_heads) as u32,
            of_kv: kv_heads as u32,
            tensor_cores: tensor_cores.is_some(),
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
            dtype: kv.dtype(),
            window: shape.window.map_or(0, |window| window.min(i32::MAX as u32)) as i32,
            scale: shape.scale,
            softcap: shape.softcap.unwrap_or(0.0),
            block_inverse: block_inverse(&self.step, kv.shape.block_size)?,
            first: 0,
        };
        let Some(((together, split), size)) = tensor_cores else {
            let blocks = heads.div_ceil(PLAIN_HEADS);
            let all = [0, self.plan.count(List::Rows)];
            self.attention_list(List::Rows, all, "attention_plain", blocks, 0, attention);
            return Ok(());
        };
        let bytes = shared(dtype, size, false);
        let all = [0, self.plan.count(List::Together)];
        self.attention_list(List::Together, all, together, kv_heads, bytes, attention);
        let bytes = shared(dtype, size, true);
        for index in 0..self.plan.waves().len() {
            let Wave { splits, merges } = self.plan.waves()[index];
            self.attention_list(List::Split, splits, split, kv_heads, bytes, attention);
            let merge = "attention_merge";
            self.attention_list(List::Merge, merges, merge, kv_heads, 0, attention);
        }
        Ok(())
    }

    /// Launches a kernel over `count` items of a list, from `first` on.
    fn attention_list(
        &mut self,
        list: List,
        [first, count]: [usize; 2],
        kernel: &'static str,
        blocks: usize,
        shared: usize,
        attention: params::Attention,
    ) {
        let of_list = params::Attention {
            list: list as i32,
            first: first as i32,
            ..attention
        };
        self.launch(kernel, (count, blocks), shared, &of_list);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_product_with_the_inverse_is_the_quotient_for_every_position_that_is_allowed() {
        let step = |end| Step {
            spans: vec![Span {
                row: 0,
                rows: 1,
                start: end - 1,
                table: 0,
                beyond: false,
            }],
            ..Step::default()
        };
        for size in (16..2000_usize).step_by(16).chain([1 << 20]) {
            let end = if size.is_power_of_two() {
                u32::MAX
            } else {
                ((1_u64 << 32) / size as u64) as u32
            };
            let inverse = block_inverse(&step(end), size).unwrap();
            let ends = (0..2000_u32).chain((0..2000).map(|i| end - 1 - i));
            let edges = (1..2000_u32).map(|i| (end / 2000 * i / size as u32) * size as u32);
            for at in ends.chain(edges.flat_map(|edge| [edge.saturating_sub(1), edge])) {
                let quotient = (u64::from(at) * u64::from(inverse)) >> 32;
                assert_eq!(quotient, u64::from(at / size as u32), "{at} / {size}");
            }
        }
        assert!(block_inverse(&step(200_000_000), 24).is_err());
    }

    #[test]
    fn a_block_of_attention_fits_the_shared_memory_of_every_gpu() {
        for dtype in [KvDtype::F16, KvDtype::Bf16, KvDtype::Fp8] {
            for size in SIZES {
                assert!(shared(dtype, size, true) <= 99 << 10, "{dtype:?} {size}");
                assert!(shared(dtype, size, false) <= 99 << 10, "{dtype:?} {size}");
            }
        }
    }
}
