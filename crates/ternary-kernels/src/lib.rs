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
    ByteMatrix, CodeMatrix, FloatMatrix, Input, Matrix, Order, Product, Quantized, SixBitMatrix,
    TernaryMatrix, multiply,
};
#[cfg(feature = "rayon")]
pub use matmul::{HalfFactors, View, float_product, half_product};
pub use memory::{Arena, ExitAllocator, Room, release_rooms};
pub use simd::Isa;
pub use thread_pool::Pool;
