#![doc = include_str!("../README.md")]
#![warn(missing_docs)]

mod matmul;
mod memory;
pub mod nn;
pub mod optim;
pub mod roofline;
mod simd;
#[cfg(test)]
mod testing;
mod thread_pool;

pub use matmul::{
    Activations, CodeRange, F32Matrix, Int8Activations, Int8Matrix, Int8TrainingMatrix, Matrix, MemoryOrder,
    Product, Q6Matrix, TernaryMatrix, multiply,
};
#[cfg(feature = "rayon")]
pub use matmul::{Bf16Workspace, MatrixView, matmul_bf16, matmul_f32};
pub use memory::{Arena, ExitAllocator, TensorBuffer, release_cached_memory};
pub use simd::Isa;
pub use thread_pool::Pool;
