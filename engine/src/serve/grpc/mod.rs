//! gRPC: `quire.v1.Generation`, `grpc.health.v1` and reflection on one listener.

mod generation;
mod request;
mod response;

use axum::Router;
use axum::body::Body;
use quire_proto::v1::generation_server::GenerationServer;
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

/// The services whose health is reported; the empty name stands for the whole server.
const SERVICES: [&str; 2] = ["", "quire.v1.Generation"];

/// What `grpc.health.v1` says; clones refer to the same.
#[derive(Debug, Clone)]
pub(super) struct Health(HealthReporter);

impl Health {
    pub fn new() -> Self {
        Self(HealthReporter::new())
    }

    pub async fn serving(&self, serving: bool) {
        let status = if serving {
            ServingStatus::Serving
        } else {
            ServingStatus::NotServing
        };
        for service in SERVICES {
            self.0.set_service_status(service, status).await;
        }
    }
}

/// All services.
pub(super) fn router(generator: Generator, health: Health) -> Router {
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(quire_proto::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let service = GenerationService::new(generator, Registry::default());
    let service = GenerationServer::new(service).max_decoding_message_size(LARGEST_REQUEST);
    let health = tonic_health::server::HealthService::from_health_reporter(health.0);
    let described = "the descriptors are made when quire is built, and a test reads them";
    let mut routes = Routes::new(service);
    routes = routes
        .add_service(HealthServer::new(health))
        .add_service(reflection().build_v1().expect(described))
        .add_service(reflection().build_v1alpha().expect(described));
    routes
        .into_axum_router()
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
