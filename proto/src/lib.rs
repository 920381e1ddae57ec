//! The gRPC services of quire: messages, clients and servers generated from `proto/`, and the descriptors that reflection serves.

#![allow(
    missing_docs,
    clippy::pedantic,
    reason = "generated from .proto files, which carry the documentation"
)]

/// `quire.v1`: generation from text, chat or token ids.
pub mod v1 {
    tonic::include_proto!("quire.v1");
}

/// An encoded `FileDescriptorSet` of every service here, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
