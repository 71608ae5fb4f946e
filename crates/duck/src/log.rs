//! [`Log`]: the log of a server on standard error. It never blocks the server.
//!
//! A thread writes the lines. While standard error is not read, lines beyond a bounded queue are dropped and counted. Lines
//! that cannot be written, to a full disk or a closed pipe, are lost.

use std::{
    io::{self, IsTerminal, Write},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
        mpsc::{self, Receiver, SyncSender, TrySendError},
    },
    thread,
    time::Duration,
};
use tracing_subscriber::{EnvFilter, fmt::MakeWriter};

/// Maximum number of queued lines.
const QUEUE: usize = 1024;
/// How long the program waits for queued lines at its end.
const DRAIN_TIMEOUT: Duration = Duration::from_millis(500);

/// Writes lines in the background. Its clones share the queue.
#[derive(Clone)]
pub struct Log {
    queue: SyncSender<Message>,
    dropped: Arc<AtomicU64>,
}

enum Message {
    Line(Vec<u8>),
    /// Confirmed when all lines before it have been written.
    Flush(SyncSender<()>),
}

impl Log {
    /// Logs events of `tracing` and panics to standard error, at the level in the environment variable `DUCK_LOG`.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn install() -> io::Result<Self> {
        let log = Self::to(io::stderr())?;
        let filter = EnvFilter::try_from_env("DUCK_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
        let colours =
            io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|no| no.is_empty());
        let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours);
        subscriber.log_internal_errors(false).with_writer(log.clone()).init();
        // The default hook writes to standard error itself, and would block there.
        std::panic::set_hook(Box::new(|panic| tracing::error!("{panic}")));
        Ok(log)
    }

    /// A log to `out`.
    fn to(out: impl Write + Send + 'static) -> io::Result<Self> {
        let (queue, messages) = mpsc::sync_channel(QUEUE);
        let dropped = Arc::new(AtomicU64::new(0));
        let log = Self { queue, dropped: dropped.clone() };
        thread::Builder::new().name("log".into()).spawn(move || write(out, &messages, &dropped))?;
        Ok(log)
    }

    /// Waits until queued lines have been written, for at most [`DRAIN_TIMEOUT`].
    pub fn drain(&self) {
        let (written, done) = mpsc::sync_channel(1);
        if self.queue.try_send(Message::Flush(written)).is_ok() {
            let _ = done.recv_timeout(DRAIN_TIMEOUT);
        }
    }
}

fn write(mut out: impl Write, messages: &Receiver<Message>, dropped: &AtomicU64) {
    for message in messages {
        match message {
            Message::Line(line) => drop(out.write_all(&line)),
            Message::Flush(written) => drop(written.send(())),
        }
        let lines = dropped.swap(0, Relaxed);
        if lines > 0 {
            let _ = writeln!(out, "{lines} log lines were dropped: standard error was not read in time");
        }
    }
}

impl Write for Log {
    /// Queues one line.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if let Err(TrySendError::Full(_)) = self.queue.try_send(Message::Line(line.to_vec())) {
            self.dropped.fetch_add(1, Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Log {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        sync::{Mutex, PoisonError},
        time::Instant,
    };

    /// Blocks until it is opened.
    #[derive(Clone, Default)]
    struct Gate(Arc<Mutex<Vec<u8>>>);

    impl Write for Gate {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_log_that_is_not_read_drops_lines_and_counts_them() {
        let gate = Gate::default();
        let mut log = Log::to(gate.clone()).unwrap();
        let closed = gate.0.lock().unwrap();
        let begun = Instant::now();
        for _ in 0..QUEUE + 10 {
            log.write_all(b"a line\n").unwrap();
        }
        log.drain(); // the queue is full
        assert!(begun.elapsed() < Duration::from_secs(10));
        drop(closed);
        thread::sleep(Duration::from_millis(50));
        log.drain();
        let text = String::from_utf8(gate.0.lock().unwrap().clone()).unwrap();
        let (kept, notes): (Vec<_>, Vec<_>) = text.lines().partition(|line| *line == "a line");
        let dropped: usize =
            notes.iter().map(|note| note.split(' ').next().unwrap().parse::<usize>().unwrap()).sum();
        assert_eq!(kept.len() + dropped, QUEUE + 10, "{notes:?}");
        assert!((1..=10).contains(&dropped), "{notes:?}");
    }

    #[test]
    fn a_log_that_cannot_be_written_is_lost() {
        struct Full;
        impl Write for Full {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::StorageFull.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut log = Log::to(Full).unwrap();
        log.write_all(b"a line\n").unwrap();
        let begun = Instant::now();
        log.drain();
        assert!(begun.elapsed() < DRAIN_TIMEOUT, "the thread has ended");
    }
}
