//! Tests of [`Tensor`].

use super::*;
use proptest::prelude::*;
use safetensors::SafeTensors;

const TERNARY: [Encoding; 4] =
    [Encoding::Tq1_0, Encoding::Tq2_0, Encoding::Q2_0, Encoding::Ternary { group: 64 }];

/// A ternary matrix with one scale per row, its codes and its scales.
fn matrix(rows: usize, cols: usize, seed: u64) -> (Tensor, Vec<i8>, Vec<f16>) {
    use rand::{Rng, SeedableRng};
    let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
    let codes: Vec<i8> = (0..rows * cols).map(|_| rng.random_range(-1..=1)).collect();
    let scales: Vec<f16> = (0..rows).map(|_| f16::from_f32(rng.random_range(6e-5..2.0))).collect();
    let tensor = Tensor::ternary(rows, cols, cols, |row, c, s| {
        c.copy_from_slice(&codes[row * cols..(row + 1) * cols]);
        s[0] = scales[row];
    });
    (tensor.unwrap(), codes, scales)
}

fn values(tensor: &Tensor) -> Vec<f32> {
    let mut values = vec![0.0; tensor.rows() * tensor.cols()];
    for (row, values) in values.chunks_exact_mut(tensor.cols()).enumerate() {
        tensor.read_row(row, values);
    }
    values
}

#[test]
fn ternary_blocks_are_those_of_the_reference() {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../../shared/data/gguf_ternary/fixture_expected.safetensors"
    );
    let Ok(bytes) = std::fs::read(path) else {
        println!("skipped: {path}: no reference data");
        return;
    };
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let floats = |name: &str| -> Vec<f32> {
        let data = file.tensor(name).unwrap().data().to_vec();
        data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    };
    let mut blocks = 0;
    for encoding in [Encoding::Tq1_0, Encoding::Tq2_0] {
        for name in ["gauss", "wide", "ternary_exact", "zeros", "one_hot"] {
            let stored = file.tensor(&format!("{name}.{encoding}.bytes")).unwrap();
            let expected = floats(&format!("{name}.{encoding}.dequant_f32"));
            let rows = stored.shape()[0];
            let shape = vec![rows, expected.len() / rows];
            let tensor = Tensor::new(shape, encoding, stored.data().to_vec()).unwrap();
            assert_eq!(values(&tensor), expected, "{name} {encoding}");
            // A round trip through the in-memory encoding keeps every byte.
            let codes = tensor.encode(Encoding::Ternary { group: 256 }).unwrap();
            assert_eq!(codes.encode(encoding).unwrap().bytes(), stored.data(), "{name} {encoding}");
            blocks += stored.data().len() / encoding.block_bytes();
        }
    }
    assert_eq!(blocks, 2 * (8 + 8 + 4 + 1 + 2));
}

proptest! {
    #[test]
    fn ternary_weights_survive_every_encoding(rows in 1usize..5, blocks in 1usize..4, seed: u64) {
        let (tensor, codes, scales) = matrix(rows, 256 * blocks, seed);
        let dense = values(&tensor);
        let mut encodings = TERNARY.to_vec();
        encodings.extend([Encoding::Q8_0, Encoding::Q4_0, Encoding::F32]);
        for from in TERNARY {
            for &to in &encodings {
                let other = tensor.encode(from).unwrap().encode(to).unwrap();
                prop_assert_eq!(other.encoding(), to);
                prop_assert_eq!(values(&other), dense.clone(), "{} to {}", from, to);
                let Some(group) = other.ternary_group() else { continue };
                let mut c = vec![0; tensor.cols()];
                let mut s = vec![f16::ZERO; tensor.cols() / group];
                for (row, expected) in codes.chunks_exact(tensor.cols()).enumerate() {
                    other.read_ternary_row(row, &mut c, &mut s);
                    prop_assert_eq!(&c, expected);
                    prop_assert!(s.iter().all(|&scale| scale == scales[row]));
                }
            }
        }
    }

    #[test]
    fn rows_of_any_length_survive_in_memory(rows in 1usize..5, cols in 1usize..300, seed: u64) {
        let (tensor, codes, scales) = matrix(rows, cols, seed);
        let expected: Vec<f32> =
            codes.iter().enumerate().map(|(i, &c)| f32::from(c) * scales[i / cols].to_f32()).collect();
        prop_assert_eq!(values(&tensor), expected.clone());
        let order: Vec<usize> = (0..rows).rev().collect();
        let reversed: Vec<f32> =
            order.iter().flat_map(|&row| expected[row * cols..(row + 1) * cols].to_vec()).collect();
        prop_assert_eq!(values(&tensor.select_rows(order)), reversed);
    }

    #[test]
    fn rounding_to_8_and_4_bits_is_within_half_a_step(x in prop::collection::vec(-3.0f32..3.0, 64)) {
        let tensor = Tensor::f32(&[2, 32], &x).unwrap();
        for (encoding, most) in [(Encoding::Q8_0, 0.51), (Encoding::Q4_0, 1.01)] {
            let rounded = tensor.encode(encoding).unwrap();
            for (row, (x, y)) in x.chunks(32).zip(values(&rounded).chunks(32)).enumerate() {
                let at = row * encoding.block_bytes();
                let step = f16::from_le_bytes([rounded.bytes()[at], rounded.bytes()[at + 1]]).to_f32().abs();
                for (x, y) in x.iter().zip(y) {
                    // The scale itself is rounded to 11 bits: up to 127 steps of 2^-11.
                    prop_assert!((x - y).abs() <= step * (most + 127.0 / 2048.0), "{x} {y} {step}");
                }
            }
        }
    }
}

#[test]
fn integer_codes_are_stored_exactly_in_8_and_4_bits() {
    for (encoding, limit) in [(Encoding::Q8_0, 127), (Encoding::Q4_0, 7)] {
        let code = |row: usize, i: usize| ((7 * i + row) as i32 % (2 * limit + 1) - limit) as i8;
        let scale = |row: usize| f16::from_f32(0.01 + row as f32);
        let tensor = Tensor::from_codes(encoding, 3, 64, |row, codes, scales| {
            codes.iter_mut().enumerate().for_each(|(i, c)| *c = code(row, i));
            scales.fill(scale(row));
        });
        let found = values(&tensor.unwrap());
        for (i, value) in found.iter().enumerate() {
            assert_eq!(*value, f32::from(code(i / 64, i % 64)) * scale(i / 64).to_f32());
        }
    }
}

#[test]
fn weights_that_are_not_ternary_are_never_rounded_to_ternary() {
    let floats = Tensor::f32(&[1, 256], &[0.5; 256]).unwrap();
    for encoding in TERNARY {
        assert!(matches!(floats.encode(encoding), Err(FormatError::NotTernary { .. })));
    }
    let (tensor, ..) = matrix(1, 384, 0);
    let error = tensor.encode(Encoding::Tq2_0).unwrap_err();
    assert_eq!(
        error.to_string(),
        "rows of 384 weights, TQ2_0 needs a multiple of 256: use another type, or train with a multiple of 256"
    );
    assert!(tensor.encode(Encoding::Q2_0).is_ok());
    let groups = Tensor::ternary(1, 256, 64, |_, codes, scales| {
        codes.fill(1);
        scales.iter_mut().enumerate().for_each(|(i, s)| *s = f16::from_f32(i as f32));
    });
    let groups = groups.unwrap();
    let error = groups.encode(Encoding::Tq1_0).unwrap_err();
    assert!(matches!(error, FormatError::ScalesDiffer { row: 0, .. }));
    assert!(error.to_string().contains("`--type F16` of duck export"), "{error}");
    assert!(groups.encode(Encoding::Q2_0).is_ok());
    assert!(matches!(groups.encode(Encoding::Q6K), Err(FormatError::ReadOnly { .. })));
}

#[test]
fn bytes_that_do_not_match_the_shape_are_refused() {
    let new = |shape: &[usize], encoding, bytes| Tensor::new(shape.to_vec(), encoding, vec![255u8; bytes]);
    for shape in [&[][..], &[0], &[0, 256], &[usize::MAX, 2], &[1 << 31, 1 << 31, 1 << 31]] {
        assert!(matches!(new(shape, Encoding::F32, 4), Err(FormatError::Shape { .. })), "{shape:?}");
    }
    assert!(matches!(new(&[2, 2], Encoding::F32, 15), Err(FormatError::TensorBytes { expected: 16, .. })));
    assert!(matches!(new(&[33], Encoding::Q8_0, 34), Err(FormatError::RowLength { block: 32, .. })));
    assert!(matches!(new(&[9], Encoding::Ternary { group: 0 }, 3), Err(FormatError::RowLength { .. })));
    for (encoding, bytes) in [(Encoding::Tq2_0, 66), (Encoding::Ternary { group: 256 }, 66)] {
        assert!(matches!(new(&[256], encoding, bytes), Err(FormatError::NotACode { row: 0, .. })));
    }
    // Every byte of TQ1_0 decodes to five codes, so only the scale is NaN.
    assert!(values(&new(&[256], Encoding::Tq1_0, 54).unwrap())[..5].iter().all(|v| v.is_nan()));
}

/// Every scale in turn of a row of two blocks is NaN or infinite, in every encoding.
#[test]
fn a_value_that_is_not_finite_is_found_in_every_encoding() {
    let check = |encoding, cols: usize, bytes: &[u8]| {
        let bytes = [vec![0; bytes.len()], bytes.to_vec()].concat();
        Tensor::new(vec![2, cols], encoding, bytes).unwrap().check_finite()
    };
    for (encoding, places) in [
        (Encoding::F16, vec![0, 2, 254]),
        (Encoding::Q8_0, vec![0, 34]),
        (Encoding::Q4_0, vec![0, 18]),
        (Encoding::Q4_1, vec![0, 2, 20, 22]),
        (Encoding::Q4K, vec![0, 2, 144, 146]),
        (Encoding::Q6K, vec![208, 418]),
        (Encoding::Tq1_0, vec![52, 106]),
        (Encoding::Tq2_0, vec![64, 130]),
        (Encoding::Q2_0, vec![0, 18]),
    ] {
        let cols = if encoding == Encoding::F16 { 128 } else { 2 * encoding.block_weights() };
        let sound = vec![0; encoding.bytes(&[cols]).unwrap()];
        check(encoding, cols, &sound).unwrap();
        for place in places {
            for bad in [f16::NAN, f16::INFINITY, f16::NEG_INFINITY] {
                let mut bytes = sound.clone();
                bytes[place..place + 2].copy_from_slice(&bad.to_le_bytes());
                let error = check(encoding, cols, &bytes).unwrap_err();
                assert!(matches!(error, FormatError::NotFinite { row: 1 }), "{encoding} {place}: {error}");
                bytes[place..place + 2].copy_from_slice(&f16::MAX.to_le_bytes());
                check(encoding, cols, &bytes).unwrap();
            }
        }
    }
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let values = [[f32::MAX; 40], [bad; 40]].concat();
        let tensor = Tensor::f32(&[80], &values).unwrap();
        assert!(matches!(tensor.check_finite(), Err(FormatError::NotFinite { row: 0 })));
        let halves: Vec<u8> = values.iter().flat_map(|x| bf16::from_f32(x.min(1e38)).to_le_bytes()).collect();
        let tensor = Tensor::new(vec![2, 40], Encoding::Bf16, halves).unwrap();
        assert_eq!(tensor.check_finite().is_ok(), bad == f32::INFINITY || bad.is_nan());
        let ternary = Tensor::ternary(2, 8, 4, |row, _, scales| scales[1] = f16::from_f32(bad * row as f32));
        assert!(ternary.unwrap().check_finite().is_err());
    }
}

#[test]
fn weights_beyond_the_range_of_an_encoding_are_refused() {
    let tensor = Tensor::f32(&[2, 32], &[[1.0; 32], [1e9; 32]].concat()).unwrap();
    for encoding in [Encoding::F16, Encoding::Q8_0, Encoding::Q4_0] {
        let error = tensor.encode(encoding).unwrap_err();
        assert!(matches!(error, FormatError::NotFinite { row: 1 }), "{error}");
    }
}

#[test]
#[cfg_attr(miri, ignore)] // miri cannot map files
fn released_tensors_are_read_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("values");
    let stored: Vec<u8> = (0..40_000u32).flat_map(|i| (i as f32).to_le_bytes()).collect();
    std::fs::write(&path, &stored).unwrap();
    let file = Bytes::map(&path).unwrap().slice(4..stored.len());
    let tensor = Tensor::new(vec![39_999], Encoding::F32, file).unwrap();
    tensor.release();
    assert_eq!(tensor.bytes(), &stored[4..]);
    let owned = Tensor::f32(&[2], &[1.0, 2.0]).unwrap();
    owned.release();
    assert_eq!(values(&owned), [1.0, 2.0]);
}
