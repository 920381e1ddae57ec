//! Logs: human by default, JSON on request, always on standard error.

use std::ffi::OsString;
use std::io::IsTerminal;

use clap::ValueEnum;
use tracing_subscriber::EnvFilter;

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum LogFormat {
    /// For people
    Text,
    /// One JSON object a line
    Json,
}

/// Starts logging. `level` is a level (`info`) or a filter (`quire=debug,tonic=warn`).
///
/// # Errors
/// The filter does not parse.
pub(super) fn start(format: LogFormat, level: &str) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(level).map_err(|error| {
        anyhow::anyhow!("--log-level `{level}`: {error}; write a level (error, warn, info, debug, trace) or a filter such as quire=debug")
    })?;
    let logs = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        // What cannot be written is lost, and no reason to panic: a server whose terminal is closed still drains.
        .log_internal_errors(false)
        .with_ansi(
            std::io::stderr().is_terminal() && !is_colour_unwanted(std::env::var_os("NO_COLOR")),
        );
    let started = match format {
        LogFormat::Text => logs.try_init(),
        LogFormat::Json => logs.json().flatten_event(true).try_init(),
    };
    started.map_err(|error| anyhow::anyhow!("logging: {error}"))
}

/// What the variable `NO_COLOR` says, by <https://no-color.org>: anything but nothing.
fn is_colour_unwanted(no_color: Option<OsString>) -> bool {
    no_color.is_some_and(|value| !value.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_are_unwanted_where_no_color_is_set_to_anything() {
        assert!(is_colour_unwanted(Some("1".into())));
        assert!(is_colour_unwanted(Some("0".into())));
        assert!(!is_colour_unwanted(Some(OsString::new())));
        assert!(!is_colour_unwanted(None));
    }
}
