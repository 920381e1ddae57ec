//! The gRPC services of quire: messages, clients and servers generated from `proto/`, and the descriptors that reflection serves.

#![allow(
    missing_docs,
    clippy::pedantic,
    clippy::large_enum_variant,
    reason = "generated from .proto files, which carry the documentation"
)]

/// `quire.v1`: generation from text, chat or token ids.
pub mod v1 {
    tonic::include_proto!("quire.v1");
}

/// What other engines speak. The modules are nested as their packages are: the generated code refers to its neighbours by path.
pub mod vllm {
    pub mod grpc {
        /// `vllm.grpc.engine`: vLLM's engine as the Shepherd model gateway speaks it.
        pub mod engine {
            tonic::include_proto!("vllm.grpc.engine");
        }
    }
}

/// What the engines behind the Shepherd model gateway have in common.
pub mod smg {
    pub mod grpc {
        /// `smg.grpc.common`: tokenizer artefacts, KV-cache events, load records.
        pub mod common {
            tonic::include_proto!("smg.grpc.common");
        }
    }
}

/// An encoded `FileDescriptorSet` of every service here, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
