//! What training needs besides products: forward and backward passes that touch memory once, on the threads of a
//! [`Pool`].
//!
//! Work is cut into pieces whose size does not depend on the number of threads, and partial sums are added in their
//! order: results are the same, to the bit, on any number of threads and with any instruction set.

mod activation;
mod attention;
mod divergence;
mod embedding;
#[cfg(feature = "rayon")]
mod float;
#[cfg(feature = "rayon")]
pub(crate) mod half;
mod linear;
mod loss;
mod moments;
#[cfg(feature = "rayon")]
mod muon;
mod norm;
mod optimizer;
mod quantize;

pub use activation::{gelu, gelu_backward, silu_mul, silu_mul_backward};
pub use attention::{Attention, attention, attention_backward};
pub use divergence::{divergence, divergence_backward};
pub use embedding::embedding_backward;
#[cfg(feature = "rayon")]
pub use float::{View, float_product};
#[cfg(feature = "rayon")]
pub use half::{HalfFactors, half_product};
pub use linear::{Saved, SavedMut, TernaryLinear, Weight, column_sums};
pub use loss::{cross_entropy, cross_entropy_backward};
pub use moments::{MOMENTS, Moments, adamw_moments};
#[cfg(feature = "rayon")]
pub use muon::{Muon, NEWTON_SCHULZ, NEWTON_SCHULZ_STEPS, muon};
pub use norm::{Norm, norm, norm_backward};
pub use optimizer::{AdamW, adamw, square_sum};
pub use quantize::{absmax_quantize, mean_abs, ternary_quantize};

use crate::{Pool, pool::Disjoint};

/// Numbers that a task works on, so that it is worth waking a thread.
const PIECE: usize = 1 << 14;

/// Copies, on all threads.
///
/// # Panics
/// When lengths differ.
pub fn copy(pool: &Pool, from: &[f32], to: &mut [f32]) {
    assert_eq!(from.len(), to.len(), "numbers to copy");
    pool.chunks(to, PIECE, |index, _, to| to.copy_from_slice(&from[index * PIECE..][..to.len()]));
}

/// Rows of `width` numbers for a task.
fn rows_a_piece(width: usize) -> usize {
    (PIECE / width.max(1)).max(1)
}

/// Calls `task(rows)` for pieces of `rows`, in parallel, and gives what each returned, in order.
fn pieces<T: Send + Default + Clone>(
    pool: &Pool,
    rows: usize,
    piece: usize,
    task: impl Fn(std::ops::Range<usize>) -> T + Sync,
) -> Vec<T> {
    let mut results = vec![T::default(); rows.div_ceil(piece)];
    let places = Disjoint::new(&mut results);
    pool.run(rows.div_ceil(piece), |index, _| {
        let result = task(index * piece..rows.min((index + 1) * piece));
        // SAFETY: each index is called once.
        unsafe { places.slice(index, 1)[0] = result };
    });
    results
}

#[cfg(test)]
mod tests {
    use crate::{Isa, Pool};

    /// Every instruction set, on one thread and on three.
    pub fn pools() -> Vec<Pool> {
        let isas = Isa::available();
        isas.into_iter().flat_map(|isa| [1, 3].map(|threads| Pool::with_isa(threads, isa))).collect()
    }

    /// `len` numbers between -`largest` and `largest`.
    pub fn numbers(len: usize, largest: f32, seed: u64) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        (0..len).map(|_| next() * largest).collect()
    }

    /// Every number within `tolerance` times the largest expected one.
    #[track_caller]
    pub fn assert_close(what: &str, found: &[f32], expected: impl IntoIterator<Item = f64>, tolerance: f64) {
        let expected: Vec<f64> = expected.into_iter().collect();
        assert_eq!(found.len(), expected.len(), "{what}");
        let largest = expected.iter().fold(f64::MIN_POSITIVE, |max, x| max.max(x.abs()));
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let error = (f64::from(*found) - expected).abs() / largest;
            assert!(error <= tolerance, "{what}, {i}: {found} is not {expected}, by {error:.1e}");
        }
    }
}
