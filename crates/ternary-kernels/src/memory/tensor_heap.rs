//! [`TensorBuffer`]: memory for the tensors of a training step, from a caching allocator.
//!
//! A step allocates and frees gigabytes in pieces of megabytes. The usual allocator returns such pieces to the system, and
//! fresh pages cost more than what is written to them, since the system clears each: 2 microseconds per page on one
//! machine, where allocators that kept their pages made a step 5 to 7 % faster. So freed memory stays here, in huge pages
//! if the system has them, until [`release_cached_memory`].
//!
//! # Layout
//! ```text
//! maps:   | buffer | free | buffer | buffer | free ............ |  256 MiB (16 MiB where address space is scarce)
//!         | buffer ..................................... | free |  larger, for one large buffer
//! ```
//!
//! Each map has a sorted list of its free ranges. Allocation takes the first range that is large enough; freeing merges a
//! range with its free neighbours. Buffers below 64 KiB come from the usual allocator.
//!
//! # What was tried
//! A safe free list per size, without huge pages: a third of the code. On a machine whose memory was busy, a step of the default
//! experiment took 1.14 times as long (median of 6 pairs), and 1.00 times with `glibc.malloc.hugetlb=1`, which gives it huge
//! pages; on the same machine when idle, 1.02 to 1.03 times.

use memmap2::{MmapMut, MmapRaw};
use std::{
    collections::BTreeMap,
    ops::{Deref, DerefMut},
    ptr::NonNull,
    sync::{Mutex, MutexGuard, PoisonError},
};

/// Bytes of a map, unless one buffer needs more. Pages take no memory until they are written to. The second size is tried
/// if the first one cannot be mapped.
const MAP_BYTES: [usize; 2] = [256 << 20, 16 << 20];
/// Buffers start at cache lines.
const CACHE_LINE_BYTES: usize = 64;
/// Bytes below which a buffer comes from the usual allocator.
const MIN_HEAP_BYTES: usize = 64 << 10;

/// A buffer of f32 from the caching allocator. Its contents are unspecified until they are written (NaN in debug builds).
///
/// Dropping it returns the memory to the cache. It dereferences to a slice.
///
/// # Example
/// ```
/// let mut buffer = ternary_kernels::TensorBuffer::new(100_000);
/// buffer.fill(1.0);
/// assert_eq!(buffer.iter().sum::<f32>(), 100_000.0);
/// ```
#[derive(Debug)]
pub struct TensorBuffer(Storage);

#[derive(Debug)]
enum Storage {
    /// A small buffer.
    Own(Vec<f32>),
    /// `len` numbers at `start`, which is `offset` of the map.
    Heap { start: NonNull<f32>, len: usize, map: usize, offset: usize },
}

// SAFETY: a buffer has its part of the heap to itself, as a Vec has its memory.
unsafe impl Send for TensorBuffer {}
// SAFETY: as above; shared references only read.
unsafe impl Sync for TensorBuffer {}

impl TensorBuffer {
    /// A buffer of `len` numbers.
    pub fn new(len: usize) -> Self {
        let bytes = len * size_of::<f32>();
        let taken = if bytes < MIN_HEAP_BYTES {
            None
        } else {
            heap().allocate(bytes.next_multiple_of(CACHE_LINE_BYTES))
        };
        let storage = match taken {
            Some((map, offset, start)) => Storage::Heap { start: start.cast(), len, map, offset },
            // If nothing can be mapped, the program's allocator decides what happens.
            None => Storage::Own(vec![0.0; len]),
        };
        let mut buffer = Self(storage);
        if cfg!(debug_assertions) {
            buffer.fill(f32::NAN);
        }
        buffer
    }
}

impl Drop for TensorBuffer {
    fn drop(&mut self) {
        if let Storage::Heap { len, map, offset, .. } = self.0 {
            heap().free(map, offset, (len * size_of::<f32>()).next_multiple_of(CACHE_LINE_BYTES));
        }
    }
}

impl Deref for TensorBuffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &self.0 {
            Storage::Own(numbers) => numbers,
            // SAFETY: maps stay while buffers are in use, started as zeros, and this buffer owns the range.
            Storage::Heap { start, len, .. } => unsafe { std::slice::from_raw_parts(start.as_ptr(), *len) },
        }
    }
}

impl DerefMut for TensorBuffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        match &mut self.0 {
            Storage::Own(numbers) => numbers,
            // SAFETY: as for `deref`; `&mut self` makes it exclusive.
            Storage::Heap { start, len, .. } => unsafe {
                std::slice::from_raw_parts_mut(start.as_ptr(), *len)
            },
        }
    }
}

/// Returns the cached memory to the system, if no buffer is in use.
///
/// Call it at the end of a training run. Between two steps it would make the next step pay for all pages again.
pub fn release_cached_memory() {
    heap().release();
}

/// The heap of the process.
static HEAP: Mutex<Heap> = Mutex::new(Heap { maps: Vec::new(), live_buffers: 0 });

fn heap() -> MutexGuard<'static, Heap> {
    HEAP.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug)]
struct Heap {
    /// Never shrinks while a buffer is in use, so that an index stays valid.
    maps: Vec<Map>,
    /// Buffers in use.
    live_buffers: usize,
}

#[derive(Debug)]
struct Map {
    map: MmapRaw,
    /// Length of each free range in bytes, by offset. Neighbouring ranges are merged.
    free: BTreeMap<usize, usize>,
}

impl Heap {
    /// Allocates the first free range that is large enough: index of the map, offset, address. `None` if the system has
    /// no memory to map.
    fn allocate(&mut self, bytes: usize) -> Option<(usize, usize, NonNull<u8>)> {
        let fits = self.maps.iter().enumerate().find_map(|(index, map)| {
            let (offset, _) = map.free.iter().find(|(_, free)| **free >= bytes)?;
            Some((index, *offset))
        });
        let (index, offset) = match fits {
            Some(place) => place,
            None => {
                let mut sizes = MAP_BYTES.map(|size| size.max(bytes)).into_iter().chain([bytes]);
                self.maps.push(sizes.find_map(Map::new)?);
                (self.maps.len() - 1, 0)
            }
        };
        self.live_buffers += 1;
        let map = &mut self.maps[index];
        let free = map.free.remove(&offset).expect("it was found");
        if free > bytes {
            map.free.insert(offset + bytes, free - bytes);
        }
        // SAFETY: the offset lies within the map.
        Some((index, offset, unsafe { NonNull::new_unchecked(map.map.as_mut_ptr().add(offset)) }))
    }

    /// Frees a range and merges it with its free neighbours.
    fn free(&mut self, map: usize, offset: usize, bytes: usize) {
        let free = &mut self.maps[map].free;
        let (mut start, mut len) = (offset, bytes);
        if let Some(next) = free.remove(&(offset + bytes)) {
            len += next;
        }
        if let Some((before, size)) = free.range(..offset).next_back().map(|(before, size)| (*before, *size))
            && before + size == offset
        {
            (start, len) = (before, size + len);
        }
        free.insert(start, len);
        self.live_buffers -= 1;
    }

    /// Unmaps everything, if no buffer is in use.
    fn release(&mut self) {
        if self.live_buffers == 0 {
            self.maps.clear();
        }
    }
}

impl Map {
    /// Maps `bytes` bytes; `None` if the system cannot.
    fn new(bytes: usize) -> Option<Self> {
        let map = MmapRaw::from(MmapMut::map_anon(bytes).ok()?);
        #[cfg(all(target_os = "linux", not(miri)))] // which knows no advice
        // Only advice: where it is refused, 4 KiB pages serve, slower.
        let _ = map.advise(memmap2::Advice::HugePage);
        Some(Self { map, free: BTreeMap::from([(0, bytes)]) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_do_not_overlap_and_neighbours_merge_when_freed() {
        let mut heap = Heap { maps: vec![Map::new(1 << 20).unwrap()], live_buffers: 0 };
        let mut taken: Vec<(usize, usize, usize)> = vec![];
        let mut state = 1u64;
        for turn in 0..2000 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(turn);
            let random = (state >> 33) as usize;
            if taken.len() > 20 || random.is_multiple_of(3) && !taken.is_empty() {
                let (map, offset, bytes) = taken.swap_remove(random % taken.len());
                heap.free(map, offset, bytes);
            } else {
                let bytes = CACHE_LINE_BYTES * (1 + random % 2000);
                let (map, offset, start) = heap.allocate(bytes).unwrap();
                assert!(
                    start.as_ptr().cast::<[u8; 64]>().is_aligned() && offset.is_multiple_of(CACHE_LINE_BYTES)
                );
                let apart = |(other, at, len): &(usize, usize, usize)| {
                    *other != map || offset + bytes <= *at || at + len <= offset
                };
                assert!(taken.iter().all(apart), "{offset} + {bytes} of {taken:?}");
                taken.push((map, offset, bytes));
            }
        }
        let (last, offset, bytes) = taken.pop().unwrap();
        taken.into_iter().for_each(|(map, offset, bytes)| heap.free(map, offset, bytes));
        for (index, map) in heap.maps.iter().enumerate() {
            let len = map.map.len();
            let free = match index == last {
                true => vec![(0, offset), (offset + bytes, len - offset - bytes)],
                false => vec![(0, len)],
            };
            let found = map.free.iter().map(|(start, len)| (*start, *len));
            assert!(found.eq(free.into_iter().filter(|(_, len)| *len > 0)), "{map:?}");
        }
        heap.release();
        assert!(!heap.maps.is_empty(), "a buffer is taken");
        heap.free(last, offset, bytes);
        heap.release();
        assert!(heap.maps.is_empty());
    }

    #[test]
    fn what_cannot_be_mapped_is_none_and_the_heap_goes_on() {
        let mut heap = Heap { maps: vec![], live_buffers: 0 };
        assert!(
            heap.allocate(isize::MAX as usize / CACHE_LINE_BYTES * CACHE_LINE_BYTES).is_none()
                && heap.live_buffers == 0
        );
        let (map, offset, _) = heap.allocate(CACHE_LINE_BYTES).unwrap();
        heap.free(map, offset, CACHE_LINE_BYTES);
        heap.release();
        assert!(heap.maps.is_empty());
    }

    #[test]
    fn a_buffer_holds_what_was_written() {
        for len in [0, 1, 100, 16_384, 100_001] {
            let mut buffer = TensorBuffer::new(len);
            buffer.iter_mut().enumerate().for_each(|(i, x)| *x = i as f32);
            let other = TensorBuffer::new(len);
            assert!(buffer.iter().enumerate().all(|(i, x)| *x == i as f32));
            assert_eq!((buffer.len(), other.len()), (len, len));
        }
    }
}
