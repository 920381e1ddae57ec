//! `vllm.grpc.engine.VllmEngine` over a [`Generator`]: what makes quire a worker of the Shepherd model gateway.
//!
//! The gateway tokenises, renders templates and detokenises; token ids go in and come out. The rest tells it where to send requests:
//! what the prefix cache can find ([`kv_events`]) and how busy the engine is ([`load`]).
//!
//! **Invariant:** what cannot be done is refused, never left out silently. A refusal is INVALID_ARGUMENT where it is the client's request
//! that asks for it, so that no gateway takes the worker for a broken one.

mod kv_events;
mod load;
mod request;
mod response;
mod tokenizer;

use std::pin::Pin;
use std::time::{Duration, Instant};

use futures_util::Stream;
use quire_proto::smg::grpc::common;
use quire_proto::vllm::grpc::engine as vllm;
use quire_proto::vllm::grpc::engine::vllm_engine_server::VllmEngine;
use serde_json::{Map, json};
use tonic::{Request, Response, Status};

use super::arrival::held;
use super::request::{deadline, request_id, status};
use crate::generation::Generator;
use crate::serve::registry::Registry;

use kv_events::Subscription;
use load::LoadMeter;
use response::Responses;

pub use tokenizer::TokenizerFiles;

/// Longest wait for an idle engine that a flush may ask for, in seconds.
const LONGEST_WAIT: f32 = 3600.0;

/// The service.
#[derive(Debug)]
pub(super) struct VllmService {
    generator: Generator,
    registry: Registry,
    tokenizer_files: Option<TokenizerFiles>,
    load: LoadMeter,
    started: Instant,
}

impl VllmService {
    pub fn new(
        generator: Generator,
        registry: Registry,
        tokenizer_files: Option<TokenizerFiles>,
    ) -> Self {
        Self {
            load: LoadMeter::new(generator.engine().clone()),
            generator,
            registry,
            tokenizer_files,
            started: Instant::now(),
        }
    }

    /// What the checkpoint's authors recommend, for requests that leave it open; empty if they recommend nothing.
    fn default_sampling_params(&self) -> String {
        let defaults = self.generator.defaults();
        let mut params = Map::new();
        for (name, value) in [
            ("temperature", defaults.temperature),
            ("top_p", defaults.top_p),
            ("min_p", defaults.min_p),
            ("repetition_penalty", defaults.repetition_penalty),
        ] {
            if let Some(value) = value {
                params.insert(name.to_owned(), json!(value));
            }
        }
        if let Some(top_k) = defaults.top_k {
            params.insert("top_k".to_owned(), json!(top_k));
        }
        if params.is_empty() {
            return String::new();
        }
        serde_json::Value::Object(params).to_string()
    }
}

/// Messages of a stream.
type Messages<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl VllmEngine for VllmService {
    type GenerateStream = Messages<vllm::GenerateResponse>;
    type GetTokenizerStream = Messages<common::GetTokenizerChunk>;
    type SubscribeKvEventsStream = Messages<common::KvEventBatch>;

    async fn generate(
        &self,
        mut request: Request<vllm::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let held = held(&mut request);
        let deadline = deadline(request.metadata());
        let request = request.into_inner();
        let id = request_id(&request.request_id)?;
        let registered = self.registry.enter(&id).ok_or_else(|| {
            Status::already_exists(format!("request_id `{id}` belongs to a live request"))
        })?;
        let (mut request, reported) = request::generation(request, id, deadline)?;
        request.held = held;
        let generation = self
            .generator
            .generate(request)
            .await
            .map_err(|error| status(&error))?;
        registered.submitted(generation.abort_handle());
        let responses = Responses::new(generation, registered, reported);
        let stream = futures_util::stream::unfold(responses, |mut responses| async {
            let response = responses.next().await?;
            Some((response, responses))
        });
        Ok(Response::new(Box::pin(stream)))
    }

    async fn embed(
        &self,
        _request: Request<vllm::EmbedRequest>,
    ) -> Result<Response<vllm::EmbedResponse>, Status> {
        Err(Status::unimplemented(
            "this server generates text; it has no embeddings",
        ))
    }

    async fn health_check(
        &self,
        _request: Request<vllm::HealthCheckRequest>,
    ) -> Result<Response<vllm::HealthCheckResponse>, Status> {
        let engine = self.generator.engine();
        let message = if !engine.is_healthy() {
            "the engine has stopped"
        } else if engine.is_draining() {
            "draining: finishing what was accepted"
        } else {
            "ok"
        };
        Ok(Response::new(vllm::HealthCheckResponse {
            healthy: engine.is_healthy() && !engine.is_draining(),
            message: message.to_owned(),
        }))
    }

    async fn flush_cache(
        &self,
        request: Request<common::FlushCacheRequest>,
    ) -> Result<Response<common::FlushCacheResponse>, Status> {
        let seconds = request.into_inner().timeout_s;
        if !(0.0..=LONGEST_WAIT).contains(&seconds) {
            return Err(Status::invalid_argument(format!(
                "timeout_s is {seconds}, expected 0 to {LONGEST_WAIT}"
            )));
        }
        let engine = self.generator.engine();
        let wait = Duration::from_secs_f32(seconds);
        // At rest or not, `drained` is asked at least once.
        let idle = tokio::time::timeout(wait, engine.drained()).await.is_ok();
        if idle {
            engine.clear_prefix_cache();
        }
        let message = if idle {
            "the prefix cache is empty".to_owned()
        } else {
            format!(
                "{} requests are in flight; nothing was flushed",
                engine.stats().in_flight
            )
        };
        Ok(Response::new(common::FlushCacheResponse {
            success: idle,
            message,
        }))
    }

    async fn start_profile(
        &self,
        _request: Request<common::StartProfileRequest>,
    ) -> Result<Response<common::ProfileResponse>, Status> {
        Err(Status::unimplemented("this server has no profiler"))
    }

    async fn stop_profile(
        &self,
        _request: Request<common::StopProfileRequest>,
    ) -> Result<Response<common::ProfileResponse>, Status> {
        Err(Status::unimplemented("this server has no profiler"))
    }

    async fn abort(
        &self,
        request: Request<vllm::AbortRequest>,
    ) -> Result<Response<vllm::AbortResponse>, Status> {
        for id in request.into_inner().request_ids {
            self.registry.abort(&id);
        }
        Ok(Response::new(vllm::AbortResponse {}))
    }

    async fn get_model_info(
        &self,
        _request: Request<vllm::GetModelInfoRequest>,
    ) -> Result<Response<vllm::GetModelInfoResponse>, Status> {
        let model = self.generator.engine().model();
        let path = match &self.tokenizer_files {
            Some(files) => files.path(),
            None => model.name.clone(),
        };
        Ok(Response::new(vllm::GetModelInfoResponse {
            model_path: path.clone(),
            is_generation: true,
            max_context_length: model.max_model_len,
            vocab_size: model.vocab_size,
            served_model_name: model.name.clone(),
            tokenizer_path: path,
            model_type: model.family.clone(),
            eos_token_ids: model.eos.iter().map(|token| token.0 as i32).collect(),
            // The answer needs a place, too.
            max_req_input_len: model.max_model_len as i32 - 1,
            default_sampling_params_json: self.default_sampling_params(),
            ..vllm::GetModelInfoResponse::default()
        }))
    }

    async fn get_server_info(
        &self,
        _request: Request<vllm::GetServerInfoRequest>,
    ) -> Result<Response<vllm::GetServerInfoResponse>, Status> {
        let engine = self.generator.engine();
        let model = engine.model();
        Ok(Response::new(vllm::GetServerInfoResponse {
            active_requests: engine.stats().in_flight,
            is_paused: engine.is_draining(),
            uptime_seconds: self.started.elapsed().as_secs_f64(),
            server_type: "vllm-grpc".to_owned(),
            data_parallel_size: 1,
            kv_cache_dtype: model.kv_dtype.clone(),
            block_size: model.block_size as i32,
            model_dtype: model.dtype.clone(),
            max_num_seqs: model.max_seqs as i32,
            ..vllm::GetServerInfoResponse::default()
        }))
    }

    async fn get_loads(
        &self,
        request: Request<vllm::GetLoadsRequest>,
    ) -> Result<Response<vllm::GetLoadsResponse>, Status> {
        let loads = match request.into_inner().dp_rank {
            None | Some(0) => vec![self.load.read().scheduler_load()],
            Some(_) => Vec::new(),
        };
        Ok(Response::new(vllm::GetLoadsResponse {
            timestamp: jiff::Timestamp::now().to_string(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            dp_rank_count: 1,
            loads,
        }))
    }

    async fn get_tokenizer(
        &self,
        _request: Request<common::GetTokenizerRequest>,
    ) -> Result<Response<Self::GetTokenizerStream>, Status> {
        let files = self.tokenizer_files.clone().ok_or_else(|| {
            Status::failed_precondition("this server was not told where the tokenizer's files are")
        })?;
        let archive = tokio::task::spawn_blocking(move || files.archive())
            .await
            .map_err(|error| Status::internal(format!("reading the tokenizer failed: {error}")))?
            .map_err(|error| Status::internal(error.to_string()))?;
        let chunks = archive.chunks().map(Ok).collect::<Vec<_>>();
        Ok(Response::new(Box::pin(futures_util::stream::iter(chunks))))
    }

    async fn subscribe_kv_events(
        &self,
        request: Request<common::SubscribeKvEventsRequest>,
    ) -> Result<Response<Self::SubscribeKvEventsStream>, Status> {
        let engine = self.generator.engine();
        let subscription = Subscription::new(engine, self.load.clone(), request.into_inner());
        let stream = futures_util::stream::unfold(subscription, |mut subscription| async {
            let batch = subscription.next().await?;
            Some((Ok(batch), subscription))
        });
        Ok(Response::new(Box::pin(stream)))
    }
}
