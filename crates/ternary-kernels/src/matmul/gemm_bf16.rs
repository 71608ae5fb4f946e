//! Products of float matrices whose factors are rounded to bfloat16, by the CPU's unit for matrices.

use super::gemm_f32::{View, float_product};
use crate::{
    Pool,
    simd::{Kernel, LANES, Line, Simd, vector_ops::load},
    thread_pool::Disjoint,
};
use half::bf16;

/// Rows and columns of a result that are multiplied at once.
const SIDE: usize = 2 * LANES;
/// Numbers of a line.
const WIDTH: usize = size_of::<Line>() / size_of::<bf16>();
/// Summands that are taken at a time, so that many rows of them stay in the second-level cache; and bytes of rows that do.
const DEPTH: usize = 1024;
const TASK_BYTES: usize = 512 << 10;

/// Room for rounded factors, to be used again and again: fresh memory costs more than they do.
#[derive(Debug, Default)]
pub struct HalfFactors {
    rows: Vec<Line>,
    columns: Vec<Line>,
}

/// `out = left right`, plus `bias` for each row where there is one, of factors rounded to bfloat16 and with sums in f32, where
/// the CPU has a unit for such products and the shape is whole tiles of it; else [`float_product`] of the factors as they are.
///
/// # Shapes
/// left `[m, k]`, right `[k, n]`, bias `[n]`, out `[m, n]`
///
/// # Panics
/// When shapes do not fit.
pub fn half_product(
    pool: &Pool,
    room: &mut HalfFactors,
    left: View,
    right: View,
    bias: Option<&[f32]>,
    out: &mut [f32],
) {
    let (m, k, n) = (left.row_count(), right.row_count(), right.transposed().row_count());
    let whole = m.is_multiple_of(SIDE) && n.is_multiple_of(SIDE) && k.is_multiple_of(WIDTH);
    if !(pool.isa().has_half_tiles() && whole) {
        return float_product(pool, left, right, bias, out);
    }
    assert!(left.transposed().row_count() == k && out.len() == m * n, "the factors' and the result's shapes");
    assert!(bias.is_none_or(|bias| bias.len() == n), "a bias for each of {n} columns");
    let HalfFactors { rows, columns } = room;
    let out = Disjoint::new(out);
    for start in (0..k).step_by(DEPTH) {
        let range = start..k.min(start + DEPTH);
        let (left, right) = (left.transposed().rows(range.clone()).transposed(), right.rows(range.clone()));
        let k = range.len();
        let [rows, columns] = [(&mut *rows, m), (&mut *columns, n)].map(|(lines, count)| {
            let len = count * k / WIDTH;
            // What was there is written over, so it never shrinks: to grow again would clear it.
            if lines.len() < len {
                lines.resize(len, Line([0; 64]));
            }
            &mut lines[..len]
        });
        pool.chunks(rows, LANES * k / WIDTH, |index, _, out| {
            pool.isa().run(PackRows { left, first: index * LANES, out });
        });
        pool.chunks(columns, LANES * k / WIDTH, |index, _, out| {
            pool.isa().run(PackColumns { right, first: index * LANES, out });
        });
        let tasks = size_of_val::<[Line]>(rows).div_ceil(TASK_BYTES).next_multiple_of(pool.threads());
        let share = m.div_ceil(tasks).next_multiple_of(SIDE);
        pool.run(m.div_ceil(share), |index, _| {
            let rows = (&rows[..], index * share..m.min((index + 1) * share));
            let before = if start > 0 { Before::Sums } else { bias.map_or(Before::Nothing, Before::Bias) };
            pool.isa().run(Multiply { rows, columns, k, n, before, out: &out });
        });
    }
}

impl View<'_> {
    /// The numbers of 16 rows from `row` on and 32 columns from `col` on, rounded to bfloat16: a line a row; or, where columns
    /// lie in one piece, and then true is given, one for each two columns, with the two numbers of each row.
    #[inline(always)]
    fn halves(&self, row: usize, col: usize) -> ([Line; LANES], bool) {
        let start = row * self.row_stride + col * self.col_stride;
        let mut lines = [Line([0; 64]); LANES];
        if self.col_stride == 1 {
            for (i, line) in lines.iter_mut().enumerate() {
                let from = &self.values[start + i * self.row_stride..][..WIDTH];
                for (to, x) in line.0.as_chunks_mut::<2>().0.iter_mut().zip(from) {
                    *to = rounded(*x).to_ne_bytes();
                }
            }
            return (lines, false);
        }
        assert_eq!(self.row_stride, 1, "a matrix or its transpose");
        for (pair, line) in lines.iter_mut().enumerate() {
            let [even, odd] =
                [0, 1].map(|k| &self.values[start + (2 * pair + k) * self.col_stride..][..LANES]);
            for (to, (even, odd)) in line.0.as_chunks_mut::<4>().0.iter_mut().zip(even.iter().zip(odd)) {
                let [a, b] = rounded(*even).to_ne_bytes();
                let [c, d] = rounded(*odd).to_ne_bytes();
                *to = [a, b, c, d];
            }
        }
        (lines, true)
    }
}

/// Rows of the left factor: `[k / 32, 16, 32]`, two bytes a number.
struct PackRows<'a> {
    left: View<'a>,
    first: usize,
    out: &'a mut [Line],
}

impl Kernel for PackRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { left, first, out } = self;
        for (step, lines) in out.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
            let (block, by_pair) = left.halves(first, step * WIDTH);
            *lines = if by_pair { transposed(s, &block) } else { block };
        }
    }
}

/// Columns of the right factor: `[k / 2, 16, 2]`.
struct PackColumns<'a> {
    right: View<'a>,
    first: usize,
    out: &'a mut [Line],
}

impl Kernel for PackColumns<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { right, first, out } = self;
        for (step, lines) in out.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
            let (block, by_pair) = right.transposed().halves(first, step * WIDTH);
            *lines = if by_pair { block } else { transposed(s, &block) };
        }
    }
}

/// Rows for columns, of pairs of numbers.
#[inline(always)]
fn transposed<S: Simd>(s: S, block: &[Line; LANES]) -> [Line; LANES] {
    let mut out = *block;
    for (line, column) in out.iter_mut().zip(s.transpose(block.each_ref().map(|line| s.load(line)))) {
        s.store(column, line);
    }
    out
}

/// The nearest bfloat16, ties to even; a NaN stays one.
#[inline(always)]
fn rounded(x: f32) -> u16 {
    let bits = x.to_bits();
    let nearest = (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16;
    if x.is_nan() { 0x7fc0 } else { nearest }
}

/// What a product is added to.
#[derive(Clone, Copy)]
enum Before<'a> {
    Nothing,
    Bias(&'a [f32]),
    /// What `out` holds.
    Sums,
}

struct Multiply<'a> {
    /// Of all rows those of the task.
    rows: (&'a [Line], std::ops::Range<usize>),
    columns: &'a [Line],
    k: usize,
    n: usize,
    before: Before<'a>,
    out: &'a Disjoint<'a, f32>,
}

impl Kernel for Multiply<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { rows: (rows, range), columns, k, n, before, out } = self;
        let (stride, tile) = (k / WIDTH, LANES * k / WIDTH);
        let mut sums = [[0.0; SIDE]; SIDE];
        for (pair, columns) in columns.chunks(2 * tile).enumerate() {
            let right = [&columns[..tile], &columns[tile..]];
            for first in range.clone().step_by(SIDE) {
                let rows = &rows[first * stride..][..SIDE * stride];
                s.half_tiles([&rows[..tile], &rows[tile..]], right, &mut sums);
                for (row, sums) in sums.iter().enumerate() {
                    // SAFETY: each task has rows of its own.
                    let out = unsafe { out.slice((first + row) * n + pair * SIDE, SIDE) };
                    let halves = out.as_chunks_mut().0.iter_mut().zip(sums.as_chunks().0);
                    for (half, (out, sums)) in halves.enumerate() {
                        let sums = s.load_f32(sums);
                        match before {
                            Before::Nothing => s.stream_f32(sums, out),
                            Before::Bias(bias) => {
                                let bias = load(s, &bias[pair * SIDE + half * LANES..][..LANES]);
                                s.stream_f32(s.add_f32(sums, bias), out);
                            }
                            Before::Sums => s.store_f32(s.add_f32(s.load_f32(out), sums), out),
                        }
                    }
                }
            }
        }
        s.fence();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, numbers, pools};

    #[test]
    fn factors_are_rounded_as_bfloat16() {
        for x in numbers(10_000, 3.0, 1).into_iter().chain([0.0, -0.0, f32::INFINITY, f32::MAX, 1e-40]) {
            assert_eq!(rounded(x), bf16::from_f32(x).to_bits(), "{x}");
        }
        assert!(bf16::from_bits(rounded(f32::from_bits(0x7f80_0001))).is_nan());
    }

    #[test]
    fn products_are_those_of_rounded_factors() {
        for (m, k, n) in
            [(32, 32, 32), (64, 96, 160), (160, 32, 64), (33, 32, 32), (32, 30, 31), (32, 2080, 64)]
        {
            let (a, b) = (numbers(m * k, 1.0, 1), numbers(k * n, 1.0, 2));
            let (a_t, b_t): (Vec<f32>, Vec<f32>) = (
                (0..m * k).map(|i| a[i % m * k + i / m]).collect(),
                (0..k * n).map(|i| b[i % k * n + i / k]).collect(),
            );
            let mut room = HalfFactors::default();
            for pool in pools() {
                let whole = m % SIDE == 0 && n % SIDE == 0 && k % WIDTH == 0;
                let factor = |x: f32| match whole && pool.isa().has_half_tiles() {
                    true => f64::from(bf16::from_f32(x).to_f32()),
                    false => f64::from(x),
                };
                let exact = |i: usize| -> f64 {
                    (0..k).map(|c| factor(a[i / n * k + c]) * factor(b[c * n + i % n])).sum()
                };
                for (left, right) in [
                    (View::new(&a, m, k), View::new(&b, k, n)),
                    (View::new(&a_t, k, m).transposed(), View::new(&b, k, n)),
                    (View::new(&a, m, k), View::new(&b_t, n, k).transposed()),
                ] {
                    for bias in [None, Some(&numbers(n, 1.0, 3)[..])] {
                        let mut out = vec![f32::NAN; m * n];
                        half_product(&pool, &mut room, left, right, bias, &mut out);
                        let exact = |i| exact(i) + bias.map_or(0.0, |bias| f64::from(bias[i % n]));
                        assert_close("product", &out, (0..m * n).map(exact), 2e-6);
                    }
                }
            }
        }
    }
}
