//! What kernels are told: the structs of `params.cuh` and of the `.cu` files, field by field.
//!
//! [`tests`] compares every size with the C++ compiler's; that fields stand in the same order is for the reader to see.

/// An address in device memory.
pub(crate) type Pointer = u64;

/// Parameters of a kernel.
///
/// # Safety
/// `#[repr(C)]`, without padding, and valid for any bits.
pub(crate) unsafe trait Params: Copy {}

/// Declares a kernel's parameters and refuses padding at compile time.
macro_rules! params {
    ($($(#[$doc:meta])* struct $name:ident { $($field:ident: $type:ty),* $(,)? })*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy)]
        #[repr(C)]
        #[allow(clippy::struct_field_names, reason = "the names are those of the kernels' structs")]
        pub(crate) struct $name { $(pub $field: $type),* }

        const _: () = assert!(size_of::<$name>() == 0 $(+ size_of::<$type>())*);

        // SAFETY: `repr(C)`, no padding by the assertion above, made of numbers.
        unsafe impl Params for $name {}
    )*};
}

/// `Precision` of `params.cuh`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub(crate) enum Precision {
    F32 = 0,
    Bf16 = 1,
}

params! {
    /// `Rows` of `params.cuh`.
    struct Rows { data: Pointer, stride: i32, precision: i32 }
    /// `Weights` of `params.cuh`.
    struct Weights { quants: Pointer, scales: Pointer, more: Pointer, cols: i32, groups: i32, group_inverse: u32, pad: i32 }
    struct Product {
        w: Weights, x: Pointer, out: Pointer, bias: Pointer, tiles: Pointer, tile_count: Pointer, row_of: Pointer,
        rows: i32, features: i32, x_stride: i32, out_stride: i32, column: i32, add: i32, splits: i32, split_cols: i32,
    }
    struct FloatProduct { of: Product, x: Rows }
    struct Expand { w: Weights, out: Pointer, first: i32, rows: i32 }
    struct Embed { step: Pointer, table: Weights, drawn: Pointer, out: Pointer, first: u32, rows: u32, scale: f32, pad: i32 }
    struct RotaryTable { step: Pointer, frequencies: Pointer, beyond: Pointer, out: Pointer, count: i32, scale: f32 }
    struct Convert { x: Rows, out: Rows, order: Pointer, cols: i32, pad: i32 }
    struct AddBias { x: Pointer, bias: Pointer, stride: i32, cols: i32 }
    struct Rule { x: Pointer, cols: i32, scale: f32, cap: f32, pad: i32 }
    struct CopyBlocks { step: Pointer, cache: Pointer, count: i32, blocks: i32, bytes: i64 }
    struct RandomValues { out: Pointer, count: i64, seed: u32, precision: i32, scale: f32, pad: i32 }
    struct RmsNorm { x: Rows, out: Rows, weight: Pointer, step: Pointer, cols: i32, eps: f32 }
    struct Add { x: Rows, weight: Pointer, out: Pointer, cols: i32, eps: f32, scale: f32, pad: i32 }
    struct Gate { gate_up: Pointer, out: Rows, n: i32, kind: i32, alpha: f32, limit: f32 }
    struct NormRopeStore {
        step: Pointer, qkv: Pointer, q_norm: Pointer, k_norm: Pointer, rotary: Pointer, cache: Pointer,
        bucket: i32, heads: i32, kv_heads: i32, d: i32, pairs: i32, block_size: i32, page_group: i32, dtype: i32, eps: f32, pad: i32,
    }
    struct Attention {
        step: Pointer, qkv: Pointer, cache: Pointer, sinks: Pointer, out: Rows, partial: Pointer, softmax: Pointer,
        list: i32, heads: i32, kv_heads: i32, d: i32, qkv_stride: i32, block_size: i32, page_groups: i32, page_group: i32, dtype: i32,
        window: i32, scale: f32, softcap: f32, block_inverse: u32, first: i32,
    }
    struct Route {
        scores: Pointer, chosen: Pointer, weights: Pointer, rows: i32, experts: i32, top_k: i32, normalised: i32,
    }
    struct Sort {
        chosen: Pointer, places: Pointer, row_of: Pointer, tiles: Pointer, tile_count: Pointer,
        choices: i32, top_k: i32, experts: i32, tile_rows: i32,
    }
    struct Sample { step: Pointer, logits: Pointer, tokens: Pointer, vocabulary: i32, one: f32 }
    struct Combine { answers: Pointer, places: Pointer, weights: Pointer, out: Pointer, cols: i32, top_k: i32, add: i32, pad: i32 }
    struct AddParts { parts: Pointer, out: Pointer, count: i64, ranks: i32, add: i32 }
    struct JoinLogits { parts: Pointer, out: Pointer, rows: i32, widest: i32, vocabulary: i32, ranks: i32 }
    /// `Step` of `params.cuh`: not a parameter but what parameters point to.
    struct Header {
        base: Pointer, rows: u32, logit_rows: u32, tokens: u32, positions: u32, beyond: u32, slots: u32, tables: u32, logits: u32,
        copies: u32, draws: u32, lists: [u32; 4], list_lengths: [u32; 4],
    }
}

/// The bytes of `params`.
pub(crate) fn bytes_of<P: Params>(params: &P) -> &[u8] {
    // SAFETY: `P` is plain data without padding (the trait's promise), borrowed for as long as the slice.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(params).cast(), size_of::<P>()) }
}
