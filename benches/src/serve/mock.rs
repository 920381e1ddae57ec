//! [`Mock`]: a server for tests, which answers as it is told, right or wrong.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

/// What is done with a request: these bytes are written as they are.
pub struct Reply {
    bytes: String,
    /// What becomes of the connection then.
    then: Then,
}

enum Then {
    Keep,
    Close,
    /// Nothing more comes, and it stays open until the client closes it.
    Hold,
}

impl Reply {
    pub fn keep(bytes: impl Into<String>) -> Self {
        let (bytes, then) = (bytes.into(), Then::Keep);
        Self { bytes, then }
    }

    pub fn close(bytes: impl Into<String>) -> Self {
        let (bytes, then) = (bytes.into(), Then::Close);
        Self { bytes, then }
    }

    pub fn hold(bytes: impl Into<String>) -> Self {
        let (bytes, then) = (bytes.into(), Then::Hold);
        Self { bytes, then }
    }
}

/// The head of a stream that ends with its connection.
pub const STREAM: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n";

/// A refusal.
pub fn refusal() -> String {
    "HTTP/1.1 429 Too Many Requests\r\ncontent-length: 4\r\n\r\nfull".to_owned()
}

/// An event of a completion.
pub fn event(data: &Value) -> String {
    format!("data: {data}\n\n")
}

/// A piece of an answer.
pub fn piece() -> String {
    event(&json!({"choices": [{"text": "a", "finish_reason": null}]}))
}

/// Why it ends, and what it was.
pub fn end(reason: &str, tokens: usize) -> String {
    event(&json!({"choices": [{"text": "", "finish_reason": reason}]}))
        + &event(
            &json!({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": tokens}}),
        )
        + "data: [DONE]\n\n"
}

/// A good answer of so many tokens, after which the connection is good for another.
pub fn answer(tokens: usize) -> String {
    let body = piece().repeat(tokens) + &end("length", tokens);
    format!(
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// A server on loopback, until the tests end.
pub struct Mock {
    pub url: String,
    requests: Arc<Mutex<Vec<Value>>>,
}

impl Mock {
    /// Answers the `n`th request (from 0) as `reply` says.
    pub fn start(reply: impl Fn(usize, &Value) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("it was just bound");
        let requests = Arc::default();
        let (seen, reply) = (Arc::clone(&requests), Arc::new(reply));
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (seen, reply) = (Arc::clone(&seen), Arc::clone(&reply));
                // A client that goes away is no failure of the mock.
                std::thread::spawn(move || drop(serve(&stream, &seen, &*reply)));
            }
        });
        Self {
            url: format!("http://{address}"),
            requests,
        }
    }

    /// The bodies of all requests so far.
    pub fn requests(&self) -> Vec<Value> {
        self.requests.lock().unwrap().clone()
    }
}

fn serve(
    stream: &TcpStream,
    seen: &Mutex<Vec<Value>>,
    reply: &dyn Fn(usize, &Value) -> Reply,
) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    loop {
        let mut length = 0;
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line)? == 0 {
                return Ok(());
            }
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().expect("a length");
            }
            if line == "\r\n" {
                break;
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body)?;
        let body: Value = serde_json::from_slice(&body).expect("JSON");
        let n = {
            let mut seen = seen.lock().unwrap();
            seen.push(body.clone());
            seen.len() - 1
        };
        let Reply { bytes, then } = reply(n, &body);
        (&mut &*stream).write_all(bytes.as_bytes())?;
        match then {
            Then::Keep => {}
            Then::Close => return Ok(()),
            Then::Hold => return reader.read_to_end(&mut Vec::new()).map(drop),
        }
    }
}
