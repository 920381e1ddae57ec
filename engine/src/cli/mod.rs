//! The command line: one file per sub-command, flags that several share in `model_args`.

mod demo;
mod environment;
mod logging;
mod model_args;
mod output;
mod progress;
mod run;
mod serve;
mod show;
mod size;

use std::process::ExitCode;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{ArgMatches, CommandFactory, Error, FromArgMatches, Parser, Subcommand};

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
    let Cli { command } = parsed().unwrap_or_else(|error| error.exit());
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

/// Waits until a device was given back, see [`crate::core::Engine::gone`]; not for ever.
fn wait_for(runtime: &tokio::runtime::Runtime, gone: impl Future<Output = ()>) {
    const PATIENCE: Duration = Duration::from_secs(5);
    // Too late or in time: the process ends.
    let _ = runtime.block_on(async { tokio::time::timeout(PATIENCE, gone).await });
}

/// What this process was started with.
fn parsed() -> Result<Cli, Error> {
    let mut command = environment::without_empty(Cli::command());
    let matches = command
        .try_get_matches_from_mut(std::env::args_os())
        .map_err(|error| environment::named(error, &command))?;
    if names_two_models(&matches) {
        let text = "the model is given twice, with --model and without";
        return Err(command.error(ErrorKind::ArgumentConflict, text));
    }
    Cli::from_arg_matches(&matches).map_err(|error| error.format(&mut command))
}

/// Whether the command line itself has both `MODEL` and `--model`. (A variable is a default, which either replaces.)
fn names_two_models(matches: &ArgMatches) -> bool {
    matches.subcommand().is_some_and(|(_, given)| {
        ["path", "model"].iter().all(|id| {
            matches!(given.try_contains_id(id), Ok(true))
                && given.value_source(id) == Some(ValueSource::CommandLine)
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

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
            if matches!(id, "help" | "version") || arg.is_positional() {
                continue;
            }
            let env = arg.get_env().map(|env| env.to_string_lossy().into_owned());
            let flag = arg.get_long().unwrap_or_default();
            let expected = format!("QUIRE_{}", flag.to_uppercase().replace('-', "_"));
            assert_eq!(env, Some(expected), "--{flag}");
        }
    }

    #[test]
    fn a_model_is_given_with_its_flag_or_without_it_and_not_both() {
        let two = |line: &[&str]| {
            let matches = Cli::command().try_get_matches_from(line);
            names_two_models(&matches.expect("it parses"))
        };
        for command in ["serve", "show"] {
            assert!(two(&["quire", command, "a", "--model", "b"]));
            assert!(!two(&["quire", command, "a"]));
            assert!(!two(&["quire", command, "--model", "b"]));
            assert!(!two(&["quire", command]));
        }
        assert!(!two(&["quire", "run", "a", "--model", "b"]));
    }
}
