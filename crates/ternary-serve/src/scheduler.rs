//! [`Scheduler`]: one thread an engine, which continues the texts of all requests together.

use crate::{batch::Batch, metric::ModelMetric, option::Limits, score::Score};
use std::{
    collections::VecDeque,
    ops::Range,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
};
use ternary_infer::{Engine, Sampling};
use tokio::sync::mpsc::UnboundedSender;

/// A prompt, and how many texts are to follow it.
#[derive(Debug)]
pub struct Job {
    /// At least one token and at most the context, ids of the vocabulary.
    pub prompt: Vec<u32>,
    /// Checked; a text draws with `seed` plus its number.
    pub sampling: Sampling,
    /// The numbers of the texts.
    pub choices: Range<usize>,
    /// At most so many tokens a text, at least one.
    pub tokens: usize,
    pub stops: Vec<String>,
    /// With the scores of the drawn tokens, and of so many others.
    pub scores: Option<usize>,
    /// Where the texts go; when nobody listens any more, the work ends. Not bounded, for its messages are: at most two
    /// a token.
    pub events: UnboundedSender<Event>,
}

/// What becomes of a text.
#[derive(Debug)]
pub enum Event {
    /// More of it: whole characters.
    Text { choice: usize, text: String, scores: Vec<Score> },
    /// Its end, after so many tokens.
    End { choice: usize, finish: Finish, tokens: usize },
    /// The logits of a text are no numbers: no more comes of it.
    NotFinite,
    /// No more comes, of any text.
    Failed(&'static str),
}

/// Why a text ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model, or a stop string.
    Stop,
    /// As many tokens as were asked for, or as there is room for.
    Length,
}

/// Why a job is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Too many are waiting.
    Full,
    /// The server stops.
    Stopping,
    /// The thread of the engine has ended.
    Dead,
}

/// Takes jobs for an engine. When it is dropped, the work ends.
#[derive(Debug)]
pub struct Scheduler {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
    /// Texts in the making.
    batch: usize,
    /// Texts that may wait.
    waiting: usize,
}

#[derive(Debug)]
struct Queue {
    jobs: VecDeque<Job>,
    /// Texts in the making, as of the last step.
    busy: usize,
    phase: Phase,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Open,
    /// No more jobs; those that are there go on.
    Draining,
    /// All work ends.
    Stopped,
    Dead,
}

impl Scheduler {
    /// Starts the thread.
    pub fn new(engine: Arc<Engine>, limits: &Limits, metric: Arc<ModelMetric>) -> std::io::Result<Self> {
        let queue = Mutex::new(Queue { jobs: VecDeque::new(), busy: 0, phase: Phase::Open });
        let (batch, waiting) = (limits.batch, limits.queue);
        let shared = Arc::new(Shared { queue, changed: Condvar::new(), batch, waiting });
        let mine = shared.clone();
        let name = format!("decode {}", engine.name());
        // Names of threads have no zero bytes; those of models come from files.
        let thread = thread::Builder::new().name(name.replace('\0', ""));
        thread.spawn(move || run(&mine, &engine, &metric))?;
        Ok(Self { shared })
    }

    /// Queues jobs, all or none.
    ///
    /// # Errors
    /// Why they are not taken.
    pub fn submit(&self, jobs: Vec<Job>) -> Result<(), Refusal> {
        let mut queue = self.shared.lock();
        match queue.phase {
            Phase::Open => (),
            Phase::Draining | Phase::Stopped => return Err(Refusal::Stopping),
            Phase::Dead => return Err(Refusal::Dead),
        }
        queue.jobs.retain(|job| !job.events.is_closed());
        let new: usize = jobs.iter().map(|job| job.choices.len()).sum();
        if queue.busy + queue.waiting() + new > self.shared.batch + self.shared.waiting {
            return Err(Refusal::Full);
        }
        queue.jobs.extend(jobs);
        self.shared.changed.notify_all();
        Ok(())
    }

    /// Texts in the making and texts that wait.
    pub fn load(&self) -> (usize, usize) {
        let queue = self.shared.lock();
        (queue.busy, queue.waiting())
    }

    /// Whether jobs are taken.
    pub fn is_open(&self) -> bool {
        self.shared.lock().phase == Phase::Open
    }

    /// Takes no more jobs.
    pub fn drain(&self) {
        self.shared.enter(Phase::Draining);
    }

    /// Ends all work; who waits for a text is told.
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
        // Nothing panics while it is held.
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

/// Tells everybody that the thread has ended, however it did.
struct Ending<'a>(&'a Shared);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        let mut queue = self.0.lock();
        queue.busy = 0;
        if queue.phase < Phase::Stopped {
            tracing::error!("the thread of an engine has panicked");
            queue.phase = Phase::Dead;
        }
        for job in queue.jobs.drain(..) {
            job.events.send(Event::Failed("the server stops")).ok();
        }
    }
}

fn run(shared: &Shared, engine: &Engine, metric: &ModelMetric) {
    let _ending = Ending(shared);
    let mut batch = Batch::new(engine, metric, shared.batch);
    loop {
        let mut queue = shared.lock();
        loop {
            if queue.phase >= Phase::Stopped {
                drop(queue);
                batch.fail("the server stops");
                return;
            }
            queue.jobs.retain(|job| !job.events.is_closed());
            // In the order of their arrival: a request for many texts is not overtaken for ever.
            while let Some(job) = queue.jobs.front()
                && batch.len() + job.choices.len() <= shared.batch
            {
                let job = queue.jobs.pop_front().expect("there is a first");
                batch.begin(job);
            }
            queue.busy = batch.len();
            if batch.len() > 0 {
                break;
            }
            queue = shared.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        drop(queue);
        batch.step();
    }
}
