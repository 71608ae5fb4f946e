//! [`multiply`]: matrices times activations.

use crate::{Input, Matrix, Pool};

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

/// Multiplies the same activations with each matrix, `out[t, r] = sum_c W[r, c] x[t, c]`, in one go over the threads.
///
/// Integer matrices take the int8 activations where the input has them; the result is then
/// `sum over groups of scale[r, g] * (sum of codes * activation codes) * scale[t]`, exact but for the last roundings.
///
/// # Panics
/// When shapes do not fit.
pub fn multiply(_pool: &Pool, x: &Input, products: &mut [Product]) {
    for product in products {
        let (rows, cols) = (product.matrix.rows(), product.matrix.cols());
        assert_eq!(x.cols, cols, "columns of activations and matrix");
        assert_eq!(product.out.len(), x.tokens() * rows, "tokens x rows of the result");
        let mut values = vec![0.0; cols];
        for row in 0..rows {
            product.matrix.read_row(row, &mut values);
            for token in 0..x.tokens() {
                let mut sum = 0.0;
                match x.int8 {
                    Some(x) if product.matrix.is_integer() => {
                        for (w, x) in values.iter().zip(&x.codes[token * x.stride..]) {
                            sum += w * f32::from(*x);
                        }
                        sum *= x.scales[token];
                    }
                    _ => {
                        for (w, x) in values.iter().zip(&x.floats[token * cols..]) {
                            sum += w * x;
                        }
                    }
                }
                sum += product.bias.map_or(0.0, |bias| bias[row]);
                let out = &mut product.out[token * rows + row];
                *out = if product.add { *out + sum } else { sum };
            }
        }
    }
}
