//! Text in, text out over an [`Engine`]: what every frontend shares.
//!
//! A [`Generator`] takes a [`GenerationRequest`] (text, token ids or a conversation), renders and tokenises it off the async threads, fills in
//! defaults, checks everything, and submits it; the [`Generation`] it returns yields text, tokens and endings. Stop strings are decided
//! here, so are usage and the request's timings. gRPC, HTTP and the command line only translate, so that they cannot differ.
//!
//! **Invariant:** dropping a `Generation` frees what the request holds; a frontend has cancellation by dropping.

mod conversation;
mod error;
mod generator;
mod json_size;
mod observe;
mod output;
mod request;
mod stop;

pub use error::GenerateError;
pub use generator::Generator;
pub(crate) use json_size::{structure_of, structure_of_text};
pub(crate) use observe::{SECONDS, labels, refused};
pub use output::{Generation, Output, OutputToken, StopCause, Usage};
pub use request::{
    GenerationRequest, MAX_JSON, MAX_MESSAGES, MAX_STOP_STRINGS, MAX_TOOLS, Prompt, SamplingRequest,
};

#[cfg(doc)]
use crate::core::Engine;
