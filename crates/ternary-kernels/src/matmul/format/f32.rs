//! Float weights ([`F32Matrix`]) and their products with float activations.
//!
//! # Layout
//! A tile of 16 rows is stored column by column: one column is one vector.
//!
//! ```text
//! values[tile][column][r]  =  w(row 16 tile + r, column)                          r in 0..16
//! ```
//!
//! # Product
//! `y += column * x[column]` over the columns, where `x[column]` is broadcast. Chunks of 64 columns are summed apart: less
//! rounding, and sums that do not wait for each other.

use crate::{
    matmul::{
        activations::{Activations, Int8Activations},
        tile::{PackedFormat, tile_count, token_floats},
    },
    memory::{Arena, ArenaSlice},
    simd::{LANES, Simd},
};

/// A matrix of f32 weights. It is multiplied with float activations only.
#[derive(Debug)]
pub struct F32Matrix {
    rows: usize,
    cols: usize,
    /// `[tiles, cols]`, 16 rows each.
    values: ArenaSlice<[f32; LANES]>,
}

impl F32Matrix {
    /// Bytes that [`pack`](Self::pack) takes from its arena.
    pub fn bytes(rows: usize, cols: usize) -> usize {
        tile_count(rows) * cols * LANES * 4
    }

    /// Packs a matrix of `rows` rows and `cols` columns.
    ///
    /// `read(row, values)` is called once per row, in order. It writes the weights `[cols]` of the row.
    pub fn pack(
        arena: &mut Arena,
        rows: usize,
        cols: usize,
        mut read: impl FnMut(usize, &mut [f32]),
    ) -> Self {
        let mut values = arena.take::<[f32; LANES]>(tile_count(rows) * cols);
        let mut row_values = vec![0.0; cols];
        for row in 0..rows {
            read(row, &mut row_values);
            for (to, value) in values[row / LANES * cols..].iter_mut().zip(&row_values) {
                to[row % LANES] = *value;
            }
        }
        Self { rows, cols, values }
    }
}

impl PackedFormat for F32Matrix {
    const INT8: bool = false;

    fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    fn tile_bytes(&self) -> usize {
        self.cols * LANES * 4
    }

    fn read_row(&self, row: usize, values: &mut [f32]) {
        for (value, column) in values.iter_mut().zip(&self.values[row / LANES * self.cols..]) {
            *value = column[row % LANES];
        }
    }

    fn dot_int8<S: Simd, const T: usize>(
        &self,
        _: S,
        _: usize,
        _: &Int8Activations,
        _: usize,
    ) -> [S::Float; T] {
        unreachable!("float weights are multiplied with floats")
    }

    #[inline(always)]
    fn dot_f32<S: Simd, const T: usize>(
        &self,
        s: S,
        tile: usize,
        x: &Activations,
        token: usize,
    ) -> [S::Float; T] {
        /// Columns per partial sum.
        const CHUNK: usize = 64;
        let floats = token_floats::<T>(x, token);
        let columns = &self.values[tile * self.cols..][..self.cols];
        let mut result = [s.splat_f32(0.0); T];
        for (chunk, columns) in columns.chunks(CHUNK).enumerate() {
            let floats = floats.map(|floats| &floats[chunk * CHUNK..][..columns.len()]);
            let mut sums = [s.splat_f32(0.0); T];
            for (i, column) in columns.iter().enumerate() {
                let w = s.load_f32(column);
                for t in 0..T {
                    sums[t] = s.fma(w, s.splat_f32(floats[t][i]), sums[t]);
                }
            }
            for t in 0..T {
                result[t] = s.add_f32(result[t], sums[t]);
            }
        }
        result
    }
}
