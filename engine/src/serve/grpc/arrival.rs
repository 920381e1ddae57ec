//! Requests as they arrive: tonic sees a message once all of it is there.
//!
//! tonic takes memory for a message as soon as its length is announced, and waits for the rest as long as it takes: five bytes cost
//! megabytes. So messages are gathered here, counted as [`Held`], and all of a request must arrive in time: tonic waits for its end before
//! it hands a message on.

use std::any::Any;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::body::{Body, BodyDataStream};
use axum::extract::Request;
use axum::middleware::Next;
use axum::response::Response;
use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt, stream};
use tokio::time::{Instant, timeout_at};
use tonic::{Code, Status};

use super::request::pushback;
use crate::serve::LARGEST_REQUEST;
use crate::serve::held::{Full, Held, RETRY_AFTER};

/// How long a request may take to arrive, its end included.
const PATIENCE: Duration = Duration::from_secs(60);
/// Where the services of reflection are, the only ones whose clients stream.
const REFLECTION: &str = "/grpc.reflection.";
/// Before each message: a byte that says whether it is compressed, and its length in four.
const HEADER: usize = 5;

/// A request's bytes, counted as they arrive; in its extensions, so that they are given back with the request.
type Counted = Arc<Mutex<Held>>;

/// A layer.
pub(super) async fn gathered(request: Request, next: Next) -> Response {
    let held = if request.uri().path().starts_with(REFLECTION) {
        Held::for_reflection()
    } else {
        Held::default()
    };
    let held = Arc::new(Mutex::new(held));
    let mut request = request.map(|body| {
        let arrival = Arrival {
            chunks: body.into_data_stream(),
            waiting: BytesMut::new(),
            held: Arc::clone(&held),
            deadline: Instant::now() + PATIENCE,
        };
        Body::from_stream(stream::unfold(arrival, |mut arrival| async {
            Some((arrival.next().await?, arrival))
        }))
    });
    request.extensions_mut().insert(held);
    next.run(request).await
}

/// To be kept as long as the request's message, by whoever keeps that longer than the request.
pub(super) fn held<T>(request: &mut tonic::Request<T>) -> Option<Arc<dyn Any + Send + Sync>> {
    let held = request.extensions_mut().remove::<Counted>()?;
    Some(held)
}

struct Arrival {
    chunks: BodyDataStream,
    /// The beginning of a message.
    waiting: BytesMut,
    held: Counted,
    /// Of all there is to come.
    deadline: Instant,
}

impl Arrival {
    /// The next message, with its header; a broken one as it is, for tonic to complain about.
    async fn next(&mut self) -> Option<Result<Bytes, Status>> {
        let message = timeout_at(self.deadline, self.message()).await;
        message.unwrap_or_else(|_| {
            Some(Err(Status::deadline_exceeded(format!(
                "the request did not arrive, and end, within {} s",
                PATIENCE.as_secs()
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
    use tonic::codegen::Service;

    use super::*;

    /// What comes of `chunks`, and then of silence.
    fn arrival(chunks: &[&'static [u8]]) -> Arrival {
        let chunks: Vec<_> = chunks.iter().map(|&chunk| Ok::<_, Status>(chunk)).collect();
        let body = Body::from_stream(stream::iter(chunks).chain(stream::pending()));
        Arrival {
            chunks: body.into_data_stream(),
            waiting: BytesMut::new(),
            held: Counted::default(),
            deadline: Instant::now() + Duration::from_millis(50),
        }
    }

    #[tokio::test]
    async fn messages_are_handed_on_whole() {
        let mut arrival = arrival(&[&[0, 0, 0], &[0, 3, 1], &[2, 3, 0, 0, 0, 0, 0, 1], &[0, 0]]);
        for whole in [&[0, 0, 0, 0, 3, 1, 2, 3][..], &[0, 0, 0, 0, 0]] {
            let message = arrival.next().await.expect("a message").expect("whole");
            assert_eq!(message, whole);
        }
    }

    #[tokio::test]
    async fn what_does_not_come_is_not_waited_for() {
        let whole = &[0, 0, 0, 0, 1, 1][..];
        let (announced, begun) = (&[0, 0, 127, 0, 0][..], &[0, 0][..]);
        for (chunks, messages) in [
            (&[][..], 0),
            (&[announced][..], 0),
            (&[whole][..], 1),
            (&[whole, begun][..], 1),
        ] {
            let mut arrival = arrival(chunks);
            for _ in 0..messages {
                let message = arrival.next().await.expect("a message").expect("whole");
                assert_eq!(message, whole);
            }
            let end = tokio::time::timeout(Duration::from_secs(60), arrival.next()).await;
            let error = end.expect("an end").expect("an error").unwrap_err();
            assert_eq!(error.code(), Code::DeadlineExceeded);
        }
    }

    /// Whether a message of 128 KiB arrives, at a handler that has given the request back before it answers.
    async fn arrives(path: &str) -> bool {
        async fn handler(request: Request) -> String {
            let held = Arc::clone(request.extensions().get::<Counted>().expect("counted"));
            let body = axum::body::to_bytes(request.into_body(), usize::MAX).await;
            assert!(Arc::into_inner(held).is_some(), "nobody else holds it");
            body.is_ok().to_string()
        }
        let mut router = axum::Router::new()
            .fallback(handler)
            .layer(axum::middleware::from_fn(gathered));
        let mut message = vec![0, 0, 2, 0, 0];
        message.resize(HEADER + (2 << 16), 0);
        let request = Request::post(path).body(Body::from(message));
        let response = router.call(request.expect("a request")).await;
        let answer = response.expect("infallible").into_body();
        axum::body::to_bytes(answer, 10).await.expect("read") == "true"
    }

    #[tokio::test]
    async fn bytes_are_given_back_with_the_request_and_not_with_its_answer() {
        assert!(arrives("/quire.v1.Generation/Generate").await);
    }

    #[tokio::test]
    async fn reflection_takes_nothing_of_the_room_for_large_messages() {
        assert!(!arrives("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo").await);
    }

    #[tokio::test]
    async fn a_length_no_message_may_have_is_tonics_to_refuse() {
        let header = arrival(&[&[0, 255, 255, 255, 255]]).next().await;
        assert_eq!(header.expect("a header").expect("as it came").len(), HEADER);
    }
}
