//! What a load found, for people and for comparisons.

use std::collections::BTreeMap;

use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;
use serde_json::{Value, json};

use super::measure::{Failed, Latency, Measured};
use super::sweep::Run;
use crate::plot;

fn latencies(measured: &Measured) -> [(&'static str, &'static str, &Latency); 5] {
    [
        ("TTFT", "ttft", &measured.ttft),
        ("inter-token", "inter_token", &measured.inter_token),
        ("per token", "per_token", &measured.per_token),
        ("end to end", "end_to_end", &measured.end_to_end),
        ("sent late by", "lateness", &measured.lateness),
    ]
}

/// What users wait for, for a picture.
pub fn curves(measured: &Measured) -> Vec<plot::Curve> {
    let latencies = latencies(measured).into_iter().take(4);
    latencies
        .map(|(name, _, latency)| plot::Curve {
            name,
            points: latency.by_nines(),
        })
        .filter(|curve| !curve.points.is_empty())
        .collect()
}

/// A page for the terminal.
pub fn table(measured: &Measured) -> String {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    table.set_header(["ms", "mean", "p50", "p90", "p99", "max"]);
    for (name, _, latency) in latencies(measured) {
        let mut row = vec![name.to_owned()];
        match latency.summary() {
            Some(s) => row.extend(
                [s.mean_ms, s.p50_ms, s.p90_ms, s.p99_ms, s.max_ms].map(|ms| format!("{ms:.1}")),
            ),
            None => row.extend(std::iter::repeat_n("–".to_owned(), 5)),
        }
        table.add_row(row);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let total = measured.prompt_tokens + measured.completion_tokens;
    let mut lines = vec![
        measured.server.clone(),
        table.to_string(),
        format!(
            "{} answered, {} failed in {:.2} s",
            measured.completed,
            measured.failed(),
            measured.elapsed.as_secs_f64()
        ),
        format!(
            "{:.1} requests/s, {:.1} output tokens/s, {:.1} tokens/s with prompts",
            measured.per_second(measured.completed),
            measured.per_second(measured.completion_tokens),
            measured.per_second(total)
        ),
        format!(
            "{} tokens read, {} of them cached, {} generated",
            measured.prompt_tokens, measured.cached_tokens, measured.completion_tokens
        ),
    ];
    if let Some(slo) = &measured.slo {
        let all = measured.completed + measured.failed();
        lines.push(format!(
            "goodput: {:.2} requests/s within {slo}, {:.1} % of all",
            measured.per_second(measured.good),
            100.0 * measured.good as f64 / all.max(1) as f64
        ));
    }
    lines.extend(remarks(measured));
    lines.join("\n")
}

/// What is not as it should be, a line each.
fn remarks(measured: &Measured) -> Vec<String> {
    let mut lines = Vec::new();
    if measured.short > 0 {
        lines.push(format!(
            "{} answers ended before --max-tokens: the server does not ignore its end-of-sequence token",
            measured.short
        ));
    }
    if measured.uncounted > 0 {
        lines.push(format!(
            "{} answers came without usage: each is taken to have as many tokens as were asked for, and those of its prompt are not counted",
            measured.uncounted
        ));
    }
    if measured.resent > 0 {
        lines.push(format!(
            "{} requests were sent again: the server closed the connection it had kept for them",
            measured.resent
        ));
    }
    lines.extend(failures(&measured.failures));
    lines
}

/// A line for each kind of failure.
pub fn failures(of: &BTreeMap<String, Failed>) -> impl Iterator<Item = String> {
    of.iter()
        .map(|(kind, failed)| format!("{} × {kind}: {}", failed.count, failed.message.trim()))
}

/// A line for each rate of a sweep, and below them what is not as it should be.
pub fn sweep(runs: &[Run]) -> String {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    table.set_header([
        "rate/s",
        "requests/s",
        "output tokens/s",
        "TTFT p50 ms",
        "p99",
        "inter-token p50 ms",
        "p99",
        "good",
        "failed",
    ]);
    for Run { rate, measured, .. } in runs {
        let both = |latency: &Latency| match latency.summary() {
            Some(s) => [s.p50_ms, s.p99_ms].map(|ms| format!("{ms:.1}")),
            None => ["–", "–"].map(str::to_owned),
        };
        let [ttft, slow_ttft] = both(&measured.ttft);
        let [gap, slow_gap] = both(&measured.inter_token);
        table.add_row([
            rate.to_string(),
            format!("{:.2}", measured.per_second(measured.completed)),
            format!("{:.1}", measured.per_second(measured.completion_tokens)),
            ttft,
            slow_ttft,
            gap,
            slow_gap,
            measured
                .slo
                .map_or("–".to_owned(), |_| measured.good.to_string()),
            measured.failed().to_string(),
        ]);
    }
    for column in table.column_iter_mut() {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let mut lines = vec![table.to_string()];
    for Run { rate, measured, .. } in runs {
        let remarks = remarks(measured).into_iter();
        lines.extend(remarks.map(|line| format!("at {rate}/s: {line}")));
    }
    lines.join("\n")
}

/// Parameters and results.
pub fn json(arguments: &impl Serialize, measured: &Measured) -> Value {
    let latency: serde_json::Map<String, Value> = latencies(measured)
        .into_iter()
        .map(|(_, key, latency)| (key.to_owned(), json!(latency.summary())))
        .collect();
    let total = measured.prompt_tokens + measured.completion_tokens;
    json!({
        "parameters": arguments,
        "server": measured.server,
        "seconds": measured.elapsed.as_secs_f64(),
        "completed": measured.completed,
        "failed": measured.failed(),
        "failures": measured.failures,
        "resent": measured.resent,
        "short_answers": measured.short,
        "uncounted_answers": measured.uncounted,
        "prompt_tokens": measured.prompt_tokens,
        "cached_tokens": measured.cached_tokens,
        "completion_tokens": measured.completion_tokens,
        "requests_per_second": measured.per_second(measured.completed),
        "output_tokens_per_second": measured.per_second(measured.completion_tokens),
        "total_tokens_per_second": measured.per_second(total),
        "slo": measured.slo,
        "good": measured.good,
        "good_requests_per_second": measured.slo.map(|_| measured.per_second(measured.good)),
        "latency": latency,
    })
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::super::client::{Answer, Failure};
    use super::super::measure::Outcome;
    use super::*;

    #[test]
    fn the_page_says_what_was_measured_and_what_failed() {
        let began = Instant::now();
        let at = |ms| began + Duration::from_millis(ms);
        let slo = "ttft=300".parse().unwrap();
        let mut measured = Measured::new("a server".to_owned(), Some(slo));
        let answer = Answer {
            pieces: vec![at(250), at(350), at(450)],
            ended: at(500),
            text: String::new(),
            prompt_tokens: 7,
            completion_tokens: 3,
            cached_tokens: 0,
            counted: false,
        };
        let refusal = Failure::new("HTTP 429", "full\n");
        for result in [Ok(answer), Err(refusal)] {
            let (meant, sent, ended) = (at(0), at(0), at(500));
            measured.record(
                Outcome {
                    meant,
                    sent: Some(sent),
                    ended,
                    asked: 3,
                    result,
                },
                began,
            );
        }
        let page = table(&measured);
        for part in [
            "a server",
            "1 answered, 1 failed in 0.50 s",
            "6.0 output tokens/s, 20.0 tokens/s",
            "1 × HTTP 429: full",
            "1 answers came without usage",
            "goodput: 2.00 requests/s within ttft=300, 50.0 % of all",
        ] {
            assert!(page.contains(part), "{part:?} is not in\n{page}");
        }
        let curves = curves(&measured);
        let names: Vec<_> = curves.iter().map(|curve| curve.name).collect();
        assert_eq!(names, ["TTFT", "inter-token", "per token", "end to end"]);
        let swept = sweep(&[Run {
            rate: 4.0,
            seed: 1,
            measured,
        }]);
        assert!(swept.ends_with("at 4/s: 1 × HTTP 429: full"), "{swept}");
        let row = |name: &str| -> Vec<f64> {
            let line = page.lines().find(|line| line.contains(name)).expect(name);
            line.split_whitespace()
                .filter_map(|cell| cell.parse().ok())
                .collect()
        };
        assert!(row("TTFT").iter().all(|ms| (ms - 250.0).abs() < 0.5));
        assert_eq!(row("inter-token").len(), 5);
        assert!(row("inter-token").iter().all(|ms| (ms - 100.0).abs() < 0.5));
    }
}
