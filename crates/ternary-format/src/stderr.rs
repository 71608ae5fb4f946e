//! [`print_stderr`]: messages for the user on standard error.

use std::{
    fmt::Display,
    io::{self, Write},
};

/// Writes a line to standard error, and never panics or blocks for long.
///
/// The line is dropped if standard error is closed, if its disk is full, or if it is a pipe whose reader has not made
/// room for a second. `eprintln!` would panic in the first two cases, and wait forever in the third.
pub fn print_stderr(line: impl Display) {
    if is_writable() {
        let _ = writeln!(io::stderr(), "{line}");
    }
}

/// Returns whether standard error accepts a line within a second.
#[cfg(unix)]
fn is_writable() -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

    /// Set when the last line timed out. The next one then does not wait.
    static TIMED_OUT: AtomicBool = AtomicBool::new(false);
    let timeout = Timespec { tv_sec: i64::from(!TIMED_OUT.load(Relaxed)), tv_nsec: 0 };
    let stderr = io::stderr();
    let ready = poll(&mut [PollFd::new(&stderr, PollFlags::OUT)], Some(&timeout));
    TIMED_OUT.store(ready == Ok(0), Relaxed);
    ready != Ok(0)
}

#[cfg(not(unix))]
fn is_writable() -> bool {
    true
}
