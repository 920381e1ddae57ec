//! Matrix products of every format: right, and the same bits in every tile shape, on any number of threads, in AVX2 and plain Rust.
#![allow(clippy::unwrap_used)]

mod common;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use common::{
    Random, backend, backends, bits, encode, error, filled, formats, isas, multiplied, part,
    plain_step, rounding,
};
use half::bf16;
use quire_kernels::cpu::{CpuBackend, Isa};
use quire_kernels::quantize::{Bits, Grouped, Scale, Zero};
use quire_kernels::{Backend, Error, Format, MatrixPart, Step};

/// `[rows, n]` of `x · wᵀ + bias`.
fn product(
    backend: &mut CpuBackend,
    (format, bytes): (Format, &[u8]),
    (n, k): (usize, usize),
    x: &[f32],
    bias: Option<&[f32]>,
) -> Vec<f32> {
    let rows = x.len() / k;
    let matrix = backend.matrix(&[part(n, k, format, bytes)], None).unwrap();
    let bias = bias.map(|bias| backend.vector(bias).unwrap());
    let input = filled(backend, rows, k, x);
    let mut out = backend.activations(rows, n).unwrap();
    backend.begin(&plain_step(rows)).unwrap();
    backend
        .linear(&input, &matrix, bias.as_ref(), &mut out)
        .unwrap();
    out.as_slice().to_vec()
}

/// Every third one has rows enough for panels to be taken apart or kept widened, and the first more than stay in a core's cache.
#[test]
fn products_equal_a_double_precision_reference() {
    let mut random = Random(1);
    let mut backends: Vec<_> = isas().map(|isa| backend(2, Some(isa))).collect();
    for format in formats() {
        for case in 0..18 {
            let many = case % 3 == 0;
            let (least, most, longest) = if many { (21, 300, 1024) } else { (1, 20, 512) };
            let blocks = longest / format.block_size();
            let (rows, blocks) = if case == 0 {
                (most, blocks)
            } else {
                (
                    least + random.below(most - least + 1),
                    1 + random.below(blocks),
                )
            };
            let k = blocks * format.block_size();
            let n = 1 + random.below(150);
            let (bytes, w) = encode(format, &random.floats(n * k));
            let x = random.floats(rows * k);
            let bias = random.floats(n);
            let wide: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
            let mut expected = multiplied(&wide, &w, k);
            for (y, b) in expected.iter_mut().zip(bias.iter().cycle()) {
                *y += f64::from(*b);
            }
            // Integer products round the activations to 8 bits. Of many results the largest, which errors are compared with, is never small by chance.
            let allowed = match format.multiplies_integers() {
                true if many => 0.01,
                true => 0.02,
                false => 1e-5,
            };
            for backend in &mut backends {
                let got = product(backend, (format, &bytes), (n, k), &x, Some(&bias));
                let error = error(&got, &expected);
                assert!(
                    error < allowed,
                    "{format:?} {rows} × {k} × {n}, {backend:?}: {error}"
                );
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_alone_and_among_others_on_any_backend() {
    let mut random = Random(2);
    for format in formats() {
        for rows in [1, 2, 3, 4, 5, 6, 7, 8, 13, 40] {
            let block = format.block_size().max(32);
            let (n, k) = (
                1 + random.below(200),
                block * (1 + random.below(192 / block + 1)),
            );
            let (bytes, _) = encode(format, &random.floats(n * k));
            let x = random.floats(rows * k);
            let mut all: Vec<Vec<u32>> = Vec::new();
            for mut backend in backends() {
                let together = product(&mut backend, (format, &bytes), (n, k), &x, None);
                let alone: Vec<f32> = x
                    .chunks(k)
                    .flat_map(|row| product(&mut backend, (format, &bytes), (n, k), row, None))
                    .collect();
                assert_eq!(
                    bits(&together),
                    bits(&alone),
                    "{format:?} {rows} × {k} × {n}"
                );
                all.push(bits(&together));
            }
            assert!(
                all.iter().all(|x| *x == all[0]),
                "{format:?}: backends differ"
            );
        }
    }
}

/// To the bit: of every two k first the product of the second is added, then that of the first, each rounded once. With activations rounded to bfloat16,
/// ties to even, that is `vdpbf16ps` as Intel's manual defines it; and AMX is as it defines `tdpbf16ps`.
#[test]
fn bfloat16_products_are_what_the_instruction_for_them_gives() {
    let mut random = Random(15);
    for (k, most) in [
        (1, 30),
        (2, 30),
        (31, 30),
        (32, 30),
        (33, 30),
        (63, 300),
        (200, 300),
        (1024, 300),
    ] {
        let (n, rows) = (1 + random.below(70), most - random.below(30));
        let (bytes, w) = encode(Format::Bf16, &random.floats(n * k));
        let mut x = random.floats(rows * k);
        // Halfway between two: to the even one, downwards and upwards.
        x[0] = f32::from_bits(0x3f80_8000);
        x[k - 1] = f32::from_bits(0x3f81_8000);
        let rounded: Vec<f32> = x.iter().map(|&x| bf16::from_f32(x).to_f32()).collect();
        let expected = |x: &[f32]| -> Vec<f32> {
            let mut expected = Vec::new();
            for x in x.chunks(k) {
                for w in w.chunks(k) {
                    let mut sum = 0.0_f32;
                    for (x, w) in x.chunks(2).zip(w.chunks(2)) {
                        for (x, w) in x.iter().zip(w).rev() {
                            sum = x.mul_add(*w, sum);
                        }
                    }
                    expected.push(sum);
                }
            }
            expected
        };
        let (tiles, others): (Vec<_>, Vec<_>) = isas().partition(|&isa| isa == Isa::Amx);
        let rounding = |isas: Vec<Isa>| isas.into_iter().map(|isa| rounding(2, isa)).collect();
        for (backends, expected) in [
            (backends(), expected(&x)),
            (rounding(others), expected(&rounded)),
            (rounding(tiles), products_of_tiles(&rounded, &w, k)),
        ] {
            for mut backend in backends {
                let got = product(&mut backend, (Format::Bf16, &bytes), (n, k), &x, None);
                assert_eq!(bits(&got), bits(&expected), "{rows} × {k} × {n}");
            }
        }
    }
}

/// What `tdpbf16ps` gives: of 32 of k the products of even ones and of odd ones are summed in their order, each rounded once, then the two sums, then what was there.
fn products_of_tiles(x: &[f32], w: &[f32], k: usize) -> Vec<f32> {
    let dot = |x: &[f32], w: &[f32]| {
        let blocks = x.chunks(32).zip(w.chunks(32));
        blocks.fold(0.0_f32, |sum, (x, w)| {
            let mut sums = [0.0_f32; 2];
            for (i, (x, w)) in x.iter().zip(w).enumerate() {
                sums[i % 2] = x.mul_add(*w, sums[i % 2]);
            }
            sum + (sums[0] + sums[1])
        })
    };
    let rows = x.chunks(k);
    rows.flat_map(|x| w.chunks(k).map(move |w| dot(x, w)))
        .collect()
}

#[test]
fn a_row_rounded_to_bfloat16_has_the_same_bits_alone_and_among_others() {
    let mut random = Random(17);
    for rows in [1, 2, 3, 8, 15, 16, 17, 31, 32, 33, 70] {
        let (n, k) = (1 + random.below(200), 1 + random.below(300));
        let (bytes, _) = encode(Format::Bf16, &random.floats(n * k));
        let x = random.floats(rows * k);
        for isa in isas() {
            for threads in [1, 3] {
                let backend = &mut rounding(threads, isa);
                let together = product(backend, (Format::Bf16, &bytes), (n, k), &x, None);
                let mut alone = Vec::new();
                for row in x.chunks(k) {
                    alone.extend(product(backend, (Format::Bf16, &bytes), (n, k), row, None));
                }
                assert_eq!(
                    bits(&together),
                    bits(&alone),
                    "{rows} × {k} × {n}, {backend:?}"
                );
            }
        }
    }
}

#[test]
fn only_products_with_bfloat16_weights_round_their_activations() {
    let mut random = Random(16);
    for format in formats() {
        let k = format.block_size().max(32);
        let (n, rows) = (20, 3);
        let (bytes, _) = encode(format, &random.floats(n * k));
        let x = random.floats(rows * k);
        let exact = product(&mut backend(1, None), (format, &bytes), (n, k), &x, None);
        let other = product(
            &mut rounding(1, Isa::best()),
            (format, &bytes),
            (n, k),
            &x,
            None,
        );
        assert_eq!(
            bits(&exact) == bits(&other),
            format != Format::Bf16,
            "{format:?}"
        );
    }
}

#[test]
fn activations_that_are_no_numbers_stay_so_and_large_ones_become_infinite() {
    let (bytes, _) = encode(Format::Bf16, &[1.0, 0.0]);
    let finite = 3.38e38;
    for isa in isas() {
        let backend = &mut rounding(1, isa);
        let mut of = |x: f32| product(backend, (Format::Bf16, &bytes), (2, 1), &[x], None)[0];
        assert!(of(f32::NAN).is_nan());
        // A number that is none by its lowest bit alone.
        assert!(of(f32::from_bits(0x7f80_0001)).is_nan());
        assert!(of(f32::MAX).is_infinite() && of(f32::INFINITY).is_infinite());
        assert!((of(finite) / finite - 1.0).abs() < 0.004);
    }
}

/// As many rows as a step of a prompt has, more than stay in a core's cache at once; the last of those that do are a few.
#[test]
fn hundreds_of_rows_have_the_bits_they_have_alone() {
    let mut random = Random(12);
    for format in formats() {
        let (n, rows) = (33, 268);
        let k = 1024usize.next_multiple_of(format.block_size());
        let (bytes, _) = encode(format, &random.floats(n * k));
        let x = random.floats(rows * k);
        for isa in isas() {
            let mut backend = backend(2, Some(isa));
            let together = product(&mut backend, (format, &bytes), (n, k), &x, None);
            for row in [0, 1, 12, 131, 132, 255, 256, 263, 264, 267] {
                let x = &x[row * k..][..k];
                let alone = product(&mut backend, (format, &bytes), (n, k), x, None);
                assert_eq!(bits(&together[row * n..][..n]), bits(&alone), "{format:?}");
            }
        }
    }
}

/// A matrix of E4M3 floats is the widened matrix, to the last bit.
#[test]
fn eight_bit_floats_multiply_as_the_f32_they_are_worth() {
    let mut random = Random(13);
    let (n, k, rows) = (50, 256, 9);
    let format = Format::F8E4m3 { group: 128 };
    let (bytes, values) = encode(format, &random.floats(n * k));
    let (wide, _) = encode(Format::F32, &values);
    let x = random.floats(rows * k);
    for mut backend in backends() {
        let ours = product(&mut backend, (format, &bytes), (n, k), &x, None);
        let exact = product(&mut backend, (Format::F32, &wide), (n, k), &x, None);
        assert_eq!(bits(&ours), bits(&exact));
    }
}

/// GPTQ's `desc_act`: the columns of each projection are sorted in an order of its own.
#[test]
fn columns_out_of_order_meet_the_activations_they_belong_to() {
    let mut random = Random(14);
    let format = Format::Grouped(Grouped {
        bits: Bits::Four,
        group: 32,
        scale: Scale::F16,
        zero: Zero::Point,
    });
    let (n, k, rows) = (40, 128, 7);
    let orders: [Option<Vec<u32>>; 3] = [0, 1, 2].map(|part| {
        let mut order: Vec<u32> = (0..k as u32).collect();
        for i in (1..k).rev() {
            order.swap(i, random.below(i + 1));
        }
        (part != 1).then_some(order)
    });
    let encoded: Vec<_> = (0..3)
        .map(|_| encode(format, &random.floats(n * k)))
        .collect();
    let parts: Vec<_> = encoded
        .iter()
        .zip(&orders)
        .map(|((bytes, _), order)| MatrixPart {
            order: order.as_deref(),
            ..part(n, k, format, bytes)
        })
        .collect();
    let x = random.floats(rows * k);
    let bias = random.floats(3 * n);
    // The same product in order, part by part, with the activations sorted by hand.
    let mut expected = vec![Vec::new(); rows];
    for (i, ((bytes, _), order)) in encoded.iter().zip(&orders).enumerate() {
        let sorted: Vec<f32> = match order {
            None => x.clone(),
            Some(order) => x
                .chunks(k)
                .flat_map(|row| order.iter().map(|&from| row[from as usize]))
                .collect(),
        };
        let bias = Some(&bias[i * n..][..n]);
        let y = product(
            &mut backend(1, None),
            (format, bytes),
            (n, k),
            &sorted,
            bias,
        );
        for (expected, y) in expected.iter_mut().zip(y.chunks(n)) {
            expected.extend_from_slice(y);
        }
    }
    for mut backend in backends() {
        let matrix = backend.matrix(&parts, None).unwrap();
        let input = filled(&backend, rows, k, &x);
        let mut out = backend.activations(rows, 3 * n).unwrap();
        let bias = backend.vector(&bias).unwrap();
        backend.begin(&plain_step(rows)).unwrap();
        backend
            .linear(&input, &matrix, Some(&bias), &mut out)
            .unwrap();
        assert_eq!(bits(out.as_slice()), bits(&expected.concat()));

        // And a row that is looked up has its elements where the model wants them.
        let mut step = plain_step(1);
        step.tokens[0] = 3;
        backend.begin(&step).unwrap();
        let mut out = backend.activations(1, k).unwrap();
        backend.embed(&matrix, 1.0, &mut out).unwrap();
        for (value, &column) in encoded[0].1[3 * k..].iter().zip(orders[0].iter().flatten()) {
            assert_eq!(out.as_slice()[column as usize], *value);
        }
    }
}

#[test]
fn orders_that_are_none_are_refused() {
    let backend = backend(1, None);
    let grouped = Format::Grouped(Grouped {
        bits: Bits::Eight,
        group: 32,
        scale: Scale::F16,
        zero: Zero::Point,
    });
    let right: Vec<u32> = (0..32).rev().collect();
    let mut twice = right.clone();
    twice[5] = twice[6];
    let mut outside = right.clone();
    outside[5] = 32;
    let data = [0; 32 * 4];
    for (format, order, named) in [
        (grouped, &right, None),
        (grouped, &twice, Some("no permutation")),
        (grouped, &outside, Some("no permutation")),
        (grouped, &right[1..].to_vec(), Some("no permutation")),
        (Format::F32, &right, Some("only grouped integers")),
    ] {
        let bytes = format.row_bytes(32).unwrap();
        let part = MatrixPart {
            order: Some(order),
            ..part(1, 32, format, &data[..bytes])
        };
        match (backend.matrix(&[part], None), named) {
            (Ok(_), None) => {}
            (Err(Error::Shape(text)), Some(named)) => assert!(text.contains(named), "{text}"),
            (other, _) => panic!("{other:?}"),
        }
    }
}

#[test]
fn tq2_0_keeps_ternary_weights_and_refuses_others() {
    let mut random = Random(15);
    let (n, k) = (20, 512);
    let mut w: Vec<f32> = (0..n * k)
        .map(|_| 0.375 * (random.below(3) as f32 - 1.0))
        .collect();
    let backend = backend(2, None);
    let pack = |w: &[f32]| {
        let (bytes, _) = encode(Format::F32, w);
        let part = part(n, k, Format::F32, &bytes);
        backend.matrix(&[part], Some(Format::Tq2_0))
    };
    let matrix = pack(&w).unwrap();
    let mut step = plain_step(1);
    step.tokens[0] = 7;
    let mut reader = common::backend(1, None);
    reader.begin(&step).unwrap();
    let mut out = reader.activations(1, k).unwrap();
    reader.embed(&matrix, 1.0, &mut out).unwrap();
    assert_eq!(out.as_slice(), &w[7 * k..8 * k]);

    w[7 * k + 300] = 0.25;
    let error = pack(&w).unwrap_err().to_string();
    assert!(
        error.contains("row 7") && error.contains("0.25 beside 0.375"),
        "{error}"
    );
}

#[test]
fn a_product_of_any_format_is_added_to_what_is_there() {
    let mut random = Random(3);
    let mut backends = backends();
    for format in formats() {
        let (n, k) = (37, 65_usize.next_multiple_of(format.block_size()));
        let (bytes, _) = encode(format, &random.floats(n * k));
        let bias = random.floats(n);
        for rows in [1, 9, 40] {
            let (x, before) = (random.floats(rows * k), random.floats(rows * n));
            for (backend, bias) in backends
                .iter_mut()
                .zip([None, Some(&*bias)].into_iter().cycle())
            {
                let set = product(backend, (format, &bytes), (n, k), &x, bias);
                let matrix = backend.matrix(&[part(n, k, format, &bytes)], None).unwrap();
                let bias = bias.map(|bias| backend.vector(bias).unwrap());
                let input = filled(backend, rows, k, &x);
                let mut out = filled(backend, rows, n, &before);
                backend
                    .linear_add(&input, &matrix, bias.as_ref(), &mut out)
                    .unwrap();
                let expected: Vec<f32> = before.iter().zip(&set).map(|(a, b)| a + b).collect();
                assert_eq!(
                    bits(out.as_slice()),
                    bits(&expected),
                    "{format:?}, {rows} rows, {backend:?}"
                );
            }
        }
    }
}

#[test]
fn parts_of_a_matrix_follow_each_other_as_rows() {
    let mut random = Random(4);
    let k = 64;
    let parts: Vec<Vec<f32>> = [17, 5, 40].iter().map(|n| random.floats(n * k)).collect();
    let encoded: Vec<Vec<u8>> = parts.iter().map(|p| encode(Format::Bf16, p).0).collect();
    let x = random.floats(3 * k);
    let mut backend = backend(2, None);
    let views: Vec<_> = encoded
        .iter()
        .map(|bytes| part(bytes.len() / 2 / k, k, Format::Bf16, bytes))
        .collect();
    let fused = backend.matrix(&views, None).unwrap();
    let whole = backend
        .matrix(&[part(62, k, Format::Bf16, &encoded.concat())], None)
        .unwrap();
    let input = filled(&backend, 3, k, &x);
    backend.begin(&plain_step(3)).unwrap();
    let mut a = backend.activations(3, 62).unwrap();
    let mut b = backend.activations(3, 62).unwrap();
    backend.linear(&input, &fused, None, &mut a).unwrap();
    backend.linear(&input, &whole, None, &mut b).unwrap();
    assert_eq!(bits(a.as_slice()), bits(b.as_slice()));
}

/// As in Q4_K_M files, where the values of some layers are in Q6_K.
#[test]
fn parts_of_a_matrix_keep_formats_of_their_own() {
    let mut random = Random(9);
    let k = 256;
    let formats = [Format::Q4K, Format::Q4K, Format::Q6K, Format::F16];
    let rows = [33, 20, 7, 5];
    let x = random.floats(5 * k);
    let bias = random.floats(rows.iter().sum());
    let encoded: Vec<_> = formats
        .iter()
        .zip(rows)
        .map(|(&format, n)| encode(format, &random.floats(n * k)))
        .collect();
    let mut expected = vec![Vec::new(); 5];
    let mut at = 0;
    for (i, (bytes, _)) in encoded.iter().enumerate() {
        let bias = &bias[at..at + rows[i]];
        let shape = (rows[i], k);
        let y = product(
            &mut backend(2, None),
            (formats[i], bytes),
            shape,
            &x,
            Some(bias),
        );
        for (expected, y) in expected.iter_mut().zip(y.chunks(rows[i])) {
            expected.extend_from_slice(y);
        }
        at += rows[i];
    }
    let parts: Vec<_> = (0..4)
        .map(|i| part(rows[i], k, formats[i], &encoded[i].0))
        .collect();
    let mut backend = backend(2, None);
    let matrix = backend.matrix(&parts, None).unwrap();
    let input = filled(&backend, 5, k, &x);
    let mut out = backend.activations(5, at).unwrap();
    let bias = backend.vector(&bias).unwrap();
    backend.begin(&plain_step(5)).unwrap();
    backend
        .linear(&input, &matrix, Some(&bias), &mut out)
        .unwrap();
    assert_eq!(bits(out.as_slice()), bits(&expected.concat()));

    let mut step = plain_step(1);
    for (row, values) in [(53, &encoded[2].1[..k]), (64, &encoded[3].1[4 * k..])] {
        step.tokens[0] = row;
        backend.begin(&step).unwrap();
        let mut out = backend.activations(1, k).unwrap();
        backend.embed(&matrix, 1.0, &mut out).unwrap();
        assert_eq!(bits(out.as_slice()), bits(values));
    }
}

#[test]
fn packed_matrices_are_hardly_larger_than_stored_ones() {
    let mut random = Random(10);
    for format in formats() {
        let (n, k) = (64, 512_usize.next_multiple_of(format.block_size()));
        let (bytes, _) = encode(format, &random.floats(n * k));
        let backend = backend(1, None);
        let matrix = backend.matrix(&[part(n, k, format, &bytes)], None).unwrap();
        let ratio = backend.matrix_bytes(&matrix) as f64 / bytes.len() as f64;
        assert!(ratio <= 1.1, "{format:?}: {ratio}");
    }
}

#[test]
fn quantising_gives_the_bytes_ggml_gives() {
    let mut random = Random(5);
    let x: Vec<f32> = (0..32 * 64)
        .map(|_| random.float() * random.float() * 3.0)
        .collect();
    let tensor = Tensor::from_slice(&x, x.len(), &Device::Cpu).unwrap();
    for (format, ggml) in [
        (Format::Q8_0, GgmlDType::Q8_0),
        (Format::Q4_0, GgmlDType::Q4_0),
    ] {
        let reference = QTensor::quantize(&tensor, ggml).unwrap();
        let reference = reference.data().unwrap();
        assert_eq!(encode(format, &x).0, reference.as_ref(), "{format:?}");
    }
}

#[test]
fn quantising_at_load_equals_loading_quantised_data() {
    let mut random = Random(6);
    let (n, k) = (50, 96);
    let w = random.floats(n * k);
    let x = random.floats(2 * k);
    for format in [Format::Q8_0, Format::Q4_0] {
        let mut backend = backend(1, None);
        let (stored, _) = encode(format, &w);
        let expected = product(&mut backend, (format, &stored), (n, k), &x, None);
        let (floats, _) = encode(Format::F32, &w);
        let matrix = backend
            .matrix(&[part(n, k, Format::F32, &floats)], Some(format))
            .unwrap();
        let input = filled(&backend, 2, k, &x);
        let mut out = backend.activations(2, n).unwrap();
        backend.linear(&input, &matrix, None, &mut out).unwrap();
        assert_eq!(bits(out.as_slice()), bits(&expected));
    }
}

#[test]
fn embedding_rows_are_the_matrix_rows() {
    let mut random = Random(7);
    for format in formats() {
        let (n, k) = (70, 256_usize.next_multiple_of(format.block_size()));
        let (bytes, values) = encode(format, &random.floats(n * k));
        let mut backend = backend(2, None);
        let table = backend.matrix(&[part(n, k, format, &bytes)], None).unwrap();
        let mut step = plain_step(n);
        step.tokens.reverse();
        backend.begin(&step).unwrap();
        let mut out = backend.activations(n, k).unwrap();
        backend.embed(&table, 2.0, &mut out).unwrap();
        let expected: Vec<f32> = values.chunks(k).rev().flatten().map(|v| v * 2.0).collect();
        assert_eq!(bits(out.as_slice()), bits(&expected), "{format:?}");
    }
}

#[test]
fn data_that_does_not_match_its_shape_is_refused() {
    let backend = backend(1, None);
    let bytes = vec![0; 64 * 4];
    let refused = |parts: &[_], quantize| match backend.matrix(parts, quantize) {
        Err(Error::Shape(text)) => text,
        other => panic!("{other:?}"),
    };
    let text = refused(&[part(2, 33, Format::F32, &bytes)], None);
    assert!(text.contains("256") && text.contains("264"), "{text}");
    let text = refused(&[part(2, 32, Format::F32, &bytes)], Some(Format::F16));
    assert!(text.contains("not a quantised format"), "{text}");
    let odd = vec![0; 2 * 30 * 4];
    let text = refused(&[part(2, 30, Format::F32, &odd)], Some(Format::Q8_0));
    assert!(text.contains("multiple of 32"), "{text}");
    let text = refused(&[part(usize::MAX, 32, Format::F32, &bytes)], None);
    assert!(
        text.contains("cannot hold") || text.contains("expected"),
        "{text}"
    );
    refused(&[], None);
    refused(
        &[
            part(2, 32, Format::F32, &bytes),
            part(1, 64, Format::F32, &bytes),
        ],
        None,
    );
}

#[test]
fn steps_that_contradict_themselves_are_refused() {
    let mut backend = backend(1, None);
    let broken: [fn(&mut Step); 6] = [
        |s| s.positions.truncate(1),
        |s| s.spans.clear(),
        |s| s.spans[0].row = 1,
        |s| s.spans[0].rows = 9,
        |s| s.spans[0].start = u32::MAX,
        |s| s.logit_rows.push(77),
    ];
    for (i, breaks) in broken.iter().enumerate() {
        let mut step = plain_step(5);
        breaks(&mut step);
        assert!(matches!(backend.begin(&step), Err(Error::Shape(_))), "{i}");
    }
}

#[test]
fn a_token_outside_the_vocabulary_is_refused() {
    let mut backend = backend(1, None);
    let bytes = vec![0; 10 * 4 * 4];
    let table = backend
        .matrix(&[part(10, 4, Format::F32, &bytes)], None)
        .unwrap();
    let mut out = backend.activations(1, 4).unwrap();
    let mut step = plain_step(1);
    step.tokens[0] = 10;
    backend.begin(&step).unwrap();
    let error = backend.embed(&table, 1.0, &mut out).unwrap_err();
    assert_eq!(error.to_string(), "token 10 of a vocabulary of 10");
}
