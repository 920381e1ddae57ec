//! A hostile GGUF file: header, metadata, tokenizer, tensors.
#![no_main]

use libfuzzer_sys::fuzz_target;
use quire::checkpoint::gguf_tokenizer;
use quire_fuzz::{Directory, exercise};

thread_local!(static DIRECTORY: Directory = Directory::default());

fuzz_target!(|bytes: &[u8]| {
    quire_fuzz::only_what_escapes_counts();
    DIRECTORY.with(|directory| {
        directory.write("model.gguf", bytes);
        directory.open(Some("model.gguf"));
        // Most files have no model, and still a vocabulary.
        if let Ok(tokenizer) = gguf_tokenizer(&directory.path("model.gguf")) {
            exercise(&tokenizer);
        }
    });
});
