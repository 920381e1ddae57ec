//! [`Greeting`]: a connection that has to begin.
//!
//! Whoever speaks HTTP speaks first. hyper waits for the first bytes, which tell HTTP/2 from HTTP/1, without a limit; its own timers begin
//! behind them.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

/// What a client of HTTP/2 sends first (RFC 9113, section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A connection that fails to be read if its peer takes too long to say what it speaks.
#[derive(Debug)]
pub(super) struct Greeting<S> {
    stream: S,
    /// How much of the preface has come; it may still be HTTP/2.
    seen: usize,
    /// `None` once it is known what the peer speaks.
    patience: Option<Pin<Box<Sleep>>>,
}

impl<S> Greeting<S> {
    pub fn new(stream: S, patience: Duration) -> Self {
        Self {
            stream,
            seen: 0,
            patience: Some(Box::pin(tokio::time::sleep(patience))),
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Greeting<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        let Some(patience) = &mut self.patience else {
            return read;
        };
        if read.is_pending() {
            ready!(patience.as_mut().poll(context));
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        let new = &buffer.filled()[before..];
        let expected = &PREFACE[self.seen..];
        self.seen += new.len();
        if self.seen >= PREFACE.len() || !expected.starts_with(new) {
            self.patience = None;
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Greeting<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use tokio::net::TcpListener;

    use super::*;

    /// What comes of reading again from a peer that was silent after `first`, with no patience left.
    async fn read_after(first: &[u8]) -> Option<io::ErrorKind> {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let mut peer = std::net::TcpStream::connect(address).expect("it listens");
        let (stream, _) = listener.accept().await.expect("a connection");
        peer.write_all(first).expect("a few bytes");
        stream.readable().await.expect("a socket");
        let mut greeting = Greeting::new(stream, Duration::ZERO);
        let mut bytes = [0; 100];
        let mut buffer = ReadBuf::new(&mut bytes);
        let mut read = std::future::poll_fn(|context| {
            while buffer.filled().len() < first.len() {
                ready!(Pin::new(&mut greeting).poll_read(context, &mut buffer))?;
            }
            Pin::new(&mut greeting).poll_read(context, &mut buffer)
        });
        let limit = Duration::from_millis(100);
        let read = tokio::time::timeout(limit, &mut read).await.ok()?;
        read.err().map(|error| error.kind())
    }

    #[tokio::test]
    async fn patience_ends_with_the_first_words() {
        for undecided in [&b"P"[..], b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r"] {
            assert_eq!(read_after(undecided).await, Some(io::ErrorKind::TimedOut));
        }
        for spoken in [&b"G"[..], b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"] {
            assert_eq!(read_after(spoken).await, None);
        }
    }
}
