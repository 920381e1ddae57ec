//! Other people's programs: where they are, and what they printed.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::Context;

use super::child::ends_with_us;

/// Looks for a program in `folder`, or where the shell would.
pub fn find(folder: Option<&Path>, name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = match folder {
        Some(folder) => vec![folder.to_path_buf()],
        None => std::env::split_paths(&path).collect(),
    };
    folders
        .into_iter()
        .map(|folder| folder.join(name))
        .find(|program| program.is_file())
}

/// Runs a program to its end; what it wrote to standard output.
///
/// # Errors
/// It cannot be started or failed; the message ends with the last lines of what it said.
pub fn output(program: &Path, arguments: &[String]) -> anyhow::Result<String> {
    let line = || format!("{} {}", program.display(), arguments.join(" "));
    let done = ends_with_us(Command::new(program).args(arguments))
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start {}", program.display()))?;
    anyhow::ensure!(
        done.status.success(),
        "{} ended with {}:\n{}",
        line(),
        done.status,
        tail(&String::from_utf8_lossy(&done.stderr))
    );
    String::from_utf8(done.stdout).with_context(|| format!("what {} printed", line()))
}

/// The last lines.
pub fn tail(text: &str) -> String {
    const LINES: usize = 12;
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_fails_says_so_in_its_own_words() {
        let sh = find(None, "sh").expect("a shell is in the path");
        let run = |script: &str| output(&sh, &["-c".to_owned(), script.to_owned()]);
        assert_eq!(run("echo out; echo err >&2").unwrap(), "out\n");
        let error = run("echo 'no such model' >&2; exit 3")
            .unwrap_err()
            .to_string();
        assert!(error.contains("no such model"), "{error}");
        assert!(find(None, "no-program-has-this-name").is_none());
        assert!(find(Some(Path::new("/nowhere")), "sh").is_none());
    }
}
