//! [`Pool`]: a pool of threads that share the tasks of one run after another.
//!
//! # A run
//! ```text
//! caller:   publish the job, open the run          worker:   spin for a run, then sleep
//!           wake sleeping workers                            join it (compare and swap on the state)
//!           take tasks until none is left                    take tasks until none is left
//!           close the run, wait for workers in it            leave it
//! ```
//!
//! `state` holds the number of the run, whether it may be joined, and how many workers are in it, in one 64-bit word. Tasks
//! are taken by incrementing one counter. A worker that is asleep, or whose core another program uses, never holds up a
//! run: only one that has joined it does.
//!
//! # Why not rayon
//! A training step is about a thousand short runs, and waking a thread for each took a twentieth of its time. The workers of
//! this pool spin for 20 to 60 microseconds before they sleep. Measured against rayon: 1381, 1416 and 1290 tokens/s before,
//! 1450, 1434 and 1403 after.
//!
//! # Determinism
//! Kernels cut their work into tasks whose size does not depend on the number of threads ([`TASK_LEN`]), and add partial sums
//! in the order of tasks. Results are therefore the same, to the bit, on any number of threads.

use crate::Isa;
use std::{
    cell::UnsafeCell,
    hint::spin_loop,
    io,
    marker::PhantomData,
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Condvar, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread,
};

/// Iterations of a spin loop before a worker sleeps, some 20 to 60 microseconds: longer than the caller's work between two
/// runs. Fewer under miri, which is a thousand times as slow.
const SPINS: usize = if cfg!(miri) { 20 } else { 2_000 };

/// A pool of threads, of which the caller is one.
///
/// A run does not wait for a thread that is asleep or whose core is in use elsewhere: the threads that are running take all
/// tasks.
#[derive(Debug)]
pub struct Pool {
    shared: Arc<Shared>,
    /// One run at a time.
    running: Mutex<()>,
    workers: Vec<thread::JoinHandle<()>>,
    isa: Isa,
}

/// Aligned so that values which different threads write are in different cache lines (and pairs of them, which some CPUs
/// fetch together).
#[derive(Debug, Default)]
#[repr(align(128))]
struct CachePadded<T>(T);

#[derive(Debug, Default)]
struct Shared {
    /// Number of the run << 32 | whether it may be joined << 31 | number of workers in it.
    state: CachePadded<AtomicU64>,
    /// The next task.
    next: CachePadded<AtomicUsize>,
    /// The task function of the current run.
    job: UnsafeCell<Option<Job>>,
    /// Workers that sleep, or are about to.
    asleep: AtomicUsize,
    /// Whether a task of this run has panicked on a worker.
    panicked: AtomicBool,
    /// Whether workers are to end.
    stop: AtomicBool,
    lock: Mutex<()>,
    wake: Condvar,
}

/// One run, in `state`.
const RUN: u64 = 1 << 32;
/// The bit of `state` that allows workers to join.
const OPEN: u64 = 1 << 31;

// SAFETY: `job` is written only by the caller of `run` while the run is closed and no worker is in it, and read only by
// workers that have joined an open run.
unsafe impl Sync for Shared {}
// SAFETY: as above; a job is only a pointer to a task that outlives the run.
unsafe impl Send for Shared {}

/// A task function without its type and lifetime.
#[derive(Clone, Copy, Debug)]
struct Job {
    tasks: usize,
    /// A `&F`, to be used by `call` only.
    task: *const (),
    call: unsafe fn(*const (), usize, usize),
}

/// Calls the task function of a [`Job`].
///
/// # Safety
/// `task` points to a living `F`.
unsafe fn call<F: Fn(usize, usize) + Sync>(task: *const (), index: usize, thread: usize) {
    // SAFETY: the caller's promise.
    unsafe { (*task.cast::<F>())(index, thread) }
}

impl Pool {
    /// A pool of `threads` threads, including the caller's, that uses the instruction set of [`Isa::get`].
    ///
    /// # Panics
    /// When the system cannot start the threads.
    pub fn new(threads: usize) -> Self {
        Self::with_isa(threads, Isa::get())
    }

    /// A pool of `threads` threads that uses the given instruction set.
    ///
    /// # Panics
    /// As [`new`](Self::new).
    pub fn with_isa(threads: usize, isa: Isa) -> Self {
        Self::start(threads, isa).expect("the system starts a thread")
    }

    /// As [`new`](Self::new).
    ///
    /// # Errors
    /// The system cannot start a thread. Those that were started have ended.
    pub fn try_new(threads: usize) -> io::Result<Self> {
        Self::start(threads, Isa::get())
    }

    /// Starts the workers.
    fn start(threads: usize, isa: Isa) -> io::Result<Self> {
        let (shared, running, workers) = (Arc::default(), Mutex::new(()), Vec::new());
        let mut pool = Self { shared, running, workers, isa };
        for thread in 1..threads {
            let shared: Arc<Shared> = pool.shared.clone();
            let name = format!("ternary-{thread}");
            pool.workers.push(thread::Builder::new().name(name).spawn(move || shared.work(thread))?);
        }
        Ok(pool)
    }

    /// Number of threads, including the caller's.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// The instruction set that kernels of this pool use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Calls `task(index, thread)` once for each index below `tasks`, on whichever thread is free. Returns when all are done.
    ///
    /// `thread` is below [`threads`](Self::threads), and differs between tasks that run at the same time: a task may use it as
    /// the index of a workspace. Runs do not nest: a task that calls `run` waits forever.
    ///
    /// # Panics
    /// When a task panics.
    ///
    /// # Example
    /// ```
    /// use std::sync::atomic::{AtomicUsize, Ordering};
    /// let (pool, sum) = (ternary_kernels::Pool::new(2), AtomicUsize::new(0));
    /// pool.run(10, |index, _thread| {
    ///     sum.fetch_add(index, Ordering::Relaxed);
    /// });
    /// assert_eq!(sum.into_inner(), 45);
    /// ```
    pub fn run<F: Fn(usize, usize) + Sync>(&self, tasks: usize, task: F) {
        let running = self.running.lock().unwrap_or_else(|poison| poison.into_inner());
        if self.workers.is_empty() || tasks <= 1 {
            (0..tasks).for_each(|index| task(index, 0));
            return;
        }
        let shared = &*self.shared;
        let job = Job { tasks, task: (&raw const task).cast(), call: call::<F> };
        // SAFETY: we hold the lock and the last run has ended, so no worker reads the job.
        unsafe { *shared.job.get() = Some(job) };
        shared.next.0.store(0, Ordering::Relaxed);
        let state = shared.state.0.load(Ordering::Relaxed);
        shared.state.0.store(((state & !(RUN - 1)).wrapping_add(RUN)) | OPEN, Ordering::SeqCst);
        if shared.asleep.load(Ordering::SeqCst) > 0 {
            let _lock = shared.lock();
            shared.wake.notify_all();
        }
        let end = EndOfRun(shared);
        shared.take_tasks(job, 0);
        drop(end);
        drop(running);
        assert!(!shared.panicked.swap(false, Ordering::Relaxed), "a task of the pool panicked");
    }

    /// Calls `task(index, thread, chunk)` for each chunk of `len` consecutive values, as [`run`](Self::run) does. The last
    /// chunk may be shorter.
    ///
    /// # Panics
    /// When `len` is 0, or a task panics.
    ///
    /// # Example
    /// ```
    /// let mut values = [0; 5];
    /// ternary_kernels::Pool::new(2).chunks(&mut values, 2, |index, _thread, chunk| chunk.fill(index));
    /// assert_eq!(values, [0, 0, 1, 1, 2]);
    /// ```
    pub fn chunks<T: Send>(
        &self,
        values: &mut [T],
        len: usize,
        task: impl Fn(usize, usize, &mut [T]) + Sync,
    ) {
        let total = values.len();
        let values = DisjointSlices::new(values);
        self.run(total.div_ceil(len), |index, thread| {
            let start = index * len;
            // SAFETY: each index is called once, and chunks do not overlap.
            task(index, thread, unsafe { values.slice(start, len.min(total - start)) });
        });
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.state.0.fetch_add(RUN, Ordering::SeqCst);
        drop({
            let lock = self.shared.lock();
            self.shared.wake.notify_all();
            lock
        });
        for worker in self.workers.drain(..) {
            // A worker catches the panics of its tasks.
            let _ = worker.join();
        }
    }
}

/// Closes a run when dropped: no worker may join any more, and those in it are waited for. A drop also happens when the
/// caller's own task panics.
struct EndOfRun<'a>(&'a Shared);

impl Drop for EndOfRun<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state.0.fetch_and(!OPEN, Ordering::AcqRel) & !OPEN;
        let mut waited = 0;
        while state & (OPEN - 1) != 0 {
            // The core of a late worker may be the caller's own.
            if waited < SPINS {
                spin_loop()
            } else {
                thread::yield_now()
            }
            waited += 1;
            state = self.0.state.0.load(Ordering::Acquire);
        }
    }
}

impl Shared {
    /// The lock under which workers sleep.
    fn lock(&self) -> MutexGuard<'_, ()> {
        self.lock.lock().unwrap_or_else(|poison| poison.into_inner())
    }

    /// Takes tasks until none is left.
    fn take_tasks(&self, job: Job, thread: usize) {
        loop {
            let index = self.next.0.fetch_add(1, Ordering::Relaxed);
            if index >= job.tasks {
                return;
            }
            // SAFETY: the run is not over while this thread is in it, and `Pool::run` outlives the run.
            unsafe { (job.call)(job.task, index, thread) };
        }
    }

    /// The main function of a worker.
    fn work(&self, thread: usize) {
        let mut done = 0;
        loop {
            let state = self.wait(done);
            if self.stop.load(Ordering::SeqCst) {
                return;
            }
            done = state >> 32;
            let joined = self.state.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, |now| {
                (now >> 32 == done && now & OPEN != 0).then_some(now + 1)
            });
            if joined.is_err() {
                continue;
            }
            // SAFETY: the run is open and now waits for us; its job was written before it was opened.
            let job = unsafe { *self.job.get() }.expect("an open run has a job");
            if catch_unwind(AssertUnwindSafe(|| self.take_tasks(job, thread))).is_err() {
                self.panicked.store(true, Ordering::Relaxed);
            }
            self.state.0.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// Waits for a run other than `done`, spinning at first, then asleep. Returns the state.
    fn wait(&self, done: u64) -> u64 {
        for _ in 0..SPINS {
            let state = self.state.0.load(Ordering::Acquire);
            if state >> 32 != done {
                return state;
            }
            spin_loop();
        }
        let mut lock = self.lock();
        // Either this worker sees the new run, or the thread that opens it sees this worker.
        self.asleep.fetch_add(1, Ordering::SeqCst);
        let state = loop {
            let state = self.state.0.load(Ordering::SeqCst);
            if state >> 32 != done {
                break state;
            }
            lock = self.wake.wait(lock).unwrap_or_else(|poison| poison.into_inner());
        };
        self.asleep.fetch_sub(1, Ordering::SeqCst);
        state
    }
}

/// Numbers per task of elementwise work: enough to be worth a task, and independent of the number of threads, so that sums
/// do not depend on it.
pub(crate) const TASK_LEN: usize = 1 << 14;

/// Rows of `width` numbers per task.
pub(crate) fn rows_per_task(width: usize) -> usize {
    (TASK_LEN / width.max(1)).max(1)
}

impl Pool {
    /// Copies a slice, on all threads.
    ///
    /// # Panics
    /// When lengths differ.
    pub fn copy(&self, from: &[f32], to: &mut [f32]) {
        assert_eq!(from.len(), to.len(), "numbers to copy");
        self.chunks(to, TASK_LEN, |index, _, to| to.copy_from_slice(&from[index * TASK_LEN..][..to.len()]));
    }

    /// Calls `task(range)` for ranges of `per_task` rows, in parallel. Returns their results in order.
    pub(crate) fn map_ranges<T: Send + Default + Clone>(
        &self,
        rows: usize,
        per_task: usize,
        task: impl Fn(Range<usize>) -> T + Sync,
    ) -> Vec<T> {
        let mut results = vec![T::default(); rows.div_ceil(per_task)];
        let places = DisjointSlices::new(&mut results);
        self.run(rows.div_ceil(per_task), |index, _| {
            let result = task(index * per_task..rows.min((index + 1) * per_task));
            // SAFETY: each index is called once.
            unsafe { places.slice(index, 1)[0] = result };
        });
        results
    }
}

/// A mutable slice of which several threads write disjoint parts.
pub(crate) struct DisjointSlices<'a, T> {
    start: *mut T,
    len: usize,
    slice: PhantomData<&'a mut [T]>,
}

// SAFETY: threads get exclusive parts, by the promise of `slice`.
unsafe impl<T: Send> Sync for DisjointSlices<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for DisjointSlices<'_, T> {}

impl<'a, T> DisjointSlices<'a, T> {
    /// Borrows the slice for as long as threads share it.
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), slice: PhantomData }
    }

    /// The `len` values from `start` on.
    ///
    /// # Panics
    /// When they are not within the slice.
    ///
    /// # Safety
    /// No other part that overlaps this one is alive.
    #[allow(clippy::mut_from_ref)]
    #[inline(always)]
    pub(crate) unsafe fn slice(&self, start: usize, len: usize) -> &'a mut [T] {
        assert!(start <= self.len && len <= self.len - start);
        // SAFETY: within the slice, which is borrowed for 'a; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 5] {
            let pool = Pool::new(threads);
            for tasks in [0, 1, 2, 3, 100] {
                for _ in 0..if cfg!(miri) { 5 } else { 50 } {
                    let counts: Vec<_> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                    pool.run(tasks, |index, thread| {
                        assert!(thread < threads);
                        counts[index].fetch_add(1, Ordering::Relaxed);
                    });
                    assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
                }
            }
        }
    }

    #[test]
    fn sleeping_workers_wake() {
        let pool = Pool::new(3);
        for _ in 0..5 {
            thread::sleep(std::time::Duration::from_millis(5));
            let seen = Mutex::new(std::collections::BTreeSet::new());
            pool.run(3, |_, thread| {
                seen.lock().unwrap().insert(thread);
                // Long enough that no thread can take two.
                while seen.lock().unwrap().len() < 3 {
                    thread::yield_now();
                }
            });
        }
    }

    #[test]
    fn chunks_cover_the_slice() {
        let mut values = vec![0; 103];
        Pool::new(2).chunks(&mut values, 10, |index, _, chunk| chunk.fill(index + 1));
        assert!(values.iter().enumerate().all(|(i, value)| *value == i / 10 + 1));
    }

    #[test]
    fn panics_reach_the_caller_and_the_pool_goes_on() {
        let pool = Pool::new(2);
        for bad in 0..8 {
            let run = AssertUnwindSafe(|| pool.run(8, |index, _| assert!(index != bad)));
            assert!(catch_unwind(run).is_err());
        }
        pool.run(8, |_, _| {});
    }
}
