//! Every product on every instruction set, against obvious loops over the codes.

use crate::*;
use half::f16;
use proptest::prelude::*;

/// Cases, and what rows, columns and tokens are fewer than; miri is a thousand times as slow.
const CASES: u32 = if cfg!(miri) { 4 } else { 150 };
const ROWS: usize = if cfg!(miri) { 20 } else { 70 };
const COLS: usize = if cfg!(miri) { 80 } else { 600 };
const TOKENS: usize = if cfg!(miri) { 6 } else { 40 };

/// A small generator: the tests need many numbers, not good ones.
struct Random(u64);

impl Random {
    fn next(&mut self, below: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % below
    }

    fn float(&mut self) -> f32 {
        self.next(2_000_001) as f32 / 1e6 - 1.0
    }
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Ternary,
    SixBit,
    Byte,
    Code { ternary: bool },
}

impl Kind {
    /// The least code and the largest.
    fn codes(self) -> (i8, i8) {
        match self {
            Self::Ternary | Self::Code { ternary: true } => (-1, 1),
            Self::SixBit => (-32, 31),
            Self::Byte => (-128, 127),
            Self::Code { ternary: false } => (-127, 127),
        }
    }
}

/// What a matrix holds: codes `[rows, cols]` and factors and scales for each 16 columns `[rows, blocks]`.
struct Weights {
    kind: Kind,
    rows: usize,
    cols: usize,
    /// In blocks of 16 columns.
    group: usize,
    codes: Vec<i8>,
    factors: Vec<i8>,
    scales: Vec<f32>,
}

impl Weights {
    fn new(kind: Kind, rows: usize, cols: usize, group: usize, extreme: bool, random: &mut Random) -> Self {
        let (low, high) = kind.codes();
        let codes = (0..rows * cols).map(|_| match extreme {
            true => [low, high][random.next(2)],
            false => {
                (i32::from(low) + random.next((i32::from(high) - i32::from(low) + 1) as usize) as i32) as i8
            }
        });
        let codes = codes.collect();
        let blocks = cols.div_ceil(16);
        let groups = rows * blocks.div_ceil(group);
        let scale = |random: &mut Random| match extreme {
            true => [65504.0, 6.1e-5, 0.0][random.next(3)],
            false => f16::from_f32(random.float()).to_f32(),
        };
        Self {
            kind,
            rows,
            cols,
            group,
            codes,
            factors: (0..rows * blocks)
                .map(|_| [-128, 127, 0, 1, random.next(100) as i8][random.next(5)])
                .collect(),
            scales: (0..groups).map(|_| f16::from_f32(scale(random)).to_f32()).collect(),
        }
    }

    fn factor(&self, row: usize, block: usize) -> i32 {
        let blocks = self.cols.div_ceil(16);
        if let Kind::SixBit = self.kind { i32::from(self.factors[row * blocks + block]) } else { 1 }
    }

    fn scale(&self, row: usize, group: usize) -> f32 {
        self.scales[row * self.cols.div_ceil(16).div_ceil(self.group) + group]
    }

    fn pack(&self) -> Matrix {
        let (rows, cols, blocks) = (self.rows, self.cols, self.cols.div_ceil(16));
        let group = if self.group >= blocks { cols } else { self.group * 16 };
        let groups = blocks.div_ceil(self.group);
        let arena = &mut Arena::new(1);
        let codes = |row: usize, codes: &mut [i8]| codes.copy_from_slice(&self.codes[row * cols..][..cols]);
        let scales =
            |row: usize, scales: &mut [f32]| scales.copy_from_slice(&self.scales[row * groups..][..groups]);
        let halves = |row: usize, halves: &mut [f16]| {
            let scales = &self.scales[row * groups..];
            halves.iter_mut().zip(scales).for_each(|(half, scale)| *half = f16::from_f32(*scale));
        };
        match self.kind {
            Kind::Ternary => TernaryMatrix::pack(arena, rows, cols, group, |row, c, s| {
                codes(row, c);
                halves(row, s);
            })
            .into(),
            Kind::SixBit => SixBitMatrix::pack(arena, rows, cols, |row, c, f, s| {
                codes(row, c);
                f.copy_from_slice(&self.factors[row * blocks..][..blocks]);
                halves(row, s);
            })
            .into(),
            Kind::Byte => ByteMatrix::pack(arena, rows, cols, group, |row, c, s| {
                codes(row, c);
                scales(row, s);
            })
            .into(),
            Kind::Code { ternary } => {
                let mut matrix = CodeMatrix::default();
                matrix.pack(&Pool::new(2), &self.codes, Order::Rows, &self.scales, ternary);
                matrix.into()
            }
        }
    }

    /// The product of a row with int8 activations: exact sums, rounded as documented.
    fn integer(&self, row: usize, x: &[i8], scale: f32) -> f32 {
        let mut result = 0.0f32;
        for group in 0..self.cols.div_ceil(16).div_ceil(self.group) {
            let mut sum = 0;
            for col in group * self.group * 16..self.cols.min((group + 1) * self.group * 16) {
                let w = i32::from(self.codes[row * self.cols + col]) * self.factor(row, col / 16);
                sum += w * i32::from(x[col]);
            }
            result = (sum as f32).mul_add(self.scale(row, group), result);
        }
        result * scale
    }

    fn value(&self, row: usize, col: usize) -> f64 {
        let code = f64::from(self.codes[row * self.cols + col]);
        code * f64::from(self.factor(row, col / 16)) * f64::from(self.scale(row, col / 16 / self.group))
    }
}

/// Quantized by the formula: codes and scale.
fn quantize(x: &[f32]) -> (Vec<i8>, f32) {
    let scale = x.iter().fold(1e-5f32, |max, x| max.max(x.abs())) / 127.0;
    (x.iter().map(|x| (x / scale).round_ties_even() as i8).collect(), scale)
}

/// Blocks that share a scale, of those that a kind allows.
fn groups(kind: Kind, choice: usize) -> usize {
    match kind {
        Kind::SixBit => 16,
        Kind::Code { .. } => 1000,
        _ => [1, 2, 4, 8, 16, 1000][choice],
    }
}

fn kinds() -> impl Strategy<Value = Kind> {
    let code = |ternary| Just(Kind::Code { ternary });
    prop_oneof![Just(Kind::Ternary), Just(Kind::SixBit), Just(Kind::Byte), code(true), code(false)]
}

/// Kind, rows, columns, tokens and choice of group: of all, and of those that a unit takes (whole steps of several tiles, few
/// tokens).
fn shapes() -> impl Strategy<Value = (Kind, usize, usize, usize, usize)> {
    let all = (kinds(), 1..ROWS, 1..COLS, 1..TOKENS, 0usize..6);
    let kinds = prop_oneof![Just(Kind::Ternary), Just(Kind::Byte)];
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
                let (pool, mut buffer) = (Pool::with_isa(threads, isa), Quantized::default());
                let input = Input::int8(&pool, &x, cols, &mut buffer);
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
        let float: Matrix = FloatMatrix::pack(&mut Arena::new(0), rows, cols, |row, values| {
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
                multiply(&pool, &Input::exact(&x, cols), &mut [Product::new(matrix, &mut out)]);
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

/// Random signs cancel; these do not. All codes are the largest or the least, all activations 127 or -127.
#[test]
#[cfg_attr(miri, ignore = "takes hours")]
fn sums_of_equal_signs_are_exact() {
    let code = |ternary| Kind::Code { ternary };
    let kinds = [Kind::Ternary, Kind::SixBit, Kind::Byte, code(true), code(false)];
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
        check_equal_signs(Kind::SixBit, 1, 600_011, tokens, 1 << 20);
        check_equal_signs(Kind::Byte, 1, ByteMatrix::LONGEST_GROUP, tokens, 1 << 20);
        check_equal_signs(Kind::Code { ternary: false }, 1, ByteMatrix::LONGEST_GROUP, tokens, 1 << 20);
    }
}

fn check_equal_signs(kind: Kind, rows: usize, cols: usize, tokens: usize, group: usize) {
    let group = match kind {
        Kind::SixBit => 16,
        Kind::Code { .. } => 1 << 20,
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
            let (pool, mut buffer) = (Pool::with_isa(1, isa), Quantized::default());
            let input = Input::int8(&pool, &x, cols, &mut buffer);
            let mut out = vec![f32::NAN; tokens * rows];
            multiply(&pool, &input, &mut [Product::new(&matrix, &mut out)]);
            let case = format!("{kind:?} {code}, {cols} columns in groups of {group}, {tokens} tokens");
            assert!(out == expected, "{case}, {isa:?}: {} is not {}", out[0], expected[0]);
        }
    }
}

#[test]
fn activations_are_quantized_as_in_training() {
    let mut random = Random(1);
    for isa in Isa::available() {
        let (pool, mut buffer) = (Pool::with_isa(2, isa), Quantized::default());
        for (tokens, cols) in [(1, 1), (3, 17), (TOKENS, COLS), (2, 16), (1, 5)] {
            let scale = [1e-30, 1e-3, 1.0, 1e30][random.next(4)];
            let mut x: Vec<_> = (0..tokens * cols).map(|_| random.float() * scale).collect();
            let place = random.next(tokens * cols);
            x[place] = f32::NAN;
            Input::int8(&pool, &x, cols, &mut buffer);
            for (token, x) in x.chunks(cols).enumerate() {
                let (codes, scale) = quantize(x);
                let blocks = &buffer.codes[token * buffer.blocks..][..buffer.blocks];
                let found = blocks.as_flattened();
                assert_eq!(buffer.scales[token], scale);
                assert_eq!(found[..cols], codes);
                assert!(found[cols..].iter().all(|code| *code == 0));
                let sum: i32 = codes.iter().map(|code| i32::from(*code)).sum();
                assert_eq!(buffer.sum(token), sum);
            }
        }
    }
}

#[test]
fn matrices_lie_one_after_another() {
    let group = 64;
    let bytes = TernaryMatrix::bytes(70, 300, group)
        + ByteMatrix::bytes(17, 40, 40)
        + SixBitMatrix::bytes(33, 300)
        + FloatMatrix::bytes(5, 7);
    let arena = &mut Arena::new(bytes);
    let before = arena.left();
    TernaryMatrix::pack(arena, 70, 300, group, |_, _, _| ());
    ByteMatrix::pack(arena, 17, 40, 40, |_, _, _| ());
    SixBitMatrix::pack(arena, 33, 300, |_, _, _, _| ());
    FloatMatrix::pack(arena, 5, 7, |_, _| ());
    assert!(before - arena.left() <= bytes);
}
