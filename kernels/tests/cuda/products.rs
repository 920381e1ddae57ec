//! Products of every format, with few rows and many, on odd shapes.

use quire_kernels::cuda::CudaBackend;
use quire_kernels::{Backend, Format, MatrixPart};

use crate::common::{Random, bits, encode, formats, plain_step};
use crate::machine::{Machine, distance, exact, gpu, gpu_with_library, of};

/// Rows on both sides of every kernel's tile.
const ROWS: [usize; 9] = [1, 2, 8, 9, 16, 23, 33, 65, 130];

struct Case {
    format: Format,
    features: usize,
    cols: usize,
    x: Vec<f32>,
    stored: Vec<u8>,
    values: Vec<f32>,
    bias: Option<Vec<f32>>,
}

impl Case {
    fn new(random: &mut Random, format: Format, rows: usize) -> Self {
        let block = format.block_size();
        let unit = if block == 1 { 8 } else { block };
        let cols = unit * (1 + random.below(300 / unit + 2));
        let features = 1 + random.below(if rows > 32 { 180 } else { 40 });
        let (stored, values) = encode(format, &random.floats(features * cols));
        Self {
            format,
            features,
            cols,
            x: exact(random, rows * cols),
            stored,
            values,
            bias: (random.below(2) == 0).then(|| random.floats(features)),
        }
    }

    fn run(&self, gpu: &mut CudaBackend, x: &[f32], before: f32, add: bool) -> Vec<f32> {
        let rows = x.len() / self.cols;
        gpu.begin(&plain_step(rows)).unwrap();
        let part = of(self.features, self.cols, self.format, &self.stored);
        let matrix = gpu.matrix(&[part], None).unwrap();
        let bias = self.bias.as_ref().map(|bias| gpu.vector(bias).unwrap());
        let input = gpu.filled(rows, self.cols, x);
        let mut out = gpu.filled(rows, self.features, &vec![before; rows * self.features]);
        if add {
            gpu.linear_add(&input, &matrix, bias.as_ref(), &mut out)
        } else {
            gpu.linear(&input, &matrix, bias.as_ref(), &mut out)
        }
        .unwrap();
        gpu.read(&out, rows)
    }

    fn reference(&self, before: f64) -> Vec<f64> {
        let mut out = Vec::new();
        for x in self.x.chunks(self.cols) {
            for (f, w) in self.values.chunks(self.cols).enumerate() {
                let dot: f64 = x
                    .iter()
                    .zip(w)
                    .map(|(x, w)| f64::from(*x) * f64::from(*w))
                    .sum();
                let bias = self.bias.as_ref().map_or(0.0, |bias| f64::from(bias[f]));
                out.push(before + dot + bias);
            }
        }
        out
    }

    fn allowed(&self) -> f64 {
        match self.format {
            // Exact operands, f32 sums.
            Format::F32 | Format::Bf16 | Format::F16 => 1e-5,
            // Weights are rounded to bf16.
            _ => 1e-2,
        }
    }
}

#[test]
fn products_of_every_format_equal_their_definition() {
    let mut random = Random(1);
    let mut gpu = gpu(false);
    for format in formats() {
        for rows in ROWS {
            let case = Case::new(&mut random, format, rows);
            let got = case.run(&mut gpu, &case.x, f32::NAN, false);
            let error = distance(&got, &case.reference(0.0));
            let shape = [rows, case.features, case.cols];
            assert!(error < case.allowed(), "{format:?} {shape:?}: {error}");
        }
    }
}

#[test]
fn a_product_is_added_to_what_is_there() {
    let mut random = Random(2);
    let mut gpu = gpu(false);
    for (format, rows) in [
        (Format::Bf16, 5),
        (Format::Q8_0, 70),
        (Format::F32, 3),
        (Format::F16, 40),
    ] {
        let case = Case::new(&mut random, format, rows);
        let got = case.run(&mut gpu, &case.x, 3.0, true);
        assert!(distance(&got, &case.reference(3.0)) < case.allowed());
    }
}

#[test]
fn many_rows_of_few_features_are_as_defined_though_k_is_divided() {
    let mut random = Random(5);
    let mut gpu = gpu(false);
    for (format, rows, cols) in [
        (Format::Q4_0, 40, 1088),
        (Format::Q8_0, 70, 2112),
        (Format::Q4K, 130, 1280),
    ] {
        let features = 150;
        let (stored, values) = encode(format, &random.floats(features * cols));
        let case = Case {
            format,
            features,
            cols,
            x: exact(&mut random, rows * cols),
            stored,
            values,
            bias: Some(random.floats(features)),
        };
        let got = case.run(&mut gpu, &case.x, f32::NAN, false);
        let error = distance(&got, &case.reference(0.0));
        assert!(error < case.allowed(), "{format:?}: {error}");
        let got = case.run(&mut gpu, &case.x, 3.0, true);
        assert!(distance(&got, &case.reference(3.0)) < case.allowed());
    }
}

#[test]
fn prompts_are_multiplied_by_a_library_with_weights_that_are_expanded_for_it() {
    let mut random = Random(6);
    let mut gpu = gpu_with_library();
    for format in formats() {
        // Fewest rows of a prompt whose weights are expanded.
        let mut case = Case::new(&mut random, format, 512);
        case.features = case.features.min(70);
        let (stored, values) = encode(format, &random.floats(case.features * case.cols));
        (case.stored, case.values) = (stored, values);
        case.bias = case.bias.map(|bias| bias[..case.features].to_vec());
        let got = case.run(&mut gpu, &case.x, f32::NAN, false);
        let error = distance(&got, &case.reference(0.0));
        let shape = [case.features, case.cols];
        assert!(error < case.allowed(), "{format:?} {shape:?}: {error}");
        let got = case.run(&mut gpu, &case.x, 3.0, true);
        assert!(distance(&got, &case.reference(3.0)) < case.allowed());
    }
}

#[test]
fn columns_that_are_no_multiple_of_eight_are_multiplied_in_f32() {
    let mut random = Random(3);
    let mut gpu = gpu(false);
    for format in [Format::F32, Format::Bf16, Format::F16] {
        let (rows, features, cols) = (5, 9, 13);
        let (stored, values) = encode(format, &random.floats(features * cols));
        let case = Case {
            format,
            features,
            cols,
            x: random.floats(rows * cols),
            stored,
            values,
            bias: None,
        };
        let got = case.run(&mut gpu, &case.x, f32::NAN, false);
        assert!(distance(&got, &case.reference(0.0)) < 1e-6);
    }
}

#[test]
fn a_row_has_the_same_bits_alone_and_among_others_when_deterministic() {
    let mut random = Random(4);
    let mut gpu = gpu(true);
    let formats = [Format::Bf16, Format::Q4K, Format::Q8_0, Format::F32];
    // Rows of one stretch for a warp, or of several.
    for (format, long) in formats.into_iter().flat_map(|f| [(f, false), (f, true)]) {
        let mut case = Case::new(&mut random, format, 37);
        if long {
            case.cols = 2304;
            case.x = exact(&mut random, 37 * case.cols);
            let floats = random.floats(case.features * case.cols);
            (case.stored, case.values) = encode(format, &floats);
        }
        let together = case.run(&mut gpu, &case.x, f32::NAN, false);
        assert!(distance(&together, &case.reference(0.0)) < case.allowed());
        for (row, (x, expected)) in case
            .x
            .chunks(case.cols)
            .zip(together.chunks(case.features))
            .enumerate()
            .step_by(9)
        {
            let alone = case.run(&mut gpu, x, f32::NAN, false);
            assert_eq!(bits(&alone), bits(expected), "{format:?} row {row}");
        }
    }
}

#[test]
fn a_matrix_may_have_parts_in_different_formats_and_sorted_columns() {
    let mut random = Random(5);
    let (mut plain, mut with_library) = (gpu(false), gpu_with_library());
    let cols = 256;
    let order: Vec<u32> = (0..cols as u32).map(|k| (k * 77 + 5) % 256).collect();
    let grouped = formats()
        .into_iter()
        .find(|format| matches!(format, Format::Grouped(g) if g.group == 128))
        .unwrap();
    let parts = [
        (Format::Q4K, 7, None),
        (Format::Q4K, 6, None),
        (Format::Q6K, 20, None),
        (grouped, 9, Some(&order)),
        (Format::F32, 3, None),
    ];
    for rows in [3, 40, 520] {
        // Columns of the output that begin at no multiple of 16 bytes are not for the library: those of Q6_K.
        let gpu = if rows < 512 {
            &mut plain
        } else {
            &mut with_library
        };
        let x = exact(&mut random, rows * cols);
        let encoded: Vec<_> = parts
            .iter()
            .map(|&(format, features, _)| encode(format, &random.floats(features * cols)))
            .collect();
        let of_parts: Vec<MatrixPart<'_>> = parts
            .iter()
            .zip(&encoded)
            .map(|(&(format, features, order), (stored, _))| MatrixPart {
                order: order.map(Vec::as_slice),
                ..of(features, cols, format, stored)
            })
            .collect();
        gpu.begin(&plain_step(rows)).unwrap();
        let matrix = gpu.matrix(&of_parts, None).unwrap();
        let input = gpu.filled(rows, cols, &x);
        let mut out = gpu.filled(rows, 45, &vec![f32::NAN; rows * 45]);
        gpu.linear(&input, &matrix, None, &mut out).unwrap();
        let mut expected = Vec::new();
        for x in x.chunks(cols) {
            for (&(_, _, order), (_, values)) in parts.iter().zip(&encoded) {
                for w in values.chunks(cols) {
                    let column = |k: usize| order.map_or(k, |order| order[k] as usize);
                    let product = |(k, w): (usize, &f32)| f64::from(x[column(k)]) * f64::from(*w);
                    expected.push(w.iter().enumerate().map(product).sum());
                }
            }
        }
        assert!(distance(&gpu.read(&out, rows), &expected) < 1e-2);
    }
}

#[test]
fn floats_are_quantised_while_they_load() {
    let mut random = Random(6);
    let mut gpu = gpu(false);
    let (rows, features, cols) = (4, 10, 64);
    let x = exact(&mut random, rows * cols);
    let weights = random.floats(features * cols);
    let stored: Vec<u8> = weights.iter().flat_map(|w| w.to_le_bytes()).collect();
    for format in [Format::Q8_0, Format::Q4_0] {
        gpu.begin(&plain_step(rows)).unwrap();
        let part = of(features, cols, Format::F32, &stored);
        let matrix = gpu.matrix(&[part], Some(format)).unwrap();
        let bytes = format.row_bytes(cols).unwrap() * features;
        assert_eq!(gpu.matrix_bytes(&matrix), bytes, "as small as the format");
        let input = gpu.filled(rows, cols, &x);
        let mut out = gpu.filled(rows, features, &vec![f32::NAN; rows * features]);
        gpu.linear(&input, &matrix, None, &mut out).unwrap();
        let case = Case {
            format,
            features,
            cols,
            x: x.clone(),
            stored: Vec::new(),
            values: encode(format, &weights).1,
            bias: None,
        };
        assert!(distance(&gpu.read(&out, rows), &case.reference(0.0)) < 1e-2);
    }
    let part = of(features, cols, Format::F32, &stored);
    assert!(gpu.matrix(&[part], Some(Format::Tq2_0)).is_err());
}

#[test]
fn data_that_does_not_fit_its_shape_is_refused() {
    let gpu = gpu(false);
    for (rows, cols, format, bytes) in [
        (2, 32, Format::Q4_0, 35),
        (2, 33, Format::Q4_0, 36),
        (2, 8, Format::Bf16, 31),
        (usize::MAX, 8, Format::Bf16, 32),
    ] {
        let data = vec![0; bytes];
        let refused = gpu.matrix(&[of(rows, cols, format, &data)], None);
        assert!(refused.is_err(), "{rows} × {cols} {format:?}");
    }
    assert!(gpu.matrix(&[], None).is_err());
}
