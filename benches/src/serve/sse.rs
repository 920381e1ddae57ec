//! Server-sent events, as far as streamed completions use them: the `data` of each event.
//!
//! <https://html.spec.whatwg.org/multipage/server-sent-events.html>: lines end with LF, CR LF or CR; an empty line ends an event; several `data`
//! lines of one event are joined by LF; a line that begins with a colon is a comment. Bytes come in pieces of any size.

/// Takes bytes as they come.
#[derive(Debug, Default)]
pub struct Parser {
    /// The unfinished line.
    line: Vec<u8>,
    /// The data of the unfinished event; `None`: it has none so far.
    data: Option<String>,
    /// The last line ended with CR: a LF that follows belongs to it.
    after_cr: bool,
}

impl Parser {
    /// Takes the next bytes and hands on the data of each event they complete.
    pub fn push(&mut self, bytes: &[u8], mut event: impl FnMut(String)) {
        for &byte in bytes {
            let after_cr = std::mem::replace(&mut self.after_cr, byte == b'\r');
            match byte {
                b'\n' if after_cr => {}
                b'\n' | b'\r' => {
                    if let Some(data) = self.end_line() {
                        event(data);
                    }
                }
                _ => self.line.push(byte),
            }
        }
    }

    fn end_line(&mut self) -> Option<String> {
        if self.line.is_empty() {
            return self.data.take();
        }
        let line = String::from_utf8_lossy(&self.line);
        let (field, value) = line.split_once(':').unwrap_or((&line, ""));
        if field == "data" {
            let value = value.strip_prefix(' ').unwrap_or(value);
            match &mut self.data {
                Some(data) => {
                    data.push('\n');
                    data.push_str(value);
                }
                None => self.data = Some(value.to_owned()),
            }
        }
        self.line.clear();
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &str = ": a comment\n\ndata: {\"a\": 1}\n\ndata:two\r\ndata: lines\r\n\r\nevent: x\nid: 7\ndata: héllo\r\rdata\n\ndata: [DONE]\n\ndata: cut off";
    const EVENTS: [&str; 5] = ["{\"a\": 1}", "two\nlines", "héllo", "", "[DONE]"];

    #[test]
    fn events_are_the_same_however_the_bytes_are_cut() {
        for size in 1..=STREAM.len() {
            let mut parser = Parser::default();
            let mut events = Vec::new();
            for piece in STREAM.as_bytes().chunks(size) {
                parser.push(piece, |event| events.push(event));
            }
            assert_eq!(events, EVENTS, "in pieces of {size}");
        }
    }
}
