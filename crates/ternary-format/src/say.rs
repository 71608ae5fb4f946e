//! [`say`]: a line for a person, which never ends nor stops a program.

use std::{
    fmt::Display,
    io::{self, Write},
};

/// Writes a line to standard error. It is lost where it cannot be written: standard error is closed, its disk is full, or
/// a pipe that nobody reads has been full for a second.
pub fn say(line: impl Display) {
    if takes() {
        let _ = writeln!(io::stderr(), "{line}");
    }
}

/// Whether standard error takes a line now or soon.
#[cfg(unix)]
fn takes() -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

    /// Nobody read the last line, so the next one does not wait.
    static STUCK: AtomicBool = AtomicBool::new(false);
    let patience = Timespec { tv_sec: i64::from(!STUCK.load(Relaxed)), tv_nsec: 0 };
    let stderr = io::stderr();
    let ready = poll(&mut [PollFd::new(&stderr, PollFlags::OUT)], Some(&patience));
    STUCK.store(ready == Ok(0), Relaxed);
    ready != Ok(0)
}

#[cfg(not(unix))]
fn takes() -> bool {
    true
}
