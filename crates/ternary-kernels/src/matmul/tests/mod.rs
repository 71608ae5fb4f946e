//! Every product on every instruction set, against obvious loops over the codes: the weights and their products.

mod activations;
mod products;
mod sums;

use crate::*;
use half::f16;

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
    Q6,
    Int8,
    Int8Training { range: CodeRange },
}

impl Kind {
    /// The least code and the largest.
    fn codes(self) -> (i8, i8) {
        match self {
            Self::Ternary | Self::Int8Training { range: CodeRange::Ternary } => (-1, 1),
            Self::Q6 => (-32, 31),
            Self::Int8 => (-128, 127),
            Self::Int8Training { range: CodeRange::Int8 } => (-127, 127),
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
        if let Kind::Q6 = self.kind { i32::from(self.factors[row * blocks + block]) } else { 1 }
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
            Kind::Q6 => Q6Matrix::pack(arena, rows, cols, |row, c, f, s| {
                codes(row, c);
                f.copy_from_slice(&self.factors[row * blocks..][..blocks]);
                halves(row, s);
            })
            .into(),
            Kind::Int8 => Int8Matrix::pack(arena, rows, cols, group, |row, c, s| {
                codes(row, c);
                scales(row, s);
            })
            .into(),
            Kind::Int8Training { range } => {
                let mut matrix = Int8TrainingMatrix::default();
                matrix.pack(&Pool::new(2), &self.codes, MemoryOrder::RowMajor, &self.scales, range);
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

/// Quantizes by the formula: codes and scale.
fn quantize(x: &[f32]) -> (Vec<i8>, f32) {
    let scale = x.iter().fold(1e-5f32, |max, x| max.max(x.abs())) / 127.0;
    (x.iter().map(|x| (x / scale).round_ties_even() as i8).collect(), scale)
}

#[test]
fn matrices_lie_one_after_another() {
    let group = 64;
    let bytes = TernaryMatrix::bytes(70, 300, group)
        + Int8Matrix::bytes(17, 40, 40)
        + Q6Matrix::bytes(33, 300)
        + F32Matrix::bytes(5, 7);
    let arena = &mut Arena::new(bytes);
    let before = arena.left();
    TernaryMatrix::pack(arena, 70, 300, group, |_, _, _| ());
    Int8Matrix::pack(arena, 17, 40, 40, |_, _, _| ());
    Q6Matrix::pack(arena, 33, 300, |_, _, _, _| ());
    F32Matrix::pack(arena, 5, 7, |_, _| ());
    assert!(before - arena.left() <= bytes);
}
