//! Instruction sets, and vectors of 16 lanes over them.
//!
//! | file | contents |
//! |---|---|
//! | `vector.rs` | the operations that an instruction set must provide, and what an algorithm over them is |
//! | `vector_ops.rs` | functions of vectors: partial loads and stores, exponential, sigmoid |
//! | `isa.rs` | the instruction set in use, chosen at run time |
//! | `scalar.rs` | the operations in plain Rust: for CPUs without the others, and the oracle of the tests |
//! | `x86_64/`, `aarch64/` | the operations by intrinsics, a file per instruction set |

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
pub(crate) use vector::{
    AccumulatorSink, CacheLine, Kernel, LANES, MatrixUnit, Simd, UNIT_TILES, UnpackedBlock,
};
