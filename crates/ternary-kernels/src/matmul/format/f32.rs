//! [`FloatMatrix`]: f32 weights.

use crate::{
    matmul::{
        activations::{Input, Quantized},
        tile::{Form, tiles, token_floats},
    },
    memory::{Arena, Block},
    simd::{LANES, Simd},
};

/// Float weights. A line holds one column of 16 rows.
#[derive(Debug)]
pub struct FloatMatrix {
    rows: usize,
    cols: usize,
    /// `[tiles, cols]`
    values: Block<[f32; LANES]>,
}

impl FloatMatrix {
    /// Bytes that [`pack`](Self::pack) takes from its arena.
    pub fn bytes(rows: usize, cols: usize) -> usize {
        tiles(rows) * cols * LANES * 4
    }

    /// `read(row, values)` gives the values `[cols]` of each row in turn.
    pub fn pack(
        arena: &mut Arena,
        rows: usize,
        cols: usize,
        mut read: impl FnMut(usize, &mut [f32]),
    ) -> Self {
        let mut values = arena.take::<[f32; LANES]>(tiles(rows) * cols);
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

impl Form for FloatMatrix {
    const INTEGER: bool = false;

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

    fn integer<S: Simd, const T: usize>(&self, _: S, _: usize, _: &Quantized, _: usize) -> [S::Float; T] {
        unreachable!("float weights are multiplied with floats")
    }

    #[inline(always)]
    fn exact<S: Simd, const T: usize>(&self, s: S, tile: usize, x: &Input, token: usize) -> [S::Float; T] {
        /// Columns that are summed apart: less rounding, and sums that do not wait for each other.
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
