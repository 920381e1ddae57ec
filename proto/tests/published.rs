//! Our text of the gateway's protocol against the one that is published: see `published/make.py`.
#![allow(missing_docs, clippy::unwrap_used)]

use std::collections::BTreeMap;

use prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage};
use prost_types::{DescriptorProto, FileDescriptorSet};

const PUBLISHED: &[u8] = include_bytes!("published/descriptors.bin");
const MESSAGES: &str = include_str!("published/messages.txt");
const PACKAGES: [&str; 2] = ["smg.grpc.common", "vllm.grpc.engine"];

/// Everything that decides what is on the wire: a name, and what it stands for.
fn contract(descriptors: &[u8]) -> BTreeMap<String, String> {
    let mut contract = BTreeMap::new();
    let set = FileDescriptorSet::decode(descriptors).unwrap();
    for file in &set.file {
        let package = file.package();
        if !PACKAGES.contains(&package) {
            continue;
        }
        for message in &file.message_type {
            add_message(&mut contract, package, message);
        }
        for kind in &file.enum_type {
            for value in &kind.value {
                let name = format!("{package}.{}.{}", kind.name(), value.name());
                contract.insert(name, value.number().to_string());
            }
        }
        for service in &file.service {
            for method in &service.method {
                let stream = |streams| if streams { "stream " } else { "" };
                contract.insert(
                    format!("{package}.{}/{}", service.name(), method.name()),
                    format!(
                        "{}{} -> {}{}",
                        stream(method.client_streaming()),
                        method.input_type(),
                        stream(method.server_streaming()),
                        method.output_type()
                    ),
                );
            }
        }
    }
    contract
}

fn add_message(contract: &mut BTreeMap<String, String>, scope: &str, message: &DescriptorProto) {
    let scope = format!("{scope}.{}", message.name());
    contract.insert(scope.clone(), "message".to_owned());
    for field in &message.field {
        let oneof = field
            .oneof_index
            .map(|at| message.oneof_decl[at as usize].name());
        contract.insert(
            format!("{scope}.{}", field.name()),
            format!(
                "{} = {:?} {:?} {} in {oneof:?}",
                field.number(),
                field.label(),
                field.r#type(),
                field.type_name()
            ),
        );
    }
    for nested in &message.nested_type {
        add_message(contract, &scope, nested);
    }
}

#[test]
fn names_numbers_and_types_are_the_published_ones() {
    let published = contract(PUBLISHED);
    let ours = contract(quire_proto::FILE_DESCRIPTOR_SET);
    assert!(published.len() > 200, "{} entries", published.len());
    for (name, meaning) in &published {
        assert_eq!(ours.get(name), Some(meaning), "{name}");
    }
    for name in ours.keys() {
        assert!(published.contains_key(name), "{name} is ours alone");
    }
}

/// Decodes as the type of that name and encodes again.
macro_rules! reencoded {
    ($name:expr, $bytes:expr; $($module:ident: $($message:ident)*;)*) => {
        match $name {
            $($(
                name if name == concat!(package!($module), ".", stringify!($message)) =>
                    <module!($module, $message)>::decode($bytes).unwrap().encode_to_vec(),
            )*)*
            other => panic!("{other} is in messages.txt and not in this test"),
        }
    };
}

macro_rules! package {
    (common) => {
        "smg.grpc.common"
    };
    (engine) => {
        "vllm.grpc.engine"
    };
}

macro_rules! module {
    (common, $message:ident) => {
        quire_proto::smg::grpc::common::$message
    };
    (engine, $message:ident) => {
        quire_proto::vllm::grpc::engine::$message
    };
}

fn bytes(hex: &str) -> Vec<u8> {
    (0..hex.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap())
        .collect()
}

#[test]
fn messages_of_the_published_stubs_are_read_and_written_back_the_same() {
    let published = DescriptorPool::decode(PUBLISHED).unwrap();
    let mut count = 0;
    for line in MESSAGES.lines() {
        let (name, hex) = line.split_once(' ').unwrap();
        let bytes = bytes(hex);
        let again = reencoded!(name, &bytes[..];
            common: GetTokenizerRequest GetTokenizerChunk SubscribeKvEventsRequest KvEventBatch EngineLoad EngineMemory EngineQueues
                EngineSpeculative EngineLora EngineDisaggregation KvSnapshotChunk KvCacheEvent KvBlocksStored KvBlockExtraKey
                KvMultimodalKey KvBlock KvBlocksRemoved KvCacheCleared FlushCacheRequest FlushCacheResponse StartProfileRequest
                StopProfileRequest ProfileResponse ShmHandle RemoteTensorHandle;
            engine: SamplingParams ChoiceConstraint TokenizedInput TensorData PlaceholderRange MultimodalInputs MediaRef MediaRefs
                GenerateRequest KvTransferParams OutputLogProbs InputLogProbs InputTokenLogProb TopLogProbs GenerateResponse
                GenerateStreamChunk GenerateComplete MediaIdentity EmbedRequest EmbedResponse HealthCheckRequest
                HealthCheckResponse AbortRequest AbortResponse GetModelInfoRequest GetModelInfoResponse GetServerInfoRequest
                GetServerInfoResponse GetLoadsRequest GetLoadsResponse SchedulerLoad;
        );
        // A oneof may stand elsewhere in the bytes, a default may be left out; what they say to who reads them by the published descriptors must be the same.
        let read = |bytes: &[u8]| {
            let kind = published.get_message_by_name(name).unwrap();
            let message = DynamicMessage::decode(kind, bytes).unwrap();
            assert_eq!(message.unknown_fields().count(), 0, "{name}");
            message
        };
        assert_eq!(read(&again), read(&bytes), "{name}");
        count += 1;
    }
    assert!(count > 60, "{count} messages");
}
