//! JSON as Python's `json.dumps` writes it: chat templates were written, and models trained, on its spaces.

use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind, State};

use super::{budget, python};

/// Deeper values are refused, about where Python gives up.
const DEEPEST: usize = 500;

/// How `json.dumps` is asked to write.
#[derive(Debug, Default)]
pub(super) struct Style {
    /// Escape what is not ASCII.
    pub ensure_ascii: bool,
    /// What a level is indented by; `None` for one line.
    pub indent: Option<String>,
    /// Between items, and between key and value; `None`: Python's defaults.
    pub separators: Option<(String, String)>,
    /// Objects in the order of their keys.
    pub sort_keys: bool,
}

/// # Errors
/// The value, or something in it, is not JSON, or its text is more than the template may still write.
pub(super) fn dumps(state: &State<'_, '_>, value: &Value, style: &Style) -> Result<String, Error> {
    let (item, key) = match &style.separators {
        Some((item, key)) => (item.as_str(), key.as_str()),
        None if style.indent.is_some() => (",", ": "),
        None => (", ", ": "),
    };
    let mut writer = Writer {
        state,
        style,
        item,
        key,
        out: String::new(),
    };
    writer.value(value, 0)?;
    Ok(writer.out)
}

struct Writer<'a> {
    state: &'a State<'a, 'a>,
    style: &'a Style,
    item: &'a str,
    key: &'a str,
    out: String,
}

impl Writer<'_> {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > DEEPEST {
            return Err(not_json("a value that is nested too deep"));
        }
        self.state.consume_fuel(1)?;
        match value.kind() {
            ValueKind::None => self.push("null")?,
            ValueKind::Bool => self.push(if value.is_true() { "true" } else { "false" })?,
            ValueKind::Number => self.push(&number(value))?,
            ValueKind::String => self.string(value.as_str().unwrap_or_default())?,
            ValueKind::Seq | ValueKind::Iterable => {
                self.push("[")?;
                for (at, item) in value.try_iter()?.enumerate() {
                    self.next(at, depth + 1)?;
                    self.value(&item, depth + 1)?;
                }
                self.close("]", value.len() == Some(0), depth)?;
            }
            ValueKind::Map => {
                let mut pairs = Vec::new();
                for key in value.try_iter()? {
                    let name = Self::object_key(&key)?;
                    budget::charge(self.state, name.len())?;
                    pairs.push((name, value.get_item(&key)?));
                }
                if self.style.sort_keys {
                    pairs.sort_by(|a, b| a.0.cmp(&b.0));
                }
                self.push("{")?;
                for (at, (key, item)) in pairs.iter().enumerate() {
                    self.next(at, depth + 1)?;
                    self.string(key)?;
                    self.push(self.key)?;
                    self.value(item, depth + 1)?;
                }
                self.close("}", pairs.is_empty(), depth)?;
            }
            other => return Err(not_json(&other.to_string())),
        }
        Ok(())
    }

    fn object_key(key: &Value) -> Result<String, Error> {
        Ok(match key.kind() {
            ValueKind::String => key.as_str().unwrap_or_default().to_owned(),
            ValueKind::None => "null".to_owned(),
            ValueKind::Bool => key.is_true().to_string(),
            ValueKind::Number => number(key),
            other => return Err(not_json(&format!("a key of type {other}"))),
        })
    }

    fn push(&mut self, text: &str) -> Result<(), Error> {
        budget::afford(self.state, self.out.len() + text.len())?;
        self.out.push_str(text);
        Ok(())
    }

    /// What stands before an item.
    fn next(&mut self, at: usize, depth: usize) -> Result<(), Error> {
        if at > 0 {
            self.push(self.item)?;
        }
        self.line(depth)
    }

    fn close(&mut self, bracket: &str, empty: bool, depth: usize) -> Result<(), Error> {
        if !empty {
            self.line(depth)?;
        }
        self.push(bracket)
    }

    fn line(&mut self, depth: usize) -> Result<(), Error> {
        if let Some(indent) = &self.style.indent {
            self.push("\n")?;
            for _ in 0..depth {
                self.push(indent)?;
            }
        }
        Ok(())
    }

    fn string(&mut self, text: &str) -> Result<(), Error> {
        // Six bytes for a control character.
        budget::afford(self.state, text.len().saturating_mul(6))?;
        // serde_json escapes what Python does with `ensure_ascii=False`: quotes, backslashes and controls below U+0020.
        let quoted = serde_json::Value::from(text).to_string();
        if !self.style.ensure_ascii {
            return self.push(&quoted);
        }
        for c in quoted.chars() {
            if (' '..='~').contains(&c) {
                self.push(c.encode_utf8(&mut [0; 4]))?;
            } else {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    self.push(&format!("\\u{unit:04x}"))?;
                }
            }
        }
        Ok(())
    }
}

fn number(value: &Value) -> String {
    match python::as_float(value) {
        Some(float) if float.is_nan() => "NaN".to_owned(),
        Some(float) if float.is_infinite() && float > 0.0 => "Infinity".to_owned(),
        Some(float) if float.is_infinite() => "-Infinity".to_owned(),
        Some(float) => python::float(float),
        None => value.to_string(),
    }
}

fn not_json(what: &str) -> Error {
    Error::new(
        ErrorKind::BadSerialization,
        format!("{what} is not JSON serializable"),
    )
}

#[cfg(test)]
mod tests {
    use minijinja::Environment;
    use minijinja::value::Serde;
    use serde_json::json;

    use super::*;

    fn dumped(value: serde_json::Value, indent: Option<&str>) -> String {
        let style = Style {
            indent: indent.map(str::to_owned),
            ..Style::default()
        };
        dumps(
            &Environment::new().empty_state(),
            &Value::from(Serde(value)),
            &style,
        )
        .expect("JSON")
    }

    #[test]
    fn spaces_are_pythons() {
        let value = json!({"a": [1, 2.5, "ü\n"], "b": {}, "c": [], "d": null, "e": true});
        assert_eq!(
            dumped(value, None),
            r#"{"a": [1, 2.5, "ü\n"], "b": {}, "c": [], "d": null, "e": true}"#
        );
    }

    #[test]
    fn indented_lines_are_pythons() {
        let value = json!({"a": [1, {"b": 2}], "c": {}});
        assert_eq!(
            dumped(value, Some("  ")),
            "{\n  \"a\": [\n    1,\n    {\n      \"b\": 2\n    }\n  ],\n  \"c\": {}\n}"
        );
    }

    #[test]
    fn what_never_ends_is_refused() {
        let mut value = Value::from(1);
        for _ in 0..2 * DEEPEST {
            value = Value::from(vec![value]);
        }
        let environment = Environment::new();
        assert!(dumps(&environment.empty_state(), &value, &Style::default()).is_err());
    }
}
