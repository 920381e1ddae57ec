//! `quire run`: one answer to one prompt, or a chat.

use std::fs::File;
use std::io::{IsTerminal, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use rustyline::error::ReadlineError;
use serde_json::{Value, json};

use super::logging::{self, LogFormat};
use super::model_args::ModelArgs;
use super::output;
use crate::core::FinishReason;
use crate::generation::{GenerateError, Generation, GenerationRequest, Generator, Output, Prompt};
use crate::tokenizer::Conversation;

/// What helps where a conversation has filled the context.
const ROOM: &str = "/clear forgets the conversation and makes room";
/// What a chat understands beside messages.
const HELP: &str = "\
/clear   forgets the conversation
/exit    ends, as Ctrl-D does
/help    this
Ctrl-C   stops an answer, and forgets it with its question
";

/// How long standard input may take to end before somebody is told what is waited for.
const PATIENCE: Duration = Duration::from_secs(3);

/// Flags of `quire run`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  quire run 'What does `Vec::push` do?'
  quire run --model ./Qwen3-0.6B --temperature 0.7 'Write a haiku about pages'
  git diff | quire run --model ./Qwen3-4B 'Write a commit message for this diff:'
  quire run                                       chat; Ctrl-D ends it

Standard input is read to its end if it is a pipe or a file; beside a PROMPT, anything else (a terminal, a socket, /dev/null) is left alone. A script
whose own input is not meant for the model adds `< /dev/null`.")]
pub(super) struct RunArgs {
    /// What to answer. Text that comes through a pipe or from a file goes after it, or is the prompt if there is none; without either, a chat
    prompt: Option<String>,

    #[command(flatten)]
    model: ModelArgs,

    /// An instruction before the conversation
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,

    /// Continue the prompt as plain text instead of answering it as a message
    #[arg(long)]
    raw: bool,

    /// Most tokens of an answer [default: what is left of the context]
    #[arg(long, value_name = "N")]
    max_tokens: Option<u32>,

    /// 0 is always the likeliest token [default: the model's recommendation]
    #[arg(long, value_name = "T")]
    temperature: Option<f32>,

    /// Only the likeliest tokens that add up to this probability
    #[arg(long, value_name = "P")]
    top_p: Option<f32>,

    /// Only the k likeliest tokens
    #[arg(long, value_name = "K")]
    top_k: Option<u32>,

    /// Equal seeds give equal answers [default: a new one each time]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,

    /// Text that ends an answer; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
}

/// Answers.
///
/// # Errors
/// The model cannot be loaded, or refuses the prompt.
pub(super) fn run(args: &RunArgs) -> anyhow::Result<ExitCode> {
    logging::start(LogFormat::Text, "warn")?;
    let asked = asked(args)?;
    let checkpoint = args.model.open()?;
    let engine = args
        .model
        .start(&checkpoint, &args.model.engine_config(), None)?;
    let gone = engine.gone();
    let generator = Generator::new(engine, &checkpoint)?;
    drop(checkpoint);
    // Nobody waits for half a million texts to be given back one by one: the process ends.
    std::mem::forget(Arc::clone(generator.tokenizer()));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let session = Session {
        args,
        chat: generator.has_chat_template() && !args.raw,
        generator,
    };
    let answered = runtime.block_on(async {
        match &asked {
            Some(prompt) => session.once(prompt).await,
            None => session.converse().await,
        }
    });
    drop(session);
    super::wait_for(&runtime, gone);
    answered
}

/// What to answer; `None`: a chat.
fn asked(args: &RunArgs) -> anyhow::Result<Option<String>> {
    if let (Some(prompt), None) = (&args.prompt, &args.model.model)
        && is_path(prompt)
    {
        bail!(
            "`{prompt}` looks like a path and would be the demo model's prompt; a model goes after --model: quire run --model {prompt} ['PROMPT']"
        );
    }
    let stdin = std::io::stdin();
    let sent = match &args.prompt {
        None if stdin.is_terminal() => return Ok(None),
        // The prompt is nowhere else, whatever this is.
        None => read()?,
        Some(_) if is_sent(&stdin) => read()?,
        Some(_) => String::new(),
    };
    let prompt = joined(args.prompt.as_deref().unwrap_or_default(), &sent);
    if prompt.trim().is_empty() {
        bail!(
            "the prompt is empty: write it (quire run 'PROMPT') or send it through a pipe; on a terminal, `quire run` alone is a chat"
        );
    }
    Ok(Some(prompt))
}

/// Whether somebody who names no model has named one here.
fn is_path(prompt: &str) -> bool {
    let path = Path::new(prompt);
    let is_gguf = path.extension().is_some_and(|end| end == "gguf");
    // There may be a question about a file that is not there.
    path.exists() || is_gguf && !prompt.contains(char::is_whitespace)
}

/// Whether an input is a pipe or a file: somebody has put something there, and it ends. What services and schedulers hand on to commands that nobody gave
/// an input is the null device, a socket or a terminal, and the last two never end.
fn is_sent(input: impl AsFd) -> bool {
    let metadata = input
        .as_fd()
        .try_clone_to_owned()
        .and_then(|input| File::from(input).metadata());
    metadata.is_ok_and(|metadata| metadata.is_file() || metadata.file_type().is_fifo())
}

/// All of standard input. A pipe that somebody forgot to close is waited for, but not without a word.
fn read() -> anyhow::Result<String> {
    let (done, end) = mpsc::channel();
    std::thread::spawn(move || {
        let mut text = String::new();
        let read = std::io::stdin().read_to_string(&mut text);
        // Nobody else ends before this does.
        let _ = done.send(read.map(|_| text));
    });
    let read = match end.recv_timeout(PATIENCE) {
        Err(RecvTimeoutError::Timeout) => {
            output::note(
                "reading standard input until it ends; `< /dev/null` if nothing is to be read",
            );
            end.recv().ok()
        }
        read => read.ok(),
    };
    read.context("the thread that reads is gone")?
        .context("standard input is not text")
}

/// A prompt and, a blank line after it, the text it is about.
fn joined(prompt: &str, text: &str) -> String {
    let text = text.trim_end_matches(['\n', '\r']);
    if prompt.is_empty() || text.trim().is_empty() {
        return format!("{prompt}{text}");
    }
    format!("{prompt}\n\n{text}")
}

struct Session<'a> {
    args: &'a RunArgs,
    generator: Generator,
    /// Prompts are messages of a conversation, not text to continue.
    chat: bool,
}

impl Session<'_> {
    async fn once(&self, prompt: &str) -> anyhow::Result<ExitCode> {
        let prompt = if self.chat {
            let mut messages = self.beginning();
            messages.push(json!({"role": "user", "content": prompt}));
            conversation(&messages)
        } else {
            Prompt::Text(prompt.to_owned())
        };
        let answer = self.answer(prompt).await?;
        output::print("\n")?;
        if let Some(cut) = answer.cut {
            output::note(&cut.to_string());
        }
        Ok(ExitCode::SUCCESS)
    }

    /// Reads lines until the end of input; each answer sees all that was said before.
    async fn converse(&self) -> anyhow::Result<ExitCode> {
        if !self.chat {
            anyhow::bail!(
                "the model has no chat template; give a prompt to continue: quire run --raw PROMPT"
            );
        }
        let model = self.generator.engine().model();
        output::print(&format!(
            "{} on {}. /help lists commands, Ctrl-C stops an answer, Ctrl-D ends.\n",
            model.name, model.device
        ))?;
        let mut editor = rustyline::DefaultEditor::new().context("no terminal to read from")?;
        let mut messages = self.beginning();
        loop {
            let line = match editor.readline(">>> ") {
                Ok(line) => line,
                Err(ReadlineError::Interrupted) => {
                    output::print("Ctrl-D or /exit ends the chat.\n")?;
                    continue;
                }
                Err(ReadlineError::Eof) => return Ok(ExitCode::SUCCESS),
                Err(error) => return Err(error).context("reading a line"),
            };
            match line.trim() {
                "" => continue,
                "/help" | "/?" => {
                    output::print(HELP)?;
                    continue;
                }
                "/clear" => {
                    messages = self.beginning();
                    output::print("Forgotten.\n")?;
                    continue;
                }
                "/bye" | "/exit" | "/quit" => return Ok(ExitCode::SUCCESS),
                text if is_command(&line) => {
                    output::print(&format!(
                        "There is no command {text}; /help lists those there are. (A space before it makes it a message.)\n"
                    ))?;
                    continue;
                }
                text => messages.push(json!({"role": "user", "content": text})),
            }
            // Remembering a line fails only where there is no memory for it.
            let _ = editor.add_history_entry(&line);
            let answer = tokio::select! {
                answer = self.answer(conversation(&messages)) => answer,
                _ = tokio::signal::ctrl_c() => {
                    output::print("\n(stopped; the question and what came of its answer are forgotten)\n")?;
                    messages.pop();
                    continue;
                }
            };
            match answer {
                Ok(Answer { text, cut }) => {
                    messages.push(json!({"role": "assistant", "content": text}));
                    output::print("\n")?;
                    if let Some(cut) = cut {
                        output::note(&cut.to_string());
                    }
                    if matches!(cut, Some(Cut::Context(_))) {
                        output::note(ROOM);
                    }
                }
                Err(error) => {
                    output::note(&format!("error: {error:#}"));
                    if let Some(GenerateError::TooLong(_)) = error.downcast_ref() {
                        output::note(ROOM);
                    }
                    messages.pop();
                }
            }
            output::print("\n")?;
        }
    }

    fn beginning(&self) -> Vec<Value> {
        self.args
            .system
            .iter()
            .map(|text| json!({"role": "system", "content": text}))
            .collect()
    }

    /// What an answer of so many tokens was cut by.
    fn cut(&self, tokens: u32) -> Cut {
        if self.args.max_tokens.is_some_and(|most| tokens >= most) {
            Cut::MaxTokens(tokens)
        } else {
            Cut::Context(tokens)
        }
    }

    /// Prints an answer as it comes, for as long as somebody reads.
    async fn answer(&self, prompt: Prompt) -> anyhow::Result<Answer> {
        let mut request = GenerationRequest::new("run", prompt);
        request.sampling.max_tokens = self.args.max_tokens;
        request.sampling.temperature = self.args.temperature;
        request.sampling.top_p = self.args.top_p;
        request.sampling.top_k = self.args.top_k;
        request.sampling.seed = self.args.seed;
        request.stop.clone_from(&self.args.stop);
        let mut generation: Generation = self.generator.generate(request).await?;
        let mut answer = Answer {
            text: String::new(),
            cut: None,
        };
        while let Some(part) = generation.next().await {
            let text = match part {
                Output::Started { .. } | Output::PromptLogprobs(_) => continue,
                Output::Chunk { text, .. } => text,
                Output::Finished {
                    text,
                    reason,
                    completion_tokens,
                    ..
                } => {
                    match reason {
                        FinishReason::Failed => {
                            let text = "the computation failed".to_owned();
                            return Err(GenerateError::Internal(text).into());
                        }
                        FinishReason::Length => answer.cut = Some(self.cut(completion_tokens)),
                        _ => {}
                    }
                    text
                }
            };
            answer.text.push_str(&text);
            if !output::print(&text)? {
                break;
            }
        }
        Ok(answer)
    }
}

/// An answer, and why it is no longer.
struct Answer {
    text: String,
    cut: Option<Cut>,
}

/// What an answer was cut by, after so many tokens.
#[derive(Debug, Clone, Copy)]
enum Cut {
    MaxTokens(u32),
    Context(u32),
}

impl std::fmt::Display for Cut {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::MaxTokens(tokens) => write!(f, "(cut after {tokens} tokens: --max-tokens)"),
            Self::Context(tokens) => {
                write!(f, "(cut after {tokens} tokens: the context is full)")
            }
        }
    }
}

/// Whether a line of a chat is meant as a command: a slash and a word. Paths have more slashes, or a space before them.
fn is_command(line: &str) -> bool {
    line.strip_prefix('/').is_some_and(|rest| {
        let word = rest.split_whitespace().next().unwrap_or_default();
        word.chars().all(|c| c.is_ascii_alphabetic() || c == '?')
    })
}

fn conversation(messages: &[Value]) -> Prompt {
    Prompt::Chat(Box::new(Conversation {
        messages: messages.to_vec(),
        add_generation_prompt: true,
        ..Conversation::default()
    }))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_prompt_stands_before_the_text_it_is_about() {
        assert_eq!(joined("Summarise:", "a\nb\n"), "Summarise:\n\na\nb");
        assert_eq!(joined("", "a\n"), "a");
        assert_eq!(joined("a", "\n"), "a");
        assert_eq!(joined("", ""), "");
    }

    #[test]
    fn a_path_is_told_from_a_question() {
        for path in ["src", "Cargo.toml", "/models/qwen3.gguf", "qwen3.gguf"] {
            assert!(is_path(path), "{path}");
        }
        for prompt in ["What is model.gguf", "What is `Vec`?", "", "gguf"] {
            assert!(!is_path(prompt), "{prompt}");
        }
    }

    #[test]
    fn commands_are_a_slash_and_a_word() {
        for line in ["/clera", "/system You are", "/"] {
            assert!(is_command(line), "{line}");
        }
        for line in [
            "/etc/hosts is what?",
            " /clera",
            "What is /",
            "// a comment",
        ] {
            assert!(!is_command(line), "{line}");
        }
    }

    #[test]
    fn pipes_and_files_are_read_beside_a_prompt_and_what_may_never_end_is_not() {
        let (reader, _writer) = std::io::pipe().expect("a pipe");
        assert!(is_sent(&reader));
        assert!(is_sent(tempfile::tempfile().expect("a file")));
        let (socket, _other) = UnixStream::pair().expect("sockets");
        assert!(!is_sent(&socket));
        assert!(!is_sent(File::open("/dev/null").expect("it is there")));
    }
}
