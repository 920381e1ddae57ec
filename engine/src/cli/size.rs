//! Sizes in bytes as people write them: `512MiB`, `4G`, `1.5GB`.

/// Reads a size. Suffixes `K`, `M`, `G`, `T` (also `KiB` …) are powers of 1024; `KB`, `MB`, `GB`, `TB` powers of 1000; none is bytes.
///
/// # Errors
/// Not a size, in words for the user.
pub(super) fn parse(text: &str) -> Result<u64, String> {
    let wrong = || format!("`{text}` is not a size; write for example 512MiB, 4G or 1500000000");
    let text = text.trim();
    let digits = text
        .find(|c: char| !(c.is_ascii_digit() || c == '.'))
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let number: f64 = number.parse().map_err(|_| wrong())?;
    let unit = match suffix.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "ki" | "kib" => 1024.0,
        "m" | "mi" | "mib" => 1024.0 * 1024.0,
        "g" | "gi" | "gib" => 1024.0 * 1024.0 * 1024.0,
        "t" | "ti" | "tib" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "tb" => 1e12,
        _ => return Err(wrong()),
    };
    let bytes = number * unit;
    if bytes < 1.0 || bytes > u64::MAX as f64 {
        return Err(wrong());
    }
    Ok(bytes as u64)
}

/// Reads a size or `0`.
///
/// # Errors
/// As [`parse`].
pub(super) fn parse_or_none(text: &str) -> Result<u64, String> {
    if text.trim() == "0" {
        Ok(0)
    } else {
        parse(text)
    }
}

/// Bytes for people: `1.2 GiB`.
pub(super) fn show(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{bytes} B")
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, bytes) in [
            ("4096", 4096),
            ("512MiB", 512 << 20),
            ("4G", 4 << 30),
            ("4 gib", 4 << 30),
            ("1.5GB", 1_500_000_000),
            ("1k", 1024),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn nothing_is_a_size_where_it_may_be() {
        assert_eq!(parse_or_none(" 0"), Ok(0));
        assert_eq!(parse_or_none("2GiB"), Ok(2 << 30));
        assert!(parse_or_none("-1").is_err());
    }

    #[test]
    fn what_is_not_a_size_is_refused_with_an_example() {
        for text in ["", "many", "-4G", "4X", "0", "1e99T", "..", "NaN"] {
            let error = parse(text).expect_err(text);
            assert!(error.contains("512MiB"), "{error}");
        }
    }

    #[test]
    fn sizes_are_shown_in_the_largest_unit_that_fits() {
        assert_eq!(show(512), "512 B");
        assert_eq!(show(20 << 20), "20.0 MiB");
    }
}
