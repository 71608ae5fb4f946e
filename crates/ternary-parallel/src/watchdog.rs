//! [`Watchdog`]: a group that ends this process when the others do not answer.

use crate::Group;
use signal_hook::consts::SIGTERM;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How often the watchdog looks.
const TICK: Duration = Duration::from_millis(100);
/// A process that still waits so long after a signal says so. When a process dies, `mpirun` sends SIGTERM to the others, and
/// SIGKILL one second later.
const AFTER_SIGNAL: Duration = Duration::from_millis(500);
/// The least limit of a step.
const LEAST: Duration = Duration::from_secs(60);
/// The least limit of evaluations and checkpoints: a large checkpoint on a slow disk takes minutes.
const LEAST_FILES: Duration = Duration::from_secs(30 * 60);
/// The limit of a step, as a multiple of the median duration of steps.
const MEDIANS: u32 = 10;
/// Steps whose median counts.
const STEPS: usize = 101;

/// What a run is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Phase {
    /// Rank 0 prepares the run.
    #[default]
    Preparing,
    /// All ranks compute this step.
    Step(usize),
    /// An evaluation and a checkpoint after this step.
    Files(usize),
}

/// A group that ends this process, with a line on standard error, when a collective takes too long: then another process is dead,
/// stopped, or cut off, and the collective would wait for ever. A process that waits when it gets SIGTERM prints such a line as
/// well and waits on, since a launcher that found a dead process will kill it. In the preparation SIGTERM ends the process, as
/// without a watchdog.
///
/// The limit is that of the constructor. Without one it is ten times the median duration of a step, at least 60 s, and 30 minutes
/// in [`Phase::Files`]. There is none in the preparation, which may take hours.
///
/// A second thread watches; the group's own thread only notes when it enters and leaves a collective. The exit is immediate (no
/// destructors): a thread that waits for another process cannot be stopped.
pub struct Watchdog<G> {
    group: G,
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    /// Ends the thread.
    closed: AtomicBool,
    name: String,
    alone: bool,
    limit: Option<Duration>,
    exit_code: u8,
}

#[derive(Default)]
struct State {
    phase: Phase,
    /// Where the last checkpoint is.
    advice: String,
    /// Removed at an exit.
    folder: Option<PathBuf>,
    /// The collective that the process is in, and since when.
    waiting: Option<(&'static str, Instant)>,
    /// The last durations of steps.
    steps: Vec<Duration>,
    next: usize,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn limit(&self, given: Option<Duration>) -> Option<Duration> {
        let least = match self.phase {
            Phase::Preparing => return None,
            Phase::Step(_) => LEAST,
            Phase::Files(_) => LEAST_FILES,
        };
        if given.is_some() {
            return given;
        }
        let mut steps = self.steps.clone();
        steps.sort();
        let median = steps.get(steps.len() / 2).copied().unwrap_or_default();
        Some((median * MEDIANS).max(least))
    }

    /// What destructors would do.
    fn clean_up(&self) {
        if let Some(folder) = &self.folder {
            let _ = std::fs::remove_dir_all(folder);
        }
    }

    fn sentence(&self, name: &str, reason: &str, collective: &str) -> String {
        let when = match self.phase {
            Phase::Preparing => "before the first step".into(),
            Phase::Step(step) => format!("in step {step}"),
            Phase::Files(step) => format!("after step {step}"),
        };
        format!("{name} {reason} {when} ({collective}); {}\n", self.advice)
    }
}

impl<G: Group> Watchdog<G> {
    /// Watches `group`; `limit` replaces the limit that follows the steps. The process ends with `exit_code`.
    pub fn new(group: G, limit: Option<Duration>, exit_code: u8) -> Self {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            closed: AtomicBool::new(false),
            name: group.name(),
            alone: group.size() == 1,
            limit,
            exit_code,
        });
        if !shared.alone {
            let watched = shared.clone();
            std::thread::spawn(move || watch(&watched));
        }
        Self { group, shared }
    }

    /// Sets what the run is doing from now on.
    pub fn enter(&self, phase: Phase) {
        self.shared.state().phase = phase;
    }

    /// Sets the end of the line that the watchdog prints: where the last checkpoint is, and what continues from it.
    pub fn advise(&self, advice: String) {
        self.shared.state().advice = advice;
    }

    /// Sets a folder that the watchdog removes when it ends the process.
    pub fn remove_at_exit(&self, folder: &Path) {
        self.shared.state().folder = Some(folder.into());
    }

    /// Notes the duration of a step, for the limit.
    pub fn stepped(&self, duration: Duration) {
        let state = &mut *self.shared.state();
        match state.steps.len() {
            STEPS => state.steps[state.next % STEPS] = duration,
            _ => state.steps.push(duration),
        }
        state.next += 1;
    }

    fn during<T>(&self, collective: &'static str, run: impl FnOnce(&G) -> T) -> T {
        self.shared.state().waiting = Some((collective, Instant::now()));
        let result = run(&self.group);
        self.shared.state().waiting = None;
        result
    }
}

impl<G> Drop for Watchdog<G> {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::Relaxed);
    }
}

/// Looks at the collective until the watchdog is dropped.
fn watch(shared: &Shared) {
    let signaled: Arc<AtomicBool> = Arc::default();
    // Without it, a terminated process says nothing; the limit holds all the same.
    let _ = signal_hook::flag::register(SIGTERM, signaled.clone());
    let mut since_signal: Option<Instant> = None;
    let mut reported = false;
    while !shared.closed.load(Ordering::Relaxed) {
        std::thread::sleep(TICK);
        if signaled.load(Ordering::Relaxed) {
            since_signal.get_or_insert_with(Instant::now);
        }
        let state = shared.state();
        if since_signal.is_some() && state.phase == Phase::Preparing {
            state.clean_up();
            let _ = signal_hook::low_level::emulate_default_handler(SIGTERM);
        }
        let Some((collective, began)) = state.waiting else { continue };
        let waited = began.elapsed();
        // Standard error that cannot be written must not keep the process alive.
        let print = |line: String| drop(std::io::stderr().write_all(line.as_bytes()));
        if !reported && since_signal.is_some_and(|since| since.elapsed().min(waited) > AFTER_SIGNAL) {
            reported = true;
            let reason = "was told to end while it waits for the other processes";
            print(state.sentence(&shared.name, reason, collective));
        }
        if let Some(limit) = state.limit(shared.limit).filter(|&limit| waited > limit) {
            let reason = format!("has had no answer from the other processes for {} s", limit.as_secs_f32());
            print(format!("error: {}", state.sentence(&shared.name, &reason, collective)));
            state.clean_up();
            signal_hook::low_level::exit(shared.exit_code.into());
        }
    }
}

impl<G: Group> Group for Watchdog<G> {
    fn rank(&self) -> usize {
        self.group.rank()
    }

    fn size(&self) -> usize {
        self.group.size()
    }

    fn host(&self) -> String {
        self.group.host()
    }

    fn gather(&self, bytes: &[u8]) -> Vec<Vec<u8>> {
        self.during("gather", |group| group.gather(bytes))
    }

    fn broadcast(&self, bytes: &mut Vec<u8>) {
        self.during("broadcast", |group| group.broadcast(bytes))
    }

    fn all_to_all(&self, send: &[f32], receive: &mut [f32]) {
        self.during("all_to_all", |group| group.all_to_all(send, receive))
    }

    fn all_gather(&self, send: &[f32], receive: &mut [f32]) {
        self.during("all_gather", |group| group.all_gather(send, receive))
    }

    fn abort(&self, code: u8) -> ! {
        self.group.abort(code)
    }
}
