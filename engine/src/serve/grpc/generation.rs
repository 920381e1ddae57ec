//! `quire.v1.Generation` over a [`Generator`].

use std::pin::Pin;

use futures_util::Stream;
use quire_proto::v1;
use quire_proto::v1::generation_server::Generation;
use quire_scheduler::TokenId;
use tonic::{Request, Response, Status};

use super::arrival::held;
use super::request::{conversation, deadline, generation, request_id, status};
use super::response::{Events, Reported};
use crate::generation::{Generator, Prompt};
use crate::serve::registry::Registry;

/// The service.
#[derive(Debug)]
pub(super) struct GenerationService {
    generator: Generator,
    registry: Registry,
}

impl GenerationService {
    pub fn new(generator: Generator, registry: Registry) -> Self {
        Self {
            generator,
            registry,
        }
    }

    /// Checks a request and starts it.
    async fn start(&self, mut request: Request<v1::GenerateRequest>) -> Result<Events, Status> {
        let held = held(&mut request);
        let deadline = deadline(request.metadata());
        let request = request.into_inner();
        self.generator
            .check_model(&request.model)
            .map_err(|error| status(&error))?;
        let output = request.output.unwrap_or_default();
        let reported = Reported {
            echo: output.echo,
            prompt_token_ids: output.prompt_token_ids,
            skip_special: !output.include_special_tokens,
        };
        let id = request_id(&request.request_id)?;
        let registered = self.registry.enter(&id).ok_or_else(|| {
            Status::already_exists(format!("request_id `{id}` belongs to a live request"))
        })?;
        let mut request = generation(request, id.clone(), deadline)?;
        request.held = held;
        let samples = request.sampling.n.unwrap_or(1);
        let generation = self
            .generator
            .generate(request)
            .await
            .map_err(|error| status(&error))?;
        registered.submitted(generation.abort_handle());
        let tokenizer = self.generator.tokenizer().clone();
        Ok(Events::new(
            id, generation, registered, tokenizer, reported, samples,
        ))
    }
}

#[tonic::async_trait]
impl Generation for GenerationService {
    type GenerateStreamStream =
        Pin<Box<dyn Stream<Item = Result<v1::GenerateEvent, Status>> + Send>>;

    async fn generate_stream(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStreamStream>, Status> {
        let events = self.start(request).await?;
        let stream = futures_util::stream::unfold(events, |mut events| async {
            let event = events.next().await?;
            let event = event.map(|event| v1::GenerateEvent { event: Some(event) });
            Some((event, events))
        });
        Ok(Response::new(Box::pin(stream)))
    }

    async fn generate(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Response<v1::GenerateResponse>, Status> {
        let events = self.start(request).await?;
        events.collect().await.map(Response::new)
    }

    async fn abort(
        &self,
        request: Request<v1::AbortRequest>,
    ) -> Result<Response<v1::AbortResponse>, Status> {
        let id = request.into_inner().request_id;
        if self.registry.abort(&id) {
            Ok(Response::new(v1::AbortResponse {}))
        } else {
            Err(Status::not_found(format!(
                "no live request has the request_id `{id}`"
            )))
        }
    }

    async fn tokenize(
        &self,
        mut request: Request<v1::TokenizeRequest>,
    ) -> Result<Response<v1::TokenizeResponse>, Status> {
        let held = held(&mut request);
        let request = request.into_inner();
        let prompt = match request.input {
            None => {
                return Err(Status::invalid_argument(
                    "input is not set, expected text or chat",
                ));
            }
            Some(v1::tokenize_request::Input::Text(text)) => Prompt::Text(text),
            Some(v1::tokenize_request::Input::Chat(chat)) => {
                Prompt::Chat(Box::new(conversation(chat)?))
            }
        };
        let tokens = self
            .generator
            .tokenize(prompt, request.add_special_tokens.unwrap_or(true), held)
            .await
            .map_err(|error| status(&error))?;
        let ids = tokens.into_iter().map(|token| token.0).collect();
        Ok(Response::new(v1::TokenizeResponse { ids }))
    }

    async fn detokenize(
        &self,
        mut request: Request<v1::DetokenizeRequest>,
    ) -> Result<Response<v1::DetokenizeResponse>, Status> {
        let held = held(&mut request);
        let request = request.into_inner();
        let tokens: Vec<TokenId> = request.ids.into_iter().map(TokenId).collect();
        let text = self
            .generator
            .detokenize("ids", tokens, !request.include_special_tokens, held)
            .await
            .map_err(|error| status(&error))?;
        Ok(Response::new(v1::DetokenizeResponse { text }))
    }

    async fn get_model(
        &self,
        _request: Request<v1::GetModelRequest>,
    ) -> Result<Response<v1::GetModelResponse>, Status> {
        let model = self.generator.engine().model();
        Ok(Response::new(v1::GetModelResponse {
            name: model.name.clone(),
            family: model.family.clone(),
            max_model_len: model.max_model_len,
            vocab_size: model.vocab_size,
            eos_token_ids: model.eos.iter().map(|token| token.0).collect(),
            dtype: model.dtype.clone(),
            kv_cache_dtype: model.kv_dtype.clone(),
            kv_blocks: model.num_blocks,
            block_size: model.block_size,
            max_seqs: model.max_seqs,
            max_batch_tokens: model.max_batch_tokens,
            prefix_cache: model.prefix_cache,
            has_chat_template: self.generator.has_chat_template(),
            device: model.device.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }))
    }

    async fn get_stats(
        &self,
        _request: Request<v1::GetStatsRequest>,
    ) -> Result<Response<v1::GetStatsResponse>, Status> {
        let engine = self.generator.engine();
        let stats = engine.stats();
        Ok(Response::new(v1::GetStatsResponse {
            requests_running: stats.running,
            requests_waiting: stats.waiting,
            kv_blocks_used: stats.blocks_used,
            kv_blocks_cached: stats.blocks_cached,
            kv_blocks: stats.blocks_total,
            prefix_cache_query_tokens: stats.prefix_queries,
            prefix_cache_hit_tokens: stats.prefix_hits,
            preemptions: stats.preemptions,
            prompt_tokens: stats.prompt_tokens,
            generation_tokens: stats.generation_tokens,
            kv_blocks_used_peak: stats.blocks_used_peak,
            draining: engine.is_draining(),
        }))
    }

    async fn clear_prefix_cache(
        &self,
        _request: Request<v1::ClearPrefixCacheRequest>,
    ) -> Result<Response<v1::ClearPrefixCacheResponse>, Status> {
        self.generator.engine().clear_prefix_cache();
        Ok(Response::new(v1::ClearPrefixCacheResponse {}))
    }
}
