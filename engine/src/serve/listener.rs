//! [`serve`]: the accept loop of both protocols.
//!
//! Our own and not tonic's or axum's, because a request's end is ours to decide: deadlines are kept by the engine (tonic would answer them
//! with CANCELLED), clients that say nothing, send no request or stop answering pings are let go, and closing waits for answers, not for idle connections.

use std::future::Future;
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};

use super::greeting::Greeting;

/// A connection whose peer says nothing at first, does not finish a request's head, or does not answer a ping, for as long is closed.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);
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
    patience: Duration,
    closed: impl Future<Output = ()>,
) {
    let builder = builder(protocol, patience);
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
                    .serve_connection(
                        TokioIo::new(Greeting::new(prepared(stream), patience)),
                        service,
                    )
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

fn builder(protocol: Protocol, patience: Duration) -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(patience);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(patience)
        .keep_alive_timeout(patience)
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

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;

    use super::*;

    /// Reads until the other side has closed.
    async fn closes(stream: &TcpStream) {
        loop {
            stream.readable().await.expect("a socket");
            match stream.try_read(&mut [0; 1024]) {
                Ok(1..) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Ok(0) | Err(_) => return,
            }
        }
    }

    #[tokio::test]
    async fn who_begins_nothing_is_let_go() {
        for protocol in [Protocol::Http, Protocol::Grpc] {
            let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
            let address = listener.local_addr().expect("an address");
            let never = std::future::pending();
            let patience = Duration::from_millis(50);
            let serving = tokio::spawn(serve(listener, Router::new(), protocol, patience, never));
            for beginning in ["", "P", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r", "GET / HT"] {
                let stream = TcpStream::connect(address).await.expect("it accepts");
                stream.writable().await.expect("a socket");
                stream.try_write(beginning.as_bytes()).expect("a few bytes");
                let closed = tokio::time::timeout(Duration::from_secs(60), closes(&stream)).await;
                closed.unwrap_or_else(|_| panic!("{protocol:?} waits after {beginning:?}"));
            }
            serving.abort();
        }
    }
}
