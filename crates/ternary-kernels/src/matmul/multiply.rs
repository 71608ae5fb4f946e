//! [`multiply`]: matrices times activations, in parallel.
//!
//! # Tasks
//! ```text
//! tiles of all products:  | matrix 0: 0 1 2 3 4 5 | matrix 1: 0 1 2 3 |
//! tasks:                  |  0   |   1    |   2   |    3      |   4   |     each has the rows of its tiles to itself
//! ```
//!
//! Up to four matrices that share activations (as query, key and value do) are one run of the thread pool. A task has as
//! many tiles as fit the second-level cache, but few enough that each thread gets [`TASKS_PER_THREAD`] of
//! them: a thread that is late then does fewer. Within a task, tokens pass the weights 64 at a time.
//!
//! # Epilogue
//! ```text
//! y = sums * scale of the token                      (int8 activations only)
//! y += bias                                          (if there is one)
//! out = y, or out += y                               (Product::add)
//! ```
//!
//! Outputs of a megabyte or more bypass the caches ([`STREAMING_BYTES`]).
//!
//! # Tried
//! In a training step on AMX, other thresholds for streaming were slower: 4 MB by 5 %, never by 18 %.

use super::{
    activations::Activations,
    matrix::{Matrix, match_format},
    tile::{Epilogue, PackedFormat, UNIT_TOKENS, for_each_token_group, tile_count},
};
use crate::{
    Pool,
    simd::{
        Kernel, LANES, Simd, UNIT_TILES,
        vector_ops::{load, store},
    },
    thread_pool::DisjointSlices,
};
use std::ops::Range;

/// Bytes of an output from which it bypasses the caches: it would not stay there until its next use, and a cache line that
/// is streamed as a whole is not read from memory before.
const STREAMING_BYTES: usize = 1 << 20;
/// Tasks per thread, so that a slow thread does fewer.
const TASKS_PER_THREAD: usize = 6;

/// One of the products of [`multiply`]: `out = W x`, with an optional bias and an optional addition.
#[derive(Debug)]
pub struct Product<'a> {
    /// `W`, `[rows, cols]`.
    pub matrix: &'a Matrix,
    /// Added to the result of each token, `[rows]`.
    pub bias: Option<&'a [f32]>,
    /// Whether the result is added to `out`, as for a residual connection, instead of replacing it.
    pub add: bool,
    /// The result, `[tokens, rows]`.
    pub out: &'a mut [f32],
}

impl<'a> Product<'a> {
    /// `out = W x`
    pub fn new(matrix: &'a Matrix, out: &'a mut [f32]) -> Self {
        Self { matrix, bias: None, add: false, out }
    }
}

/// The largest number of products per call.
const MAX_PRODUCTS: usize = 4;

/// Multiplies the same activations with each matrix: `out[t, r] = sum_c W[r, c] x[t, c]`.
///
/// All products are one run of the thread pool. Integer matrices use the int8 activations if `x` has them. The result is then
/// `(sum over groups g of scale[r, g] * (sum over c in g of code[r, c] * code[t, c])) * scale[t]`, with exact inner sums.
/// The bits of the result depend neither on the number of threads nor on the instruction set.
///
/// # Shapes
/// x `[tokens, cols]`; of each product: matrix `[rows, cols]`, bias `[rows]`, out `[tokens, rows]`
///
/// # Panics
/// When shapes do not fit, or there are more than four products.
///
/// # Example
/// ```
/// // Query and key of a layer, from the same activations.
/// use ternary_kernels::{Activations, Arena, F32Matrix, Matrix, Pool, Product, multiply};
/// let (pool, mut arena) = (Pool::new(1), Arena::new(0));
/// let mut matrix = |factor: f32| -> Matrix {
///     F32Matrix::pack(&mut arena, 2, 2, |row, weights| {
///         weights.fill(0.0);
///         weights[row] = factor;
///     })
///     .into()
/// };
/// let (query, key) = (matrix(2.0), matrix(3.0));
/// let (mut q, mut k) = ([0.0; 2], [1.0; 2]);
/// let mut products = [
///     Product::new(&query, &mut q),
///     // Added to what `k` holds.
///     Product { add: true, ..Product::new(&key, &mut k) },
/// ];
/// multiply(&pool, &Activations::f32(&[1.0, 10.0], 2), &mut products);
/// assert_eq!((q, k), ([2.0, 20.0], [4.0, 31.0]));
/// ```
pub fn multiply(pool: &Pool, x: &Activations, products: &mut [Product]) {
    assert!(products.len() <= MAX_PRODUCTS, "{} products, more than {MAX_PRODUCTS}", products.len());
    let rows: usize = products.iter().map(|product| tile_count(product.matrix.rows())).sum();
    let share = rows.div_ceil(pool.threads() * TASKS_PER_THREAD);
    let mut tasks = 0;
    let mut products = products.iter_mut();
    let parts: [Option<SharedProduct>; MAX_PRODUCTS] = std::array::from_fn(|_| {
        let part = SharedProduct::new(x, products.next()?, share, tasks);
        tasks = part.tasks.end;
        Some(part)
    });
    pool.run(tasks, |index, _| {
        let part =
            parts.iter().flatten().find(|part| part.tasks.contains(&index)).expect("a task has a product");
        let start = (index - part.tasks.start) * part.share;
        let tiles = start..tile_count(part.matrix.rows()).min(start + part.share);
        // The task has the rows of its tiles to itself.
        match_format!(part.matrix, format => pool.isa().run(Task { format, part, x, tiles }));
    });
}

impl<'a> Activations<'a> {
    /// The activations that `matrix` is in fact multiplied with, as floats `[tokens, cols]`.
    ///
    /// If the matrix uses the int8 codes, these are the codes times their scales, which are written to `buffer`; else
    /// they are the float activations themselves.
    pub fn dequantized<'b>(&self, matrix: &Matrix, buffer: &'b mut Vec<f32>) -> &'b [f32]
    where
        'a: 'b,
    {
        let Some(int8) = self.int8.filter(|_| matrix.is_integer()) else {
            return self.floats;
        };
        buffer.resize(self.tokens * self.cols, 0.0);
        let tokens = buffer.chunks_exact_mut(self.cols).zip(int8.codes.chunks_exact(int8.blocks));
        for ((values, codes), scale) in tokens.zip(&int8.scales) {
            let codes = codes.as_flattened();
            values.iter_mut().zip(codes).for_each(|(value, code)| *value = f32::from(*code) * scale);
        }
        buffer
    }
}

/// A product that several threads work on.
struct SharedProduct<'a> {
    matrix: &'a Matrix,
    bias: Option<&'a [f32]>,
    add: bool,
    /// Whether the output bypasses the caches.
    streaming: bool,
    out: DisjointSlices<'a, f32>,
    /// The range of its tasks.
    tasks: Range<usize>,
    /// Tiles per task.
    share: usize,
}

impl<'a> SharedProduct<'a> {
    fn new(x: &Activations, product: &'a mut Product, share: usize, first: usize) -> Self {
        let Product { matrix, bias, add, out } = product;
        let (rows, cols) = (matrix.rows(), matrix.cols());
        assert_eq!(x.cols, cols, "columns of activations and matrix");
        assert_eq!(out.len(), x.tokens() * rows, "tokens x rows of the result");
        assert!(bias.is_none_or(|bias| bias.len() == rows), "rows of bias and matrix");
        let most = match_format!(matrix, m => tiles_of_task(m));
        // Tiles share passes in pairs, or in fours in the matrix unit.
        let together = if UNIT_TOKENS.contains(&x.tokens()) { UNIT_TILES } else { 2 };
        let share = share.min(most).max(1).next_multiple_of(together);
        let tasks = first..first + tile_count(rows).div_ceil(share);
        let streaming = !*add && size_of_val(*out) >= STREAMING_BYTES;
        Self { matrix, bias: *bias, add: *add, streaming, out: DisjointSlices::new(out), tasks, share }
    }
}

/// Tiles per task whose weights stay in the second-level cache.
fn tiles_of_task<F: PackedFormat>(format: &F) -> usize {
    F::TASK_BYTES / format.tile_bytes().max(1)
}

/// Some tiles of a product, for all tokens. It is also the epilogue of its sums.
struct Task<'a, F> {
    format: &'a F,
    part: &'a SharedProduct<'a>,
    x: &'a Activations<'a>,
    /// The tiles whose rows the task computes.
    tiles: Range<usize>,
}

impl<F: PackedFormat> Kernel for Task<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let tokens = self.x.tokens();
        let together = self.format.tokens_per_pass(s);
        for start in (0..tokens).step_by(together) {
            let tokens = start..tokens.min(start + together);
            if let Some(x) = self.x.int8
                && F::INT8
            {
                self.format.multiply_tiles(s, self.tiles.clone(), x, tokens, &self);
                continue;
            }
            for tile in self.tiles.clone() {
                for_each_token_group!(S, tokens.clone(), |token, T| {
                    let sums = self.format.dot_f32::<S, T>(s, tile, self.x, token);
                    for t in 0..T {
                        self.write(s, tile, token + t, sums[t]);
                    }
                });
            }
        }
        if self.part.streaming {
            s.fence();
        }
    }
}

impl<F: PackedFormat> Epilogue for Task<'_, F> {
    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, tile: usize, token: usize, sums: S::Float) {
        let scale = self.x.int8.expect("an int8 product").scales[token];
        self.write(s, tile, token, s.mul_f32(sums, s.splat_f32(scale)));
    }
}

impl<F: PackedFormat> Task<'_, F> {
    /// Adds bias and output as the product says, and stores the rows of a tile.
    #[inline(always)]
    fn write<S: Simd>(&self, s: S, tile: usize, token: usize, mut sum: S::Float) {
        let (rows, start) = (self.format.shape().0, tile * LANES);
        let len = LANES.min(rows - start);
        // SAFETY: rows of a tile belong to one task, and a task writes a token at a time.
        let out = unsafe { self.part.out.slice(token * rows + start, len) };
        if let Some(bias) = self.part.bias {
            sum = s.add_f32(sum, load(s, &bias[start..start + len]));
        }
        if self.part.add {
            sum = s.add_f32(load(s, out), sum);
        }
        match out.as_mut_array::<LANES>() {
            Some(line) if self.part.streaming => s.stream_f32(sum, line),
            _ => store(s, sum, out),
        }
    }
}
