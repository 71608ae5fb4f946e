//! [`Threads`]: a group whose processes are threads of this process, for tests.

use crate::Group;
use std::sync::{Arc, Barrier, Mutex, PoisonError};

/// A rank of a group whose processes are threads. A thread that panics leaves the others waiting.
#[derive(Clone, Debug)]
pub struct Threads {
    rank: usize,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    barrier: Barrier,
    /// What each rank sends.
    slots: Vec<Mutex<Vec<u8>>>,
}

impl Threads {
    /// Runs `program` as every rank of a group of `size`, and returns what each returned, in the order of ranks.
    ///
    /// # Panics
    /// `size` is 0, or `program` panics on every rank.
    pub fn run<T: Send>(size: usize, program: impl Fn(&dyn Group) -> T + Sync) -> Vec<T> {
        std::thread::scope(|scope| {
            let program = &program;
            let ranks: Vec<_> =
                Self::group(size).into_iter().map(|rank| scope.spawn(move || program(&rank))).collect();
            ranks.into_iter().map(|rank| rank.join().expect("a rank panicked")).collect()
        })
    }

    /// The ranks of a group of `size`, each for a thread of its own.
    ///
    /// # Panics
    /// `size` is 0.
    pub fn group(size: usize) -> Vec<Self> {
        assert!(size > 0, "a group has at least one rank");
        let slots = (0..size).map(|_| Mutex::default()).collect();
        let shared = Arc::new(Shared { barrier: Barrier::new(size), slots });
        (0..size).map(|rank| Self { rank, shared: shared.clone() }).collect()
    }

    /// Shows `bytes` to all ranks, and returns what `read` makes of those of each rank.
    fn exchange<T>(&self, bytes: Vec<u8>, read: impl Fn(usize, &[u8]) -> T) -> Vec<T> {
        let slot = |rank: usize| self.shared.slots[rank].lock().unwrap_or_else(PoisonError::into_inner);
        *slot(self.rank) = bytes;
        self.shared.barrier.wait();
        let all = (0..self.size()).map(|rank| read(rank, &slot(rank))).collect();
        // Nobody writes before all have read.
        self.shared.barrier.wait();
        all
    }
}

fn to_bytes(numbers: &[f32]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_ne_bytes()).collect()
}

fn to_numbers(bytes: &[u8]) -> impl Iterator<Item = f32> {
    bytes.chunks_exact(4).map(|bytes| f32::from_ne_bytes(bytes.try_into().expect("four bytes")))
}

impl Group for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.shared.slots.len()
    }

    fn host(&self) -> String {
        crate::launcher::host()
    }

    fn gather(&self, bytes: &[u8]) -> Vec<Vec<u8>> {
        self.exchange(bytes.to_vec(), |_, bytes| bytes.to_vec())
    }

    fn broadcast(&self, bytes: &mut Vec<u8>) {
        let all = self.exchange(std::mem::take(bytes), |rank, bytes| (rank == 0).then(|| bytes.to_vec()));
        *bytes = all.into_iter().flatten().next().expect("rank 0 is one of the group");
    }

    fn all_to_all(&self, send: &[f32], receive: &mut [f32]) {
        let block = send.len() / self.size();
        let own = self.rank * block * 4..(self.rank + 1) * block * 4;
        let blocks = self.exchange(to_bytes(send), |_, bytes| bytes[own.clone()].to_vec());
        receive.iter_mut().zip(to_numbers(&blocks.concat())).for_each(|(to, from)| *to = from);
    }

    fn all_gather(&self, send: &[f32], receive: &mut [f32]) {
        let blocks = self.gather(&to_bytes(send));
        receive.iter_mut().zip(to_numbers(&blocks.concat())).for_each(|(to, from)| *to = from);
    }

    fn abort(&self, code: u8) -> ! {
        std::process::exit(code.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn collectives_move_what_their_names_say() {
        for size in [1, 2, 5] {
            Threads::run(size, |group| {
                let rank = group.rank();
                let gathered = group.gather(&vec![rank as u8; rank]);
                assert_eq!(gathered, (0..size).map(|r| vec![r as u8; r]).collect::<Vec<_>>());
                let mut bytes = vec![rank as u8 + 7; 3];
                group.broadcast(&mut bytes);
                assert_eq!(bytes, [7; 3]);
                let numbers = group.gather_numbers(&[rank as f64, 0.5]);
                assert_eq!(numbers, (0..size).flat_map(|r| [r as f64, 0.5]).collect::<Vec<_>>());
                // Block for rank t, from rank r: r + 10 t.
                let send: Vec<f32> = (0..size).map(|to| (rank + 10 * to) as f32).collect();
                let mut received = vec![0.0; size];
                group.all_to_all(&send, &mut received);
                assert_eq!(received, (0..size).map(|from| (from + 10 * rank) as f32).collect::<Vec<_>>());
                group.all_gather(&[rank as f32], &mut received);
                assert_eq!(received, (0..size).map(|r| r as f32).collect::<Vec<_>>());
            });
        }
    }
}
