//! [`Pool`]: threads that stay, and share out tasks.

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

/// Rounds of waiting with the CPU busy, some 20 to 60 microseconds: longer than the caller's work between two runs.
/// Miri is a thousand times as slow.
const SPINS: usize = if cfg!(miri) { 20 } else { 2_000 };

/// Threads that wait for work; the caller is one of them.
///
/// A thread that is asleep, or whose core is taken by somebody else, is not waited for: whoever runs takes the tasks,
/// and only a thread that has begun one holds up the end of a run.
#[derive(Debug)]
pub struct Pool {
    shared: Arc<Shared>,
    /// One run at a time.
    running: Mutex<()>,
    workers: Vec<thread::JoinHandle<()>>,
    isa: Isa,
}

/// Keeps what different threads write in different cache lines.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Apart<T>(T);

#[derive(Debug, Default)]
struct Shared {
    /// The number of the run << 32 | whether it may be joined << 31 | workers in it.
    state: Apart<AtomicU64>,
    /// The next task.
    next: Apart<AtomicUsize>,
    job: UnsafeCell<Option<Job>>,
    asleep: AtomicUsize,
    panicked: AtomicBool,
    stop: AtomicBool,
    lock: Mutex<()>,
    wake: Condvar,
}

const RUN: u64 = 1 << 32;
const OPEN: u64 = 1 << 31;

// SAFETY: `job` is written only by the caller of `run` while the run is closed and no worker is in it, and read only by
// workers that have joined an open run.
unsafe impl Sync for Shared {}
// SAFETY: as above; a job is only a pointer to a task that outlives the run.
unsafe impl Send for Shared {}

#[derive(Clone, Copy, Debug)]
struct Job {
    tasks: usize,
    /// `&F`, for `call` alone.
    task: *const (),
    call: unsafe fn(*const (), usize, usize),
}

/// # Safety
/// `task` points to a living `F`.
unsafe fn call<F: Fn(usize, usize) + Sync>(task: *const (), index: usize, thread: usize) {
    // SAFETY: the caller's promise.
    unsafe { (*task.cast::<F>())(index, thread) }
}

impl Pool {
    /// A pool of this many threads, the caller's included, with the best instruction set.
    ///
    /// # Panics
    /// When the system does not start so many.
    pub fn new(threads: usize) -> Self {
        Self::with_isa(threads, Isa::get())
    }

    /// # Panics
    /// As [`new`](Self::new).
    pub fn with_isa(threads: usize, isa: Isa) -> Self {
        Self::start(threads, isa).expect("the system starts a thread")
    }

    /// As [`new`](Self::new).
    ///
    /// # Errors
    /// The system does not start so many threads; those that it started have ended.
    pub fn try_new(threads: usize) -> io::Result<Self> {
        Self::start(threads, Isa::get())
    }

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

    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Calls `task(index, thread)` once for each index below `tasks`, on whichever thread is free, and returns when
    /// all are done. `thread < threads()`, and no two tasks have the same one at the same time.
    ///
    /// Runs do not nest: a task that calls `run` waits for ever.
    ///
    /// # Panics
    /// When a task panics.
    pub fn run<F: Fn(usize, usize) + Sync>(&self, tasks: usize, task: F) {
        let running = self.running.lock().unwrap_or_else(|poison| poison.into_inner());
        if self.workers.is_empty() || tasks <= 1 {
            (0..tasks).for_each(|index| task(index, 0));
            return;
        }
        let shared = &*self.shared;
        let job = Job { tasks, task: (&raw const task).cast(), call: call::<F> };
        // SAFETY: we hold the lock and the last run has ended, so nobody else looks at the job.
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

    /// Calls `task(index, thread, chunk)` for each chunk of `len` consecutive values (the last may be shorter), as
    /// [`run`](Self::run) does.
    pub fn chunks<T: Send>(
        &self,
        values: &mut [T],
        len: usize,
        task: impl Fn(usize, usize, &mut [T]) + Sync,
    ) {
        let total = values.len();
        let values = Disjoint::new(values);
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

/// Lets no worker join any more, and waits for those within, also when the caller's own task panics.
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
    fn lock(&self) -> MutexGuard<'_, ()> {
        self.lock.lock().unwrap_or_else(|poison| poison.into_inner())
    }

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

    /// The life of a worker.
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

    /// Waits for another run than `done`: with the CPU busy at first, then asleep.
    fn wait(&self, done: u64) -> u64 {
        for _ in 0..SPINS {
            let state = self.state.0.load(Ordering::Acquire);
            if state >> 32 != done {
                return state;
            }
            spin_loop();
        }
        let mut lock = self.lock();
        // Either we see the new run, or whoever opens it sees us.
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

/// Numbers that a task works on, so that it is worth waking a thread.
pub(crate) const PIECE: usize = 1 << 14;

/// Rows of `width` numbers for a task.
pub(crate) fn rows_a_piece(width: usize) -> usize {
    (PIECE / width.max(1)).max(1)
}

impl Pool {
    /// Copies, on all threads.
    ///
    /// # Panics
    /// When lengths differ.
    pub fn copy(&self, from: &[f32], to: &mut [f32]) {
        assert_eq!(from.len(), to.len(), "numbers to copy");
        self.chunks(to, PIECE, |index, _, to| to.copy_from_slice(&from[index * PIECE..][..to.len()]));
    }

    /// Calls `task(rows)` for pieces of `rows`, in parallel, and gives what each returned, in order.
    pub(crate) fn pieces<T: Send + Default + Clone>(
        &self,
        rows: usize,
        piece: usize,
        task: impl Fn(Range<usize>) -> T + Sync,
    ) -> Vec<T> {
        let mut results = vec![T::default(); rows.div_ceil(piece)];
        let places = Disjoint::new(&mut results);
        self.run(rows.div_ceil(piece), |index, _| {
            let result = task(index * piece..rows.min((index + 1) * piece));
            // SAFETY: each index is called once.
            unsafe { places.slice(index, 1)[0] = result };
        });
        results
    }
}

/// A slice of which threads write different parts.
pub(crate) struct Disjoint<'a, T> {
    start: *mut T,
    len: usize,
    slice: PhantomData<&'a mut [T]>,
}

// SAFETY: threads get exclusive parts, by the promise of `slice`.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), slice: PhantomData }
    }

    /// # Panics
    /// When the part is not within the slice.
    ///
    /// # Safety
    /// While the result lives, no other one overlaps it.
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
