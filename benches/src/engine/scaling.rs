//! How speed grows with threads.

use comfy_table::{CellAlignment, Table, presets};

use super::Round;
use super::limits::Limits;

/// Each line's tokens a second on every number of threads, as a multiple of the first's, and below them what the machine's limits grow by: a line that
/// waits for memory can grow no more than the memory does.
pub fn table(rounds: &[Round]) -> String {
    let Some(first) = rounds.first() else {
        return String::new();
    };
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    let mut header = ["tokens/s", "prompt", "sequences", "KV cache"]
        .map(str::to_owned)
        .to_vec();
    header.extend(rounds.iter().map(|round| match round.threads {
        1 => "1 thread".to_owned(),
        threads => format!("{threads} threads"),
    }));
    table.set_header(header);
    for (at, line) in first.lines.iter().enumerate() {
        let mut row = vec![
            line.kind.name().to_owned(),
            line.prompt.to_string(),
            line.batch.to_string(),
            line.kv_dtype.to_owned(),
        ];
        row.extend(rounds.iter().map(|round| {
            let speed = round.lines[at].tokens_per_second();
            format!("{speed:.1} = {:.2} ×", speed / line.tokens_per_second())
        }));
        table.add_row(row);
    }
    let mut limit = |what: &str, of: &dyn Fn(&Limits) -> Option<f64>| {
        if let Some(alone) = of(&first.limits) {
            let mut row = vec![format!("limit: {what}")];
            row.resize(4, String::new());
            let reached = rounds.iter().filter_map(|round| of(&round.limits));
            row.extend(reached.map(|limit| format!("{:.0} = {:.2} ×", limit / 1e9, limit / alone)));
            table.add_row(row);
        }
    };
    limit("memory, GB/s", &|l| Some(l.memory_bytes_per_second));
    limit("f32, GFLOP/s", &|l| Some(l.f32.per_second));
    limit("bf16, GFLOP/s", &|l| l.bf16.map(|peak| peak.per_second));
    limit("8-bit, GOP/s", &|l| l.int8.map(|peak| peak.per_second));
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}
