//! Standard output, whose reader may leave before the end, and words beside it for whoever watches.

use std::io::{ErrorKind, Write};

use anyhow::Context;

/// Prints text at once; whether somebody reads on. Who has closed the pipe, as `head` does, has seen enough: that is no error.
///
/// # Errors
/// The text has no place: a disk is full, for example.
pub(super) fn print(text: &str) -> anyhow::Result<bool> {
    print_to(&mut std::io::stdout().lock(), text)
}

/// Says something on standard error, where it does not mix with what is asked for. Whether it can be said changes nothing.
pub(super) fn note(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

fn print_to(out: &mut impl Write, text: &str) -> anyhow::Result<bool> {
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(error).context("cannot write to standard output"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An output that fails in one way.
    struct Failing(ErrorKind);

    impl Write for Failing {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(self.0.into())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_reader_who_leaves_is_no_error_and_a_full_disk_is_one() {
        assert!(print_to(&mut Vec::new(), "text").expect("memory takes it"));
        let mut closed = Failing(ErrorKind::BrokenPipe);
        assert!(!print_to(&mut closed, "text").expect("it is no error"));
        let mut full = Failing(ErrorKind::StorageFull);
        let error = print_to(&mut full, "text").expect_err("it is one");
        assert!(error.to_string().contains("standard output"), "{error}");
    }
}
