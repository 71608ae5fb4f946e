//! Products of packed matrices and activations, and of float matrices.

pub(crate) mod activations;
pub(crate) mod format;
#[cfg(feature = "rayon")]
mod gemm_bf16;
#[cfg(feature = "rayon")]
pub(crate) mod gemm_f32;
mod matrix;
mod multiply;
#[cfg(test)]
mod tests;
mod tile;

pub use activations::{Input, Quantized};
pub use format::{ByteMatrix, CodeMatrix, FloatMatrix, Order, SixBitMatrix, TernaryMatrix};
#[cfg(feature = "rayon")]
pub use gemm_bf16::{HalfFactors, half_product};
#[cfg(feature = "rayon")]
pub use gemm_f32::{View, float_product};
pub use matrix::Matrix;
pub use multiply::{Product, multiply};
