//! `quire run`: one answer to one prompt, or a chat.

use std::io::{IsTerminal, Read};
use std::process::ExitCode;

use anyhow::Context;
use clap::Args;
use rustyline::error::ReadlineError;
use serde_json::{Value, json};

use super::logging::{self, LogFormat};
use super::model_args::ModelArgs;
use super::output;
use crate::generation::{GenerateError, Generation, GenerationRequest, Generator, Output, Prompt};
use crate::tokenizer::Conversation;

/// Flags of `quire run`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  quire run 'What does `Vec::push` do?'
  quire run --model ./Qwen3-0.6B --temperature 0.7 'Write a haiku about pages'
  git diff | quire run --model ./Qwen3-4B --system 'Write a commit message for this diff'
  quire run                                       chat; Ctrl-D ends it")]
pub(super) struct RunArgs {
    /// What to answer; without it, what comes through a pipe, or else a chat
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
    let checkpoint = args.model.open()?;
    let engine = args
        .model
        .start(&checkpoint, &args.model.engine_config(), None)?;
    let generator = Generator::new(engine, &checkpoint);
    drop(checkpoint);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let session = Session {
        args,
        chat: generator.has_chat_template() && !args.raw,
        generator,
    };
    runtime.block_on(async {
        match &args.prompt {
            Some(prompt) => session.once(prompt).await,
            None if std::io::stdin().is_terminal() => session.converse().await,
            None => {
                let mut prompt = String::new();
                std::io::stdin()
                    .read_to_string(&mut prompt)
                    .context("standard input is not text")?;
                session.once(prompt.trim_end_matches('\n')).await
            }
        }
    })
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
        self.answer(prompt).await?;
        output::print("\n")?;
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
            "{} on {}. /clear forgets the conversation, Ctrl-C stops an answer, Ctrl-D ends.\n",
            model.name, model.device
        ))?;
        let mut editor = rustyline::DefaultEditor::new().context("no terminal to read from")?;
        let mut messages = self.beginning();
        loop {
            let line = match editor.readline(">>> ") {
                Ok(line) => line,
                Err(ReadlineError::Interrupted) => continue,
                Err(ReadlineError::Eof) => return Ok(ExitCode::SUCCESS),
                Err(error) => return Err(error).context("reading a line"),
            };
            match line.trim() {
                "" => continue,
                "/clear" => {
                    messages = self.beginning();
                    continue;
                }
                "/bye" | "/exit" | "/quit" => return Ok(ExitCode::SUCCESS),
                text => messages.push(json!({"role": "user", "content": text})),
            }
            // Remembering a line fails only where there is no memory for it.
            let _ = editor.add_history_entry(&line);
            let answer = tokio::select! {
                answer = self.answer(conversation(&messages)) => answer,
                _ = tokio::signal::ctrl_c() => {
                    output::print("\n(stopped)\n")?;
                    messages.pop();
                    continue;
                }
            };
            match answer {
                Ok(text) => messages.push(json!({"role": "assistant", "content": text})),
                Err(error) => {
                    output::note(&format!("error: {error:#}"));
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

    /// Prints an answer as it comes, for as long as somebody reads.
    async fn answer(&self, prompt: Prompt) -> anyhow::Result<String> {
        let mut request = GenerationRequest::new("run", prompt);
        request.sampling.max_tokens = self.args.max_tokens;
        request.sampling.temperature = self.args.temperature;
        request.sampling.top_p = self.args.top_p;
        request.sampling.top_k = self.args.top_k;
        request.sampling.seed = self.args.seed;
        request.stop.clone_from(&self.args.stop);
        let mut generation: Generation = self.generator.generate(request).await?;
        let mut answer = String::new();
        while let Some(part) = generation.next().await {
            let text = match part {
                Output::Started { .. } | Output::PromptLogprobs(_) => continue,
                Output::Chunk { text, .. } => text,
                Output::Finished { text, reason, .. } => {
                    if reason == crate::core::FinishReason::Failed {
                        return Err(
                            GenerateError::Internal("the computation failed".to_owned()).into()
                        );
                    }
                    text
                }
            };
            answer.push_str(&text);
            if !output::print(&text)? {
                break;
            }
        }
        Ok(answer)
    }
}

fn conversation(messages: &[Value]) -> Prompt {
    Prompt::Chat(Box::new(Conversation {
        messages: messages.to_vec(),
        add_generation_prompt: true,
        ..Conversation::default()
    }))
}
