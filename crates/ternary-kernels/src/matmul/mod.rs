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

pub use activations::{Activations, Int8Activations};
pub use format::{
    CodeRange, F32Matrix, Int8Matrix, Int8TrainingMatrix, MemoryOrder, Q6Matrix, TernaryMatrix,
};
#[cfg(feature = "rayon")]
pub use gemm_bf16::{Bf16Workspace, matmul_bf16};
#[cfg(feature = "rayon")]
pub use gemm_f32::{MatrixView, matmul_f32};
pub use matrix::Matrix;
pub use multiply::{Product, multiply};
