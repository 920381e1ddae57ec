//! Settings in environment variables: an empty one is none, and what is wrong in one is said with its name.

use std::ffi::OsString;

use clap::builder::{Resettable, StyledStr};
use clap::error::{ContextKind, ContextValue};
use clap::{Command, Error};

/// A command whose flags do not see variables that are empty, as `${QUIRE_MODEL:-}` makes them in a compose file.
pub(super) fn without_empty(command: Command) -> Command {
    command.mut_subcommands(|command| {
        command.mut_args(|arg| match arg.get_env().and_then(std::env::var_os) {
            Some(value) if value.is_empty() => arg.env(Resettable::Reset),
            _ => arg,
        })
    })
}

/// An error of the command line that says which variable a value came from, if it did.
pub(super) fn named(mut error: Error, command: &Command) -> Error {
    if let Some(variable) = variable(&error, command, |name| std::env::var_os(name)) {
        let tip = StyledStr::from(format!(
            "the value is that of the environment variable {variable}"
        ));
        error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![tip]));
    }
    error
}

/// The variable of the flag that an error is about, if the value that is wrong is its.
fn variable(
    error: &Error,
    command: &Command,
    value: impl Fn(&str) -> Option<OsString>,
) -> Option<String> {
    let said = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.as_str()),
        _ => None,
    };
    let (flag, wrong) = (
        said(ContextKind::InvalidArg)?,
        said(ContextKind::InvalidValue)?,
    );
    // `--threads <N>`, as it is shown to people.
    let long = flag.strip_prefix("--")?.split(' ').next()?;
    let arg = command
        .get_subcommands()
        .flat_map(Command::get_arguments)
        .find(|arg| arg.get_long() == Some(long))?;
    let name = arg.get_env()?.to_str()?;
    (value(name)?.to_string_lossy() == wrong).then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::cli::Cli;

    #[test]
    fn a_wrong_value_is_said_to_be_a_variables_only_if_it_is() {
        let command = Cli::command();
        let parsed = command
            .clone()
            .try_get_matches_from(["quire", "serve", "--threads", "abc"]);
        let error = parsed.expect_err("it is no number");
        let of = |value: Option<&str>| {
            variable(&error, &command, |name| {
                assert_eq!(name, "QUIRE_THREADS");
                value.map(OsString::from)
            })
        };
        assert_eq!(of(Some("abc")).as_deref(), Some("QUIRE_THREADS"));
        assert_eq!(of(Some("2")), None);
        assert_eq!(of(None), None);
    }
}
