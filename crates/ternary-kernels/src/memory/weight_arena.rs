//! [`Arena`]: huge pages that several matrices share.

use crate::simd::{LANES, Line};
use half::f16;
use memmap2::{MmapMut, MmapRaw};
use std::{io, ptr::NonNull, sync::Arc};

const HUGE: usize = 2 << 20;
const LINE: usize = 64;

/// Memory in 2 MiB pages where the system has them; matrices packed one after another lie one after another, so that
/// a token reads one stream.
#[derive(Debug)]
pub struct Arena {
    map: Option<Arc<MmapRaw>>,
    next: usize,
    end: usize,
}

impl Arena {
    /// An arena for about this many bytes; more is mapped when they are used up.
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

    fn grow(&mut self, bytes: usize) -> io::Result<()> {
        // Room to begin at a huge page wherever the system puts the map.
        let size = bytes.checked_next_multiple_of(HUGE).and_then(|size| size.checked_add(HUGE));
        let map = MmapMut::map_anon(size.ok_or(io::ErrorKind::OutOfMemory)?)?;
        // Raw: a reference to the whole would take the blocks from their owners.
        let map = MmapRaw::from(map);
        #[cfg(all(target_os = "linux", not(miri)))] // which knows no advice
        // Only advice: where it is refused, 4 KiB pages serve, slower.
        let _ = map.advise(memmap2::Advice::HugePage);
        let start = map.as_mut_ptr() as usize;
        self.next = start.next_multiple_of(HUGE);
        self.end = start + map.len();
        self.map = Some(Arc::new(map));
        Ok(())
    }

    /// Bytes that it has before it grows.
    #[cfg(test)]
    pub(crate) fn left(&self) -> usize {
        self.end - self.next
    }

    /// `len` zeros, at a cache line.
    pub(crate) fn take<T: Plain>(&mut self, len: usize) -> Block<T> {
        let size = (len * size_of::<T>()).next_multiple_of(LINE);
        if self.map.is_none() || self.end - self.next < size {
            self.grow(size).expect("memory for the weights");
        }
        let map = self.map.clone().expect("the arena has grown");
        let offset = self.next - map.as_mut_ptr() as usize;
        self.next += size;
        // SAFETY: `offset + size` lies within the map, as checked above.
        let start = unsafe { NonNull::new_unchecked(map.as_mut_ptr().add(offset).cast()) };
        Block { start, len, _map: map }
    }
}

/// # Safety
/// Zero bytes are a value, nothing is dropped, and a cache line is aligned enough.
pub(crate) unsafe trait Plain: Copy + Send + Sync {}

// SAFETY: bytes at most as aligned as a cache line.
unsafe impl Plain for Line {}
// SAFETY: numbers.
unsafe impl Plain for [i8; LANES] {}
// SAFETY: numbers.
unsafe impl Plain for [f16; LANES] {}
// SAFETY: numbers.
unsafe impl Plain for [f32; LANES] {}

/// A part of an arena that nobody else has.
#[derive(Debug)]
pub(crate) struct Block<T> {
    start: NonNull<T>,
    len: usize,
    _map: Arc<MmapRaw>,
}

// SAFETY: a block owns its part of the map, as a Vec owns its heap memory.
unsafe impl<T: Plain> Send for Block<T> {}
// SAFETY: as above; shared references only read.
unsafe impl<T: Plain> Sync for Block<T> {}

impl<T: Plain> std::ops::Deref for Block<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: the map lives as long as the block, began as zeros, and the part is nobody else's.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<T: Plain> std::ops::DerefMut for Block<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as for `deref`; `&mut self` makes it exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}
