//! Stored blocks mean what the `gguf` Python package says, bit for bit (`dequantize/make.py` made the files).
#![allow(clippy::unwrap_used)]

use std::path::Path;

use quire_kernels::Format;

#[test]
fn every_format_is_worth_what_the_gguf_package_says() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/dequantize");
    for format in Format::ALL {
        // A bfloat16 is the upper half of an f32: nothing to compare.
        if matches!(format, Format::F32 | Format::Bf16) {
            continue;
        }
        let read = |kind: &str| {
            std::fs::read(directory.join(format!("{}.{kind}", format.name()))).unwrap()
        };
        let mut values = Vec::new();
        format.dequantize(&read("blocks"), &mut values);
        let expected = read("values");
        let expected: Vec<u32> = expected
            .as_chunks()
            .0
            .iter()
            .map(|b| u32::from_le_bytes(*b))
            .collect();
        let bits: Vec<u32> = values.iter().map(|v| v.to_bits()).collect();
        assert!(bits.len() >= 512, "{format:?}");
        assert_eq!(bits, expected, "{format:?}");
    }
}
