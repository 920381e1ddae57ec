//! The engine: one OS thread that owns the model, the KV cache and the scheduler, and a cloneable handle to it.
//!
//! [`Engine::submit`] hands a [`Request`] over a bounded channel and returns its [`RequestStream`]; the thread turns the crank
//! (receive, schedule, forward, sample, complete, publish) until every handle is gone and every stream has ended. Token ids
//! go in and come out: no text, no protocol, no async runtime lives here.
//!
//! How it ends: [`Engine::drain`] refuses what is new, and [`Engine::drained`] resolves when what was accepted has finished. Dropping
//! a stream aborts its request; dropping the last handle lets the thread finish and exit.

mod ahead;
mod config;
mod deadlines;
mod device;
mod engine_loop;
mod groups;
mod handle;
mod kv_events;
mod memory;
mod pace;
mod ranks;
mod request;
mod rows;
mod sequence;
mod start;
mod step;
mod stream;

pub use config::{EngineConfig, StartError, StepReport};
pub use device::{Device, DeviceOptions};
pub use handle::{Engine, EngineStats, ModelInfo};
pub use kv_events::{KvEventBatch, KvEvents, KvNews, KvSnapshot};
pub use memory::available as available_memory;
pub use request::{Event, FinishReason, Request, SubmitError};
pub use stream::{AbortHandle, RequestStream};
