//! The terminal of a [`Display`]: it is read key by key, Ctrl-C stays a signal, and it is restored however a run ends.

pub(crate) use super::display::Display;
use super::display::KeyAction;
use super::terminal::end_at_once;
use burn::train::Interrupter;
use crossterm::{
    cursor::Show,
    event::{self, Event},
    execute,
    terminal::{EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode, enable_raw_mode},
};
use ratatui::{Terminal, backend::CrosstermBackend};
use std::io::{self, Write};
use std::panic;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Once};
use std::time::Duration;
use ternary_format::print_stderr;

/// Time between two frames.
const TICK: Duration = Duration::from_millis(100);
/// How long a closing screen may take to draw its last frame.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// Whether a [`Screen`] is open. It changes, and is read before a frame is written, with standard output locked.
static OPEN: AtomicBool = AtomicBool::new(false);

impl Display {
    /// A display for a run of `steps` optimizer steps, each of which is a part of an epoch; `None`, with a warning, where the keys of
    /// the terminal cannot be read.
    pub fn open(run: String, steps: usize, epochs_per_step: f64) -> Option<Self> {
        #[cfg(unix)]
        if let Err(error) = terminal().and_then(|terminal| Ok(rustix::termios::tcgetattr(terminal)?)) {
            print_stderr(format_args!(
                "warning: the full-screen display cannot read keys ({error}): printing lines instead"
            ));
            return None;
        }
        Some(Self::new(run, steps, epochs_per_step))
    }
}

/// The terminal while a run draws on it; restored when this is dropped, by a panic too.
pub(crate) struct Screen {
    closing: Arc<AtomicBool>,
    /// Ends when the thread that draws has.
    closed: Receiver<()>,
}

impl Screen {
    /// Draws `display` from now on, and executes the actions of its keys. Ctrl-C is a signal where the run listens to it
    /// (`interrupts`), otherwise a key.
    ///
    /// # Errors
    /// There is no terminal that can be read key by key.
    pub fn open(display: Display, interrupter: Interrupter, interrupts: bool) -> io::Result<Self> {
        display.set_interrupts(interrupts);
        let (open, closed) = channel();
        let closing = Arc::new(AtomicBool::new(false));
        let screen = Self { closing: closing.clone(), closed };
        #[cfg(all(unix, feature = "flex"))]
        restore_without_memory::arm()?;
        restore_before_panics();
        OPEN.store(true, Ordering::Relaxed);
        enable_raw_mode()?;
        if interrupts {
            keep_interrupt_key()?;
        }
        execute!(io::stdout(), EnterAlternateScreen)?;
        let terminal = Terminal::new(CrosstermBackend::new(Output::default()))?;
        let draw = move || {
            draw_frames(terminal, &display, &interrupter, &closing);
            drop(open);
        };
        std::thread::Builder::new().name("display".into()).spawn(draw)?;
        Ok(screen)
    }

    /// Restores the terminal, as dropping does.
    pub fn close(self) {}
}

impl Drop for Screen {
    fn drop(&mut self) {
        self.closing.store(true, Ordering::Relaxed);
        // Nothing is sent: this returns when the thread has ended. On a terminal that was closed, crossterm waits for ever.
        let _ = self.closed.recv_timeout(CLOSE_TIMEOUT);
        restore();
    }
}

fn draw_frames(
    mut terminal: Terminal<CrosstermBackend<Output>>,
    display: &Display,
    interrupter: &Interrupter,
    closing: &AtomicBool,
) {
    while !closing.load(Ordering::Relaxed) {
        // A terminal that cannot be written is no reason to stop a run.
        let _ = terminal.draw(|frame| display.draw(frame, interrupter.should_stop()));
        match event::poll(TICK) {
            Ok(false) => (),
            Ok(true) => {
                if let Ok(Event::Key(key)) = event::read() {
                    match display.key(key) {
                        Some(KeyAction::Stop) => interrupter.stop(Some("a key")),
                        Some(KeyAction::Kill) => end_at_once(),
                        None => (),
                    }
                }
            }
            Err(_) => std::thread::sleep(TICK),
        }
    }
}

/// The bytes of a frame, which are written to an open screen as a whole, and dropped otherwise.
#[derive(Default)]
struct Output(Vec<u8>);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        let mut out = io::stdout().lock();
        let bytes = std::mem::take(&mut self.0);
        if !OPEN.load(Ordering::Relaxed) {
            return Ok(());
        }
        out.write_all(&bytes)?;
        out.flush()
    }
}

/// Restores the terminal where a [`Screen`] is open. Its attributes come first: a terminal that accepts no output, as after Ctrl-S,
/// blocks the thread that draws, which has standard output locked then.
pub(crate) fn restore() {
    if OPEN.load(Ordering::Relaxed) {
        let _ = disable_raw_mode();
    }
    let mut out = io::stdout().lock();
    if !OPEN.swap(false, Ordering::Relaxed) {
        return;
    }
    let _ = execute!(out, LeaveAlternateScreen, Show);
    #[cfg(all(unix, feature = "flex"))]
    restore_without_memory::disarm();
}

/// Restores the terminal before the message of a panic is printed.
fn restore_before_panics() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |panic| {
            restore();
            before(panic);
        }));
    });
}

/// In raw mode Ctrl-C is a key; here it is SIGINT again, and neither Ctrl-Z nor Ctrl-\ is a signal, which would leave the screen as it
/// is.
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
    use std::{io::IsTerminal, os::fd::AsFd};
    match io::stdin() {
        stdin if stdin.is_terminal() => stdin.as_fd().try_clone_to_owned(),
        _ => Ok(std::fs::File::open("/dev/tty")?.into()),
    }
}

/// [`restore`] for a program that has no memory left: it allocates nothing and waits for no lock.
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
    /// The main screen, a cursor.
    const SEQUENCE: &[u8] = b"\x1b[?1049l\x1b[?25h";

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
