//! The transpose of int8 codes, for the gradient of the weight.
//!
//! ```text
//! codes [tokens, stride]  ->  [columns, tokens padded to 16], a task per 64 columns
//!
//! for each 64 tokens:
//!     for each 16 of the 64 columns:
//!         quads[q] = token 4q | token 4q + 1 << 8 | 4q + 2 << 16 | 4q + 3 << 24          q in 0..16; a lane per column
//!         lines = transpose(quads)                     16 x 16 lanes of 4 bytes: line c has column c, 64 tokens in order
//!         store line c as 64 codes of column c
//! ```
//!
//! A byte transpose thus becomes one of 32-bit lanes, which all instruction sets have, and every load and store is a whole
//! vector. 64 tokens per column fill a cache line of the output. The sums of columns, which correct for offsets of the other
//! factor, are added on the way.

use crate::{
    Int8Activations, Pool,
    matmul::activations::SumGranularity,
    simd::{CacheLine, Kernel, LANES, Simd},
    thread_pool::DisjointSlices,
};

impl Int8Activations {
    /// Becomes the transpose of `codes`, `[tokens, cols padded to 16]`: int8 activations `[cols, tokens]` with scales of 1.
    pub(super) fn transpose(&mut self, pool: &Pool, codes: &[i8], cols: usize, tokens: usize) {
        let stride = cols.next_multiple_of(LANES);
        self.resize(cols, tokens, SumGranularity::PerToken);
        self.scales.fill(1.0);
        let blocks = self.blocks;
        let (out, sums) = self.codes_and_sums();
        let sums = DisjointSlices::new(sums);
        pool.chunks(out, LINE_CODES * blocks, |index, _, out| {
            // SAFETY: each column is written once.
            let sums = unsafe { sums.slice(index * LINE_CODES * 2, out.len() / blocks * 2) };
            let (sums, _) = sums.as_chunks_mut();
            pool.isa().run(Transpose { codes, stride, first: index * LINE_CODES, tokens, blocks, out, sums });
        });
    }
}

/// Codes per cache line: columns, and tokens, that are transposed together.
const LINE_CODES: usize = size_of::<CacheLine>();

/// Transposes the columns of `[tokens, stride]` from `first` on, one cache line of them: `[columns, blocks]`. The last line may have
/// fewer columns, since `stride` is padded.
struct Transpose<'a> {
    /// `[tokens, stride]`
    codes: &'a [i8],
    /// Codes per token, a multiple of 16.
    stride: usize,
    /// The first column.
    first: usize,
    /// Number of tokens.
    tokens: usize,
    /// Blocks of 16 tokens per column.
    blocks: usize,
    /// `[columns, blocks]`
    out: &'a mut [[i8; LANES]],
    /// The sum of all codes of a column, in the second place.
    sums: &'a mut [[i32; 2]],
}

impl Kernel for Transpose<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { codes, stride, first, tokens, blocks, out, sums } = self;
        let mut all = [s.splat(0); LINE_CODES / LANES];
        for start in (0..tokens).step_by(LINE_CODES) {
            let here = start / LANES..blocks.min((start + LINE_CODES) / LANES);
            for (group, columns) in out.chunks_mut(LANES * blocks).enumerate() {
                // Four tokens of a column in each lane.
                let mut quads = [s.splat(0); LANES];
                for (quad, lanes) in quads.iter_mut().enumerate() {
                    let start = start + 4 * quad;
                    for token in (start..tokens.min(start + 4)).rev() {
                        let at = token * stride + first + group * LANES;
                        let row: &[i8; LANES] = codes[at..].first_chunk().expect("a row is padded");
                        // The next tokens.
                        s.prefetch(row, stride);
                        let row = s.load_i8(row);
                        all[group] = s.add(all[group], row);
                        *lanes = s.add(s.shl::<8>(*lanes), s.and(row, s.splat(0xff)));
                    }
                }
                for (column, lanes) in columns.chunks_exact_mut(blocks).zip(s.transpose(quads)) {
                    let mut line = CacheLine([0; LINE_CODES]);
                    s.store(lanes, &mut line);
                    let codes = line.0.map(|byte| byte as i8);
                    column[here.clone()].copy_from_slice(&codes.as_chunks().0[..here.len()]);
                }
            }
        }
        for (sums, all) in sums.chunks_mut(LANES).zip(all) {
            let mut line = CacheLine([0; LINE_CODES]);
            s.store(all, &mut line);
            for (sums, sum) in sums.iter_mut().zip(line.0.as_chunks::<4>().0) {
                sums[1] = i32::from_ne_bytes(*sum);
            }
        }
    }
}
