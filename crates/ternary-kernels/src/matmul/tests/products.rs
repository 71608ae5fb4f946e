//! Products of random shapes, codes and activations.

use super::{Kind, Random, Weights, quantize};
use crate::*;
use proptest::prelude::*;

/// Cases, and what rows, columns and tokens are fewer than; miri is a thousand times as slow.
const CASES: u32 = if cfg!(miri) { 4 } else { 150 };
const ROWS: usize = if cfg!(miri) { 20 } else { 70 };
const COLS: usize = if cfg!(miri) { 80 } else { 600 };
const TOKENS: usize = if cfg!(miri) { 6 } else { 40 };

/// Blocks that share a scale, of those that a kind allows.
fn groups(kind: Kind, choice: usize) -> usize {
    match kind {
        Kind::Q6 => 16,
        Kind::Int8Training { .. } => 1000,
        _ => [1, 2, 4, 8, 16, 1000][choice],
    }
}

fn kinds() -> impl Strategy<Value = Kind> {
    let code = |range| Just(Kind::Int8Training { range });
    prop_oneof![
        Just(Kind::Ternary),
        Just(Kind::Q6),
        Just(Kind::Int8),
        code(CodeRange::Ternary),
        code(CodeRange::Int8)
    ]
}

/// Kind, rows, columns, tokens and choice of group: of all, and of those that a unit takes (whole steps of several tiles, few
/// tokens).
fn shapes() -> impl Strategy<Value = (Kind, usize, usize, usize, usize)> {
    let all = (kinds(), 1..ROWS, 1..COLS, 1..TOKENS, 0usize..6);
    let kinds = prop_oneof![Just(Kind::Ternary), Just(Kind::Int8)];
    let steps = (1..COLS / 32).prop_map(|steps| 32 * steps);
    prop_oneof![all, (kinds, 48..3 * ROWS, steps, 4usize..17, 0usize..6)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(CASES))]

    #[test]
    fn integer_products_are_exact(
        (kind, rows, cols, tokens, group) in shapes(), extreme: bool, loud: bool, bias: bool, add: bool, seed: u64,
    ) {
        let mut random = Random(seed);
        let group = groups(kind, group);
        let weights = Weights::new(kind, rows, cols, group, extreme, &mut random);
        let matrix = weights.pack();
        // Loud: every activation is -127 or 127.
        let mut x: Vec<_> = (0..tokens * cols).map(|_| match loud {
            true => [-1.0, 1.0][random.next(2)],
            false => random.float(),
        }).collect();
        x[random.next(tokens) * cols..][..cols].fill(0.0);
        let bias: Option<Vec<_>> = bias.then(|| (0..rows).map(|_| random.float()).collect());
        let before: Vec<_> = (0..tokens * rows).map(|_| random.float()).collect();
        let expected: Vec<_> = (0..tokens * rows).map(|i| {
            let (codes, scale) = quantize(&x[i / rows * cols..][..cols]);
            let mut sum = weights.integer(i % rows, &codes, scale);
            if let Some(bias) = &bias { sum += bias[i % rows]; }
            if add { before[i] + sum } else { sum }
        }).collect();
        for isa in Isa::available() {
            for threads in [1, 3] {
                let (pool, mut buffer) = (Pool::with_isa(threads, isa), Int8Activations::default());
                let input = Activations::int8(&pool, &x, cols, &mut buffer);
                let (mut out, mut twin) = (before.clone(), before.clone());
                let product = |out| Product { bias: bias.as_deref(), add, ..Product::new(&matrix, out) };
                multiply(&pool, &input, &mut [product(&mut out), product(&mut twin)]);
                prop_assert_eq!(&out, &expected, "{:?}, {} threads", isa, threads);
                prop_assert_eq!(&twin, &expected);
            }
        }
    }

    #[test]
    fn float_products_are_within_rounding(
        kind in kinds(), rows in 1..ROWS, cols in 1..COLS, tokens in 1..TOKENS.min(12), group in 0usize..6,
        seed: u64,
    ) {
        let mut random = Random(seed);
        let group = groups(kind, group);
        let weights = Weights::new(kind, rows, cols, group, false, &mut random);
        let mut values = vec![0.0; cols];
        let packed = weights.pack();
        let float: Matrix = F32Matrix::pack(&mut Arena::new(0), rows, cols, |row, values| {
            packed.read_row(row, values);
        }).into();
        for row in 0..rows {
            for matrix in [&packed, &float] {
                matrix.read_row(row, &mut values);
                for (col, value) in values.iter().enumerate() {
                    let exact = weights.value(row, col);
                    prop_assert!((f64::from(*value) - exact).abs() <= exact.abs() * 1e-7);
                }
            }
        }
        let x: Vec<_> = (0..tokens * cols).map(|_| random.float()).collect();
        for matrix in [&packed, &float] {
            let mut first = None;
            for isa in Isa::available() {
                let pool = Pool::with_isa(2, isa);
                let mut out = vec![0.0; tokens * rows];
                multiply(&pool, &Activations::f32(&x, cols), &mut [Product::new(matrix, &mut out)]);
                for (i, out) in out.iter().enumerate() {
                    let (row, x) = (i % rows, &x[i / rows * cols..]);
                    let terms = (0..cols).map(|col| weights.value(row, col) * f64::from(x[col]));
                    let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()));
                    prop_assert!((f64::from(*out) - sum).abs() <= 2e-6 * size, "{} {} of {}", out, sum, size);
                }
                prop_assert_eq!(first.get_or_insert_with(|| out.clone()), &out, "{:?}", isa);
            }
        }
    }
}
