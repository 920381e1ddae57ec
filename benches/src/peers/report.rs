//! The tables of `peers`.

use comfy_table::{CellAlignment, Table, presets};

use super::engine::Column;
use super::ratio::median;
use super::work::Work;

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
