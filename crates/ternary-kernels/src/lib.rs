//! Products of ternary and int8 matrices for CPUs, chosen at run time. All `unsafe` of the project lives here.
//!
//! A [`Matrix`] is packed once into an [`Arena`] of huge pages. [`multiply`] computes `y = W x` for one token or many,
//! on the threads of a [`Pool`], with int8 activations or exactly with floats, as the [`Input`] says.
//!
//! # Example
//! ```
//! use ternary_kernels::{Arena, Input, Pool, Product, Quantized, TernaryMatrix, multiply};
//! let pool = Pool::new(1);
//! let matrix = TernaryMatrix::pack(&mut Arena::new(0), 2, 3, 3, |row, codes, scales| {
//!     codes.copy_from_slice(if row == 0 { &[1, 0, -1] } else { &[0, 1, 1] });
//!     scales[0] = half::f16::from_f32(0.5);
//! });
//! let (mut buffer, mut y) = (Quantized::default(), [0.0; 2]);
//! let x = Input::int8(&pool, &[1.0, 2.0, 127.0], 3, &mut buffer);
//! multiply(&pool, &x, &mut [Product::new(&matrix.into(), &mut y)]);
//! assert_eq!(y, [-63.0, 64.5]);
//! ```

mod allocator;
mod arena;
pub mod attention;
mod byte;
mod code;
mod elementwise;
mod float;
mod input;
mod isa;
mod matrix;
pub mod peak;
mod pool;
mod product;
mod room;
mod scalar;
mod simd;
mod six_bit;
mod ternary;
#[cfg(test)]
mod tests;
pub mod training;

#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(target_arch = "x86_64")]
mod x86_64;

pub use allocator::ExitAllocator;
pub use arena::Arena;
pub use byte::ByteMatrix;
pub use code::{CodeMatrix, Order};
pub use float::FloatMatrix;
pub use input::{Input, Quantized};
pub use isa::Isa;
pub use matrix::Matrix;
pub use pool::Pool;
pub use product::{Product, multiply};
pub use room::{Room, release_rooms};
pub use six_bit::SixBitMatrix;
pub use ternary::TernaryMatrix;
