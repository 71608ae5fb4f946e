//! The packed forms of a matrix, a file each.

mod f32;
mod int8;
pub(crate) mod int8_training;
mod q6;
mod ternary2;

pub use f32::FloatMatrix;
pub use int8::ByteMatrix;
pub use int8_training::{CodeMatrix, Order};
pub use q6::SixBitMatrix;
pub use ternary2::TernaryMatrix;
