//! The servers: gRPC and HTTP listeners over one [`Generator`], health, metrics, and an end that loses nothing.
//!
//! Every protocol is a thin translation to and from [`crate::generation`]; several services can stand over one engine.
//!
//! How it ends: [`Server::run`] is given a future that says when. From then on health checks are red and new work is refused
//! (`UNAVAILABLE` / 503), what was accepted finishes, answers are flushed, and the listeners close. If the engine dies instead, `run`
//! fails, so that whoever supervises the process starts a new one.
//!
//! **Invariant:** a frontend never touches a tensor.

mod grpc;
mod http;
mod metrics;
mod registry;

use std::future::Future;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::generation::Generator;

pub use metrics::{Metrics, step_observer};

/// How long answers may take to reach their clients once the last one is computed.
const FLUSH: Duration = Duration::from_secs(10);

/// Largest request body of either protocol, in bytes. Far above any context; what is longer is refused without being read.
pub(crate) const LARGEST_REQUEST: usize = 32 << 20;

/// Listeners that are bound and not yet served.
#[derive(Debug)]
pub struct Server {
    generator: Generator,
    metrics: Metrics,
    http: TcpListener,
    grpc: TcpListener,
}

/// Why a server cannot start, or ended by itself.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// An address is taken or not ours.
    #[error("cannot listen on {address} for {protocol}: {source}; choose another with {flag}")]
    Bind {
        /// What would have been served there.
        protocol: &'static str,
        /// The flag that sets the address.
        flag: &'static str,
        /// The address.
        address: SocketAddr,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// A listener failed.
    #[error("the {protocol} server failed: {message}")]
    Listener {
        /// Which one.
        protocol: &'static str,
        /// Why.
        message: String,
    },
    /// The engine thread is gone.
    #[error("the engine has stopped; see the log for the reason")]
    EngineStopped,
}

impl Server {
    /// Binds both addresses; port 0 takes a free one.
    ///
    /// # Errors
    /// [`ServeError::Bind`].
    pub async fn bind(
        generator: Generator,
        metrics: Metrics,
        http: SocketAddr,
        grpc: SocketAddr,
    ) -> Result<Self, ServeError> {
        let bind = async |protocol, flag, address| {
            TcpListener::bind(address)
                .await
                .map_err(|source| ServeError::Bind {
                    protocol,
                    flag,
                    address,
                    source,
                })
        };
        Ok(Self {
            http: bind("HTTP", "--http", http).await?,
            grpc: bind("gRPC", "--grpc", grpc).await?,
            generator,
            metrics,
        })
    }

    /// Where HTTP listens.
    ///
    /// # Errors
    /// The system does not say.
    pub fn http_address(&self) -> std::io::Result<SocketAddr> {
        self.http.local_addr()
    }

    /// Where gRPC listens.
    ///
    /// # Errors
    /// The system does not say.
    pub fn grpc_address(&self) -> std::io::Result<SocketAddr> {
        self.grpc.local_addr()
    }

    /// Serves until `shutdown` resolves, then drains.
    ///
    /// # Errors
    /// The engine died or a listener failed.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> Result<(), ServeError> {
        let engine = self.generator.engine().clone();
        let (close, closing) = watch::channel(false);
        let health = grpc::Health::new();
        health.serving(true).await;

        let upkeep = tokio::spawn(self.metrics.clone().upkeep());
        let _stops_with_us = AbortOnDrop(upkeep);
        let router = http::router(self.generator.clone(), self.metrics);
        let mut http = tokio::spawn(http::serve(self.http, router, closed(closing.clone())));
        let mut grpc = tokio::spawn(grpc::serve(
            self.grpc,
            self.generator,
            health.clone(),
            closed(closing),
        ));

        tokio::select! {
            () = shutdown => {}
            () = engine.stopped() => {
                health.serving(false).await;
                return Err(ServeError::EngineStopped);
            }
            end = &mut http => return Err(failure("HTTP", end)),
            end = &mut grpc => return Err(failure("gRPC", end)),
        }

        engine.drain();
        health.serving(false).await;
        tracing::info!(
            requests = engine.stats().in_flight,
            "shutting down: finishing what was accepted, refusing what is new"
        );
        engine.drained().await;
        close.send_replace(true);
        let flushed = tokio::time::timeout(FLUSH, async { tokio::join!(http, grpc) }).await;
        if flushed.is_err() {
            tracing::warn!("some clients did not read their answers in {FLUSH:?}");
        }
        if engine.is_healthy() {
            Ok(())
        } else {
            Err(ServeError::EngineStopped)
        }
    }
}

/// A task that ends with its owner.
struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Resolves when the listeners are to close.
async fn closed(mut closing: watch::Receiver<bool>) {
    // The sender lives as long as `run`; without it there is nothing to wait for either.
    let _ = closing.wait_for(|&closing| closing).await;
}

/// What a listener that ended before it was told to ended with.
fn failure<E: std::fmt::Display>(
    protocol: &'static str,
    end: Result<Result<(), E>, tokio::task::JoinError>,
) -> ServeError {
    let message = match end {
        Ok(Ok(())) => "it ended".to_owned(),
        Ok(Err(error)) => error.to_string(),
        Err(error) => error.to_string(),
    };
    ServeError::Listener { protocol, message }
}
