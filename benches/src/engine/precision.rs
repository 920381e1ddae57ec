//! What speed and memory depend on the precision of the KV cache.

use comfy_table::{CellAlignment, Table, presets};

use super::workload::Line;

/// Each line's tokens a second and MiB of keys and values with every precision, as multiples of the first's. Lines that differ by nothing else stand
/// together, so many each.
pub fn table(lines: &[Line], dtypes: usize) -> String {
    let Some(first) = lines.get(..dtypes) else {
        return String::new();
    };
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    let header = ["tokens/s; KV cache, MiB", "prompt", "sequences"].map(str::to_owned);
    let names = first.iter().map(|line| line.kv_dtype.to_owned());
    table.set_header(header.into_iter().chain(names));
    for alike in lines.chunks_exact(dtypes) {
        let first = &alike[0];
        let mut row = vec![
            first.kind.name().to_owned(),
            first.prompt.to_string(),
            first.batch.to_string(),
        ];
        row.extend(alike.iter().map(|line| {
            let (speed, of) = (line.tokens_per_second(), first.tokens_per_second());
            let (memory, whole) = (line.kv_mib(), first.kv_mib());
            format!(
                "{speed:.1} = {:.2} ×; {memory:.1} = {:.2} ×",
                speed / of,
                memory / whole
            )
        }));
        table.add_row(row);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}

#[cfg(test)]
mod tests {
    use super::super::workload::Kind;
    use super::*;

    #[test]
    fn a_precision_stands_beside_the_first_with_its_speed_and_its_memory() {
        let line = |prompt, kv_dtype, seconds, mib: usize| Line {
            kind: Kind::Decode,
            prompt,
            batch: 8,
            kv_dtype,
            kv_bytes: mib << 20,
            tokens: 64,
            steps: 8,
            seconds,
            range: (seconds, seconds),
            memory: 0.5,
            arithmetic: 0.1,
        };
        let lines = [
            line(512, "f16", 1.0, 100),
            line(512, "q8", 1.25, 53),
            line(8192, "f16", 4.0, 1600),
            line(8192, "q8", 2.0, 850),
        ];
        let table = table(&lines, 2);
        for part in [
            "64.0 = 1.00 ×; 100.0 = 1.00 ×",
            "51.2 = 0.80 ×; 53.0 = 0.53 ×",
            "16.0 = 1.00 ×; 1600.0 = 1.00 ×",
            "32.0 = 2.00 ×; 850.0 = 0.53 ×",
        ] {
            assert!(table.contains(part), "{part} is not in\n{table}");
        }
        assert_eq!(table.lines().count(), 4, "{table}");
    }
}
