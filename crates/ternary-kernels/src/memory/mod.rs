//! Memory: huge pages for weights, a heap that keeps the pages of a training step, an allocator that ends the program.

mod exit_allocator;
mod tensor_heap;
mod weight_arena;

pub use exit_allocator::ExitAllocator;
pub use tensor_heap::{Room, release_rooms};
pub use weight_arena::Arena;
pub(crate) use weight_arena::Block;
