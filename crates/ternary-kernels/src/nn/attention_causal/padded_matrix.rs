//! [`PaddedMatrix`]: one head of a tensor, copied to memory of a thread.
//!
//! ```text
//! tensor [batch, seq, heads * width]                 PaddedMatrix [seq padded to 16, width padded to 16]
//!   position 0:  head 0 | head 1 | head 2              head 1 at position 0 | 0 0 0
//!   position 1:  head 0 | head 1 | head 2    ->        head 1 at position 1 | 0 0 0
//!                         <----->                      0 0 0 0 0 0 0 0 0 0 0 0 0 0 0
//!                          width
//! ```
//!
//! In the tensor, rows of a head are `heads * width` floats apart, of which only `width` belong to it. A copy costs `seq * width`
//! floats where each product of the head costs up to `seq * seq * width`. Padded with zeros, inner loops have no remainder:
//! zeros add nothing to a sum, and what is computed in rows and columns of the padding is not copied back.
//!
//! The copy back bypasses the caches with non-temporal stores, as the results of large products do (`matmul/multiply.rs`). Such stores
//! are not ordered with others, hence the fence before another thread may read them.

use super::shape::AttentionShape;
use crate::{
    Isa,
    simd::{
        Kernel, LANES, Simd,
        vector_ops::{load, store},
    },
    thread_pool::DisjointSlices,
};

/// A row-major matrix whose rows and columns are padded with zeros to whole vectors.
pub(super) struct PaddedMatrix {
    /// Numbers per row, a multiple of 16.
    pub stride: usize,
    /// `[rows, stride]`
    pub numbers: Vec<f32>,
}

impl PaddedMatrix {
    pub fn new(rows: usize, cols: usize) -> Self {
        let stride = cols.next_multiple_of(LANES);
        Self { stride, numbers: vec![0.0; rows.next_multiple_of(LANES) * stride] }
    }

    #[inline]
    pub fn row(&self, row: usize) -> &[f32] {
        &self.numbers[row * self.stride..][..self.stride]
    }

    #[inline]
    pub fn row_mut(&mut self, row: usize) -> &mut [f32] {
        &mut self.numbers[row * self.stride..][..self.stride]
    }

    /// Copies a head of a sequence from a tensor of `heads` heads.
    pub fn read(
        &mut self,
        isa: Isa,
        from: &[f32],
        shape: AttentionShape,
        sequence: usize,
        head: usize,
        heads: usize,
    ) {
        let (start, stride) = (shape.at(sequence, 0, head, heads), heads * shape.width);
        isa.run(ReadHead { from: &from[start..], stride, width: shape.width, rows: shape.seq, to: self });
    }

    /// Copies its rows to a head of a sequence.
    ///
    /// # Safety
    /// No other thread writes that head at the same time.
    pub unsafe fn write(
        &self,
        isa: Isa,
        to: &DisjointSlices<f32>,
        shape: AttentionShape,
        [sequence, head, heads]: [usize; 3],
    ) {
        let start = shape.at(sequence, 0, head, heads);
        let write = WriteHead {
            from: self,
            start,
            stride: heads * shape.width,
            width: shape.width,
            rows: shape.seq,
            to,
        };
        isa.run(write);
    }

    /// Becomes the transpose of `from`.
    pub fn transpose(&mut self, isa: Isa, from: &Self) {
        isa.run(Transpose { from, to: self });
    }
}

/// Transposes in blocks of 16 x 16.
struct Transpose<'a> {
    from: &'a PaddedMatrix,
    to: &'a mut PaddedMatrix,
}

impl Kernel for Transpose<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { from, to } = self;
        for (block, rows) in from.numbers.chunks_exact(LANES * from.stride).enumerate() {
            for col in (0..from.stride).step_by(LANES) {
                let square = std::array::from_fn(|row| {
                    s.float_to_bits(load(s, &rows[row * from.stride + col..][..LANES]))
                });
                for (i, lanes) in s.transpose(square).into_iter().enumerate() {
                    let at = (col + i) * to.stride + block * LANES;
                    store(s, s.bits_to_float(lanes), &mut to.numbers[at..at + LANES]);
                }
            }
        }
    }
}

/// Copies rows that are `stride` numbers apart, and prefetches those of the next head.
struct ReadHead<'a> {
    from: &'a [f32],
    /// Numbers from one row to the next.
    stride: usize,
    /// Numbers per row.
    width: usize,
    /// Number of rows.
    rows: usize,
    to: &'a mut PaddedMatrix,
}

impl Kernel for ReadHead<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { from, stride, width, rows, to } = self;
        for row in 0..rows {
            let from = &from[row * stride..][..width];
            for (to, from) in to.row_mut(row).chunks_mut(LANES).zip(from.chunks(LANES)) {
                // The next head is read as soon as this one is done: it is the neighbour in memory.
                s.prefetch(&from[0], width.div_ceil(LANES));
                store(s, load(s, from), &mut to[..from.len()]);
            }
        }
    }
}

/// Copies rows to places that are `stride` numbers apart, bypassing the caches.
struct WriteHead<'a> {
    from: &'a PaddedMatrix,
    /// Index of the first number.
    start: usize,
    /// Numbers from one row to the next.
    stride: usize,
    /// Numbers per row.
    width: usize,
    /// Number of rows.
    rows: usize,
    /// The whole tensor.
    to: &'a DisjointSlices<'a, f32>,
}

impl Kernel for WriteHead<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for row in 0..self.rows {
            // SAFETY: of a head that is its writer's alone, by the promise of `PaddedMatrix::write`.
            let to = unsafe { self.to.slice(self.start + row * self.stride, self.width) };
            for (to, from) in to.chunks_mut(LANES).zip(self.from.row(row).chunks(LANES)) {
                match to.as_mut_array::<LANES>() {
                    Some(to) => s.stream_f32(load(s, from), to),
                    None => store(s, load(s, from), to),
                }
            }
        }
        s.fence();
    }
}
