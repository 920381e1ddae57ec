//! What was measured, for the terminal.

use comfy_table::{CellAlignment, Table, presets};

use super::limits::Limits;
use super::workload::Line;

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
        "prompt",
        "sequences",
        "KV cache",
        "KV MiB",
        "tokens/s",
        "ms a step",
        "memory",
        "arithmetic",
        "runs ± %",
    ]);
    for line in lines {
        table.add_row([
            line.kind.name().to_owned(),
            line.prompt.to_string(),
            line.batch.to_string(),
            line.kv_dtype.to_owned(),
            format!("{:.1}", line.kv_mib()),
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
