//! `quire-bench peers`: the same work for us and for another engine, in turn, and the ratios.
//!
//! In go model files and the programs of peers; out come our speed and theirs, the ratio with the bar it is to reach, and the share of the
//! machine's limit. **Invariant:** a peer is never crippled: it gets the options its authors recommend, and work that is the same as ours by what is
//! computed, not by what the options are called. Who is not installed is skipped by name.

mod bars;
mod child;
mod contender;
mod engine;
mod figures;
mod llama;
mod program;
mod quiet;
mod ratio;
mod report;
mod serve;
mod server;
mod work;

use clap::{Args, Subcommand};

/// Run the same work here and in another engine, in turn, and print the ratios
#[derive(Debug, Clone, Args)]
pub struct Arguments {
    #[command(subcommand)]
    kind: Kind,
}

#[derive(Debug, Clone, Subcommand)]
enum Kind {
    Engine(engine::Arguments),
    Serve(serve::Arguments),
}

/// Runs the comparison and prints it.
///
/// # Errors
/// A model cannot be loaded, or a peer that is there failed.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    match &arguments.kind {
        Kind::Engine(arguments) => engine::run(arguments),
        Kind::Serve(arguments) => serve::run(arguments),
    }
}
