//! A hostile `tokenizer.json`, and after its first zero byte a hostile `tokenizer_config.json`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use quire::tokenizer::Tokenizer;
use quire_fuzz::{Directory, exercise};

thread_local!(static DIRECTORY: Directory = Directory::default());

fuzz_target!(|bytes: &[u8]| {
    quire_fuzz::only_what_escapes_counts();
    let mut parts = bytes.splitn(2, |&byte| byte == 0);
    let tokenizer = parts.next().unwrap_or_default();
    if let Ok(tokenizer) = Tokenizer::from_json(tokenizer) {
        exercise(&tokenizer);
    }
    if let Some(config) = parts.next() {
        DIRECTORY.with(|directory| {
            directory.write("tokenizer_config.json", config);
            directory.open(None);
        });
    }
});
