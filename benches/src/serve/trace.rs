//! Traces: when requests came to somebody's server, and how long they were. Only the times and the lengths: nobody publishes the words.
//!
//! Two forms are read. CSV with a heading or without, as the Azure LLM inference traces have it (`TIMESTAMP,ContextTokens,GeneratedTokens`; a timestamp is a date and time, or
//! seconds), and lines of JSON, as the Mooncake traces have them (`{"timestamp": 27482, "input_length": 6955, "output_length": 52}`, in milliseconds).

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, ensure};
use jiff::civil::DateTime;
use serde::Deserialize;

use super::lengths::LONGEST;

/// One request of a trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arrival {
    /// After the first of the trace.
    pub at: Duration,
    /// Tokens of its prompt.
    pub prompt_tokens: u32,
    /// Tokens of its answer.
    pub max_tokens: u32,
}

#[derive(Debug, Deserialize)]
struct JsonLine {
    timestamp: f64,
    input_length: u32,
    output_length: u32,
}

/// A line before it is known when the trace began: seconds since whenever, and lengths.
type Raw = (f64, u32, u32);

/// Reads a trace from a file.
///
/// # Errors
/// It cannot be read, has no request, or a line of it is broken; the message names the line.
pub fn read(path: &Path) -> anyhow::Result<Vec<Arrival>> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    parse(&text).with_context(|| path.display().to_string())
}

fn parse(text: &str) -> anyhow::Result<Vec<Arrival>> {
    let mut lines = (1..)
        .zip(text.lines())
        .filter(|(_, line)| !line.trim().is_empty())
        .peekable();
    let is_json = lines
        .peek()
        .is_some_and(|(_, line)| line.trim_start().starts_with('{'));
    let raw: Vec<(usize, Raw)> = if is_json {
        lines
            .map(|(n, line)| Ok((n, json(line).with_context(|| format!("line {n}: {line}"))?)))
            .collect::<anyhow::Result<_>>()?
    } else {
        // Columns come in the order of the published files, with a heading or without.
        if let Some((n, heading)) = lines.next_if(|(_, line)| csv(line).is_err()) {
            ensure!(
                heading.split(',').count() >= 3,
                "line {n}: {heading}\nexpected TIMESTAMP,ContextTokens,GeneratedTokens, or lines of JSON"
            );
        }
        lines
            .map(|(n, line)| Ok((n, csv(line).with_context(|| format!("line {n}: {line}"))?)))
            .collect::<anyhow::Result<_>>()?
    };
    ensure!(
        !raw.is_empty(),
        "it has no requests: expected TIMESTAMP,ContextTokens,GeneratedTokens and a line for each, or lines of JSON"
    );
    let first = raw.first().map_or(0.0, |(_, (seconds, ..))| *seconds);
    let mut last = first;
    raw.into_iter()
        .map(|(n, (seconds, prompt_tokens, max_tokens))| {
            ensure!(
                seconds >= last,
                "line {n}: it came before the line above it; expected lines in the order of their times"
            );
            last = seconds;
            for (name, length) in [("prompt", prompt_tokens), ("answer", max_tokens)] {
                ensure!(
                    length <= LONGEST,
                    "line {n}: {length} tokens of {name}, expected at most {LONGEST}"
                );
            }
            let at = Duration::try_from_secs_f64(seconds - first)
                .with_context(|| format!("line {n}: a time of {seconds} seconds"))?;
            Ok(Arrival {
                at,
                // Published traces have requests that were answered with nothing; we cannot ask for that.
                prompt_tokens: prompt_tokens.max(1),
                max_tokens: max_tokens.max(1),
            })
        })
        .collect()
}

fn json(line: &str) -> anyhow::Result<Raw> {
    let line: JsonLine = serde_json::from_str(line)?;
    Ok((
        line.timestamp / 1000.0,
        line.input_length,
        line.output_length,
    ))
}

fn csv(line: &str) -> anyhow::Result<Raw> {
    let mut fields = line.split(',').map(str::trim);
    let mut field = |name: &str| fields.next().with_context(|| format!("it has no {name}"));
    let (time, prompt, answer) = (
        field("time")?,
        field("length of the prompt")?,
        field("length of the answer")?,
    );
    let seconds = match time.parse::<f64>() {
        Ok(seconds) => seconds,
        Err(_) => seconds_of(time).with_context(|| format!("`{time}` is no time"))?,
    };
    let length = |text: &str| {
        text.parse::<u32>()
            .with_context(|| format!("`{text}` is no number of tokens"))
    };
    Ok((seconds, length(prompt)?, length(answer)?))
}

/// Seconds since 1970, as if the time were UTC: only differences count.
fn seconds_of(time: &str) -> anyhow::Result<f64> {
    let time: DateTime = time.parse()?;
    let zoned = time.to_zoned(jiff::tz::TimeZone::UTC)?;
    Ok(zoned.timestamp().as_nanosecond() as f64 / 1e9)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arrival(ms: u64, prompt_tokens: u32, max_tokens: u32) -> Arrival {
        Arrival {
            at: Duration::from_millis(ms),
            prompt_tokens,
            max_tokens,
        }
    }

    #[test]
    fn the_traces_people_publish_are_read() {
        let azure = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:47.1805900,396,109\n2023-11-17 00:00:00,10,0\n";
        let read = parse(azure).unwrap();
        assert_eq!(read[..1], [arrival(0, 374, 44)]);
        assert_eq!(read[1].at.as_millis(), 500);
        assert_eq!(read[2].at.as_secs(), 20_653);
        assert_eq!(read[2].max_tokens, 1, "nothing cannot be asked for");

        let mooncake = r#"{"timestamp": 1000, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1, 2]}

{"timestamp": 1250, "input_length": 7322, "output_length": 490, "hash_ids": [0, 14]}
"#;
        assert_eq!(
            parse(mooncake).unwrap(),
            [arrival(0, 6758, 500), arrival(250, 7322, 490)]
        );

        let seconds = "seconds,prompt,answer\n3.5,10,20\n4,11,21\n";
        assert_eq!(
            parse(seconds).unwrap(),
            [arrival(0, 10, 20), arrival(500, 11, 21)]
        );
        let (_, without_heading) = seconds.split_once('\n').unwrap();
        assert_eq!(parse(without_heading).unwrap(), parse(seconds).unwrap());
    }

    #[test]
    fn a_broken_line_is_named() {
        for (text, says) in [
            ("a,b,c\n1,2,3\n2,many,3\n", "line 3: 2,many,3: `many` is no"),
            ("a,b,c\nyesterday,2,3\n", "line 2: yesterday,2,3: `yester"),
            ("a,b,c\n1,2\n", "line 2: 1,2: it has no length of the ans"),
            ("a,b,c\n2,1,1\n1,1,1\n", "line 3: it came before"),
            ("a,b,c\n1,1,9999999\n", "line 2: 9999999 tokens of ans"),
            ("a,b,c\n0,1,1\ninf,1,1\n", "line 3: a time of inf"),
            ("words\n", "line 1: words"),
            ("", "it has no requests"),
            ("a,b,c\n", "it has no requests"),
            (
                "{\"timestamp\": 1}\n",
                "line 1: {\"timestamp\": 1}: missing",
            ),
        ] {
            let error = format!("{:#}", parse(text).unwrap_err());
            assert!(error.contains(says), "{says:?} is not in {error:?}");
        }
    }
}
