//! Requests as they arrive: tonic sees a message once all of it is there.
//!
//! tonic takes memory for a message as soon as its length is announced, and waits for the rest as long as it takes: five bytes cost
//! megabytes. So messages are gathered here, counted as [`Held`], and the first must arrive in time.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::body::{Body, BodyDataStream};
use axum::extract::Request;
use axum::middleware::Next;
use axum::response::Response;
use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt, stream};
use tokio::time::timeout;
use tonic::{Code, Status};

use super::request::pushback;
use crate::serve::LARGEST_REQUEST;
use crate::serve::held::{Full, Held, RETRY_AFTER};

/// How long a call's first message may take to arrive. Calls whose client streams may then be silent.
const PATIENCE: Duration = Duration::from_secs(60);
/// Before each message: a byte that says whether it is compressed, and its length in four.
const HEADER: usize = 5;

/// A layer: what a request holds is held until its handler has answered, or begun to.
pub(super) async fn gathered(request: Request, next: Next) -> Response {
    let held = Arc::new(Mutex::new(Held::default()));
    let request = request.map(|body| {
        let arrival = Arrival {
            chunks: body.into_data_stream(),
            waiting: BytesMut::new(),
            held: Arc::clone(&held),
            patience: Some(PATIENCE),
        };
        Body::from_stream(stream::unfold(arrival, |mut arrival| async {
            Some((arrival.next().await?, arrival))
        }))
    });
    let response = next.run(request).await;
    drop(held);
    response
}

struct Arrival {
    chunks: BodyDataStream,
    /// The beginning of a message.
    waiting: BytesMut,
    held: Arc<Mutex<Held>>,
    /// For the first message.
    patience: Option<Duration>,
}

impl Arrival {
    /// The next message, with its header; a broken one as it is, for tonic to complain about.
    async fn next(&mut self) -> Option<Result<Bytes, Status>> {
        let Some(patience) = self.patience.take() else {
            return self.message().await;
        };
        timeout(patience, self.message()).await.unwrap_or_else(|_| {
            Some(Err(Status::deadline_exceeded(format!(
                "the request did not arrive within {} s",
                patience.as_secs()
            ))))
        })
    }

    async fn message(&mut self) -> Option<Result<Bytes, Status>> {
        loop {
            if let Some(&[_, a, b, c, d]) = self.waiting.first_chunk::<HEADER>() {
                let length = u32::from_be_bytes([a, b, c, d]) as usize;
                if length > LARGEST_REQUEST {
                    return Some(Ok(self.waiting.split().freeze()));
                }
                if self.waiting.len() >= HEADER + length {
                    return Some(Ok(self.waiting.split_to(HEADER + length).freeze()));
                }
            }
            match self.chunks.next().await {
                None if self.waiting.is_empty() => return None,
                None => return Some(Ok(self.waiting.split().freeze())),
                Some(Err(error)) => return Some(Err(Status::from_error(error.into()))),
                Some(Ok(chunk)) => {
                    let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
                    if self.waiting.is_empty() {
                        // What came before is a message that has been answered.
                        *held = Held::default();
                    }
                    if let Err(full) = held.add(chunk.len()) {
                        return Some(Err(refusal(&full)));
                    }
                    self.waiting.extend_from_slice(&chunk);
                }
            }
        }
    }
}

fn refusal(full: &Full) -> Status {
    Status::with_metadata(
        Code::ResourceExhausted,
        full.to_string(),
        pushback(RETRY_AFTER),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What comes of `chunks`, and then of silence.
    fn arrival(chunks: &[&'static [u8]]) -> Arrival {
        let chunks: Vec<_> = chunks.iter().map(|&chunk| Ok::<_, Status>(chunk)).collect();
        let body = Body::from_stream(stream::iter(chunks).chain(stream::pending()));
        Arrival {
            chunks: body.into_data_stream(),
            waiting: BytesMut::new(),
            held: Arc::default(),
            patience: Some(Duration::from_millis(50)),
        }
    }

    #[tokio::test]
    async fn messages_are_handed_on_whole() {
        let mut arrival = arrival(&[&[0, 0, 0], &[0, 3, 1], &[2, 3, 0, 0, 0, 0, 0, 1], &[0, 0]]);
        for whole in [&[0, 0, 0, 0, 3, 1, 2, 3][..], &[0, 0, 0, 0, 0]] {
            let message = arrival.next().await.expect("a message").expect("whole");
            assert_eq!(message, whole);
        }
        let nothing = timeout(Duration::from_millis(100), arrival.next()).await;
        assert!(
            nothing.is_err(),
            "half a message, and only the first is in a hurry"
        );
    }

    #[tokio::test]
    async fn what_is_announced_and_does_not_come_is_not_waited_for() {
        for chunks in [&[][..], &[&[0, 0, 127, 0, 0][..]]] {
            let error = arrival(chunks).next().await.expect("an end").unwrap_err();
            assert_eq!(error.code(), Code::DeadlineExceeded);
        }
    }

    #[tokio::test]
    async fn a_length_no_message_may_have_is_tonics_to_refuse() {
        let header = arrival(&[&[0, 255, 255, 255, 255]]).next().await;
        assert_eq!(header.expect("a header").expect("as it came").len(), HEADER);
    }
}
