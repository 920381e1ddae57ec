//! quire's instruments. `serve` puts a load on a running server, ours or another, and says what its users would see; `engine` times
//! the decoder by itself and says how close it comes to what the machine can do, `gpu` (feature `cuda`) on a GPU; `peers` gives other engines the
//! same work; `overhead` asks what the engine costs beside the model.
//!
//! A number leaves here with everything one needs to repeat it: the table for people, `--json` for comparisons.

mod engine;
#[cfg(feature = "cuda")]
mod gpu;
mod median;
mod numbers;
mod overhead;
mod peers;
mod plot;
mod random;
mod serve;

use clap::{Parser, Subcommand};

/// quire's instruments: what users of a server see, and how close the engine comes to what the machine can do
#[derive(Debug, Parser)]
#[command(name = "quire-bench", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Serve(Box<serve::Arguments>),
    Engine(engine::Arguments),
    #[cfg(feature = "cuda")]
    Gpu(gpu::Arguments),
    Overhead(overhead::Arguments),
    Peers(peers::Arguments),
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().command {
        Command::Serve(arguments) => serve::run(&arguments),
        Command::Engine(arguments) => engine::run(&arguments),
        #[cfg(feature = "cuda")]
        Command::Gpu(arguments) => gpu::run(&arguments),
        Command::Overhead(arguments) => overhead::run(&arguments),
        Command::Peers(arguments) => peers::run(&arguments),
    }
}
