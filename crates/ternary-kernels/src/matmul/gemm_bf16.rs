//! Products of float matrices whose factors are rounded to bfloat16 ([`matmul_bf16`]), by the tile registers of AMX.
//!
//! # Layout
//! Both factors are rounded and packed, 1,024 summands (`k`) at a time:
//!
//! ```text
//! left    [m / 16][k / 32][16 rows][32]        a cache line has 32 consecutive numbers of one row
//! right   [n / 16][k / 2][16 columns][2]       a cache line has 2 consecutive numbers of 16 columns
//! ```
//!
//! A line of either factor is a row of an AMX tile, which multiplies 16 x 32 with 32 x 16 numbers. If the memory order of a
//! factor is the other one, its blocks of 16 x 16 pairs are transposed in registers.
//!
//! # Product
//! ```text
//! for each 1,024 of k:
//!     pack left and right, in parallel
//!     for each task (some rows of left that stay in the second-level cache), in parallel:
//!         for each 32 columns of right, for each 32 rows of the task:
//!             2 x 2 tiles of sums  +=  left rows * right columns, over all k of the pass
//!             out = sums + bias (first pass), out += sums (later passes)
//! ```
//!
//! | shape | CPU | path |
//! |---|---|---|
//! | rows and columns of whole 32, `k` of whole 32 | AMX with bfloat16 | this |
//! | others | any | [`matmul_f32`] of unrounded factors |
//!
//! # Tried
//! `vdpbf16ps`, the bfloat16 dot product of AVX-512 without AMX, was slower than f32: a training step ran at 334 tokens/s
//! instead of 491.

use super::gemm_f32::{MatrixView, matmul_f32};
use crate::{
    Pool,
    simd::{CacheLine, Kernel, LANES, Simd, vector_ops::load},
    thread_pool::DisjointSlices,
};
use half::bf16;

/// Rows and columns of the result that are computed at a time: 2 x 2 AMX tiles.
const TILE_SIDE: usize = 2 * LANES;
/// Numbers per cache line.
const LINE_NUMBERS: usize = size_of::<CacheLine>() / size_of::<bf16>();
/// Summands per pass, so that many rows of them stay in the second-level cache.
const K_BLOCK: usize = 1024;
/// Bytes of packed rows per task.
const TASK_BYTES: usize = 512 << 10;

/// Memory for packed factors, reused from one product to the next: fresh pages cost more than packing does.
#[derive(Debug, Default)]
pub struct Bf16Workspace {
    /// `[m / 16, k / 32, 16]`
    rows: Vec<CacheLine>,
    /// `[n / 16, k / 2]`
    columns: Vec<CacheLine>,
}

/// `out = left right + bias`, with factors rounded to bfloat16 and sums in f32; `bias` is optional and added to each row.
///
/// Factors are only rounded if the CPU multiplies bfloat16 in tiles ([`Isa::multiplies_bf16`](crate::Isa::multiplies_bf16))
/// and `m`, `n` and `k` are multiples of 32. Otherwise the result is that of [`matmul_f32`].
///
/// # Shapes
/// left `[m, k]`, right `[k, n]`, bias `[n]`, out `[m, n]`
///
/// # Panics
/// When shapes do not fit.
pub fn matmul_bf16(
    pool: &Pool,
    workspace: &mut Bf16Workspace,
    left: MatrixView,
    right: MatrixView,
    bias: Option<&[f32]>,
    out: &mut [f32],
) {
    let (m, k, n) = (left.row_count(), right.row_count(), right.transposed().row_count());
    let whole = m.is_multiple_of(TILE_SIDE) && n.is_multiple_of(TILE_SIDE) && k.is_multiple_of(LINE_NUMBERS);
    if !(pool.isa().multiplies_bf16() && whole) {
        return matmul_f32(pool, left, right, bias, out);
    }
    assert!(left.transposed().row_count() == k && out.len() == m * n, "the factors' and the result's shapes");
    assert!(bias.is_none_or(|bias| bias.len() == n), "a bias for each of {n} columns");
    let Bf16Workspace { rows, columns } = workspace;
    let out = DisjointSlices::new(out);
    for start in (0..k).step_by(K_BLOCK) {
        let range = start..k.min(start + K_BLOCK);
        let (left, right) = (left.transposed().rows(range.clone()).transposed(), right.rows(range.clone()));
        let k = range.len();
        let [rows, columns] = [(&mut *rows, m), (&mut *columns, n)].map(|(lines, count)| {
            let len = count * k / LINE_NUMBERS;
            // Never shrinks: growing again would fill with zeros again.
            if lines.len() < len {
                lines.resize(len, CacheLine([0; 64]));
            }
            &mut lines[..len]
        });
        pool.chunks(rows, LANES * k / LINE_NUMBERS, |index, _, out| {
            pool.isa().run(PackRows { left, first: index * LANES, out });
        });
        pool.chunks(columns, LANES * k / LINE_NUMBERS, |index, _, out| {
            pool.isa().run(PackColumns { right, first: index * LANES, out });
        });
        let tasks = size_of_val::<[CacheLine]>(rows).div_ceil(TASK_BYTES).next_multiple_of(pool.threads());
        let share = m.div_ceil(tasks).next_multiple_of(TILE_SIDE);
        pool.run(m.div_ceil(share), |index, _| {
            let rows = (&rows[..], index * share..m.min((index + 1) * share));
            let before = if start > 0 { Addend::Output } else { bias.map_or(Addend::Nothing, Addend::Bias) };
            pool.isa().run(Multiply { rows, columns, k, n, before, out: &out });
        });
    }
}

impl MatrixView<'_> {
    /// The block of 16 rows from `row` and 32 columns from `col`, rounded to bfloat16.
    ///
    /// For a row-major matrix, there is one line per row, and `false`. For a transposed one, there is one line per pair of
    /// columns, with the two numbers of each row, and `true`: each is read in memory order.
    #[inline(always)]
    fn bf16_block(&self, row: usize, col: usize) -> ([CacheLine; LANES], bool) {
        let start = row * self.row_stride + col * self.col_stride;
        let mut lines = [CacheLine([0; 64]); LANES];
        if self.col_stride == 1 {
            for (i, line) in lines.iter_mut().enumerate() {
                let from = &self.values[start + i * self.row_stride..][..LINE_NUMBERS];
                for (to, x) in line.0.as_chunks_mut::<2>().0.iter_mut().zip(from) {
                    *to = to_bf16_bits(*x).to_ne_bytes();
                }
            }
            return (lines, false);
        }
        assert_eq!(self.row_stride, 1, "a matrix or its transpose");
        for (pair, line) in lines.iter_mut().enumerate() {
            let [even, odd] =
                [0, 1].map(|k| &self.values[start + (2 * pair + k) * self.col_stride..][..LANES]);
            for (to, (even, odd)) in line.0.as_chunks_mut::<4>().0.iter_mut().zip(even.iter().zip(odd)) {
                let [a, b] = to_bf16_bits(*even).to_ne_bytes();
                let [c, d] = to_bf16_bits(*odd).to_ne_bytes();
                *to = [a, b, c, d];
            }
        }
        (lines, true)
    }
}

/// Packs 16 rows of the left factor: `[k / 32, 16, 32]`, two bytes per number.
struct PackRows<'a> {
    /// The whole left factor.
    left: MatrixView<'a>,
    /// The first of the 16 rows.
    first: usize,
    /// `[k / 32, 16]`
    out: &'a mut [CacheLine],
}

impl Kernel for PackRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { left, first, out } = self;
        for (step, lines) in out.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
            let (block, by_pair) = left.bf16_block(first, step * LINE_NUMBERS);
            *lines = if by_pair { transpose_pairs(s, &block) } else { block };
        }
    }
}

/// Packs 16 columns of the right factor: `[k / 2, 16, 2]`.
struct PackColumns<'a> {
    /// The whole right factor.
    right: MatrixView<'a>,
    /// The first of the 16 columns.
    first: usize,
    /// `[k / 2]`
    out: &'a mut [CacheLine],
}

impl Kernel for PackColumns<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { right, first, out } = self;
        for (step, lines) in out.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
            let (block, by_pair) = right.transposed().bf16_block(first, step * LINE_NUMBERS);
            *lines = if by_pair { block } else { transpose_pairs(s, &block) };
        }
    }
}

/// The transpose of a block of 16 x 16 pairs of numbers.
#[inline(always)]
fn transpose_pairs<S: Simd>(s: S, block: &[CacheLine; LANES]) -> [CacheLine; LANES] {
    let mut out = *block;
    for (line, column) in out.iter_mut().zip(s.transpose(block.each_ref().map(|line| s.load(line)))) {
        s.store(column, line);
    }
    out
}

/// The bits of the nearest bfloat16, ties to even. A NaN stays a NaN.
#[inline(always)]
fn to_bf16_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    let nearest = (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16;
    if x.is_nan() { 0x7fc0 } else { nearest }
}

/// What is added to a product.
#[derive(Clone, Copy)]
enum Addend<'a> {
    Nothing,
    /// `[n]`, to each row.
    Bias(&'a [f32]),
    /// The sums of the passes before, in `out`.
    Output,
}

/// Multiplies the rows of a task with all columns.
struct Multiply<'a> {
    /// All packed rows, and the range of the task.
    rows: (&'a [CacheLine], std::ops::Range<usize>),
    /// All packed columns.
    columns: &'a [CacheLine],
    /// Summands of this pass.
    k: usize,
    /// Columns of the result.
    n: usize,
    /// What the product is added to.
    before: Addend<'a>,
    /// `[m, n]`
    out: &'a DisjointSlices<'a, f32>,
}

impl Kernel for Multiply<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { rows: (rows, range), columns, k, n, before, out } = self;
        let (stride, tile) = (k / LINE_NUMBERS, LANES * k / LINE_NUMBERS);
        let mut sums = [[0.0; TILE_SIDE]; TILE_SIDE];
        for (pair, columns) in columns.chunks(2 * tile).enumerate() {
            let right = [&columns[..tile], &columns[tile..]];
            for first in range.clone().step_by(TILE_SIDE) {
                let rows = &rows[first * stride..][..TILE_SIDE * stride];
                s.multiply_bf16([&rows[..tile], &rows[tile..]], right, &mut sums);
                for (row, sums) in sums.iter().enumerate() {
                    // SAFETY: each task has rows of its own.
                    let out = unsafe { out.slice((first + row) * n + pair * TILE_SIDE, TILE_SIDE) };
                    let halves = out.as_chunks_mut().0.iter_mut().zip(sums.as_chunks().0);
                    for (half, (out, sums)) in halves.enumerate() {
                        let sums = s.load_f32(sums);
                        match before {
                            Addend::Nothing => s.stream_f32(sums, out),
                            Addend::Bias(bias) => {
                                let bias = load(s, &bias[pair * TILE_SIDE + half * LANES..][..LANES]);
                                s.stream_f32(s.add_f32(sums, bias), out);
                            }
                            Addend::Output => s.store_f32(s.add_f32(s.load_f32(out), sums), out),
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
            assert_eq!(to_bf16_bits(x), bf16::from_f32(x).to_bits(), "{x}");
        }
        assert!(bf16::from_bits(to_bf16_bits(f32::from_bits(0x7f80_0001))).is_nan());
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
            let mut workspace = Bf16Workspace::default();
            for pool in pools() {
                let whole = m % TILE_SIDE == 0 && n % TILE_SIDE == 0 && k % LINE_NUMBERS == 0;
                let factor = |x: f32| match whole && pool.isa().multiplies_bf16() {
                    true => f64::from(bf16::from_f32(x).to_f32()),
                    false => f64::from(x),
                };
                let exact = |i: usize| -> f64 {
                    (0..k).map(|c| factor(a[i / n * k + c]) * factor(b[c * n + i % n])).sum()
                };
                for (left, right) in [
                    (MatrixView::new(&a, m, k), MatrixView::new(&b, k, n)),
                    (MatrixView::new(&a_t, k, m).transposed(), MatrixView::new(&b, k, n)),
                    (MatrixView::new(&a, m, k), MatrixView::new(&b_t, n, k).transposed()),
                ] {
                    for bias in [None, Some(&numbers(n, 1.0, 3)[..])] {
                        let mut out = vec![f32::NAN; m * n];
                        matmul_bf16(&pool, &mut workspace, left, right, bias, &mut out);
                        let exact = |i| exact(i) + bias.map_or(0.0, |bias| f64::from(bias[i % n]));
                        assert_close("product", &out, (0..m * n).map(exact), 2e-6);
                    }
                }
            }
        }
    }
}
