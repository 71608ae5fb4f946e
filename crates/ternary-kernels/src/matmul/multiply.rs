//! [`multiply`]: matrices times activations.

use super::{
    activations::Input,
    matrix::{Matrix, each_form},
    tile::{Finish, Form, UNIT_TOKENS, by_tokens, tiles},
};
use crate::{
    Pool,
    simd::{
        Kernel, LANES, PANELS, Simd,
        vector_ops::{load, store},
    },
    thread_pool::Disjoint,
};
use std::ops::Range;

/// Bytes of a result that go past the caches: whoever needs them next would not find them there, and a line that is written
/// whole need not be fetched before.
const STREAMED: usize = 1 << 20;
/// Tasks for each thread, so that a slow one does fewer.
const TASKS: usize = 6;

/// One of the products of [`multiply`]: `out = W x`, with what else is done to the result.
#[derive(Debug)]
pub struct Product<'a> {
    pub matrix: &'a Matrix,
    /// Added to each token, `[rows]`.
    pub bias: Option<&'a [f32]>,
    /// Adds to what `out` holds, as for a residual, instead of replacing it.
    pub add: bool,
    /// `[tokens, rows]`
    pub out: &'a mut [f32],
}

impl<'a> Product<'a> {
    /// `out = W x`
    pub fn new(matrix: &'a Matrix, out: &'a mut [f32]) -> Self {
        Self { matrix, bias: None, add: false, out }
    }
}

/// Most products of one call.
const MOST: usize = 4;

/// Multiplies the same activations with each matrix, `out[t, r] = sum_c W[r, c] x[t, c]`, in one go over the threads.
///
/// Integer matrices take the int8 activations where the input has them; the result is then
/// `sum over groups of scale[r, g] * (sum of codes * activation codes) * scale[t]`, with the inner sums exact.
/// Neither the number of threads nor the instruction set changes a bit of it.
///
/// # Panics
/// When shapes do not fit, or there are more than four products.
pub fn multiply(pool: &Pool, x: &Input, products: &mut [Product]) {
    assert!(products.len() <= MOST, "{} products, more than {MOST}", products.len());
    let rows: usize = products.iter().map(|product| tiles(product.matrix.rows())).sum();
    let share = rows.div_ceil(pool.threads() * TASKS);
    let mut tasks = 0;
    let mut products = products.iter_mut();
    let parts: [Option<Part>; MOST] = std::array::from_fn(|_| {
        let part = Part::new(x, products.next()?, share, tasks);
        tasks = part.tasks.end;
        Some(part)
    });
    pool.run(tasks, |index, _| {
        let part =
            parts.iter().flatten().find(|part| part.tasks.contains(&index)).expect("a task has a product");
        let start = (index - part.tasks.start) * part.share;
        let tiles = start..tiles(part.matrix.rows()).min(start + part.share);
        // The task has the rows of its tiles to itself.
        each_form!(part.matrix, form => pool.isa().run(Task { form, part, x, tiles }));
    });
}

impl<'a> Input<'a> {
    /// What `matrix` multiplies of this input, as floats `[tokens, cols]`: the int8 codes times their scales if it takes
    /// those, which `buffer` then holds; else the floats.
    pub fn multiplied<'b>(&self, matrix: &Matrix, buffer: &'b mut Vec<f32>) -> &'b [f32]
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

/// A product while threads share it.
struct Part<'a> {
    matrix: &'a Matrix,
    bias: Option<&'a [f32]>,
    add: bool,
    streams: bool,
    out: Disjoint<'a, f32>,
    /// Which tasks are its own, and how many tiles each has.
    tasks: Range<usize>,
    share: usize,
}

impl<'a> Part<'a> {
    fn new(x: &Input, product: &'a mut Product, share: usize, first: usize) -> Self {
        let Product { matrix, bias, add, out } = product;
        let (rows, cols) = (matrix.rows(), matrix.cols());
        assert_eq!(x.cols, cols, "columns of activations and matrix");
        assert_eq!(out.len(), x.tokens() * rows, "tokens x rows of the result");
        assert!(bias.is_none_or(|bias| bias.len() == rows), "rows of bias and matrix");
        let most = each_form!(matrix, m => tiles_of_task(m));
        // Tiles go in pairs, or as a unit takes them.
        let together = if UNIT_TOKENS.contains(&x.tokens()) { PANELS } else { 2 };
        let share = share.min(most).max(1).next_multiple_of(together);
        let tasks = first..first + tiles(rows).div_ceil(share);
        let streams = !*add && size_of_val(*out) >= STREAMED;
        Self { matrix, bias: *bias, add: *add, streams, out: Disjoint::new(out), tasks, share }
    }
}

fn tiles_of_task<F: Form>(form: &F) -> usize {
    F::TASK_BYTES / form.tile_bytes().max(1)
}

/// Some tiles of a product, for all tokens.
struct Task<'a, F> {
    form: &'a F,
    part: &'a Part<'a>,
    x: &'a Input<'a>,
    tiles: Range<usize>,
}

impl<F: Form> Kernel for Task<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let tokens = self.x.tokens();
        let together = self.form.tokens(s);
        for start in (0..tokens).step_by(together) {
            let tokens = start..tokens.min(start + together);
            if let Some(x) = self.x.int8
                && F::INTEGER
            {
                self.form.integer_tiles(s, self.tiles.clone(), x, tokens, &self);
                continue;
            }
            for tile in self.tiles.clone() {
                by_tokens!(S, tokens.clone(), |token, T| {
                    let sums = self.form.exact::<S, T>(s, tile, self.x, token);
                    for t in 0..T {
                        self.write(s, tile, token + t, sums[t]);
                    }
                });
            }
        }
        if self.part.streams {
            s.fence();
        }
    }
}

impl<F: Form> Finish for Task<'_, F> {
    #[inline(always)]
    fn finish<S: Simd>(&self, s: S, tile: usize, token: usize, sums: S::Float) {
        let scale = self.x.int8.expect("an integer product").scales[token];
        self.write(s, tile, token, s.mul_f32(sums, s.splat_f32(scale)));
    }
}

impl<F: Form> Task<'_, F> {
    #[inline(always)]
    fn write<S: Simd>(&self, s: S, tile: usize, token: usize, mut sum: S::Float) {
        let (rows, start) = (self.form.shape().0, tile * LANES);
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
            Some(line) if self.part.streams => s.stream_f32(sum, line),
            _ => store(s, sum, out),
        }
    }
}
