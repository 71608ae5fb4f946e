//! `duck serve`: an OpenAI-compatible API and a chat page.

use crate::{
    Error,
    log::Log,
    model::{self, EngineFlags},
    terminal,
};
use std::{
    future::{Future, poll_fn},
    io,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    task::Poll,
};
use ternary_format::memory;
use ternary_infer::EngineError;
use ternary_serve::{Limits, Models, ServeError, ServeOptions, Truncation};

const EXAMPLES: &str = "\
Examples:
  duck serve                                   the built-in Duck; open the printed address in a browser
  duck serve model.gguf small=runs/small-1 --port 8000
  DUCK_API_KEY=secret duck serve model.gguf --host 0.0.0.0
  duck serve model.gguf --host 0.0.0.0 --allow-remote --host-name duck.lan
  curl http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{\"messages\": [{\"role\": \"user\", \"content\": \"Who are you?\"}]}'

The address is printed on standard output once the models are loaded. DUCK_LOG sets the log level (debug, info, warn).";

/// Memory for threads and for the requests of the first clients, in bytes. Without it, requests would fail after the start.
const PROGRAM_BYTES: u64 = 64 << 20;
const NAME: &str = "the server";

/// Serve models over an OpenAI-compatible API, with a chat page.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Command {
    /// Models, as PATH or NAME=PATH; NAME defaults to that of the file. Without models, the built-in Duck
    #[arg(value_name = "MODEL")]
    models: Vec<String>,
    /// Address to listen on
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    host: IpAddr,
    /// Port to listen on; 0: any free port
    #[arg(long, default_value_t = 8080)]
    port: u16,
    /// API key, which clients send as `Authorization: Bearer KEY`
    #[arg(long, value_name = "KEY", env = "DUCK_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// Listen on addresses other than loopback without an API key
    #[arg(long)]
    allow_remote: bool,
    /// Host name by which clients address the server, besides localhost and IP addresses (repeatable)
    #[arg(long = "host-name", value_name = "NAME")]
    host_names: Vec<String>,
    /// How to handle dialogues longer than the context: `disabled` rejects them, `auto` drops the oldest turns until the
    /// answer has room. A request can override it with its field `truncation`
    #[arg(long, value_name = "auto|disabled", default_value = "disabled")]
    truncation: Truncation,
    /// Maximum concurrent completions per model
    #[arg(long, value_name = "N", default_value_t = Limits::default().batch)]
    batch: usize,
    /// Maximum queued completions per model; more are refused with status 429
    #[arg(long, value_name = "N", default_value_t = Limits::default().queue)]
    queue: usize,
    #[command(flatten)]
    engine: EngineFlags,
}

impl Command {
    pub fn run(self) -> Result<(), Error> {
        let limits = Limits::default().with_batch(self.batch).with_queue(self.queue);
        let address = SocketAddr::new(self.host, self.port);
        let options = ServeOptions::default()
            .with_address(address)
            .with_api_key(self.api_key)
            .with_allow_remote(self.allow_remote)
            .with_host_names(self.host_names)
            .with_truncation(self.truncation)
            .with_limits(limits);
        // Invalid options are reported before models are loaded.
        options.check().map_err(failed)?;
        let network = |error: io::Error| Error::Network(error.to_string());
        let log = Log::install().map_err(network)?;
        let mut engines = Vec::new();
        for argument in &self.models {
            let (name, path) = named(argument);
            engines.push((name, Arc::new(self.engine.load(Some(&path))?)));
        }
        if engines.is_empty() {
            engines.push((model::name(None), Arc::new(self.engine.load(None)?)));
        }
        memory::check(PROGRAM_BYTES).map_err(|error| Error::engine(NAME)(EngineError::Memory(error)))?;
        let models = Models::new(engines).map_err(failed)?;
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
        let served = runtime.map_err(network)?.block_on(async {
            let listener = ternary_serve::bind(&options).await.map_err(failed)?;
            let address = listener.local_addr().map_err(network)?;
            // Before the address is printed: a program that reads it may send a signal at once.
            let stopped = stopped().map_err(network)?;
            terminal::print(format_args!("http://{address}"))?;
            ternary_serve::serve(listener, models, options, stopped).await.map_err(failed)
        });
        log.drain();
        served
    }
}

/// The name and the path of an argument.
fn named(argument: &str) -> (String, PathBuf) {
    if let Some((name, path)) = argument.split_once('=')
        && !Path::new(argument).exists()
    {
        return (name.into(), path.into());
    }
    let path = PathBuf::from(argument);
    let name = if path.is_dir() { path.file_name() } else { path.file_stem() };
    (name.map_or_else(|| argument.into(), |name| name.to_string_lossy().into_owned()), path)
}

fn failed(error: ServeError) -> Error {
    let message = error.to_string();
    match error {
        ServeError::Address { address, source } if source.kind() == io::ErrorKind::AddrInUse => {
            let port = address.port();
            Error::Network(format!(
                "port {port} of {} is taken by another program; expected a free port: --port N, or --port 0 for any",
                address.ip()
            ))
        }
        ServeError::Address { .. } | ServeError::Io(_) => Error::Network(message),
        ServeError::NoTokenizer { name } => Error::Engine { model: name, source: EngineError::NoTokenizer },
        ServeError::ChatTemplate { source, .. } => Error::Model(source),
        _ => Error::Usage(message),
    }
}

/// Completes at Ctrl-C or SIGTERM. From this call on, neither ends the program by itself.
#[cfg(unix)]
fn stopped() -> io::Result<impl Future<Output = ()>> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut signals = [signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?];
    Ok(poll_fn(move |context| {
        let arrived = signals.iter_mut().any(|signal| signal.poll_recv(context).is_ready());
        if arrived { Poll::Ready(()) } else { Poll::Pending }
    }))
}

/// Completes at Ctrl-C. From this call on, that does not end the program by itself.
#[cfg(windows)]
fn stopped() -> io::Result<impl Future<Output = ()>> {
    let mut signal = tokio::signal::windows::ctrl_c()?;
    Ok(poll_fn(move |context| signal.poll_recv(context).map(|_| ())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_have_the_name_of_their_file_or_of_the_argument() {
        assert_eq!(named("a/b.gguf"), ("b".into(), "a/b.gguf".into()));
        assert_eq!(named("big=a/b.gguf"), ("big".into(), "a/b.gguf".into()));
        assert_eq!(named(env!("CARGO_MANIFEST_DIR")).0, "duck");
    }
}
