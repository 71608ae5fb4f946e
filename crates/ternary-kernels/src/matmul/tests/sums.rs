//! Sums that are as large as sums can be.

use super::{Kind, Random, Weights, quantize};
use crate::*;

/// Random signs cancel; these do not. All codes are the largest or the least, all activations 127 or -127.
#[test]
#[cfg_attr(miri, ignore = "takes hours")]
fn sums_of_equal_signs_are_exact() {
    let code = |range| Kind::Int8Training { range };
    let kinds = [Kind::Ternary, Kind::Q6, Kind::Int8, code(CodeRange::Ternary), code(CodeRange::Int8)];
    for (kind, cols, tokens) in kinds.iter().flat_map(|kind| {
        let cols = [127, 600, 607, 640, 1041];
        cols.into_iter().flat_map(move |cols| [1, 2, 3, 4, 8, 15, 17, 33].map(|tokens| (*kind, cols, tokens)))
    }) {
        check_equal_signs(kind, 67, cols, tokens, 1000);
        check_equal_signs(kind, 67, cols, tokens, 16);
    }
}

/// Rows so long that sums of 32 bits are nearly full, or would overflow if they were not taken apart.
#[test]
#[cfg_attr(miri, ignore = "takes hours")]
fn sums_of_very_long_rows_are_exact() {
    for tokens in [1, 2, 5, 17] {
        check_equal_signs(Kind::Ternary, 1, 600_011, tokens, 1 << 20);
        check_equal_signs(Kind::Q6, 1, 600_011, tokens, 1 << 20);
        check_equal_signs(Kind::Int8, 1, Int8Matrix::LONGEST_GROUP, tokens, 1 << 20);
        check_equal_signs(
            Kind::Int8Training { range: CodeRange::Int8 },
            1,
            Int8Matrix::LONGEST_GROUP,
            tokens,
            1 << 20,
        );
    }
}

fn check_equal_signs(kind: Kind, rows: usize, cols: usize, tokens: usize, group: usize) {
    let group = match kind {
        Kind::Q6 => 16,
        Kind::Int8Training { .. } => 1 << 20,
        _ => group,
    };
    let mut weights = Weights::new(kind, rows, cols, group, false, &mut Random(1));
    let (low, high) = kind.codes();
    for (code, factor) in [(high, 127), (low, -128)] {
        weights.codes.fill(code);
        weights.factors.fill(factor);
        let matrix = weights.pack();
        let sign = |token: usize| if token.is_multiple_of(2) { 1.0 } else { -1.0 };
        let x: Vec<f32> = (0..tokens * cols).map(|i| sign(i / cols)).collect();
        let expected: Vec<f32> = (0..tokens * rows)
            .map(|i| {
                let (codes, scale) = quantize(&x[i / rows * cols..][..cols]);
                weights.integer(i % rows, &codes, scale)
            })
            .collect();
        for isa in Isa::available() {
            let (pool, mut buffer) = (Pool::with_isa(1, isa), Int8Activations::default());
            let input = Activations::int8(&pool, &x, cols, &mut buffer);
            let mut out = vec![f32::NAN; tokens * rows];
            multiply(&pool, &input, &mut [Product::new(&matrix, &mut out)]);
            let case = format!("{kind:?} {code}, {cols} columns in groups of {group}, {tokens} tokens");
            assert!(out == expected, "{case}, {isa:?}: {} is not {}", out[0], expected[0]);
        }
    }
}
