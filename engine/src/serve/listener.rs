//! [`serve`]: the accept loop of both protocols.
//!
//! Our own and not tonic's or axum's, because a request's end is ours to decide: deadlines are kept by the engine (tonic would answer them
//! with CANCELLED), clients that send no request or stop answering pings are let go, and closing waits for answers, not for idle connections.

use std::future::Future;
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};

/// A connection whose peer does not finish a request's head, or does not answer a ping, for as long is closed.
const PATIENCE: Duration = Duration::from_secs(30);
/// Calls on one connection: a gateway's may carry all of the load.
const MOST_STREAMS: u32 = 8192;
/// After the system refused a connection (too many open files), before the next try.
const PAUSE: Duration = Duration::from_millis(100);

/// What a listener speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Protocol {
    /// HTTP/1.1 and HTTP/2.
    Http,
    /// HTTP/2 alone.
    Grpc,
}

/// Accepts until `closed` resolves; returns when the last connection is closed.
pub(super) async fn serve(
    listener: TcpListener,
    router: Router,
    protocol: Protocol,
    closed: impl Future<Output = ()>,
) {
    let builder = builder(protocol);
    let connections = GracefulShutdown::new();
    let mut closed = std::pin::pin!(closed);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = &mut closed => break,
        };
        match accepted {
            Ok((stream, _)) => {
                let service = TowerToHyperService::new(router.clone());
                let connection = builder
                    .serve_connection(TokioIo::new(prepared(stream)), service)
                    .into_owned();
                let connection = connections.watch(connection);
                tokio::spawn(async move {
                    if let Err(error) = connection.await {
                        tracing::debug!(%error, "a connection ended badly");
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
    drop(listener);
    connections.shutdown().await;
}

fn builder(protocol: Protocol) -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(PATIENCE)
        .keep_alive_timeout(PATIENCE)
        .max_concurrent_streams(MOST_STREAMS);
    match protocol {
        Protocol::Http => builder,
        Protocol::Grpc => builder.http2_only(),
    }
}

/// Tokens are small packets that somebody waits for.
fn prepared(stream: TcpStream) -> TcpStream {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "TCP_NODELAY");
    }
    stream
}
