//! The terminal of a run, with or without a full-screen display.

use std::io::{self, IsTerminal};

/// Exit code of a run that a signal or the terminal interface ended.
pub(crate) const INTERRUPTED: u8 = 7;

/// How long a terminal may take to leave the full-screen display before the process ends.
#[cfg(feature = "tui")]
const RESTORE_TIMEOUT: std::time::Duration = std::time::Duration::from_millis(500);

/// Whether standard output is a terminal that can move its cursor.
pub(crate) fn can_draw() -> bool {
    io::stdout().is_terminal() && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// Restores the terminal where a full-screen display is open. A terminal that accepts no output (after Ctrl-S, or if its window hangs)
/// keeps the display: only its attributes are restored, and this returns after [`RESTORE_TIMEOUT`].
pub(crate) fn restore() {
    #[cfg(feature = "tui")]
    {
        let (restored, waiting) = std::sync::mpsc::channel::<()>();
        let restore = move || {
            super::screen::restore();
            drop(restored);
        };
        match std::thread::Builder::new().name("restore".into()).spawn(restore) {
            Ok(_) => {
                // Nothing is sent: this returns when the thread has ended.
                let _ = waiting.recv_timeout(RESTORE_TIMEOUT);
            }
            Err(_) => super::screen::restore(),
        }
    }
}

/// Restores the terminal and ends the process, without a checkpoint.
pub(crate) fn end_at_once() -> ! {
    restore();
    #[cfg(unix)]
    signal_hook::low_level::exit(INTERRUPTED.into());
    #[cfg(not(unix))]
    std::process::exit(INTERRUPTED.into())
}

/// Redirects standard output and error to `/dev/null` where their terminal was closed. Writing to it would fail and panic, and
/// the message of the panic would fail and panic again, which ends a process at once.
#[cfg(unix)]
pub(crate) fn abandon_closed() {
    use rustix::{io::Errno, stdio, termios::tcgetattr};
    let Ok(nowhere) = std::fs::File::options().write(true).open("/dev/null") else { return };
    if tcgetattr(stdio::stdout()).err() == Some(Errno::IO) {
        let _ = stdio::dup2_stdout(&nowhere);
    }
    if tcgetattr(stdio::stderr()).err() == Some(Errno::IO) {
        let _ = stdio::dup2_stderr(&nowhere);
    }
}
