//! `quire serve`: the server, until it is told to end.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use clap::builder::NonEmptyStringValueParser;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

use super::logging::{self, LogFormat};
use super::model_args::ModelArgs;
use super::size;
use crate::generation::Generator;
use crate::serve::{Addresses, Metrics, Server, TokenizerFiles, step_observer};

/// Flags of `quire serve`.
#[derive(Debug, Args)]
#[command(after_help = "\
Every flag can also be set by the environment variable shown beside it; an empty one sets nothing.

Examples:
  quire serve                                     the demo model, on this machine only
  quire serve ./Qwen3-0.6B --quantize q8_0
  quire serve --model ./Qwen3-0.6B --http 0.0.0.0:8000 --grpc 0.0.0.0:50051

Try it:
  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{\"messages\": [{\"role\": \"user\", \"content\": \"What does `Vec::push` do?\"}]}'

SIGTERM (or Ctrl-C, or a closed terminal) finishes what was accepted (--drain-timeout bounds how long), refuses what is new and exits with 0;
a second one exits at once, as does one that comes while the model loads.")]
pub(super) struct ServeArgs {
    /// The model, without --model before it
    #[arg(value_name = "MODEL")]
    path: Option<PathBuf>,

    #[command(flatten)]
    model: ModelArgs,

    /// Where to listen for HTTP: the OpenAI API, /health, /metrics
    #[arg(
        long,
        env = "QUIRE_HTTP",
        value_name = "ADDR:PORT",
        default_value = "127.0.0.1:8000"
    )]
    http: SocketAddr,

    /// Where to listen for gRPC: quire.v1.Generation, vllm.grpc.engine.VllmEngine, health, reflection
    #[arg(
        long,
        env = "QUIRE_GRPC",
        value_name = "ADDR:PORT",
        default_value = "127.0.0.1:50051"
    )]
    grpc: SocketAddr,

    /// The name clients call the model by [default: its directory's or GGUF file's name]
    #[arg(long, env = "QUIRE_SERVED_MODEL_NAME", value_name = "NAME", value_parser = NonEmptyStringValueParser::new())]
    served_model_name: Option<String>,

    /// Most seconds that what was accepted may take to finish after SIGTERM; then it is aborted [default: as long as it takes]
    #[arg(long, env = "QUIRE_DRAIN_TIMEOUT", value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(0..=86_400))]
    drain_timeout: Option<u32>,

    /// Memory of the KV cache that is claimed from the system while nobody asks for anything yet, so that first requests need not wait for it; 0: none
    #[arg(long, env = "QUIRE_CLAIM_KV_CACHE", value_name = "SIZE", default_value = "2GiB", value_parser = size::parse_or_none)]
    claim_kv_cache: u64,

    /// How log lines look
    #[arg(
        long,
        env = "QUIRE_LOG_FORMAT",
        value_name = "FORMAT",
        default_value = "text"
    )]
    log_format: LogFormat,

    /// What is logged: a level, or a filter such as quire=debug,tonic=warn
    #[arg(
        long,
        env = "QUIRE_LOG_LEVEL",
        value_name = "LEVEL",
        default_value = "info"
    )]
    log_level: String,
}

impl ServeArgs {
    /// Which model, wherever on the command line it is.
    fn model(&self) -> ModelArgs {
        let mut model = self.model.clone();
        if self.path.is_some() {
            model.model.clone_from(&self.path);
        }
        model
    }
}

/// Runs the server.
///
/// # Errors
/// The model cannot be loaded, an address is taken, or the engine died.
pub(super) fn serve(args: &ServeArgs) -> anyhow::Result<ExitCode> {
    logging::start(args.log_format, &args.log_level)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let (ready, while_loading) = oneshot::channel();
    // Before anything that takes long: the first process of a container gets only signals that it has handlers for.
    let signals = runtime.block_on(async { Signals::listen() })?;
    let signals = runtime.spawn(signals.exit_until(while_loading));

    let addresses = Addresses::take(args.http, args.grpc)?;
    let metrics = Metrics::install();
    let model = args.model();
    let checkpoint = model.open()?;
    let mut config = model.engine_config();
    config.served_name.clone_from(&args.served_model_name);
    config.claimed_kv_cache = args.claim_kv_cache;
    let name = config.served_name.as_ref().unwrap_or(&checkpoint.name);
    let observer = step_observer(name);
    let engine = model.start(&checkpoint, &config, Some(observer))?;
    let metrics = metrics.with_engine(&engine);
    let gone = engine.gone();
    let generator = Generator::new(engine, &checkpoint)?;
    // The weights are packed; their mapping need not stay.
    drop(checkpoint);

    let served = runtime.block_on(async {
        // The model is there: from now on a signal begins a drain. Whoever is told so listens as long as this process lives.
        let _ = ready.send(());
        let mut signals = signals.await.context("the task of the signals panicked")?;
        let drain_timeout = args.drain_timeout.map(u64::from).map(Duration::from_secs);
        let server = Server::listen(generator, metrics, addresses)?
            .tokenizer_files(TokenizerFiles::new(model.source()))
            .drain_timeout(drain_timeout);
        tracing::info!(
            http = %server.http_address()?,
            grpc = %server.grpc_address()?,
            "ready"
        );
        server
            .run(async move {
                let asked = signals.next().await;
                tracing::info!(signal = asked.name, "asked to end");
                tokio::spawn(async move {
                    let asked = signals.next().await;
                    tracing::warn!(signal = asked.name, "asked to end again: exiting now");
                    std::process::exit(asked.exit_code);
                });
            })
            .await?;
        tracing::info!("everything accepted is finished; goodbye");
        Ok(ExitCode::SUCCESS)
    });
    super::wait_for(&runtime, gone);
    // Dropping it would wait for threads that may block: work nobody waits for any more must not keep a drained server.
    runtime.shutdown_background();
    served
}

/// The signals that ask a server to end.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    /// `None`: whoever began the process wants it to outlive its terminal.
    hangup: Option<Signal>,
}

/// A signal that came.
struct Asked {
    name: &'static str,
    /// Of a process that the signal ends, as shells count.
    exit_code: i32,
}

impl Signals {
    fn listen() -> anyhow::Result<Self> {
        let listen = |kind| signal(kind).context("cannot listen for signals");
        Ok(Self {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
            hangup: if hangup_is_ignored() {
                None
            } else {
                Some(listen(SignalKind::hangup())?)
            },
        })
    }

    /// Waits for one.
    async fn next(&mut self) -> Asked {
        let hangup = async {
            match &mut self.hangup {
                Some(hangup) => hangup.recv().await,
                None => std::future::pending().await,
            }
        };
        let (name, kind) = tokio::select! {
            _ = self.terminate.recv() => ("SIGTERM", SignalKind::terminate()),
            _ = self.interrupt.recv() => ("SIGINT", SignalKind::interrupt()),
            _ = hangup => ("SIGHUP", SignalKind::hangup()),
        };
        Asked {
            name,
            exit_code: 128 + kind.as_raw_value(),
        }
    }

    /// Ends the process at the first one, until `ready`: while a model loads nothing is accepted that would have to be finished.
    async fn exit_until(mut self, ready: oneshot::Receiver<()>) -> Self {
        tokio::select! {
            biased;
            _ = ready => self,
            asked = self.next() => {
                tracing::warn!(signal = asked.name, "asked to end before the model is loaded: exiting now");
                std::process::exit(asked.exit_code)
            }
        }
    }
}

/// Whether SIGHUP was ignored when the process began, as under `nohup`: then it stays so. Linux says it, and where nobody does it counts as ignored.
fn hangup_is_ignored() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    ignored(&status, SignalKind::hangup()).unwrap_or(true)
}

/// What `/proc/PID/status` says of a signal: bit n - 1 of the mask stands for signal n.
fn ignored(status: &str, kind: SignalKind) -> Option<bool> {
    let mask = status
        .lines()
        .find_map(|line| line.strip_prefix("SigIgn:"))?;
    let mask = u64::from_str_radix(mask.trim(), 16).ok()?;
    Some(mask >> (kind.as_raw_value() - 1) & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ignored_signal_is_found_in_the_mask() {
        let of = |mask: &str, kind| ignored(&format!("Name:\tquire\nSigIgn:\t{mask}\n"), kind);
        assert_eq!(of("0000000000000001", SignalKind::hangup()), Some(true));
        assert_eq!(of("0000000000001000", SignalKind::hangup()), Some(false));
        assert_eq!(of("0000000000004000", SignalKind::terminate()), Some(true));
        assert_eq!(of("no number", SignalKind::hangup()), None);
        assert_eq!(ignored("", SignalKind::hangup()), None);
    }
}
