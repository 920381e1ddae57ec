//! How much memory JSON is going to take, from its text or before it is one.

use std::io;

use serde::Serialize;

/// Bytes of a JSON text without the contents of its strings: parsed, each takes about fifty bytes, where a string takes its own length.
pub(crate) fn structure_of_text(text: &str) -> usize {
    let mut size = Structure::default();
    size.add(text.as_bytes());
    size.bytes
}

/// The same of what is to become JSON, or is parsed already.
pub(crate) fn structure_of(value: &impl Serialize) -> usize {
    let mut size = Structure::default();
    match serde_json::to_writer(&mut size, value) {
        Ok(()) => size.bytes,
        Err(_) => usize::MAX,
    }
}

#[derive(Default)]
struct Structure {
    bytes: usize,
    in_string: bool,
    escaped: bool,
}

impl Structure {
    fn add(&mut self, json: &[u8]) {
        for &byte in json {
            if self.escaped {
                self.escaped = false;
            } else if byte == b'"' {
                self.in_string = !self.in_string;
                self.bytes += 1;
            } else if !self.in_string {
                self.bytes += 1;
            } else {
                self.escaped = byte == b'\\';
            }
        }
    }
}

impl io::Write for Structure {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.add(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn what_is_in_strings_does_not_count() {
        for (value, expected) in [
            (json!([1, 2.5, null, true]), 17),
            (json!("[[[["), 2),
            (json!({"a[": ["\"[\\", "\\\"", "\n", "é"]}), 18),
        ] {
            let text = value.to_string();
            assert_eq!(structure_of(&value), expected, "{text}");
            assert_eq!(structure_of_text(&text), expected, "{text}");
            let inside = Value::String(text);
            assert_eq!(structure_of(&inside), 2, "{inside}");
        }
    }
}
