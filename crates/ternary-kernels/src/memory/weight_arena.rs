//! [`Arena`]: huge pages that several matrices share.
//!
//! ```text
//! map (2 MiB pages):  | codes of matrix 0 | scales of matrix 0 | codes of matrix 1 | .. | free |
//!                     ^ huge page         ^ cache line         ^ cache line
//! ```
//!
//! A token that passes a model reads every weight once. With pages of 4 KiB, it would miss the TLB at each; with huge pages
//! it does not, and matrices that are packed one after another are read as one stream.
//!
//! A slice of the arena ([`ArenaSlice`]) keeps its map alive, so that matrices may outlive the arena.

use crate::simd::{CacheLine, LANES};
use half::f16;
use memmap2::{MmapMut, MmapRaw};
use std::{io, ptr::NonNull, sync::Arc};

/// Bytes of a huge page of x86-64 and, with pages of 4 KiB, of 64-bit ARM.
const HUGE_PAGE_BYTES: usize = 2 << 20;
/// Slices start at cache lines.
const CACHE_LINE_BYTES: usize = 64;

/// Memory for packed matrices, in pages of 2 MiB if the system has them.
///
/// Matrices that are packed one after another are neighbours in memory, so that a token reads one stream.
#[derive(Debug)]
pub struct Arena {
    /// The map that is being filled; earlier ones belong to their slices.
    map: Option<Arc<MmapRaw>>,
    /// Address of the first free byte.
    next: usize,
    /// Address of the end of the map.
    end: usize,
}

impl Arena {
    /// An arena of about `bytes` bytes. More is mapped when they are used up.
    ///
    /// # Panics
    /// When the system has no memory for them.
    pub fn new(bytes: usize) -> Self {
        Self::try_new(bytes).expect("memory for the weights")
    }

    /// As [`new`](Self::new).
    ///
    /// # Errors
    /// The system has no memory for them.
    pub fn try_new(bytes: usize) -> io::Result<Self> {
        let mut arena = Self { map: None, next: 0, end: 0 };
        if bytes > 0 {
            arena.grow(bytes)?;
        }
        Ok(arena)
    }

    /// Maps new memory of at least `bytes` bytes.
    fn grow(&mut self, bytes: usize) -> io::Result<()> {
        // Room to begin at a huge page wherever the system puts the map.
        let size = bytes
            .checked_next_multiple_of(HUGE_PAGE_BYTES)
            .and_then(|size| size.checked_add(HUGE_PAGE_BYTES));
        let map = MmapMut::map_anon(size.ok_or(io::ErrorKind::OutOfMemory)?)?;
        // Raw: a reference to the whole would take the blocks from their owners.
        let map = MmapRaw::from(map);
        #[cfg(all(target_os = "linux", not(miri)))] // which knows no advice
        // Only advice: where it is refused, 4 KiB pages serve, slower.
        let _ = map.advise(memmap2::Advice::HugePage);
        let start = map.as_mut_ptr() as usize;
        self.next = start.next_multiple_of(HUGE_PAGE_BYTES);
        self.end = start + map.len();
        self.map = Some(Arc::new(map));
        Ok(())
    }

    /// Free bytes of the current map.
    #[cfg(test)]
    pub(crate) fn left(&self) -> usize {
        self.end - self.next
    }

    /// A slice of `len` zeros that starts at a cache line.
    ///
    /// # Panics
    /// When the system has no memory for it.
    pub(crate) fn take<T: ZeroablePod>(&mut self, len: usize) -> ArenaSlice<T> {
        let size = (len * size_of::<T>()).next_multiple_of(CACHE_LINE_BYTES);
        if self.map.is_none() || self.end - self.next < size {
            self.grow(size).expect("memory for the weights");
        }
        let map = self.map.clone().expect("the arena has grown");
        let offset = self.next - map.as_mut_ptr() as usize;
        self.next += size;
        // SAFETY: `offset + size` lies within the map, as checked above.
        let start = unsafe { NonNull::new_unchecked(map.as_mut_ptr().add(offset).cast()) };
        ArenaSlice { start, len, _map: map }
    }
}

/// Types that may lie in fresh pages: plain data of which zero bytes are a value.
///
/// # Safety
/// Zero bytes must be a valid value, dropping must do nothing, and the alignment must not exceed a cache line.
pub(crate) unsafe trait ZeroablePod: Copy + Send + Sync {}

// SAFETY: bytes at most as aligned as a cache line.
unsafe impl ZeroablePod for CacheLine {}
// SAFETY: numbers.
unsafe impl ZeroablePod for [i8; LANES] {}
// SAFETY: numbers.
unsafe impl ZeroablePod for [f16; LANES] {}
// SAFETY: numbers.
unsafe impl ZeroablePod for [f32; LANES] {}

/// A part of an arena with a single owner, like a boxed slice.
#[derive(Debug)]
pub(crate) struct ArenaSlice<T> {
    start: NonNull<T>,
    len: usize,
    _map: Arc<MmapRaw>,
}

// SAFETY: a block owns its part of the map, as a Vec owns its heap memory.
unsafe impl<T: ZeroablePod> Send for ArenaSlice<T> {}
// SAFETY: as above; shared references only read.
unsafe impl<T: ZeroablePod> Sync for ArenaSlice<T> {}

impl<T: ZeroablePod> std::ops::Deref for ArenaSlice<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: the map lives as long as the slice, started as zeros, and the slice owns its range.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<T: ZeroablePod> std::ops::DerefMut for ArenaSlice<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as for `deref`; `&mut self` makes it exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}
