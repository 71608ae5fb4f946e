//! The packed forms of a matrix, a file each.

mod f32;
mod int8;
pub(crate) mod int8_training;
mod q6;
mod ternary2;

pub use f32::F32Matrix;
pub use int8::Int8Matrix;
pub use int8_training::{CodeRange, Int8TrainingMatrix, MemoryOrder};
pub use q6::Q6Matrix;
pub use ternary2::TernaryMatrix;
