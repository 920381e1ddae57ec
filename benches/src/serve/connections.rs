//! [`Connections`]: those to one server, kept from one request to the next.
//!
//! A server may close a connection that it kept just as the next request is sent on it; clients send that request again, and so does this one, and counts it.
//! **Invariant:** a request on a new connection is sent once. A server that drops what it accepted is not to look as if it had answered all.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use super::client::Failure;

/// A connection on which a request can be sent when the answer to the last was read.
pub type Connection = SendRequest<Full<Bytes>>;

/// The connections to one server.
#[derive(Debug)]
pub struct Connections {
    /// `HOST:PORT`.
    address: String,
    idle: Mutex<Vec<Connection>>,
    resent: AtomicU64,
}

impl Connections {
    /// None yet, to `HOST:PORT`.
    pub fn to(address: String) -> Self {
        Self {
            address,
            idle: Mutex::default(),
            resent: AtomicU64::new(0),
        }
    }

    /// Sends a request; its answer begins to come on the connection beside it, which is to be given to [`Self::keep`] when all of it was read.
    ///
    /// # Errors
    /// Nobody listens, or the connection ended before an answer began.
    pub async fn send(
        &self,
        request: Request<Full<Bytes>>,
    ) -> Result<(Response<Incoming>, Connection), Failure> {
        while let Some(mut kept) = self.kept() {
            if kept.ready().await.is_err() {
                // It was closed while nobody used it.
                continue;
            }
            match kept.send_request(request.clone()).await {
                Ok(response) => return Ok((response, kept)),
                Err(error) if error.is_canceled() => {}
                Err(_) => {
                    self.resent.fetch_add(1, Ordering::Relaxed);
                    break;
                }
            }
        }
        let mut new = self.connect().await?;
        let response = new.send_request(request).await;
        let response = response.map_err(|error| Failure::connection(&error))?;
        Ok((response, new))
    }

    /// Takes a connection back for the next request.
    pub fn keep(&self, connection: Connection) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.push(connection);
    }

    /// Requests that were sent again because the connection kept for them was closed.
    pub fn resent(&self) -> u64 {
        self.resent.load(Ordering::Relaxed)
    }

    fn kept(&self) -> Option<Connection> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.pop()
    }

    async fn connect(&self) -> Result<Connection, Failure> {
        let stream = TcpStream::connect(&self.address).await;
        let stream = stream.and_then(|stream| stream.set_nodelay(true).map(|()| stream));
        let stream = stream.map_err(|error| Failure::connection(&error))?;
        let (new, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| Failure::connection(&error))?;
        // It ends with whoever holds its other end, who is also told of its errors.
        tokio::spawn(async move { drop(connection.await) });
        Ok(new)
    }
}

#[cfg(test)]
mod tests {
    use super::super::ask::{Ask, Prompt, Sampling};
    use super::super::client_http::HttpClient;
    use super::super::mock::{Mock, Reply, answer};

    fn ask() -> Ask {
        Ask {
            prompt: Prompt::Text("a b c".to_owned()),
            max_tokens: 2,
            sampling: Sampling::GREEDY,
        }
    }

    #[tokio::test]
    async fn a_request_that_is_dropped_on_a_new_connection_has_failed() {
        let server = Mock::start(|_, _| Reply::close(""));
        let client = HttpClient::connect(&server.url, Some("m")).await.unwrap();
        let failure = client.complete(ask()).await.unwrap_err();
        assert_eq!(failure.kind, "connection");
        assert_eq!((server.requests().len(), client.resent()), (1, 0));
    }

    #[tokio::test]
    async fn a_request_that_is_dropped_on_a_kept_connection_is_sent_again_and_counted() {
        let server = Mock::start(|n, _| match n {
            1 => Reply::close(""),
            _ => Reply::keep(answer(2)),
        });
        let client = HttpClient::connect(&server.url, Some("m")).await.unwrap();
        client.complete(ask()).await.unwrap();
        client.complete(ask()).await.unwrap();
        assert_eq!((server.requests().len(), client.resent()), (3, 1));
    }
}
