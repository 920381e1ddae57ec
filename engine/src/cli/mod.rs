//! The command line: one file per sub-command, flags that several share in `model_args`.

mod demo;
mod logging;
mod model_args;
mod output;
mod progress;
mod run;
mod serve;
mod show;
mod size;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// A high-throughput, batched serving engine for language models.
///
/// Without --model, every command uses the small demo model inside the binary, so they all work offline. Try `quire demo` first.
#[derive(Debug, Parser)]
#[command(
    name = "quire",
    version,
    max_term_width = 120,
    propagate_version = true
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve a model to gRPC and HTTP (OpenAI API) clients until SIGTERM
    Serve(serve::ServeArgs),
    /// Answer one prompt, or chat when there is none
    Run(run::RunArgs),
    /// Say what a model is and how it is stored, without loading it
    Show(show::ShowArgs),
    /// Watch 64 clients be served at once, and check that each got the answer it gets alone
    Demo(demo::DemoArgs),
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let command = Cli::parse().command;
    let done = match command {
        Command::Serve(args) => serve::serve(&args),
        Command::Run(args) => run::run(&args),
        Command::Show(args) => show::show(&args),
        Command::Demo(args) => demo::demo(&args),
    };
    match done {
        Ok(code) => code,
        Err(error) => {
            output::note(&format!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::Cli;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_flag_of_serve_is_an_environment_variable_too() {
        let command = Cli::command();
        let serve = command.find_subcommand("serve").expect("serve exists");
        for arg in serve.get_arguments() {
            let id = arg.get_id().as_str();
            if matches!(id, "help" | "version") {
                continue;
            }
            let env = arg.get_env().map(|env| env.to_string_lossy().into_owned());
            let flag = arg.get_long().unwrap_or_default();
            let expected = format!("QUIRE_{}", flag.to_uppercase().replace('-', "_"));
            assert_eq!(env, Some(expected), "--{flag}");
        }
    }
}
