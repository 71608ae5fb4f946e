//! Products of float matrices ([`matmul_f32`]), by the crate `gemm`.
//!
//! A [`MatrixView`] has strides for rows and columns, so that a transposed matrix is only another view and none is copied.
//! Small products run on the calling thread: see [`PARALLEL_MIN_PRODUCTS`].

use crate::{Pool, thread_pool::rows_per_task};

/// A view of a float matrix `[rows, cols]`, or of its transpose.
#[derive(Clone, Copy, Debug)]
pub struct MatrixView<'a> {
    pub(super) values: &'a [f32],
    rows: usize,
    cols: usize,
    pub(super) row_stride: usize,
    pub(super) col_stride: usize,
}

impl<'a> MatrixView<'a> {
    /// A matrix `[rows, cols]` in row-major order.
    ///
    /// # Panics
    /// When the number of values is not `rows * cols`.
    pub fn new(values: &'a [f32], rows: usize, cols: usize) -> Self {
        assert_eq!(values.len(), rows * cols, "values of {rows} x {cols}");
        Self { values, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// Number of rows.
    pub(crate) fn row_count(&self) -> usize {
        self.rows
    }

    /// The rows of a range.
    pub(crate) fn rows(self, range: std::ops::Range<usize>) -> Self {
        assert!(range.start < range.end && range.end <= self.rows, "rows {range:?} of {}", self.rows);
        Self { values: &self.values[range.start * self.row_stride..], rows: range.len(), ..self }
    }

    /// The transpose: a view of the same values.
    pub fn transposed(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }
}

/// Number of multiplications from which the threads of rayon are used: for fewer they cost more than they save.
const PARALLEL_MIN_PRODUCTS: usize = 1 << 22;

/// `out = left right + bias` in f32; `bias` is optional and added to each row.
///
/// # Shapes
/// left `[m, k]`, right `[k, n]`, bias `[n]`, out `[m, n]`
///
/// # Panics
/// When shapes do not fit.
///
/// # Example
/// ```
/// use ternary_kernels::{MatrixView, Pool, matmul_f32};
/// let left = MatrixView::new(&[1.0, 2.0, 3.0, 4.0], 2, 2);
/// let mut out = [0.0; 4];
/// matmul_f32(&Pool::new(1), left, left.transposed(), Some(&[10.0, 20.0]), &mut out);
/// assert_eq!(out, [15.0, 31.0, 21.0, 45.0]);
/// ```
pub fn matmul_f32(pool: &Pool, left: MatrixView, right: MatrixView, bias: Option<&[f32]>, out: &mut [f32]) {
    let n = right.cols;
    assert_eq!(out.len(), left.rows * n, "numbers of the result");
    if let Some(bias) = bias {
        pool.chunks(out, rows_per_task(n) * n, |_, _, out| {
            out.chunks_mut(n).for_each(|row| row.copy_from_slice(bias));
        });
    }
    let add = if bias.is_some() { Some(1.0) } else { None };
    scaled_matmul(pool, left, right, 1.0, add, out, n);
}

/// `out = factor left right + add out`; without `add`, `out` is not read. Rows of `out` start every `stride` numbers.
///
/// # Panics
/// When shapes do not fit.
pub(crate) fn scaled_matmul(
    pool: &Pool,
    left: MatrixView,
    right: MatrixView,
    factor: f32,
    add: Option<f32>,
    out: &mut [f32],
    stride: usize,
) {
    let (m, k, n) = (left.rows, left.cols, right.cols);
    assert_eq!(right.rows, k, "columns of the left and rows of the right factor");
    assert!(m > 0 && n <= stride && out.len() >= (m - 1) * stride + n, "numbers of the result");
    let shared = pool.threads() > 1 && m * k * n >= PARALLEL_MIN_PRODUCTS;
    let parallelism = if shared { gemm::Parallelism::Rayon(0) } else { gemm::Parallelism::None };
    let signed = |stride: usize| isize::try_from(stride).expect("a stride within memory");
    // SAFETY: a view's values are `rows x cols` numbers at its strides, and `out` has `m` rows of `n`, as checked above; it is
    // read only where it is added to.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            signed(stride),
            add.is_some(),
            left.values.as_ptr(),
            signed(left.col_stride),
            signed(left.row_stride),
            right.values.as_ptr(),
            signed(right.col_stride),
            signed(right.row_stride),
            add.unwrap_or(0.0),
            factor,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, numbers, pools};

    #[test]
    fn products_are_right_however_they_lie() {
        for (m, k, n) in [(1, 1, 1), (3, 5, 7), (17, 33, 16), (130, 70, 90)] {
            let (a, b) = (numbers(m * k, 1.0, 1), numbers(k * n, 1.0, 2));
            let (a_t, b_t): (Vec<f32>, Vec<f32>) = (
                (0..m * k).map(|i| a[i % m * k + i / m]).collect(),
                (0..k * n).map(|i| b[i % k * n + i / k]).collect(),
            );
            let bias = numbers(n, 1.0, 3);
            let exact = |i: usize, bias: Option<&[f32]>| -> f64 {
                let (row, col) = (i / n, i % n);
                let sum: f64 = (0..k).map(|c| f64::from(a[row * k + c]) * f64::from(b[c * n + col])).sum();
                sum + bias.map_or(0.0, |bias| f64::from(bias[col]))
            };
            for pool in pools() {
                for bias in [None, Some(&bias[..])] {
                    for (left, right) in [
                        (MatrixView::new(&a, m, k), MatrixView::new(&b, k, n)),
                        (MatrixView::new(&a_t, k, m).transposed(), MatrixView::new(&b, k, n)),
                        (MatrixView::new(&a, m, k), MatrixView::new(&b_t, n, k).transposed()),
                    ] {
                        let mut out = vec![f32::NAN; m * n];
                        matmul_f32(&pool, left, right, bias, &mut out);
                        assert_close("product", &out, (0..m * n).map(|i| exact(i, bias)), 2e-6);
                    }
                }
            }
        }
    }
}
