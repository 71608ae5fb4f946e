//! [`SavedTensors`]: what the forward pass keeps for the backward pass.

use crate::{
    Pool,
    simd::{
        Kernel, LANES, Simd,
        vector_ops::{load_codes, store},
    },
    thread_pool::rows_per_task,
};

/// What the backward pass of a [`TernaryLinear`](super::TernaryLinear) needs: one byte per activation and one byte per weight.
#[derive(Clone, Copy, Debug)]
pub struct SavedTensors<'a> {
    /// `[tokens, d_input padded to 16]`
    pub input: &'a [i8],
    /// `[tokens]`
    pub input_scales: &'a [f32],
    /// -1, 0, +1: `[d_input, d_output]`
    pub weight: &'a [i8],
    /// `[d_output]`
    pub weight_scales: &'a [f32],
}

/// Memory for [`SavedTensors`], which [`TernaryLinear::forward`](super::TernaryLinear::forward) fills.
#[derive(Debug)]
pub struct SavedTensorsMut<'a> {
    /// `[tokens, d_input padded to 16]`
    pub input: &'a mut [i8],
    /// `[tokens]`
    pub input_scales: &'a mut [f32],
    /// -1, 0, +1: `[d_input, d_output]`
    pub weight: &'a mut [i8],
    /// `[d_output]`
    pub weight_scales: &'a mut [f32],
}

impl SavedTensors<'_> {
    /// Length of [`input`](Self::input) for `tokens` tokens: rows are padded to whole blocks of 16.
    pub fn input_len(tokens: usize, d_input: usize) -> usize {
        tokens * d_input.next_multiple_of(LANES)
    }

    /// The activations that were multiplied: codes times scales, `[tokens, d_input]`.
    ///
    /// # Panics
    /// When lengths do not fit.
    pub fn activations(&self, pool: &Pool, out: &mut [f32]) {
        let tokens = self.input_scales.len();
        let (d, stride) = (out.len() / tokens, self.input.len() / tokens);
        assert_eq!(self.input.len(), Self::input_len(tokens, d), "activations of {tokens} tokens");
        let rows = rows_per_task(d);
        pool.chunks(out, rows * d, |index, _, out| {
            for (row, out) in (index * rows..).zip(out.chunks_mut(d)) {
                let (codes, scale) = (&self.input[row * stride..][..d], self.input_scales[row]);
                pool.isa().run(Dequantize { codes, scale, out });
            }
        });
    }
}

/// `out = codes * scale`
struct Dequantize<'a> {
    /// `[d]`
    codes: &'a [i8],
    scale: f32,
    /// `[d]`
    out: &'a mut [f32],
}

impl Kernel for Dequantize<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let scale = s.splat_f32(self.scale);
        for (out, codes) in self.out.chunks_mut(LANES).zip(self.codes.chunks(LANES)) {
            store(s, s.mul_f32(s.to_float(load_codes(s, codes)), scale), out);
        }
    }
}
