//! A hostile `config.json` beside whole files.
#![no_main]

use libfuzzer_sys::fuzz_target;
use quire_fuzz::Directory;

thread_local!(static DIRECTORY: Directory = Directory::default());

fuzz_target!(|bytes: &[u8]| {
    quire_fuzz::only_what_escapes_counts();
    DIRECTORY.with(|directory| {
        directory.write("config.json", bytes);
        directory.open(None);
    });
});
