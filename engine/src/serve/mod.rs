//! The servers: gRPC and HTTP listeners over one [`Generator`], health, metrics, and an end that loses nothing.
//!
//! Every protocol is a thin translation to and from [`crate::generation`]; several services can stand over one engine.
//!
//! How it ends: [`Server::run`] is given a future that says when. From then on health checks are red and new work is refused
//! (`UNAVAILABLE` / 503), what was accepted finishes (or is aborted when [`Server::drain_timeout`] is over), answers are flushed, and the
//! listeners close. If the engine dies instead, everybody is told that their request has failed, and `run` fails, so that whoever
//! supervises the process starts a new one.
//!
//! **Invariant:** a frontend never touches a tensor.

mod greeting;
mod grpc;
mod held;
mod http;
mod listener;
mod metrics;
mod registry;

use std::future::Future;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::watch;

use crate::generation::Generator;
use listener::Protocol;

pub use grpc::TokenizerFiles;
pub use metrics::{Metrics, step_observer};

/// How long clients may take to read their answers once the last one is computed,
const FLUSH: Duration = Duration::from_secs(10);
/// and where the answer is that the engine is gone: it is short, and somebody waits to start a new process.
const SHORT_FLUSH: Duration = Duration::from_secs(3);
/// How long the last bytes may take to leave once nobody has an answer to read: where somebody had one when the end began, on a busy machine,
const FAREWELL: Duration = Duration::from_secs(3);
/// and where nobody had, or only a short one.
const SHORT_FAREWELL: Duration = Duration::from_millis(500);

/// Connections that wait to be accepted; as many as tokio's own listeners have.
const BACKLOG: u32 = 1024;

/// Largest request body of either protocol, in bytes. Far above any context; what is longer is refused without being read.
pub(crate) const LARGEST_REQUEST: usize = 8 << 20;

/// The addresses of a server, taken before there is anything to serve at them.
///
/// Nothing listens there yet: whoever connects is refused, as where nobody is, so that no probe takes a server that loads its model for one that hangs.
#[derive(Debug)]
pub struct Addresses {
    http: Claim,
    grpc: Claim,
}

/// One of them, and what to call it where it is not to be had.
#[derive(Debug)]
struct Claim {
    protocol: &'static str,
    flag: &'static str,
    address: SocketAddr,
    socket: TcpSocket,
}

/// Listeners that are open and not yet served.
#[derive(Debug)]
pub struct Server {
    generator: Generator,
    metrics: Metrics,
    http: TcpListener,
    grpc: TcpListener,
    tokenizer_files: Option<TokenizerFiles>,
    drain_timeout: Option<Duration>,
}

/// Why a server cannot start, or ended by itself.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// An address is taken or not ours.
    #[error("cannot listen on {address} for {protocol} ({flag} chooses another address)")]
    Bind {
        /// What would have been served there.
        protocol: &'static str,
        /// The flag that sets the address.
        flag: &'static str,
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// The engine thread is gone.
    #[error("the engine has stopped; see the log for the reason")]
    EngineStopped,
}

impl Addresses {
    /// Takes both; port 0 takes a free one.
    ///
    /// # Errors
    /// [`ServeError::Bind`].
    pub fn take(http: SocketAddr, grpc: SocketAddr) -> Result<Self, ServeError> {
        Ok(Self {
            http: Claim::take("HTTP", "--http", http)?,
            grpc: Claim::take("gRPC", "--grpc", grpc)?,
        })
    }
}

impl Claim {
    fn take(
        protocol: &'static str,
        flag: &'static str,
        address: SocketAddr,
    ) -> Result<Self, ServeError> {
        let bound = || {
            let socket = match address {
                SocketAddr::V4(_) => TcpSocket::new_v4()?,
                SocketAddr::V6(_) => TcpSocket::new_v6()?,
            };
            // Connections of a server that has just ended do not keep the next one out.
            socket.set_reuseaddr(true)?;
            socket.bind(address)?;
            Ok(socket)
        };
        Ok(Self {
            socket: bound().map_err(|source| ServeError::Bind {
                protocol,
                flag,
                address,
                source,
            })?,
            protocol,
            flag,
            address,
        })
    }

    fn listen(self) -> Result<TcpListener, ServeError> {
        self.socket
            .listen(BACKLOG)
            .map_err(|source| ServeError::Bind {
                protocol: self.protocol,
                flag: self.flag,
                address: self.address,
                source,
            })
    }
}

impl Server {
    /// Listens at the addresses: from now on clients connect, and wait for [`Server::run`]. Belongs into a tokio runtime.
    ///
    /// # Errors
    /// [`ServeError::Bind`]: of two that take the same address while neither listens, the second to listen is refused.
    pub fn listen(
        generator: Generator,
        metrics: Metrics,
        addresses: Addresses,
    ) -> Result<Self, ServeError> {
        Ok(Self {
            http: addresses.http.listen()?,
            grpc: addresses.grpc.listen()?,
            generator,
            metrics,
            tokenizer_files: None,
            drain_timeout: None,
        })
    }

    /// Serves the tokenizer's files to gateways that ask for them.
    #[must_use]
    pub fn tokenizer_files(mut self, files: TokenizerFiles) -> Self {
        self.tokenizer_files = Some(files);
        self
    }

    /// How long what was accepted may take to finish once the server is asked to end; `None`: as long as it takes.
    #[must_use]
    pub fn drain_timeout(mut self, timeout: Option<Duration>) -> Self {
        self.drain_timeout = timeout;
        self
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
    /// The engine died.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> Result<(), ServeError> {
        let engine = self.generator.engine().clone();
        let (close, closing) = watch::channel(false);
        let health = grpc::Health::new();
        health.live(true).await;
        health.serving(true).await;

        let upkeep = tokio::spawn(self.metrics.clone().upkeep());
        let _stops_with_us = AbortOnDrop(upkeep);
        let http = listener::serve(
            self.http,
            http::router(self.generator.clone(), self.metrics),
            Protocol::Http,
            listener::PATIENCE,
            closed(closing.clone()),
        );
        let grpc = listener::serve(
            self.grpc,
            grpc::router(self.generator.clone(), health.clone(), self.tokenizer_files),
            Protocol::Grpc,
            listener::PATIENCE,
            closed(closing),
        );
        let mut listening = std::pin::pin!(async { tokio::join!(http, grpc) });

        tokio::select! {
            () = shutdown => {}
            () = engine.stopped() => health.live(false).await,
            // Not before `close` is sent.
            _ = &mut listening => {}
        }

        engine.drain();
        health.serving(false).await;
        let unread = self.generator.has_unread_answers();
        if engine.is_healthy() {
            tracing::info!(
                requests = engine.stats().in_flight,
                "shutting down: finishing what was accepted, refusing what is new"
            );
        }
        // Connections are served meanwhile: what is new is refused in words, not by silence.
        tokio::select! {
            () = engine.drained() => {}
            _ = &mut listening => {}
            () = over(self.drain_timeout) => {
                tracing::warn!(
                    requests = engine.stats().in_flight,
                    "the time to drain is over: aborting what is left"
                );
                engine.abort_all();
                engine.drained().await;
            }
        }
        close.send_replace(true);
        let (farewell, patience) = waits(engine.is_healthy(), unread);
        let answered = async {
            self.generator.answered().await;
            tokio::time::sleep(farewell).await;
        };
        tokio::select! {
            _ = &mut listening => {}
            // Who holds a connection open without an answer to read (a health watch, half a request) is not waited for.
            () = answered => {}
            () = tokio::time::sleep(patience) => {
                tracing::warn!("some clients did not read their answers within {patience:?}");
            }
        }
        if engine.is_healthy() {
            Ok(())
        } else {
            Err(ServeError::EngineStopped)
        }
    }
}

/// How long to wait once nobody has an answer to read, and how long in all. `unread`: somebody had one when the end began.
fn waits(healthy: bool, unread: bool) -> (Duration, Duration) {
    match (healthy, unread) {
        (true, true) => (FAREWELL, FLUSH),
        (true, false) => (SHORT_FAREWELL, FLUSH),
        (false, _) => (SHORT_FAREWELL, SHORT_FLUSH),
    }
}

/// A task that ends with its owner.
struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Resolves when the time is over; never if there is no limit.
async fn over(limit: Option<Duration>) {
    match limit {
        Some(limit) => tokio::time::sleep(limit).await,
        None => std::future::pending().await,
    }
}

/// Resolves when the listeners are to close.
async fn closed(mut closing: watch::Receiver<bool>) {
    // The sender lives as long as `run`; without it there is nothing to wait for either.
    let _ = closing.wait_for(|&closing| closing).await;
}

#[cfg(test)]
mod tests {
    use std::error::Error;
    use std::net::{Ipv4Addr, TcpStream};

    use super::*;

    const ANYWHERE: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

    #[test]
    fn an_address_that_is_taken_refuses_connections_until_somebody_listens() {
        let Addresses { http, .. } = Addresses::take(ANYWHERE, ANYWHERE).expect("free ports");
        let address = http.socket.local_addr().expect("it has one");
        let refused = TcpStream::connect(address).expect_err("nobody listens");
        assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        let _inside = runtime.enter();
        let _listener = http.listen().expect("it is ours");
        TcpStream::connect(address).expect("somebody listens");
    }

    #[test]
    fn an_address_in_use_is_said_once_and_with_its_flag() {
        let taken = std::net::TcpListener::bind(ANYWHERE).expect("a port");
        let address = taken.local_addr().expect("it has one");
        let error = Addresses::take(ANYWHERE, address).expect_err("it is in use");
        let text = error.to_string();
        assert!(text.contains("--grpc") && text.contains(&address.to_string()));
        let source = error.source().expect("the system's").to_string();
        assert!(!text.contains(&source), "{text}: {source}");
    }

    #[test]
    fn whoever_has_read_an_answer_is_not_taken_for_one_who_has_not() {
        for (healthy, unread) in [(true, true), (true, false), (false, true), (false, false)] {
            let (farewell, patience) = waits(healthy, unread);
            assert!(
                farewell * 2 < patience,
                "no time to read: {healthy} {unread}"
            );
        }
    }
}
