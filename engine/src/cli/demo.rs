//! `quire demo`: 64 clients at once over gRPC, and the proof that each got the answer it gets alone.
//!
//! The server is the real one, on free ports of this machine; the clients are gRPC clients with a connection each. Half of the questions are answered
//! greedily, half are sampled with a seed. Then the same questions are asked one at a time, and tokens and log-probabilities must be the same bits.

use std::fmt::Write;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;
use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{CellAlignment, Table};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use quire_proto::v1;
use quire_proto::v1::generate_event::Event;
use quire_proto::v1::generation_client::GenerationClient;
use serde_json::Value;
use tokio::task::JoinSet;
use tonic::transport::Channel;

use super::logging::{self, LogFormat};
use super::model_args::ModelArgs;
use super::output;
use crate::generation::Generator;
use crate::serve::{Addresses, Metrics, Server, step_observer};

/// Questions about the standard library; the model was trained on its documentation.
const QUESTIONS: &str = include_str!("../../demo-model/answers.jsonl");
/// Answers shown at the end.
const SHOWN: usize = 5;

/// Flags of `quire demo`.
#[derive(Debug, Args)]
#[command(
    after_help = "Exits with 0 only if every client was answered and every answer is, bit for bit, the one the same question gets alone."
)]
pub(super) struct DemoArgs {
    #[command(flatten)]
    model: ModelArgs,

    /// Clients that ask at the same time, one question each
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=420))]
    clients: u16,

    /// Most tokens of an answer
    #[arg(long, value_name = "N", default_value_t = 64)]
    max_tokens: u32,
}

/// Runs the demo.
///
/// # Errors
/// The model cannot be loaded, or a client was not answered.
pub(super) fn demo(args: &DemoArgs) -> anyhow::Result<ExitCode> {
    logging::start(LogFormat::Text, "warn")?;
    let metrics = Metrics::install();
    let checkpoint = args.model.open()?;
    let observer = step_observer(&checkpoint.name);
    let config = args.model.engine_config();
    let engine = args.model.start(&checkpoint, &config, Some(observer))?;
    let metrics = metrics.with_engine(&engine);
    let gone = engine.gone();
    let generator = Generator::new(engine, &checkpoint)?;
    drop(checkpoint);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let shown = runtime.block_on(async {
        let here = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let server = Server::listen(generator.clone(), metrics, Addresses::take(here, here)?)?;
        let address = server.grpc_address()?;
        let model = generator.engine().model();
        output::print(&format!(
            "{} ({}, {}) on {}, gRPC at {address}\n",
            model.name, model.family, model.dtype, model.device
        ))?;
        let (end, ended) = tokio::sync::oneshot::channel::<()>();
        let serving = tokio::spawn(server.run(async {
            // Dropping the sender ends the server as well.
            let _ = ended.await;
        }));
        let code = show(args, address).await?;
        drop(end);
        serving.await.context("the server panicked")??;
        Ok(code)
    });
    drop(generator);
    super::wait_for(&runtime, gone);
    shown
}

async fn show(args: &DemoArgs, address: SocketAddr) -> anyhow::Result<ExitCode> {
    let questions = questions(usize::from(args.clients))?;
    let mut watcher = connect(address).await?;
    let together = together(args, address, &questions, &mut watcher).await?;
    let peak = stats(&mut watcher).await?;
    let alone = alone(args, &questions, &mut watcher).await?;
    let total = stats(&mut watcher).await?;

    let agreed = together
        .answers
        .iter()
        .zip(&alone.answers)
        .filter(|(a, b)| a.same_bits(b))
        .count();
    let mut text = String::new();
    writeln!(text, "{}", table(&together, &alone))?;
    writeln!(
        text,
        "KV cache: at most {} of {} pages used at once, {} used now",
        peak.kv_blocks_used_peak, peak.kv_blocks, total.kv_blocks_used
    )?;
    writeln!(
        text,
        "prefix cache: {:.0} % of the prompt tokens of both passes were found in it; preemptions: {}",
        share(
            total.prefix_cache_hit_tokens,
            total.prefix_cache_query_tokens
        ),
        total.preemptions,
    )?;
    writeln!(
        text,
        "same bits: {agreed} of {} answers are, token by token and to the last bit of every log-probability, the one the question gets alone\n",
        questions.len()
    )?;
    for answer in together.answers.iter().step_by(2).take(SHOWN) {
        let (question, answer) = (&answer.question, answer.text.trim());
        writeln!(text, "Q  {question}\nA  {answer}\n")?;
    }
    // The exit code is about the answers, whoever reads this.
    output::print(&text)?;
    if agreed == questions.len() {
        Ok(ExitCode::SUCCESS)
    } else {
        let differing = together
            .answers
            .iter()
            .zip(&alone.answers)
            .find(|(a, b)| !a.same_bits(b));
        if let Some((a, b)) = differing {
            output::note(&format!(
                "differs: {}\n  at once: {}\n  alone:   {}",
                a.question, a.text, b.text
            ));
        }
        bail!("{} answers differ", questions.len() - agreed);
    }
}

/// `count` questions, spread over all there are.
fn questions(count: usize) -> anyhow::Result<Vec<String>> {
    let all = QUESTIONS
        .lines()
        .map(|line| {
            let value: Value = serde_json::from_str(line)?;
            Ok(value["question"].as_str().unwrap_or_default().to_owned())
        })
        .collect::<Result<Vec<_>, serde_json::Error>>()
        .context("the demo's questions")?;
    let step = (all.len() / count).max(1);
    Ok(all.into_iter().step_by(step).take(count).collect())
}

/// What came of asking all questions in one way.
struct Pass {
    wall: Duration,
    answers: Vec<Answer>,
}

/// One client's answer and when its parts came.
struct Answer {
    question: String,
    text: String,
    tokens: Vec<u32>,
    /// Bits of the chosen tokens' log-probabilities and of their best alternatives'.
    logprobs: Vec<u32>,
    first_token: Duration,
    between: Vec<Duration>,
}

impl Answer {
    fn same_bits(&self, other: &Self) -> bool {
        self.tokens == other.tokens && self.logprobs == other.logprobs && self.text == other.text
    }
}

/// All questions at the same time, each by a client with a connection of its own.
async fn together(
    args: &DemoArgs,
    address: SocketAddr,
    questions: &[String],
    watcher: &mut GenerationClient<Channel>,
) -> anyhow::Result<Pass> {
    let mut clients = Vec::with_capacity(questions.len());
    for _ in questions {
        clients.push(connect(address).await?);
    }
    let bar = bar(questions.len(), "at once");
    let started = Instant::now();
    let mut asking = JoinSet::new();
    for (at, (question, client)) in questions.iter().zip(clients).enumerate() {
        let ask = ask(client, question.clone(), at, args.max_tokens, bar.clone());
        asking.spawn(async move { (at, ask.await) });
    }
    let mut answers: Vec<Option<Answer>> = questions.iter().map(|_| None).collect();
    let mut ticks = tokio::time::interval(Duration::from_millis(100));
    loop {
        tokio::select! {
            done = asking.join_next() => match done {
                None => break,
                Some(done) => {
                    let (at, answer) = done.context("a client panicked")?;
                    answers[at] = Some(answer?);
                    bar.inc(1);
                }
            },
            _ = ticks.tick() => {
                let now = stats(watcher).await?;
                bar.set_message(format!(
                    "{} running, {} waiting, {} of {} KV pages",
                    now.requests_running, now.requests_waiting, now.kv_blocks_used, now.kv_blocks
                ));
            }
        }
    }
    let wall = started.elapsed();
    bar.finish_and_clear();
    Ok(Pass {
        wall,
        answers: answers.into_iter().flatten().collect(),
    })
}

/// The same questions, each when the one before is answered.
async fn alone(
    args: &DemoArgs,
    questions: &[String],
    client: &mut GenerationClient<Channel>,
) -> anyhow::Result<Pass> {
    let bar = bar(questions.len(), "one at a time");
    let started = Instant::now();
    let mut answers = Vec::with_capacity(questions.len());
    for (at, question) in questions.iter().enumerate() {
        let ask = ask(
            client.clone(),
            question.clone(),
            at,
            args.max_tokens,
            bar.clone(),
        );
        answers.push(ask.await?);
        bar.inc(1);
    }
    let wall = started.elapsed();
    bar.finish_and_clear();
    Ok(Pass { wall, answers })
}

async fn connect(address: SocketAddr) -> anyhow::Result<GenerationClient<Channel>> {
    let channel = Channel::from_shared(format!("http://{address}"))?
        .connect()
        .await
        .with_context(|| format!("connecting to {address}"))?;
    Ok(GenerationClient::new(channel))
}

async fn stats(client: &mut GenerationClient<Channel>) -> anyhow::Result<v1::GetStatsResponse> {
    Ok(client.get_stats(v1::GetStatsRequest {}).await?.into_inner())
}

/// One question, streamed.
async fn ask(
    mut client: GenerationClient<Channel>,
    question: String,
    at: usize,
    max_tokens: u32,
    bar: ProgressBar,
) -> anyhow::Result<Answer> {
    let request = request(&question, at, max_tokens);
    let asked = Instant::now();
    let mut events = client.generate_stream(request).await?.into_inner();
    let mut answer = Answer {
        question,
        text: String::new(),
        tokens: Vec::new(),
        logprobs: Vec::new(),
        first_token: Duration::ZERO,
        between: Vec::new(),
    };
    let mut last = asked;
    let mut finished = false;
    while let Some(event) = events.message().await? {
        match event.event {
            Some(Event::Chunk(chunk)) => {
                answer.text.push_str(&chunk.text);
                for token in chunk.tokens {
                    let now = Instant::now();
                    if answer.tokens.is_empty() {
                        answer.first_token = now - asked;
                    } else {
                        answer.between.push(now - last);
                    }
                    last = now;
                    answer.tokens.push(token.id);
                    if let Some(logprobs) = token.logprobs {
                        answer.logprobs.push(logprobs.logprob.to_bits());
                        let top = logprobs.top.iter().map(|top| top.logprob.to_bits());
                        answer.logprobs.extend(top);
                    }
                    bar.tick();
                }
            }
            Some(Event::Finish(_)) => finished = true,
            _ => {}
        }
    }
    if !finished {
        bail!("the stream for `{}` ended too early", answer.question);
    }
    Ok(answer)
}

fn request(question: &str, at: usize, max_tokens: u32) -> v1::GenerateRequest {
    let sampling = if at.is_multiple_of(2) {
        v1::SamplingParams {
            temperature: Some(0.0),
            ..v1::SamplingParams::default()
        }
    } else {
        v1::SamplingParams {
            temperature: Some(0.8),
            top_p: Some(0.95),
            seed: Some(at as u64),
            ..v1::SamplingParams::default()
        }
    };
    v1::GenerateRequest {
        prompt: Some(v1::generate_request::Prompt::Chat(v1::Chat {
            messages: vec![v1::ChatMessage {
                role: "user".to_owned(),
                content: question.to_owned(),
                ..v1::ChatMessage::default()
            }],
            ..v1::Chat::default()
        })),
        sampling: Some(sampling),
        stop: Some(v1::StopConditions {
            max_tokens: Some(max_tokens),
            ..v1::StopConditions::default()
        }),
        output: Some(v1::OutputOptions {
            logprobs: Some(2),
            ..v1::OutputOptions::default()
        }),
        ..v1::GenerateRequest::default()
    }
}

fn bar(length: usize, what: &'static str) -> ProgressBar {
    let bar =
        ProgressBar::with_draw_target(Some(length as u64), ProgressDrawTarget::stderr_with_hz(15));
    let style = format!("{what:<14}{{bar:40}} {{pos}}/{{len}}  {{msg}}");
    bar.set_style(
        ProgressStyle::with_template(&style).unwrap_or_else(|_| ProgressStyle::default_bar()),
    );
    bar
}

fn table(together: &Pass, alone: &Pass) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED);
    let count = together.answers.len();
    table.set_header(["", &format!("{count} clients at once"), "one at a time"]);
    let mut row = |name: &str, value: &dyn Fn(&Pass) -> String| {
        table.add_row([name.to_owned(), value(together), value(alone)]);
    };
    row("answered", &|pass| pass.answers.len().to_string());
    row("seconds", &|pass| format!("{:.2}", pass.wall.as_secs_f64()));
    row("output tokens", &|pass| tokens(pass).to_string());
    row("output tokens/s", &|pass| {
        format!("{:.0}", tokens(pass) as f64 / pass.wall.as_secs_f64())
    });
    let first =
        |pass: &Pass| -> Vec<Duration> { pass.answers.iter().map(|a| a.first_token).collect() };
    let between = |pass: &Pass| -> Vec<Duration> {
        pass.answers
            .iter()
            .flat_map(|a| a.between.iter().copied())
            .collect()
    };
    row("time to first token, p50 / p99 ms", &|pass| {
        percentiles(first(pass))
    });
    row("between tokens, p50 / p99 ms", &|pass| {
        percentiles(between(pass))
    });
    for column in 1..3 {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

fn tokens(pass: &Pass) -> usize {
    pass.answers.iter().map(|answer| answer.tokens.len()).sum()
}

fn percentiles(mut times: Vec<Duration>) -> String {
    times.sort_unstable();
    let at = |share: f64| {
        let index = ((times.len() as f64 * share).ceil() as usize).max(1) - 1;
        times
            .get(index)
            .map_or(0.0, |time| time.as_secs_f64() * 1e3)
    };
    format!("{:.1} / {:.1}", at(0.5), at(0.99))
}

fn share(part: u64, whole: u64) -> f64 {
    100.0 * part as f64 / (whole.max(1)) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_as_many_different_questions_as_clients() {
        let mut questions = questions(64).expect("they are in the binary");
        questions.sort_unstable();
        questions.dedup();
        assert_eq!(questions.len(), 64);
    }

    #[test]
    fn percentiles_are_those_of_the_sorted_times() {
        let times: Vec<Duration> = (1..=100).rev().map(Duration::from_millis).collect();
        assert_eq!(percentiles(times), "50.0 / 99.0");
        assert_eq!(percentiles(Vec::new()), "0.0 / 0.0");
    }
}
