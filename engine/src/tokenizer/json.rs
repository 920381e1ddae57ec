//! JSON as Python's `json.dumps(…, ensure_ascii=False)` writes it: chat templates were written, and models trained, on its spaces.

use serde_json::Value;

/// `indent`: spaces per level; `None` for one line.
pub(super) fn dumps(value: &Value, indent: Option<usize>) -> String {
    let mut out = String::new();
    write(value, indent, 0, &mut out);
    out
}

fn write(value: &Value, indent: Option<usize>, depth: usize, out: &mut String) {
    match value {
        Value::Array(items) => {
            let items = items.iter().map(|item| (None, item));
            write_items(items, ['[', ']'], indent, depth, out);
        }
        Value::Object(fields) => {
            let items = fields.iter().map(|(key, item)| (Some(key.as_str()), item));
            write_items(items, ['{', '}'], indent, depth, out);
        }
        other => out.push_str(&other.to_string()),
    }
}

fn write_items<'a>(
    items: impl ExactSizeIterator<Item = (Option<&'a str>, &'a Value)>,
    [open, close]: [char; 2],
    indent: Option<usize>,
    depth: usize,
    out: &mut String,
) {
    out.push(open);
    let empty = items.len() == 0;
    let line = |depth: usize, out: &mut String| {
        if let Some(indent) = indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    };
    for (i, (key, item)) in items.enumerate() {
        if i > 0 {
            out.push_str(if indent.is_some() { "," } else { ", " });
        }
        line(depth + 1, out);
        if let Some(key) = key {
            out.push_str(&Value::from(key).to_string());
            out.push_str(": ");
        }
        write(item, indent, depth + 1, out);
    }
    if !empty {
        line(depth, out);
    }
    out.push(close);
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn spaces_are_pythons() {
        let value = json!({"a": [1, 2.5, "ü\n"], "b": {}, "c": [], "d": null, "e": true});
        assert_eq!(
            dumps(&value, None),
            r#"{"a": [1, 2.5, "ü\n"], "b": {}, "c": [], "d": null, "e": true}"#
        );
    }

    #[test]
    fn indented_lines_are_pythons() {
        let value = json!({"a": [1, {"b": 2}], "c": {}});
        assert_eq!(
            dumps(&value, Some(2)),
            "{\n  \"a\": [\n    1,\n    {\n      \"b\": 2\n    }\n  ],\n  \"c\": {}\n}"
        );
    }
}
