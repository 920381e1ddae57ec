//! Random data and small drivers for the kernel tests.
#![allow(dead_code, clippy::unwrap_used)]

use std::num::NonZero;

use half::{bf16, f16};
use quire_kernels::cpu::{Activations, CpuBackend, CpuOptions, Isa, Numa};
use quire_kernels::quantize::{Bits, Grouped, Scale, Zero, e4m3};
use quire_kernels::{Backend, Format, MatrixPart, Span, Step, quantize};

/// Every format; of those with parameters, every kernel with groups and scales that make a difference.
pub fn formats() -> Vec<Format> {
    let grouped = |bits, group, scale, zero| {
        Format::Grouped(Grouped {
            bits,
            group,
            scale,
            zero,
        })
    };
    let mut formats = Format::ALL.to_vec();
    formats.extend([
        grouped(Bits::Two, 256, Scale::F32, Zero::Point),
        grouped(Bits::Two, 32, Scale::Bf16, Zero::Bias),
        grouped(Bits::Four, 32, Scale::F32, Zero::Point),
        grouped(Bits::Four, 128, Scale::F16, Zero::Point),
        grouped(Bits::Four, 64, Scale::Bf16, Zero::Bias),
        grouped(Bits::Four, 96, Scale::F32, Zero::Bias),
        grouped(Bits::Eight, 64, Scale::Bf16, Zero::Point),
        grouped(Bits::Eight, 32, Scale::F16, Zero::Bias),
        Format::F8E4m3 { group: 128 },
        Format::F8E4m3 { group: 36 },
    ]);
    formats
}

/// SplitMix64 (Steele et al. 2014).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// In -1..1.
    pub fn float(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    pub fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.float()).collect()
    }
}

pub fn backend(threads: usize, isa: Option<Isa>) -> CpuBackend {
    CpuBackend::new(CpuOptions {
        threads: Some(threads),
        pin: false,
        isa,
        numa: Numa::Off,
        bf16_activations: false,
    })
    .unwrap()
}

/// A backend whose threads, weights and KV heads are divided among nodes that are none.
pub fn on_nodes(nodes: u16, threads: usize) -> CpuBackend {
    CpuBackend::new(CpuOptions {
        threads: Some(threads),
        pin: false,
        isa: None,
        numa: Numa::Emulated(NonZero::new(nodes).unwrap()),
        bf16_activations: false,
    })
    .unwrap()
}

/// As [`backend`], with activations rounded to bfloat16 where weights are.
pub fn rounding(threads: usize, isa: Isa) -> CpuBackend {
    CpuBackend::new(CpuOptions {
        threads: Some(threads),
        pin: false,
        isa: Some(isa),
        numa: Numa::Off,
        bf16_activations: true,
    })
    .unwrap()
}

/// Backends that must all give the same bits.
pub fn backends() -> Vec<CpuBackend> {
    let mut all = vec![backend(1, None), backend(3, None)];
    // As many threads on each node, and more on one than on the other.
    all.extend([on_nodes(2, 2), on_nodes(2, 3), on_nodes(4, 4)]);
    all.extend(isas().map(|isa| backend(1, Some(isa))));
    all
}

/// The instruction sets this processor has.
pub fn isas() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.is_available())
}

/// The bytes a checkpoint holds for `x`, and the values they stand for; rows have whole blocks.
///
/// Of the formats this crate does not quantise to, random blocks: `x` decides their scales.
pub fn encode(format: Format, x: &[f32]) -> (Vec<u8>, Vec<f32>) {
    let mut bytes = Vec::new();
    let mut values = Vec::new();
    match format {
        Format::F32 => {
            bytes.extend(x.iter().flat_map(|v| v.to_le_bytes()));
            values.extend_from_slice(x);
        }
        Format::F16 => {
            for &v in x {
                bytes.extend(f16::from_f32(v).to_le_bytes());
                values.push(f16::from_f32(v).to_f32());
            }
        }
        Format::Bf16 => {
            for &v in x {
                bytes.extend(bf16::from_f32(v).to_le_bytes());
                values.push(bf16::from_f32(v).to_f32());
            }
        }
        Format::Q8_0 => {
            for block in x.as_chunks::<32>().0 {
                let (scale, q) = quantize::q8_0(block);
                bytes.extend(quantize::write_q8_0(scale, &q));
                values.extend(q.map(|q| scale.to_f32() * f32::from(q)));
            }
        }
        Format::Q4_0 => {
            for block in x.as_chunks::<32>().0 {
                let (scale, q) = quantize::q4_0(block);
                bytes.extend(quantize::write_q4_0(scale, &q));
                values.extend(q.map(|q| scale.to_f32() * (f32::from(q) - 8.0)));
            }
        }
        Format::Grouped(grouped) => {
            for block in x.chunks_exact(grouped.group) {
                bytes.extend(random_group(grouped, block));
            }
            format.dequantize(&bytes, &mut values);
        }
        Format::F8E4m3 { group } => {
            for block in x.chunks_exact(group) {
                bytes.extend((block[0] / 100.0).to_le_bytes());
                let quants = block.iter().map(|x| x.to_bits().wrapping_mul(11) as u8);
                bytes.extend(quants.map(|b| if e4m3::is_nan(b) { 1 } else { b }));
            }
            format.dequantize(&bytes, &mut values);
        }
        _ => {
            for block in x.chunks_exact(format.block_size()) {
                bytes.extend(random_block(format, block));
            }
            format.dequantize(&bytes, &mut values);
        }
    }
    (bytes, values)
}

/// A block of random bytes with sensible scales.
fn random_block(format: Format, x: &[f32]) -> Vec<u8> {
    let mut random = Random(u64::from(x[0].to_bits()));
    let mut block: Vec<u8> = (0..format.block_bytes())
        .map(|_| random.next() as u8)
        .collect();
    let halves: &[usize] = match format {
        Format::Q4_1 | Format::Q5_1 | Format::Q4K | Format::Q5K => &[0, 2],
        Format::Q2K => &[80, 82],
        Format::Q3K => &[108],
        Format::Q6K => &[208],
        Format::Tq1_0 => &[52],
        Format::Tq2_0 => &[64],
        Format::Mxfp4 => {
            block[0] = 120 + block[0] % 8;
            &[]
        }
        _ => &[0],
    };
    for (&at, x) in halves.iter().zip(x) {
        block[at..at + 2].copy_from_slice(&f16::from_f32(x / 50.0).to_le_bytes());
    }
    block
}

/// A group of random quants: `x` decides its scale.
fn random_group(grouped: Grouped, x: &[f32]) -> Vec<u8> {
    let mut random = Random(u64::from(x[0].to_bits()));
    let float = |x: f32| match grouped.scale {
        Scale::F16 => f16::from_f32(x).to_le_bytes().to_vec(),
        Scale::Bf16 => bf16::from_f32(x).to_le_bytes().to_vec(),
        Scale::F32 => x.to_le_bytes().to_vec(),
    };
    let largest = (1 << grouped.bits.count()) as f32;
    let mut block = float(x[0] / largest);
    match grouped.zero {
        Zero::Point => block.push(random.below(largest as usize) as u8),
        Zero::Bias => block.extend(float(x[1])),
    }
    let quants = grouped.block_bytes() - block.len();
    block.extend((0..quants).map(|_| random.next() as u8));
    block
}

pub fn part(rows: usize, cols: usize, format: Format, data: &[u8]) -> MatrixPart<'_> {
    MatrixPart {
        rows,
        cols,
        format,
        data,
        order: None,
    }
}

pub fn filled(backend: &CpuBackend, rows: usize, cols: usize, values: &[f32]) -> Activations {
    let mut a = backend.activations(rows, cols).unwrap();
    a.as_mut_slice()[..values.len()].copy_from_slice(values);
    a
}

/// A step of `rows` rows of one sequence, beginning at position 0, with blocks `0..`.
pub fn plain_step(rows: usize) -> Step {
    step(&[(0, rows)], 16)
}

/// A step of several sequences `(start, rows)`, whose block tables follow each other.
pub fn step(spans: &[(usize, usize)], block_size: usize) -> Step {
    let mut step = Step::default();
    let mut block = 0;
    for &(start, rows) in spans {
        let blocks = (start + rows).div_ceil(block_size) as u32;
        step.spans.push(Span {
            row: step.tokens.len() as u32,
            rows: rows as u32,
            start: start as u32,
            table: step.block_tables.len() as u32,
            beyond: false,
        });
        step.block_tables.extend(block..block + blocks);
        block += blocks;
        step.tokens.extend((0..rows).map(|i| i as u32));
        step.positions
            .extend((start..start + rows).map(|p| p as u32));
    }
    step
}

/// Each row of `x` [rows, weight], normalised by its root mean square.
pub fn normalised(x: &[f32], weight: &[f32], eps: f64) -> Vec<f64> {
    let rows = x.chunks(weight.len()).flat_map(|row| {
        let squares = row.iter().map(|v| f64::from(*v).powi(2));
        let root = (squares.sum::<f64>() / row.len() as f64 + eps).sqrt();
        let of = move |(x, w): (&f32, &f32)| f64::from(*x) / root * f64::from(*w);
        row.iter().zip(weight).map(of)
    });
    rows.collect()
}

/// `x · wᵀ`, `[rows, n]`, of `x` [rows, k] and `w` [n, k].
pub fn multiplied(x: &[f64], w: &[f32], k: usize) -> Vec<f64> {
    let dot = |x: &[f64], w: &[f32]| x.iter().zip(w).map(|(x, w)| x * f64::from(*w)).sum::<f64>();
    let rows = x.chunks(k);
    rows.flat_map(|x| w.chunks(k).map(move |w| dot(x, w)))
        .collect()
}

pub fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|v| v.to_bits()).collect()
}

/// The largest difference, relative to the largest expected magnitude.
pub fn error(got: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let scale = expected.iter().fold(1e-30_f64, |m, v| m.max(v.abs()));
    got.iter()
        .zip(expected)
        .fold(0.0_f64, |m, (g, e)| m.max((f64::from(*g) - e).abs()))
        / scale
}
