//! [`Pool`]: threads that stay.

use crate::Isa;

/// Threads that wait for work; the caller is one of them.
#[derive(Debug)]
pub struct Pool {
    threads: usize,
    isa: Isa,
}

impl Pool {
    /// A pool of this many threads, the caller's included, with the best instruction set.
    pub fn new(threads: usize) -> Self {
        Self::with_isa(threads, Isa::get())
    }

    pub fn with_isa(threads: usize, isa: Isa) -> Self {
        Self { threads: threads.max(1), isa }
    }

    pub fn threads(&self) -> usize {
        self.threads
    }

    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Calls `task(index, thread)` once for each index below `tasks`, on whichever thread is free, and returns when
    /// all are done. `thread < threads()`, and no two tasks have the same one at the same time.
    pub fn run(&self, tasks: usize, task: impl Fn(usize, usize) + Sync) {
        (0..tasks).for_each(|index| task(index, 0));
    }

    /// Calls `task(index, thread, chunk)` for each chunk of `len` consecutive values (the last may be shorter).
    pub fn chunks<T: Send>(
        &self,
        values: &mut [T],
        len: usize,
        task: impl Fn(usize, usize, &mut [T]) + Sync,
    ) {
        values.chunks_mut(len).enumerate().for_each(|(index, chunk)| task(index, 0, chunk));
    }
}
