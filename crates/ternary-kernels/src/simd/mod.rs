//! Instruction sets, and vectors of 16 lanes over them.

#[cfg(target_arch = "aarch64")]
mod aarch64;
mod isa;
mod scalar;
mod vector;
pub(crate) mod vector_ops;
#[cfg(target_arch = "x86_64")]
mod x86_64;

pub use isa::Isa;
pub(crate) use scalar::Scalar;
pub(crate) use vector::{Kernel, LANES, Line, PANELS, Planes, Simd, Sums, Unit};
