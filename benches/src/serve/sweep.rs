//! `--sweep`: open loads one after the other, one for each rate, and latency over throughput.

use std::sync::Arc;

use super::client::Client;
use super::load::{self, Arrivals, Load};
use super::measure::{Latency, Measured};
use super::requests::Requests;
use super::{Arguments, report, write};
use crate::plot;
use crate::random::Random;

/// What was found at one rate.
#[derive(Debug)]
pub struct Run {
    /// Requests a second.
    pub rate: f64,
    /// Of its prompts and arrivals.
    pub seed: u64,
    /// What came out.
    pub measured: Measured,
}

/// Runs the load at every rate and prints what it found. What is finished when a rate fails is printed and written all the same.
///
/// # Errors
/// No request was answered, or the first of a rate failed.
pub async fn run(
    arguments: &Arguments,
    client: &Arc<Client>,
    requests: &Requests,
) -> anyhow::Result<()> {
    let mut runs: Vec<Run> = Vec::new();
    let mut done = Ok(());
    for (n, &rate) in (0..).zip(&arguments.sweep) {
        eprintln!("{rate} requests a second …");
        let (requests, load) = at(arguments, requests, n, rate);
        let seed = load.seed;
        match load::run(Arc::clone(client), requests, load).await {
            Ok(measured) => runs.push(Run {
                rate,
                seed,
                measured,
            }),
            Err(error) => {
                done = Err(error.context(format!("at {rate} requests a second")));
                break;
            }
        }
    }
    if runs.is_empty() {
        return done;
    }
    println!("{}\n{}", client.description(), report::sweep(&runs));
    let json: Vec<_> = runs
        .iter()
        .map(|run| {
            let result = report::json(arguments, &run.measured);
            serde_json::json!({"rate": run.rate, "seed": run.seed, "result": result})
        })
        .collect();
    write(arguments, &json.into())?;
    if let Some(file) = &arguments.plot {
        let points: Vec<_> = runs.iter().map(|run| point(&run.measured)).collect();
        plot::sweep(file, client.description(), &points)?;
    }
    done?;
    anyhow::ensure!(
        runs.iter().any(|run| run.measured.completed > 0),
        "no request was answered"
    );
    Ok(())
}

/// The load of the `n`th rate. Its prompts are its own: none is in the prefix cache because of a rate before it, or of a sweep with another seed.
fn at(arguments: &Arguments, requests: &Requests, n: u32, rate: f64) -> (Requests, Load) {
    let mut requests = requests.clone();
    requests.prompts.seed = Random::nth(arguments.seed, n.into()).next();
    let load = Load {
        arrivals: Arrivals::Open {
            rate,
            burst: arguments.burst,
        },
        ..super::load(arguments, &requests)
    };
    let entries = requests.dataset.len();
    if entries > 0 {
        let used = u64::from(n) * u64::from(load.requests);
        requests
            .dataset
            .rotate_left((used % entries as u64) as usize);
    }
    (requests, load)
}

fn point(measured: &Measured) -> plot::Point {
    let both = |latency: &Latency| {
        let summary = latency.summary()?;
        Some((summary.p50_ms, summary.p99_ms))
    };
    plot::Point {
        throughput: measured.per_second(measured.completion_tokens),
        ttft: both(&measured.ttft),
        inter_token: both(&measured.inter_token),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::path::PathBuf;

    use serde_json::Value;

    use super::super::mock::{Mock, Reply, answer, refusal};
    use super::super::{measure, parse};

    /// A sweep at two rates, of three requests each.
    async fn sweep(server: &Mock, more: &[&str]) -> anyhow::Result<()> {
        let rates = ["--sweep", "100000,200000", "--requests", "3"];
        let target = ["--url", &server.url, "--model", "m", "--max-tokens", "2"];
        let words = [&target[..], &rates[..], more].concat();
        measure(&parse(&words).unwrap()).await
    }

    fn file(server: &Mock, ending: &str) -> PathBuf {
        let (_, port) = server.url.rsplit_once(':').unwrap();
        std::env::temp_dir().join(format!("quire-bench-sweep-{port}.{ending}"))
    }

    #[tokio::test]
    async fn no_rate_repeats_a_prompt_of_another_nor_of_another_seed() {
        let server = Mock::start(|_, _| Reply::keep(answer(2)));
        let dataset = file(&server, "jsonl");
        let lines = (0..6).map(|n| format!("{{\"prompt\": \"number {n}\"}}\n"));
        std::fs::write(&dataset, lines.collect::<String>()).unwrap();
        let name = dataset.to_str().unwrap();
        sweep(&server, &["--dataset", name, "--warmup", "2"])
            .await
            .unwrap();
        for seed in ["1", "2"] {
            sweep(&server, &["--seed", seed, "--warmup", "0"])
                .await
                .unwrap();
        }
        let asked = server.requests();
        let prompts: HashSet<String> = asked.iter().map(|ask| ask["prompt"].to_string()).collect();
        // Twice two to warm up, and six of each sweep.
        assert_eq!((asked.len(), prompts.len()), (22, 22));
        std::fs::remove_file(dataset).unwrap();
    }

    #[tokio::test]
    async fn rates_that_are_finished_are_written_when_a_later_one_fails() {
        let server = Mock::start(|n, _| match n {
            // One to warm up, and three that are measured.
            0..4 => Reply::keep(answer(2)),
            _ => Reply::keep(refusal()),
        });
        let json = file(&server, "json");
        let error = sweep(&server, &["--json", json.to_str().unwrap()]).await;
        let error = format!("{:#}", error.unwrap_err());
        assert!(
            error.contains("at 200000 requests a second") && error.contains("HTTP 429"),
            "{error}"
        );
        let written: Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
        assert_eq!(written.as_array().unwrap().len(), 1);
        assert_eq!(written[0]["result"]["completed"], 3);
        assert_ne!(
            written[0]["seed"],
            written[0]["result"]["parameters"]["seed"]
        );
        std::fs::remove_file(json).unwrap();
    }

    #[tokio::test]
    async fn a_sweep_of_which_nothing_is_answered_has_failed() {
        let server = Mock::start(|_, _| Reply::keep(refusal()));
        let error = sweep(&server, &["--warmup", "0"]).await.unwrap_err();
        assert_eq!(error.to_string(), "no request was answered");
    }
}
