//! What kernels are given: matrices, activations and steps that are the same every time.

use half::{bf16, f16};
use quire_kernels::cpu::{Activations, CpuBackend, CpuOptions, Matrix};
use quire_kernels::{Backend, Format, MatrixPart, Span, Step};

use crate::options::options;

/// Positions of a KV block.
pub const BLOCK: usize = 16;
/// More bytes of weights, or keys and values, than any cache holds: servers have third-level caches of 300 MiB.
pub const WORKING_SET: usize = 512 << 20;

pub fn backend() -> CpuBackend {
    with(|_| ())
}

/// One that rounds activations to bfloat16 where weights are.
pub fn rounding() -> CpuBackend {
    with(|options| options.bf16_activations = true)
}

fn with(change: impl FnOnce(&mut CpuOptions)) -> CpuBackend {
    let mut options = options().expect("`main` has looked at them");
    change(&mut options);
    CpuBackend::new(options).expect("the instruction set is available")
}

/// Numbers in [-1, 1), the same every time (SplitMix64, Steele et al. 2014).
pub fn numbers(len: usize) -> impl Iterator<Item = f32> {
    (1..=len as u64).map(|i| {
        let mut z = i.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z >> 40) as f32 / (1 << 23) as f32 - 1.0
    })
}

/// Rows as a checkpoint stores them.
pub fn stored(rows: usize, cols: usize, format: Format) -> Vec<u8> {
    let values = || numbers(rows * cols);
    match format {
        Format::F32 => values().flat_map(f32::to_le_bytes).collect(),
        Format::F16 => values()
            .flat_map(|x| f16::from_f32(x).to_le_bytes())
            .collect(),
        Format::Bf16 => values()
            .flat_map(|x| bf16::from_f32(x).to_le_bytes())
            .collect(),
        // Blocks whose scales are ordinary numbers: how long integers take to multiply does not depend on what they are.
        _ => {
            let row = format.row_bytes(cols).expect("whole blocks");
            vec![0x25; rows * row]
        }
    }
}

/// All of a matrix, as [`stored`] made it.
pub fn part(rows: usize, cols: usize, format: Format, data: &[u8]) -> MatrixPart<'_> {
    MatrixPart {
        rows,
        cols,
        format,
        data,
        order: None,
    }
}

pub fn matrix(backend: &CpuBackend, rows: usize, cols: usize, format: Format) -> Matrix {
    let data = stored(rows, cols, format);
    backend
        .matrix(&[part(rows, cols, format, &data)], None)
        .expect("a shape every format can hold")
}

pub fn activations(backend: &CpuBackend, rows: usize, cols: usize) -> Activations {
    let mut made = backend.activations(rows, cols).expect("memory");
    for (x, value) in made.as_mut_slice().iter_mut().zip(numbers(rows * cols)) {
        *x = value;
    }
    made
}

/// A step of sequences that each compute `rows` tokens from position `start`; their blocks are those of a cache made for them.
pub fn step(sequences: u32, start: u32, rows: u32) -> Step {
    let mut step = Step::default();
    let blocks = (start + rows).div_ceil(BLOCK as u32);
    for sequence in 0..sequences {
        step.spans.push(Span {
            row: sequence * rows,
            rows,
            start,
            table: step.block_tables.len() as u32,
            beyond: false,
        });
        step.tokens.resize(step.tokens.len() + rows as usize, 0);
        step.positions.extend(start..start + rows);
        step.block_tables
            .extend(sequence * blocks..(sequence + 1) * blocks);
    }
    step
}
