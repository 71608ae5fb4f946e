//! [`Scheduler`]: one thread per engine, which generates the completions of all requests together.

use crate::{
    batch::Batch,
    job::{Event, Job, SubmitError},
    metric::ModelMetric,
    option::Limits,
};
use std::{
    collections::VecDeque,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
};
use ternary_infer::Engine;

/// The queue of an engine. Dropping it ends the work.
#[derive(Debug)]
pub struct Scheduler {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
    /// Maximum number of active completions.
    batch: usize,
    /// Maximum number of queued completions.
    waiting: usize,
}

#[derive(Debug)]
struct Queue {
    jobs: VecDeque<Job>,
    /// Active completions, as of the last step.
    active: usize,
    phase: Phase,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Open,
    /// Takes no more jobs, and finishes those it has.
    Draining,
    /// All work ends.
    Stopped,
    Dead,
}

impl Scheduler {
    /// Starts the thread.
    pub fn new(engine: Arc<Engine>, limits: &Limits, metric: Arc<ModelMetric>) -> std::io::Result<Self> {
        let queue = Mutex::new(Queue { jobs: VecDeque::new(), active: 0, phase: Phase::Open });
        let (batch, waiting) = (limits.batch, limits.queue);
        let shared = Arc::new(Shared { queue, changed: Condvar::new(), batch, waiting });
        let of_thread = shared.clone();
        let name = format!("decode {}", engine.name());
        // Names of models come from files, and may contain zero bytes; names of threads must not.
        let thread = thread::Builder::new().name(name.replace('\0', ""));
        thread.spawn(move || run(&of_thread, &engine, &metric))?;
        Ok(Self { shared })
    }

    /// Queues all of the jobs, or none.
    ///
    /// # Errors
    /// Why they are not taken.
    pub fn submit(&self, jobs: Vec<Job>) -> Result<(), SubmitError> {
        let mut queue = self.shared.lock();
        match queue.phase {
            Phase::Open => (),
            Phase::Draining | Phase::Stopped => return Err(SubmitError::Stopping),
            Phase::Dead => return Err(SubmitError::Dead),
        }
        queue.jobs.retain(|job| !job.events.is_closed());
        let new: usize = jobs.iter().map(|job| job.choices.len()).sum();
        if queue.active + queue.waiting() + new > self.shared.batch + self.shared.waiting {
            return Err(SubmitError::Full);
        }
        queue.jobs.extend(jobs);
        self.shared.changed.notify_all();
        Ok(())
    }

    /// Active and queued completions.
    pub fn load(&self) -> (usize, usize) {
        let queue = self.shared.lock();
        (queue.active, queue.waiting())
    }

    /// Whether jobs are taken.
    pub fn is_open(&self) -> bool {
        self.shared.lock().phase == Phase::Open
    }

    /// Takes no more jobs.
    pub fn drain(&self) {
        self.shared.enter(Phase::Draining);
    }

    /// Ends all work; requests that wait for a completion get an error.
    pub fn stop(&self) {
        self.shared.enter(Phase::Stopped);
    }
}

impl Drop for Scheduler {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        // Nothing panics while the lock is held.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self, phase: Phase) {
        let mut queue = self.lock();
        queue.phase = queue.phase.max(phase);
        self.changed.notify_all();
    }
}

impl Queue {
    fn waiting(&self) -> usize {
        self.jobs.iter().map(|job| job.choices.len()).sum()
    }
}

/// Reports the end of the thread to all requests, however it ended.
struct EndOfThread<'a>(&'a Shared);

impl Drop for EndOfThread<'_> {
    fn drop(&mut self) {
        let mut queue = self.0.lock();
        queue.active = 0;
        if queue.phase < Phase::Stopped {
            tracing::error!("the thread of an engine has panicked");
            queue.phase = Phase::Dead;
        }
        for job in queue.jobs.drain(..) {
            job.events.send(Event::Failed("the server is stopping")).ok();
        }
    }
}

fn run(shared: &Shared, engine: &Engine, metric: &ModelMetric) {
    let _end = EndOfThread(shared);
    let mut batch = Batch::new(engine, metric, shared.batch);
    loop {
        let mut queue = shared.lock();
        loop {
            if queue.phase >= Phase::Stopped {
                drop(queue);
                batch.fail("the server is stopping");
                return;
            }
            queue.jobs.retain(|job| !job.events.is_closed());
            // In order of arrival, so that a request for many completions is not overtaken forever.
            while let Some(job) = queue.jobs.front()
                && batch.len() + job.choices.len() <= shared.batch
            {
                let job = queue.jobs.pop_front().expect("the queue has a first job");
                batch.add(job);
            }
            queue.active = batch.len();
            if batch.len() > 0 {
                break;
            }
            queue = shared.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        drop(queue);
        batch.step();
    }
}
