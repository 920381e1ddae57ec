//! quire's gRPC service, streamed.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use anyhow::Context;
use quire_proto::v1::generate_event::Event;
use quire_proto::v1::generate_request::Prompt as Wire;
use quire_proto::v1::generation_client::GenerationClient;
use quire_proto::v1::{
    Chat, ChatMessage, FinishReason, GenerateRequest, GetModelRequest, SamplingParams,
    StopConditions, TokenIds,
};
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use super::ask::{Ask, Prompt};
use super::client::{Answer, Failure};

/// Connections; a server may limit the streams of each.
const CONNECTIONS: usize = 8;

/// A client of one server.
#[derive(Debug)]
pub struct GrpcClient {
    channels: Vec<GenerationClient<Channel>>,
    next: AtomicUsize,
    model: String,
    description: String,
}

impl GrpcClient {
    /// Connects, and asks what is served.
    ///
    /// # Errors
    /// The address is not one, or nobody answers there.
    pub async fn connect(address: &str, model: Option<&str>) -> anyhow::Result<Self> {
        let address = address.trim_start_matches("http://");
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .with_context(|| format!("--grpc {address}: expected HOST:PORT"))?
            .tcp_nodelay(true);
        let mut channels = Vec::with_capacity(CONNECTIONS);
        for _ in 0..CONNECTIONS {
            let channel = endpoint
                .connect()
                .await
                .with_context(|| format!("cannot connect to {address}"))?;
            channels.push(GenerationClient::new(channel));
        }
        let served = channels[0]
            .get_model(GetModelRequest {})
            .await
            .with_context(|| format!("{address} does not speak quire.v1.Generation"))?
            .into_inner();
        let description = format!(
            "{address} (gRPC), model {}, {} weights, {}",
            served.name, served.dtype, served.device
        );
        Ok(Self {
            channels,
            next: AtomicUsize::new(0),
            model: model.unwrap_or_default().to_owned(),
            description,
        })
    }

    /// One line about the server.
    pub fn description(&self) -> &str {
        &self.description
    }

    /// Sends a request and reads the answer to its end.
    ///
    /// # Errors
    /// The server refused it, or the answer broke off.
    pub async fn complete(&self, ask: Ask) -> Result<Answer, Failure> {
        let prompt = match ask.prompt {
            Prompt::Text(text) => Wire::Text(text),
            Prompt::Ids(ids) => Wire::Tokens(TokenIds { ids }),
            Prompt::Chat(messages) => {
                let messages = messages.into_iter().map(|message| ChatMessage {
                    role: message.role,
                    content: message.content,
                    ..ChatMessage::default()
                });
                Wire::Chat(Chat {
                    messages: messages.collect(),
                    ..Chat::default()
                })
            }
        };
        let request = GenerateRequest {
            prompt: Some(prompt),
            sampling: Some(SamplingParams {
                temperature: Some(ask.sampling.temperature),
                top_p: Some(ask.sampling.top_p),
                ..SamplingParams::default()
            }),
            stop: Some(StopConditions {
                max_tokens: Some(ask.max_tokens),
                ignore_eos: true,
                ..StopConditions::default()
            }),
            model: self.model.clone(),
            ..GenerateRequest::default()
        };
        let turn = self.next.fetch_add(1, Ordering::Relaxed) % self.channels.len();
        let mut client = self.channels[turn].clone();
        let mut stream = client
            .generate_stream(request)
            .await
            .map_err(|status| failure(&status))?
            .into_inner();
        let mut answer = Answer::begun();
        let (mut usage, mut finish) = (None, None);
        while let Some(event) = stream.message().await.map_err(|status| failure(&status))? {
            answer.ended = Instant::now();
            match event.event {
                Some(Event::Chunk(chunk)) if !chunk.tokens.is_empty() => {
                    answer.pieces.push(answer.ended);
                    answer.text.push_str(&chunk.text);
                }
                Some(Event::Finish(last)) => finish = Some(last.reason()),
                Some(Event::Usage(last)) => usage = Some(last),
                _ => {}
            }
        }
        whole(finish)?;
        let usage =
            usage.ok_or_else(|| Failure::new("broken stream", "it ended without its usage"))?;
        answer.prompt_tokens = usage.prompt_tokens.into();
        answer.completion_tokens = usage.completion_tokens.into();
        answer.cached_tokens = usage.cached_tokens.into();
        Ok(answer)
    }
}

/// Whether an answer ended as one should.
fn whole(finish: Option<FinishReason>) -> Result<(), Failure> {
    match finish {
        Some(FinishReason::Stop | FinishReason::Length) => Ok(()),
        other => Err(Failure::new(
            "broken stream",
            other.map_or("it ended without a finish".to_owned(), |reason| {
                format!("it ended with {}", reason.as_str_name())
            }),
        )),
    }
}

fn failure(status: &Status) -> Failure {
    Failure::new(format!("gRPC {:?}", status.code()), status.message())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_whole_when_it_stopped_or_was_long_enough() {
        assert_eq!(whole(Some(FinishReason::Length)), Ok(()));
        assert_eq!(whole(Some(FinishReason::Stop)), Ok(()));
        for broken in [None, Some(FinishReason::Aborted)] {
            assert_eq!(whole(broken).unwrap_err().kind, "broken stream");
        }
    }
}
