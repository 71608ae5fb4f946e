//! [`Arena`]: huge pages that several matrices share.

use memmap2::MmapMut;
use std::{ptr::NonNull, sync::Arc};

const HUGE: usize = 2 << 20;
const LINE: usize = 64;

/// Memory in 2 MiB pages where the system has them; matrices packed one after another lie one after another, so that
/// a token reads one stream.
#[derive(Debug)]
pub struct Arena {
    map: Option<Arc<MmapMut>>,
    next: usize,
    end: usize,
}

impl Arena {
    /// An arena for about this many bytes; more is mapped when they are used up.
    pub fn new(bytes: usize) -> Self {
        let mut arena = Self { map: None, next: 0, end: 0 };
        if bytes > 0 {
            arena.grow(bytes);
        }
        arena
    }

    fn grow(&mut self, bytes: usize) {
        // Room to begin at a huge page wherever the system puts the map.
        let mut map = MmapMut::map_anon(bytes.next_multiple_of(HUGE) + HUGE).expect("memory for the weights");
        #[cfg(target_os = "linux")]
        // Only advice: where it is refused, 4 KiB pages serve, slower.
        let _ = map.advise(memmap2::Advice::HugePage);
        let start = map.as_mut_ptr() as usize;
        self.next = start.next_multiple_of(HUGE);
        self.end = start + map.len();
        self.map = Some(Arc::new(map));
    }

    /// Zeroed memory for `len` bytes, at a cache line.
    pub(crate) fn take(&mut self, len: usize) -> Block {
        let size = len.next_multiple_of(LINE);
        if self.map.is_none() || self.end - self.next < size {
            self.grow(size);
        }
        let map = self.map.clone().expect("the arena has grown");
        let address = self.next - map.as_ptr() as usize;
        self.next += size;
        // SAFETY: `address + size` lies within the map, checked above; the pointer keeps the provenance of the map.
        let start = unsafe { NonNull::new_unchecked(map.as_ptr().cast_mut().add(address)) };
        Block { start, len, _map: map }
    }
}

/// A part of an arena that nobody else has.
#[derive(Debug)]
pub(crate) struct Block {
    start: NonNull<u8>,
    len: usize,
    _map: Arc<MmapMut>,
}

// SAFETY: a block owns its part of the map, as a Vec owns its heap memory.
unsafe impl Send for Block {}
// SAFETY: as above; shared references only read.
unsafe impl Sync for Block {}

impl std::ops::Deref for Block {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the map lives as long as the block, was zeroed by the system, and the part is nobody else's.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl std::ops::DerefMut for Block {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `deref`; `&mut self` makes it exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}
