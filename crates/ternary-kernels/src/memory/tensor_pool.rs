//! [`TensorBuffer`]: memory for the tensors of a training step, from a free list per size.
//!
//! A step allocates and frees gigabytes in pieces of megabytes. The usual allocator returns such pieces to the system, and
//! fresh pages cost more than what is written to them, since the system clears each: 2 microseconds per page on one
//! machine, where allocators that kept their pages made a step 5 to 7 % faster. So freed memory stays here until
//! [`release_cached_memory`].
//!
//! ```text
//! new(len):  lines = ceil(len / 16);  free[lines].pop()  or a new allocation
//! drop:      free[lines].push(memory)
//! ```
//!
//! All steps of a run allocate the same sizes, so a buffer finds memory of exactly its size from the second step on, and the
//! list never holds more of a size than were in use at once.
//!
//! # What was tried
//! A heap of 256 MiB maps in huge pages, with first fit and merging of neighbours. It had three times the code and its own
//! `unsafe`. With it a step took 0.99 to 1.02 times as long, and peak memory was 0.97 to 1.00 times as high: training phases of
//! different shapes shared ranges.

use std::{
    collections::BTreeMap,
    ops::{Deref, DerefMut},
    sync::{Mutex, MutexGuard, PoisonError},
};

/// Lines below which a buffer comes from the usual allocator, which keeps small pieces itself: 64 KiB.
const MIN_LINES: usize = 1024;

/// One cache line: buffers are aligned to it.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
struct Line([f32; LINE_NUMBERS]);

const LINE_NUMBERS: usize = 16;

/// A buffer of f32 from a free list. Its contents are unspecified until they are written (NaN in debug builds).
///
/// Dropping it returns the memory to the list. It dereferences to a slice.
///
/// # Example
/// ```
/// let mut buffer = ternary_kernels::TensorBuffer::new(100_000);
/// buffer.fill(1.0);
/// assert_eq!(buffer.iter().sum::<f32>(), 100_000.0);
/// ```
#[derive(Debug)]
pub struct TensorBuffer {
    /// `ceil(len / 16)` lines.
    lines: Vec<Line>,
    len: usize,
}

impl TensorBuffer {
    /// A buffer of `len` numbers.
    pub fn new(len: usize) -> Self {
        let count = len.div_ceil(LINE_NUMBERS);
        let freed = if count < MIN_LINES { None } else { free_list().get_mut(&count).and_then(Vec::pop) };
        let lines = freed.unwrap_or_else(|| vec![Line([0.0; LINE_NUMBERS]); count]);
        let mut buffer = Self { lines, len };
        if cfg!(debug_assertions) {
            buffer.fill(f32::NAN);
        }
        buffer
    }
}

impl Drop for TensorBuffer {
    fn drop(&mut self) {
        let lines = std::mem::take(&mut self.lines);
        if lines.len() >= MIN_LINES {
            free_list().entry(lines.len()).or_default().push(lines);
        }
    }
}

impl Deref for TensorBuffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        // SAFETY: lines are arrays of 16 numbers without padding, and `len` is at most 16 times their count.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }
}

impl DerefMut for TensorBuffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: as for `deref`; `&mut self` makes it exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }
}

/// Returns the cached memory to the system; buffers in use keep theirs.
///
/// Call it at the end of a training run. Between two steps it would make the next step pay for all pages again.
pub fn release_cached_memory() {
    // Freed after the lock, since returning pages takes a while.
    let freed = std::mem::take(&mut *free_list());
    drop(freed);
}

/// Freed memory by its number of lines.
static FREE: Mutex<BTreeMap<usize, Vec<Vec<Line>>>> = Mutex::new(BTreeMap::new());

fn free_list() -> MutexGuard<'static, BTreeMap<usize, Vec<Vec<Line>>>> {
    FREE.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_holds_what_was_written() {
        for len in [0, 1, 100, 16_384, 100_001] {
            let mut buffer = TensorBuffer::new(len);
            buffer.iter_mut().enumerate().for_each(|(i, x)| *x = i as f32);
            let other = TensorBuffer::new(len);
            assert!(buffer.iter().enumerate().all(|(i, x)| *x == i as f32));
            assert_eq!((buffer.len(), other.len()), (len, len));
            assert!(buffer.is_empty() || buffer.as_ptr().cast::<[u8; 64]>().is_aligned());
        }
    }

    #[test]
    fn freed_memory_is_reused_by_its_size_until_it_is_released() {
        // Lengths that no other test uses: the list is shared by the process.
        let (len, longer) = (777_777, 777_777 + LINE_NUMBERS);
        let freed = |len: usize| free_list().get(&len.div_ceil(LINE_NUMBERS)).map_or(0, Vec::len);
        let buffer = TensorBuffer::new(len);
        let start = buffer.as_ptr();
        drop(buffer);
        assert_eq!((freed(len), freed(longer)), (1, 0));
        let longer = TensorBuffer::new(longer);
        let (again, another) = (TensorBuffer::new(len), TensorBuffer::new(len));
        assert_eq!(again.as_ptr(), start);
        assert!(another.as_ptr() != start && longer.as_ptr() != start);
        drop((again, another));
        assert_eq!(freed(len), 2);
        release_cached_memory();
        assert_eq!(freed(len), 0);
        assert!(!longer.is_empty(), "a buffer in use stays");
    }

    #[test]
    fn small_buffers_are_not_cached() {
        drop(TensorBuffer::new(16 * (MIN_LINES - 1)));
        assert!(!free_list().contains_key(&(MIN_LINES - 1)));
    }
}
