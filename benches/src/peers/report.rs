//! The tables of `peers`.

use comfy_table::{CellAlignment, Table, presets};

use super::contender::Who;
use super::engine::Column;
use super::figures::{Figures, Match, Paced, Rounds, Side, loads, matches};
use super::work::Work;
use crate::median::median;
use crate::serve::report::failures as by_kind;

fn table(header: impl IntoIterator<Item = String>) -> Table {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    table.set_header(header);
    table
}

fn percent(share: f64) -> String {
    format!("{:.0} %", 100.0 * share)
}

/// The ratios, a column for each file: `2.13 (≥ 2.8 missed), 40 %` is the ratio, its bar, and our share of the machine's limit.
pub fn ratios(columns: &[Column], rows: &[Work]) -> String {
    let names = columns.iter().map(|column| column.name.clone());
    let mut table = table(std::iter::once("ours / theirs, share of limit".to_owned()).chain(names));
    for work in rows {
        let cells = columns.iter().map(|column| {
            column.row(*work).map_or("–".to_owned(), |row| {
                format!("{}, {}", row.pair.show(), percent(row.limit()))
            })
        });
        table.add_row(std::iter::once(work.to_string()).chain(cells));
    }
    table.to_string()
}

/// All figures, a line for each file and piece of work.
pub fn figures(columns: &[Column], peer: &str) -> String {
    let mut table = table(
        [
            "file",
            "work",
            "quire tokens/s",
            &format!("{peer} tokens/s"),
            "ratio",
            "of rounds",
            "bar",
            "",
            "memory",
            "arithmetic",
        ]
        .map(str::to_owned),
    );
    let number = |value: Option<f64>| value.map_or("–".to_owned(), |value| format!("{value:.1}"));
    for column in columns {
        for row in &column.rows {
            let pair = &row.pair;
            table.add_row([
                column.name.clone(),
                row.work.to_string(),
                number(median(&pair.ours)),
                number(median(&pair.theirs)),
                pair.ratio().map_or("–".to_owned(), |r| format!("{r:.2}")),
                pair.range().map_or("–".to_owned(), |(least, most)| {
                    format!("{least:.2} to {most:.2}")
                }),
                pair.bar.map_or("–".to_owned(), |bar| bar.to_string()),
                pair.verdict()
                    .map_or("", super::ratio::Verdict::word)
                    .to_owned(),
                percent(row.memory),
                percent(row.arithmetic),
            ]);
        }
    }
    for column in table.column_iter_mut().skip(2) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}

/// A figure of a server, in words.
type Show = fn(&Side) -> String;

/// TTFT, p50 and p99.
fn ttft(rounds: &Rounds) -> String {
    let p99 = rounds.median(|f| f.ttft.1);
    figure(rounds.median(|f| f.ttft.0).zip(p99), both)
}

/// Between tokens, likewise.
fn inter_token(rounds: &Rounds) -> String {
    let p99 = rounds.median(|f| f.inter_token.1);
    figure(rounds.median(|f| f.inter_token.0).zip(p99), both)
}

fn output(rounds: &Rounds) -> String {
    figure(rounds.median(|f| f.output), |x| format!("{x:.1}"))
}

/// The servers side by side: medians of the closed load's rounds, then of the open one's.
pub fn servers(sides: &[Side]) -> String {
    let names = sides.iter().map(|side| side.who.name().to_owned());
    let mut table = table(std::iter::once(String::new()).chain(names));
    let rows: [(&str, Show); 9] = [
        ("output tokens/s", |s| output(&s.closed)),
        ("requests/s", |s| {
            figure(s.closed.median(|f| f.requests), |x| format!("{x:.2}"))
        }),
        ("TTFT p50 / p99 ms", |s| ttft(&s.closed)),
        ("inter-token p50 / p99 ms", |s| inter_token(&s.closed)),
        ("start to ready s", |s| {
            figure(s.closed.median(|f| f.start), |x| format!("{x:.1}"))
        }),
        ("memory MiB", |s| {
            let mib = |bytes| format!("{:.0}", bytes / f64::from(1 << 20));
            figure(s.closed.median(|f| f.memory as f64), mib)
        }),
        ("open: output tokens/s", |s| output(&s.open)),
        ("open: TTFT p50 / p99 ms", |s| ttft(&s.open)),
        ("open: inter-token p50 / p99 ms", |s| inter_token(&s.open)),
    ];
    for (name, show) in rows {
        table.add_row(std::iter::once(name.to_owned()).chain(sides.iter().map(show)));
    }
    let failed = sides.iter().map(|side| {
        let loads = loads(sides, side.who).into_iter();
        loads.map(|(_, f)| f.failed).sum::<u64>().to_string()
    });
    table.add_row(std::iter::once("failed".to_owned()).chain(failed));
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}

fn both((p50, p99): (f64, f64)) -> String {
    format!("{p50:.0} / {p99:.0}")
}

/// A cell of what may not have been measured.
fn figure<T>(value: Option<T>, show: impl FnOnce(T) -> String) -> String {
    value.map_or("–".to_owned(), show)
}

/// What failed, server by server and load by load.
pub fn failures(sides: &[Side]) -> Vec<String> {
    let mut lines = Vec::new();
    for side in sides {
        for (load, figures) in loads(sides, side.who) {
            let kinds = by_kind(&figures.failures);
            lines.extend(kinds.map(|line| format!("{}, {load}: {line}", side.who.name())));
        }
    }
    lines
}

/// One of a round's figures.
type Of = fn(&Figures) -> f64;

/// A line for each bar: how our server stands to each peer, as far as both were measured.
pub fn server_bars(sides: &[Side]) -> Vec<String> {
    let mut lines = Vec::new();
    for both in matches(sides) {
        let Match { ours, theirs } = both;
        let who = both.name();
        let has_bars = theirs.who.bar().is_some();
        let below = |what: &str, ours: &Rounds, theirs: &Rounds, of: Of| {
            let failed = (ours.failed(), theirs.failed());
            let (ours, theirs) = (ours.median(of)?, theirs.median(of)?);
            let verdict = match (has_bars, ours < theirs) {
                (false, _) => "",
                (true, true) => " (below, reached)",
                (true, false) => " (below, missed)",
            };
            let line = format!("{what}: {ours:.0} ms, {who} {theirs:.0} ms{verdict}");
            Some(marked(line, failed))
        };
        let pair = both.output();
        if pair.ratio().is_some() {
            let ratio = format!("output tokens/s, times that of {who}: {}", pair.show());
            lines.push(marked(
                ratio,
                (ours.closed.failed(), theirs.closed.failed()),
            ));
        }
        let (first, gap): (Of, Of) = (|f| f.ttft.1, |f| f.inter_token.1);
        lines.extend(below(
            "p99 between tokens",
            &ours.closed,
            &theirs.closed,
            gap,
        ));
        lines.extend(below(
            "open load, p99 TTFT",
            &ours.open,
            &theirs.open,
            first,
        ));
        if ours.who == Who::Quire {
            let Paced { theirs, ours } = &theirs.paced;
            for (what, of) in [
                ("open load it can bear, p99 TTFT", first),
                ("open load it can bear, p99 between tokens", gap),
            ] {
                lines.extend(below(what, ours, theirs, of));
            }
        }
    }
    lines
}

/// A verdict on runs in which requests failed says so: who answers less has less to do.
fn marked(line: String, (ours, theirs): (u64, u64)) -> String {
    if ours + theirs == 0 {
        return line;
    }
    format!("{line}; of requests, {ours} of ours failed and {theirs} of theirs")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::engine::{Column, Row};
    use super::super::ratio::Pair;
    use super::*;
    use crate::engine::limits::{Limits, Peak};
    use crate::serve::measure::Failed;

    #[test]
    fn a_ratio_stands_with_its_bar_and_our_share_of_the_limit() {
        let work = Work::Prefill { tokens: 512 };
        let column = Column {
            name: "q4_0".to_owned(),
            format: "q4_0".to_owned(),
            limits: Limits {
                threads: 2,
                memory_bytes_per_second: 1.0,
                f32: Peak {
                    per_second: 1.0,
                    with: "",
                },
                bf16: None,
                int8: None,
            },
            peer_build: None,
            rows: vec![Row {
                work,
                pair: Pair {
                    ours: vec![30.0, 28.0, 29.0],
                    theirs: vec![10.0, 10.0, 10.0],
                    bar: Some(2.8),
                },
                memory: 0.02,
                arithmetic: 0.61,
            }],
        };
        let absent = Work::Prefill { tokens: 8192 };
        let short = ratios(std::slice::from_ref(&column), &[work, absent]);
        assert!(short.contains("| 2.90 (≥ 2.8 reached), 61 % |"), "{short}");
        assert!(short.contains("| prefill of 8192"), "{short}");
        let long = figures(std::slice::from_ref(&column), "llama.cpp");
        for cell in [
            "29.0",
            "10.0",
            "2.90",
            "2.80 to 3.00",
            "reached",
            "2 %",
            "61 %",
        ] {
            assert!(long.contains(cell), "{cell} is not in\n{long}");
        }
    }

    fn run_of(output: f64, gap: f64) -> Figures {
        Figures {
            output,
            requests: output / 64.0,
            ttft: (100.0, 900.0),
            inter_token: (20.0, gap),
            failed: 0,
            failures: BTreeMap::new(),
            start: 0.5,
            memory: 3 << 20,
        }
    }

    fn rounds(of: impl IntoIterator<Item = Figures>) -> Rounds {
        let mut rounds = Rounds::default();
        of.into_iter().for_each(|figures| rounds.push(figures));
        rounds
    }

    #[test]
    fn servers_are_held_to_their_bars() {
        let side = |who, output, gap: f64| {
            let mut side = Side::new(who);
            side.closed = rounds([run_of(output, gap)]);
            side.open = rounds([run_of(output, gap)]);
            if who == Who::LlamaServer {
                side.paced.theirs = rounds([run_of(output, 90.0)]);
                side.paced.ours = rounds([run_of(output, 80.0)]);
            }
            side
        };
        let sides = [
            side(Who::Quire, 90.0, 500.0),
            side(Who::LlamaServer, 25.0, 2800.0),
            side(Who::QuireSame, 57.0, 300.0),
            side(Who::Vllm, 19.0, 400.0),
            side(Who::MistralRs, 30.0, 600.0),
        ];
        let lines = server_bars(&sides);
        assert_eq!(
            lines,
            [
                "output tokens/s, times that of llama-server: 3.60 (≥ 3 reached)",
                "p99 between tokens: 500 ms, llama-server 2800 ms (below, reached)",
                "open load, p99 TTFT: 900 ms, llama-server 900 ms (below, missed)",
                "open load it can bear, p99 TTFT: 900 ms, llama-server 900 ms (below, missed)",
                "open load it can bear, p99 between tokens: 80 ms, llama-server 90 ms (below, reached)",
                "output tokens/s, times that of mistral.rs: 3.00",
                "p99 between tokens: 500 ms, mistral.rs 600 ms",
                "open load, p99 TTFT: 900 ms, mistral.rs 900 ms",
                "output tokens/s, times that of vLLM: 4.74 (≥ 5 missed)",
                "p99 between tokens: 500 ms, vLLM 400 ms (below, missed)",
                "open load, p99 TTFT: 900 ms, vLLM 900 ms (below, missed)",
                "output tokens/s, times that of vLLM (same checkpoint): 3.00",
                "p99 between tokens: 300 ms, vLLM (same checkpoint) 400 ms (below, reached)",
                "open load, p99 TTFT: 900 ms, vLLM (same checkpoint) 900 ms (below, missed)",
            ]
        );
        let table = servers(&sides);
        assert!(
            table.contains("100 / 900") && table.contains("20 / 2800"),
            "{table}"
        );
    }

    #[test]
    fn of_every_load_the_median_of_its_rounds_is_reported() {
        let late = |ttft: f64| Figures {
            ttft: (ttft / 10.0, ttft),
            ..run_of(50.0, 30.0)
        };
        let mut ours = Side::new(Who::Quire);
        ours.open = rounds([late(9000.0), late(400.0), late(500.0)]);
        let mut theirs = Side::new(Who::LlamaServer);
        theirs.open = rounds([late(600.0), late(8000.0), late(700.0)]);
        theirs.paced.ours = rounds([late(300.0), late(200.0), late(100.0)]);
        theirs.paced.theirs = rounds([late(150.0), late(150.0), late(950.0)]);
        let sides = [ours, theirs];
        assert_eq!(
            server_bars(&sides),
            [
                "open load, p99 TTFT: 500 ms, llama-server 700 ms (below, reached)",
                "open load it can bear, p99 TTFT: 200 ms, llama-server 150 ms (below, missed)",
                "open load it can bear, p99 between tokens: 30 ms, llama-server 30 ms (below, missed)",
            ]
        );
        let table = servers(&sides);
        assert!(
            table.contains("50 / 500") && table.contains("70 / 700"),
            "{table}"
        );
    }

    #[test]
    fn what_failed_is_counted_named_and_marks_its_verdicts() {
        let failing = |gap| Figures {
            failed: 3,
            failures: BTreeMap::from([(
                "HTTP 500".to_owned(),
                Failed {
                    count: 3,
                    message: "out of memory".to_owned(),
                },
            )]),
            ..run_of(64.0, gap)
        };
        let mut ours = Side::new(Who::Quire);
        ours.closed = rounds([run_of(90.0, 500.0)]);
        let mut theirs = Side::new(Who::LlamaServer);
        theirs.closed = rounds([run_of(25.0, 800.0), failing(900.0)]);
        theirs.paced.theirs = rounds([run_of(25.0, 90.0)]);
        theirs.paced.ours = rounds([failing(80.0)]);
        let sides = [ours, theirs];
        let table = servers(&sides);
        let failed = table.lines().find(|line| line.contains("failed")).unwrap();
        let cells: Vec<&str> = failed.split('|').map(str::trim).collect();
        assert_eq!(cells[1..4], ["failed", "3", "3"], "{table}");
        assert_eq!(
            failures(&sides),
            [
                "quire, open load that llama-server can bear, round 1: 3 × HTTP 500: out of memory",
                "llama-server, round 2: 3 × HTTP 500: out of memory",
            ]
        );
        let bars = server_bars(&sides);
        let marks = [
            "(≥ 3 missed); of requests, 0 of ours failed and 3 of theirs",
            "(below, reached); of requests, 0 of ours failed and 3 of theirs",
            "(below, missed); of requests, 3 of ours failed and 0 of theirs",
            "(below, reached); of requests, 3 of ours failed and 0 of theirs",
        ];
        assert_eq!(bars.len(), marks.len());
        for (line, mark) in bars.iter().zip(marks) {
            assert!(line.ends_with(mark), "{line}");
        }
    }

    #[test]
    fn of_a_comparison_that_was_cut_short_there_is_what_was_finished() {
        let mut ours = Side::new(Who::Quire);
        ours.closed = rounds([run_of(90.0, 500.0)]);
        let sides = [ours, Side::new(Who::LlamaServer)];
        let table = servers(&sides);
        assert!(table.contains("90.0") && !table.contains("NaN"), "{table}");
        assert!(server_bars(&sides).is_empty());
    }
}
