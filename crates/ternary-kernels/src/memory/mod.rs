//! Memory: huge pages for weights, a caching allocator for the tensors of a training step, and an allocator that ends the
//! program when memory is exhausted.

mod exit_allocator;
mod tensor_heap;
mod weight_arena;

pub use exit_allocator::ExitAllocator;
pub use tensor_heap::{TensorBuffer, release_cached_memory};
pub use weight_arena::Arena;
pub(crate) use weight_arena::ArenaSlice;
