//! Burn's terminal interface, in which Ctrl-C is a signal as anywhere else, and a screen that is restored however a run ends.

use super::signals::end_at_once;
use burn::train::{
    Interrupter, LearnerSummary,
    logger::{EvaluationProgressLogger, TrainingProgressLogger},
    metric::MetricDefinition,
    renderer::{
        EvaluationName, MetricState, MetricsRenderer, MetricsRendererEvaluation, MetricsRendererTraining,
        tui::TuiMetricsRendererWrapper,
    },
};
use crossterm::{
    cursor::Show,
    event::DisableMouseCapture,
    execute,
    terminal::{LeaveAlternateScreen, disable_raw_mode, enable_raw_mode, is_raw_mode_enabled},
};
use std::any::Any;
use std::io::{self, IsTerminal};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

/// What Burn's interface panics with after `q` and `k`: to end the process without a checkpoint.
const KILLED: &str = "Killing training from user input.";
/// How long a closing interface may take to draw its last picture.
const PATIENCE: Duration = Duration::from_secs(1);

/// Whether a [`Screen`] was ever opened.
static OPENED: AtomicBool = AtomicBool::new(false);
/// Whether the terminal was closed.
static CLOSED: AtomicBool = AtomicBool::new(false);

/// The terminal while a run draws on it; restored when this is dropped, by a panic too.
pub(super) struct Screen {
    /// Ends when the renderer and its thread have.
    closed: Receiver<()>,
}

impl Screen {
    /// Burn's interface, and what restores the terminal.
    ///
    /// # Errors
    /// There is no terminal that can be read key by key.
    pub fn open(interrupter: Interrupter, checkpoint: usize) -> io::Result<(Self, Renderer)> {
        let (open, closed) = channel();
        let screen = Self { closed };
        OPENED.store(true, Ordering::Relaxed);
        #[cfg(all(unix, feature = "flex"))]
        restore_without_memory::arm()?;
        // Burn's own call finds this done, and leaves the next one alone.
        enable_raw_mode()?;
        keep_interrupt_key()?;
        let burn = TuiMetricsRendererWrapper::new(interrupter, Some(checkpoint));
        Ok((screen, Renderer { burn: Some(burn), _open: open }))
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // Nobody sends: this returns when the renderer is gone.
        let _ = self.closed.recv_timeout(PATIENCE);
        restore();
    }
}

/// Restores the terminal where a [`Screen`] was opened. Burn does so itself at the end of a run; in a panic it leaves the cursor hidden.
pub(super) fn restore() {
    if !OPENED.load(Ordering::Relaxed) {
        return;
    }
    if is_raw_mode_enabled().unwrap_or(false) {
        let _ = disable_raw_mode();
        let _ = execute!(io::stdout(), DisableMouseCapture, LeaveAlternateScreen);
    }
    let _ = execute!(io::stdout(), Show);
    #[cfg(all(unix, feature = "flex"))]
    restore_without_memory::disarm();
}

/// Sends standard output and error nowhere where their terminal was closed. What draws on it, or tells an error, would fail and panic, and
/// in the middle of that fail and panic again, which ends a process at once.
#[cfg(unix)]
pub(super) fn abandon_closed() {
    use rustix::{io::Errno, stdio, termios::tcgetattr};
    let Ok(nowhere) = std::fs::File::options().write(true).open("/dev/null") else { return };
    if tcgetattr(stdio::stdout()).err() == Some(Errno::IO) {
        CLOSED.store(true, Ordering::Relaxed);
        let _ = stdio::dup2_stdout(&nowhere);
    }
    if tcgetattr(stdio::stderr()).err() == Some(Errno::IO) {
        let _ = stdio::dup2_stderr(&nowhere);
    }
}

/// Whether standard output is a terminal that can move its cursor.
pub(super) fn can_draw() -> bool {
    io::stdout().is_terminal() && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// In raw mode Ctrl-C is a key that Burn's interface ignores; here it is SIGINT again, and neither Ctrl-Z nor Ctrl-\ is a signal, which
/// would leave the screen as it is.
#[cfg(unix)]
fn keep_interrupt_key() -> io::Result<()> {
    use rustix::termios::{LocalModes, OptionalActions, SpecialCodeIndex, tcgetattr, tcsetattr};

    // The value of a key that is none, which rustix does not name.
    const NONE: u8 = if cfg!(target_os = "linux") { 0 } else { 0xff };
    let terminal = terminal()?;
    let mut attributes = tcgetattr(&terminal)?;
    attributes.local_modes |= LocalModes::ISIG;
    attributes.special_codes[SpecialCodeIndex::VSUSP] = NONE;
    attributes.special_codes[SpecialCodeIndex::VQUIT] = NONE;
    Ok(tcsetattr(&terminal, OptionalActions::Now, &attributes)?)
}

/// The terminal whose keys are read.
#[cfg(unix)]
fn terminal() -> io::Result<std::os::fd::OwnedFd> {
    use std::os::fd::AsFd;
    match io::stdin() {
        stdin if stdin.is_terminal() => stdin.as_fd().try_clone_to_owned(),
        _ => Ok(std::fs::File::open("/dev/tty")?.into()),
    }
}

/// [`restore`] for a program that has no memory left: it takes none, and no lock.
#[cfg(all(unix, feature = "flex"))]
mod restore_without_memory {
    use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
    use std::{
        io,
        os::fd::OwnedFd,
        sync::{Mutex, PoisonError},
    };

    /// The terminal and its attributes before a screen was opened.
    static BEFORE: Mutex<Option<(OwnedFd, Termios)>> = Mutex::new(None);
    /// No reports of the mouse, the main screen, a cursor.
    const SEQUENCE: &[u8] = b"\x1b[?1006l\x1b[?1015l\x1b[?1003l\x1b[?1002l\x1b[?1000l\x1b[?1049l\x1b[?25h";

    pub fn arm() -> io::Result<()> {
        let terminal = super::terminal()?;
        let attributes = tcgetattr(&terminal)?;
        *BEFORE.lock().unwrap_or_else(PoisonError::into_inner) = Some((terminal, attributes));
        ternary_kernels::ExitAllocator::set_cleanup(restore);
        Ok(())
    }

    /// Once the screen is closed, the terminal is the shell's again.
    pub fn disarm() {
        *BEFORE.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn restore() {
        let Ok(before) = BEFORE.try_lock() else { return };
        if let Some((terminal, attributes)) = &*before {
            let _ = rustix::io::write(rustix::stdio::stdout(), SEQUENCE);
            let _ = tcsetattr(terminal, OptionalActions::Now, attributes);
        }
    }
}

#[cfg(not(unix))]
fn keep_interrupt_key() -> io::Result<()> {
    Ok(())
}

/// Burn's interface, whose way to end the process is not a panic.
pub(super) struct Renderer {
    /// Until this is dropped.
    burn: Option<TuiMetricsRendererWrapper>,
    /// Dropped after the interface.
    _open: Sender<()>,
}

impl Renderer {
    fn call<T>(&mut self, call: impl FnOnce(&mut TuiMetricsRendererWrapper) -> T) -> T {
        let killed = |payload: &Box<dyn Any + Send>| payload.downcast_ref() == Some(&KILLED);
        let burn = self.burn.as_mut().expect("it is there until it is dropped");
        match catch_unwind(AssertUnwindSafe(|| call(burn))) {
            Ok(value) => value,
            Err(payload) if killed(&payload) => end_at_once(),
            Err(payload) => resume_unwind(payload),
        }
    }
}

impl Drop for Renderer {
    fn drop(&mut self) {
        // Its thread waits for keys, and on a closed terminal crossterm waits for ever.
        if CLOSED.load(Ordering::Relaxed) {
            std::mem::forget(self.burn.take());
        }
    }
}

impl MetricsRendererTraining for Renderer {
    fn update_train(&mut self, state: MetricState) {
        self.call(|burn| burn.update_train(state));
    }
    fn update_valid(&mut self, state: MetricState) {
        self.call(|burn| burn.update_valid(state));
    }
    fn on_train_end(&mut self, summary: Option<LearnerSummary>) -> Result<(), Box<dyn std::error::Error>> {
        self.call(|burn| burn.on_train_end(summary))
    }
}

impl MetricsRendererEvaluation for Renderer {
    fn update_test(&mut self, name: EvaluationName, state: MetricState) {
        self.call(|burn| burn.update_test(name, state));
    }
    fn on_test_end(&mut self, summary: Option<LearnerSummary>) -> Result<(), Box<dyn std::error::Error>> {
        self.call(|burn| burn.on_test_end(summary))
    }
}

impl TrainingProgressLogger for Renderer {
    fn start(&mut self, epochs: usize, first: usize, items: Option<usize>, label: Option<&str>) {
        self.call(|burn| TrainingProgressLogger::start(burn, epochs, first, items, label));
    }
    fn update_epoch(&mut self, epoch: usize) {
        self.call(|burn| burn.update_epoch(epoch));
    }
    fn start_split(&mut self, split: &str, items: usize) {
        self.call(|burn| burn.start_split(split, items));
    }
    fn update_split(&mut self, items: usize) {
        self.call(|burn| burn.update_split(items));
    }
    fn end_split(&mut self) {
        self.call(|burn| burn.end_split());
    }
    fn end(&mut self) {
        self.call(TrainingProgressLogger::end);
    }
    fn log_event_training(&mut self, event: String) {
        self.call(|burn| burn.log_event_training(event));
    }
}

impl EvaluationProgressLogger for Renderer {
    fn start_global_progress(&mut self, tests: usize) {
        self.call(|burn| burn.start_global_progress(tests));
    }
    fn start_test(&mut self, name: &str, items: usize) {
        self.call(|burn| burn.start_test(name, items));
    }
    fn update_test_progress(&mut self, items: usize) {
        self.call(|burn| burn.update_test_progress(items));
    }
    fn end_test(&mut self) {
        self.call(|burn| burn.end_test());
    }
    fn end_global_progress(&mut self) {
        self.call(|burn| burn.end_global_progress());
    }
    fn log_event_evaluation(&mut self, event: String) {
        self.call(|burn| burn.log_event_evaluation(event));
    }
}

impl MetricsRenderer for Renderer {
    fn manual_close(&mut self) {
        self.call(|burn| burn.manual_close());
    }
    fn register_metric(&mut self, definition: MetricDefinition) {
        self.call(|burn| burn.register_metric(definition));
    }
}
