//! [`serve`]: the accept loop of both protocols.
//!
//! Our own and not tonic's or axum's, because a request's end is ours to decide: deadlines are kept by the engine (tonic would answer them
//! with CANCELLED), clients that say nothing, send no request or stop answering pings are let go, and closing waits for answers, not for idle connections.

use std::future::Future;
use std::time::{Duration, Instant};

use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};

use super::greeting::Greeting;

/// A connection whose peer says nothing at first, or does not answer a ping, for as long is closed.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);
/// And one on which no next request begins, or whose request's head is not finished, for so many times as long: 75 s. Proxies keep idle connections for 60 s
/// most often, and would send a request on one that is being closed here if theirs were the longer time.
const IDLE: f32 = 2.5;
/// Calls on one connection: a gateway's may carry all of the load.
const MOST_STREAMS: u32 = 8192;
/// After the system refused a connection (too many open files), before the next try.
const PAUSE: Duration = Duration::from_millis(100);
/// When a listener is to close: for so long nobody must have come, and so long it waits for that at most.
const LULL: Duration = Duration::from_millis(50);
const LAST_CALL: Duration = Duration::from_millis(250);

/// What a listener speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Protocol {
    /// HTTP/1.1 and HTTP/2.
    Http,
    /// HTTP/2 alone.
    Grpc,
}

/// Accepts until `closed` resolves, and then whom the system greeted for us already: closing the listener would reset them. Returns when the
/// last connection is closed.
pub(super) async fn serve(
    listener: TcpListener,
    router: Router,
    protocol: Protocol,
    patience: Duration,
    closed: impl Future<Output = ()>,
) {
    let builder = builder(protocol, patience);
    let connections = GracefulShutdown::new();
    let begin = |stream: TcpStream| {
        let service = TowerToHyperService::new(router.clone());
        let stream = TokioIo::new(Greeting::new(prepared(stream), patience));
        let connection = builder.serve_connection(stream, service).into_owned();
        let connection = connections.watch(connection);
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection ended badly");
            }
        });
    };
    let mut closed = std::pin::pin!(closed);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = &mut closed => break,
        };
        match accepted {
            Ok((stream, _)) => begin(stream),
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
    let last_call = Instant::now() + LAST_CALL;
    while Instant::now() < last_call
        && let Ok(Ok((stream, _))) = tokio::time::timeout(LULL, listener.accept()).await
    {
        begin(stream);
    }
    drop(listener);
    connections.shutdown().await;
}

fn builder(protocol: Protocol, patience: Duration) -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(patience.mul_f32(IDLE));
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

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

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

    #[tokio::test]
    async fn who_has_come_when_it_closes_is_answered() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let mut clients = Vec::new();
        for _ in 0..20 {
            let mut stream = TcpStream::connect(address).await.expect("a connection");
            let request = b"GET / HTTP/1.1\r\nHost: quire\r\n\r\n";
            stream.write_all(request).await.expect("a few bytes");
            clients.push(stream);
        }
        let now = std::future::ready(());
        serve(listener, Router::new(), Protocol::Http, PATIENCE, now).await;
        for mut stream in clients {
            let mut answer = String::new();
            let read = stream.read_to_string(&mut answer).await;
            read.expect("an answer and not a reset");
            assert!(answer.starts_with("HTTP/1.1 404"), "{answer:?}");
        }
    }
}
