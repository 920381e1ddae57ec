//! What was measured, for the terminal.

use comfy_table::{CellAlignment, Table, presets};

use super::limits::Limits;
use super::workload::{Kind, Line};

/// The machine, in a line.
pub fn limits(limits: &Limits) -> String {
    let giga = |x: f64| x / 1e9;
    let int8 = limits.int8.map_or("8-bit not measured".to_owned(), |peak| {
        format!("8-bit {:.0} GOP/s ({})", giga(peak.per_second), peak.with)
    });
    let bf16 = limits.bf16.map_or(String::new(), |peak| {
        format!(
            "bf16 {:.0} GFLOP/s ({}), ",
            giga(peak.per_second),
            peak.with
        )
    });
    format!(
        "limits on {} threads: memory {:.1} GB/s, f32 {:.0} GFLOP/s ({}), {bf16}{int8}",
        limits.threads,
        giga(limits.memory_bytes_per_second),
        giga(limits.f32.per_second),
        limits.f32.with
    )
}

/// A line for each result.
pub fn table(lines: &[Line]) -> String {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    table.set_header([
        "",
        "sequences",
        "tokens/s",
        "ms a step",
        "memory",
        "arithmetic",
        "runs ± %",
    ]);
    for line in lines {
        let kind = match line.kind {
            Kind::Prefill => "prefill",
            Kind::Decode => "decode",
            Kind::Mixed => "mixed",
        };
        table.add_row([
            kind.to_owned(),
            line.batch.to_string(),
            format!("{:.1}", line.tokens_per_second()),
            format!("{:.2}", 1000.0 * line.seconds / f64::from(line.steps)),
            format!("{:.0} %", 100.0 * line.memory),
            format!("{:.0} %", 100.0 * line.arithmetic),
            format!("{:.0}", 50.0 * (line.range.1 - line.range.0) / line.seconds),
        ]);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}
