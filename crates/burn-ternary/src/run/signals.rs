//! Signals: the first one ends a run after the current step, with a checkpoint; another one ends it at once.

use crate::report::terminal;
use burn::train::Interrupter;
use std::io;
use ternary_format::print_stderr;

/// Listens until it is dropped.
pub(super) struct Signals {
    #[cfg(unix)]
    handle: signal_hook::iterator::Handle,
    interrupts: bool,
}

impl Signals {
    /// Whether Ctrl-C is one of the signals: not where the process was started to ignore it.
    pub fn interrupts(&self) -> bool {
        self.interrupts
    }
}

#[cfg(unix)]
mod unix {
    use super::*;
    use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
    use std::fs;
    use std::time::{Duration, Instant};

    /// A signal that comes again so soon is the same one: `timeout`, shells and schedulers signal a process and its group.
    const SAME: Duration = Duration::from_secs(1);

    impl Signals {
        /// INT, TERM and HUP stop `interrupter`, and say so where `speaks`; QUIT restores the terminal before it ends the process. A signal
        /// that the process was started to ignore (as by `nohup`, or in the background of a script) stays ignored.
        ///
        /// # Errors
        /// The system refuses a handler or a thread.
        pub fn listen(interrupter: Interrupter, speaks: bool) -> io::Result<Self> {
            let ignored = ignored();
            let is_listened = |signal: &i32| ignored & 1 << (signal - 1) == 0;
            let listened = [SIGINT, SIGTERM, SIGHUP, SIGQUIT].into_iter().filter(is_listened);
            let mut signals = signal_hook::iterator::Signals::new(listened)?;
            let handle = signals.handle();
            let listen = move || {
                let mut first: Option<Instant> = None;
                for signal in signals.forever() {
                    match signal {
                        SIGHUP => terminal::abandon_closed(),
                        SIGQUIT => {
                            terminal::restore();
                            let _ = signal_hook::low_level::emulate_default_handler(SIGQUIT);
                        }
                        _ => (),
                    }
                    if !interrupter.should_stop() {
                        first = Some(Instant::now());
                        interrupter.stop(Some("a signal"));
                        if speaks {
                            print_stderr(
                                "stopping after this step, with a checkpoint; another signal stops at once",
                            );
                        }
                    } else if first.is_none_or(|first| first.elapsed() > SAME) {
                        // Of a run that a key has stopped, too.
                        terminal::end_at_once();
                    }
                }
            };
            std::thread::Builder::new().name("signals".into()).spawn(listen)?;
            Ok(Self { handle, interrupts: is_listened(&SIGINT) })
        }
    }

    impl Drop for Signals {
        fn drop(&mut self) {
            self.handle.close();
        }
    }

    /// Beyond `ulimit -f`, makes writing an error, as on a full disk, in place of a signal that ends the process.
    #[cfg(feature = "cli")]
    pub(in super::super) fn ignore_file_limit() {
        // A handler that does next to nothing; without one more descriptor the signal stays what it is.
        let _ = signal_hook::flag::register(signal_hook::consts::SIGXFSZ, std::sync::Arc::default());
    }

    /// The signals that this process ignores, a bit each from signal 1 on; none where the system does not say.
    fn ignored() -> u64 {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
        mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
    }
}

#[cfg(unix)]
#[cfg(feature = "cli")]
pub(super) use unix::ignore_file_limit;

#[cfg(not(unix))]
impl Signals {
    /// Other systems than Unix end a program themselves.
    ///
    /// # Errors
    /// None.
    pub fn listen(_interrupter: Interrupter, _speaks: bool) -> io::Result<Self> {
        Ok(Self { interrupts: false })
    }
}

#[cfg(all(not(unix), feature = "cli"))]
pub(super) fn ignore_file_limit() {}
