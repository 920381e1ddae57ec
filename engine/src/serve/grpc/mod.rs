//! gRPC: `quire.v1.Generation`, `grpc.health.v1` and reflection on one listener.

mod generation;
mod request;
mod response;

use std::future::Future;
use std::time::Duration;

use quire_proto::v1::generation_server::GenerationServer;
use tokio::net::TcpListener;
use tonic::transport::server::TcpIncoming;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use super::LARGEST_REQUEST;
use super::registry::Registry;
use crate::generation::Generator;

use generation::GenerationService;

/// The services whose health is reported; the empty name stands for the whole server.
const SERVICES: [&str; 2] = ["", "quire.v1.Generation"];

/// A peer that does not answer pings for as long is gone, and its requests with it.
const KEEPALIVE: Duration = Duration::from_secs(30);

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

/// Serves until `closed` resolves and the open calls have ended.
///
/// # Errors
/// The listener failed.
pub(super) async fn serve(
    listener: TcpListener,
    generator: Generator,
    health: Health,
    closed: impl Future<Output = ()>,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(quire_proto::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let service = GenerationService::new(generator, Registry::default());
    let service = GenerationServer::new(service).max_decoding_message_size(LARGEST_REQUEST);
    let health = tonic_health::server::HealthService::from_health_reporter(health.0);
    tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        // One gateway's connection may carry all of the load.
        .max_concurrent_streams(Some(8192))
        .add_service(tonic_health::pb::health_server::HealthServer::new(health))
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?)
        .add_service(service)
        .serve_with_incoming_shutdown(TcpIncoming::from(listener).with_nodelay(Some(true)), closed)
        .await?;
    Ok(())
}
