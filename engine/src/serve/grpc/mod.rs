//! gRPC: `quire.v1.Generation`, `vllm.grpc.engine.VllmEngine`, `grpc.health.v1` and reflection on one listener.

mod arrival;
mod generation;
mod request;
mod response;
mod vllm;

use axum::Router;
use axum::body::Body;
use quire_proto::v1::generation_server::GenerationServer;
use quire_proto::vllm::grpc::engine::vllm_engine_server::VllmEngineServer;
use tonic::Status;
use tonic::service::Routes;
use tonic_health::ServingStatus;
use tonic_health::pb::health_server::HealthServer;
use tonic_health::server::HealthReporter;
use tower_http::catch_panic::CatchPanicLayer;

use super::LARGEST_REQUEST;
use super::registry::Registry;
use crate::generation::Generator;

use generation::GenerationService;
use vllm::VllmService;

pub use vllm::TokenizerFiles;

/// The services whose health says whether new work is welcome; the empty name stands for the whole server.
const SERVICES: [&str; 3] = ["", "quire.v1.Generation", "vllm.grpc.engine.VllmEngine"];
/// No service: the name whose health says whether the engine lives, draining or not, for probes that would restart the process.
const LIVENESS: &str = "liveness";

/// What `grpc.health.v1` says; clones refer to the same.
#[derive(Debug, Clone)]
pub(super) struct Health(HealthReporter);

impl Health {
    pub fn new() -> Self {
        Self(HealthReporter::new())
    }

    /// Whether the engine lives.
    pub async fn live(&self, live: bool) {
        self.set(LIVENESS, live).await;
    }

    /// Whether new work is welcome.
    pub async fn serving(&self, serving: bool) {
        for service in SERVICES {
            self.set(service, serving).await;
        }
    }

    async fn set(&self, service: &str, serving: bool) {
        let status = if serving {
            ServingStatus::Serving
        } else {
            ServingStatus::NotServing
        };
        self.0.set_service_status(service, status).await;
    }
}

/// All services.
pub(super) fn router(
    generator: Generator,
    health: Health,
    tokenizer_files: Option<TokenizerFiles>,
) -> Router {
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(quire_proto::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    // One for both: an id is live or not, whatever its request came by.
    let registry = Registry::default();
    let vllm = VllmService::new(generator.clone(), registry.clone(), tokenizer_files);
    let vllm = VllmEngineServer::new(vllm).max_decoding_message_size(LARGEST_REQUEST);
    let service = GenerationService::new(generator, registry);
    let service = GenerationServer::new(service).max_decoding_message_size(LARGEST_REQUEST);
    let health = tonic_health::server::HealthService::from_health_reporter(health.0);
    let described = "the descriptors are made when quire is built, and a test reads them";
    let mut routes = Routes::new(service);
    routes = routes
        .add_service(vllm)
        .add_service(HealthServer::new(health))
        .add_service(reflection().build_v1().expect(described))
        .add_service(reflection().build_v1alpha().expect(described));
    routes
        .into_axum_router()
        .layer(axum::middleware::from_fn(arrival::gathered))
        .layer(CatchPanicLayer::custom(|_| {
            Status::internal("the handler panicked; the server's log says where")
                .into_http::<Body>()
        }))
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_descriptors_that_reflection_serves_can_be_read() {
        let builder = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(quire_proto::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET);
        assert!(builder.build_v1().is_ok());
    }
}
