//! quire: a high-throughput, batched serving engine for language models.
//!
//! `ARCHITECTURE.md` at the root of the repository is the map. In short: [`checkpoint`] opens a model, [`model`] is the decoder that
//! runs it on a backend, [`core`] is the engine loop that batches requests, [`generation`] turns text into requests and tokens into text,
//! [`serve`] speaks the protocols, [`cli`] is the command line.

mod blocking;
pub mod checkpoint;
pub mod cli;
pub mod core;
pub mod generation;
pub mod model;
pub mod sampling;
pub mod serve;
pub mod tokenizer;
