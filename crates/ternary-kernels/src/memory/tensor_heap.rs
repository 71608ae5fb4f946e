//! [`Room`]: memory for the numbers of a training step, from a heap that keeps its pages.
//!
//! A step takes and gives back gigabytes in pieces of megabytes, which a usual allocator returns to the system. Fresh pages
//! cost more than the numbers that are put there: the system empties each first. Here they stay, huge where it has such, until
//! [`release_rooms`].

use memmap2::{MmapMut, MmapRaw};
use std::{
    collections::BTreeMap,
    ops::{Deref, DerefMut},
    ptr::NonNull,
    sync::{Mutex, MutexGuard, PoisonError},
};

/// Bytes of a map, unless more are asked for at once; pages are the system's until they are written to. The second is for where
/// address space is scarce.
const MAPS: [usize; 2] = [256 << 20, 16 << 20];
/// Rooms begin at cache lines.
const LINE: usize = 64;
/// Smaller rooms are the usual allocator's.
const LEAST: usize = 64 << 10;

/// Numbers that are anything until they are written; in debug builds NaN.
#[derive(Debug)]
pub struct Room(Place);

#[derive(Debug)]
enum Place {
    Own(Vec<f32>),
    /// `len` numbers at `start`, which is `offset` of the map.
    Heap {
        start: NonNull<f32>,
        len: usize,
        map: usize,
        offset: usize,
    },
}

// SAFETY: a room has its part of the heap to itself, as a Vec has its memory.
unsafe impl Send for Room {}
// SAFETY: as above; shared references only read.
unsafe impl Sync for Room {}

impl Room {
    pub fn new(len: usize) -> Self {
        let bytes = len * size_of::<f32>();
        let taken = if bytes < LEAST { None } else { heap().take(bytes.next_multiple_of(LINE)) };
        let place = match taken {
            Some((map, offset, start)) => Place::Heap { start: start.cast(), len, map, offset },
            // Where there is no map either, what follows is the program's allocator's to say.
            None => Place::Own(vec![0.0; len]),
        };
        let mut room = Self(place);
        if cfg!(debug_assertions) {
            room.fill(f32::NAN);
        }
        room
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        if let Place::Heap { len, map, offset, .. } = self.0 {
            heap().give(map, offset, (len * size_of::<f32>()).next_multiple_of(LINE));
        }
    }
}

impl Deref for Room {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &self.0 {
            Place::Own(numbers) => numbers,
            // SAFETY: maps stay while they have rooms, began as zeros, and the part is nobody else's.
            Place::Heap { start, len, .. } => unsafe { std::slice::from_raw_parts(start.as_ptr(), *len) },
        }
    }
}

impl DerefMut for Room {
    fn deref_mut(&mut self) -> &mut [f32] {
        match &mut self.0 {
            Place::Own(numbers) => numbers,
            // SAFETY: as for `deref`; `&mut self` makes it exclusive.
            Place::Heap { start, len, .. } => unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), *len) },
        }
    }
}

/// Gives the maps back to the system, if no room is taken: between two steps there may be none, and the next would
/// pay for all pages again, so this is for the end of a training.
pub fn release_rooms() {
    heap().release();
}

static HEAP: Mutex<Heap> = Mutex::new(Heap { maps: Vec::new(), rooms: 0 });

fn heap() -> MutexGuard<'static, Heap> {
    HEAP.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug)]
struct Heap {
    maps: Vec<Map>,
    /// How many are taken.
    rooms: usize,
}

#[derive(Debug)]
struct Map {
    map: MmapRaw,
    /// Bytes that are free, by offset; neighbours are one.
    free: BTreeMap<usize, usize>,
}

impl Heap {
    /// The first place that is large enough: number of the map, offset, address. `None`: the system maps no more.
    fn take(&mut self, bytes: usize) -> Option<(usize, usize, NonNull<u8>)> {
        let fits = self.maps.iter().enumerate().find_map(|(index, map)| {
            let (offset, _) = map.free.iter().find(|(_, free)| **free >= bytes)?;
            Some((index, *offset))
        });
        let (index, offset) = match fits {
            Some(place) => place,
            None => {
                let mut sizes = MAPS.map(|size| size.max(bytes)).into_iter().chain([bytes]);
                self.maps.push(sizes.find_map(Map::new)?);
                (self.maps.len() - 1, 0)
            }
        };
        self.rooms += 1;
        let map = &mut self.maps[index];
        let free = map.free.remove(&offset).expect("it was found");
        if free > bytes {
            map.free.insert(offset + bytes, free - bytes);
        }
        // SAFETY: the offset lies within the map.
        Some((index, offset, unsafe { NonNull::new_unchecked(map.map.as_mut_ptr().add(offset)) }))
    }

    fn give(&mut self, map: usize, offset: usize, bytes: usize) {
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
        self.rooms -= 1;
    }

    fn release(&mut self) {
        if self.rooms == 0 {
            self.maps.clear();
        }
    }
}

impl Map {
    /// `None`: the system has no place for it.
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
    fn places_are_apart_and_neighbours_become_one_again() {
        let mut heap = Heap { maps: vec![Map::new(1 << 20).unwrap()], rooms: 0 };
        let mut taken: Vec<(usize, usize, usize)> = vec![];
        let mut state = 1u64;
        for turn in 0..2000 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(turn);
            let random = (state >> 33) as usize;
            if taken.len() > 20 || random.is_multiple_of(3) && !taken.is_empty() {
                let (map, offset, bytes) = taken.swap_remove(random % taken.len());
                heap.give(map, offset, bytes);
            } else {
                let bytes = LINE * (1 + random % 2000);
                let (map, offset, start) = heap.take(bytes).unwrap();
                assert!(start.as_ptr().cast::<[u8; 64]>().is_aligned() && offset.is_multiple_of(LINE));
                let apart = |(other, at, len): &(usize, usize, usize)| {
                    *other != map || offset + bytes <= *at || at + len <= offset
                };
                assert!(taken.iter().all(apart), "{offset} + {bytes} of {taken:?}");
                taken.push((map, offset, bytes));
            }
        }
        let (last, offset, bytes) = taken.pop().unwrap();
        taken.into_iter().for_each(|(map, offset, bytes)| heap.give(map, offset, bytes));
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
        assert!(!heap.maps.is_empty(), "a room is taken");
        heap.give(last, offset, bytes);
        heap.release();
        assert!(heap.maps.is_empty());
    }

    #[test]
    fn what_cannot_be_mapped_is_none_and_the_heap_goes_on() {
        let mut heap = Heap { maps: vec![], rooms: 0 };
        assert!(heap.take(isize::MAX as usize / LINE * LINE).is_none() && heap.rooms == 0);
        let (map, offset, _) = heap.take(LINE).unwrap();
        heap.give(map, offset, LINE);
        heap.release();
        assert!(heap.maps.is_empty());
    }

    #[test]
    fn a_room_holds_what_was_written() {
        for len in [0, 1, 100, 16_384, 100_001] {
            let mut room = Room::new(len);
            room.iter_mut().enumerate().for_each(|(i, x)| *x = i as f32);
            let other = Room::new(len);
            assert!(room.iter().enumerate().all(|(i, x)| *x == i as f32));
            assert_eq!((room.len(), other.len()), (len, len));
        }
    }
}
