//! Methods of Python's strings, lists and dicts that neither minijinja nor its `pycompat` has, or has otherwise.
//!
//! Everything here follows the Python of the same name; `tests/templates/idioms.json` compares.

use minijinja::formatting::{FormatStyle, format};
use minijinja::value::{Kwargs, Tuple, Value, ValueKind, from_args};
use minijinja::{Error, State};
use minijinja_contrib::pycompat;

use super::budget;
use super::python::{afford_format, invalid, is_space, iterated, or_named};

/// Longest text a padding method makes.
const LONGEST: usize = 1 << 20;

/// Calls a method of Python's that the value itself does not have.
pub(super) fn call(
    state: &mut State<'_, '_>,
    value: &Value,
    name: &str,
    args: &[Value],
) -> Result<Value, Error> {
    if value.kind() != ValueKind::String {
        // What is looked for: as a key, or among the items.
        if let Some(wanted) = args.first() {
            budget::comparison(state, wanted)?;
        }
        if let "index" | "count" = name {
            budget::comparison(state, value)?;
        }
    }
    let known = match value.kind() {
        ValueKind::String => string_method(state, value.as_str().unwrap_or_default(), name, args)?,
        ValueKind::Seq => sequence_method(value, name, args)?,
        ValueKind::Map if name == "copy" => {
            let () = from_args(args)?;
            Some(value.clone())
        }
        _ => None,
    };
    if let Some(result) = known {
        return Ok(result);
    }
    pycompat::unknown_method_callback(state, value, name, args)
}

fn sequence_method(value: &Value, name: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    Ok(Some(match name {
        "copy" => {
            let () = from_args(args)?;
            value.clone()
        }
        "index" => {
            let (wanted,): (&Value,) = from_args(args)?;
            value
                .try_iter()?
                .position(|item| item == *wanted)
                .map(Value::from)
                .ok_or_else(|| invalid("the item is not in the list"))?
        }
        _ => return Ok(None),
    }))
}

fn string_method(
    state: &State<'_, '_>,
    text: &str,
    name: &str,
    args: &[Value],
) -> Result<Option<Value>, Error> {
    let pair = || from_args::<(&str,)>(args).map(|(separator,)| separator);
    Ok(Some(match name {
        "swapcase" => {
            let () = from_args(args)?;
            let swap = |c: char| -> String {
                if c.is_uppercase() {
                    c.to_lowercase().collect()
                } else {
                    c.to_uppercase().collect()
                }
            };
            text.chars().map(swap).collect::<String>().into()
        }
        "casefold" => {
            let () = from_args(args)?;
            text.to_lowercase().replace('ß', "ss").into()
        }
        "removeprefix" => text.strip_prefix(pair()?).unwrap_or(text).into(),
        "removesuffix" => text.strip_suffix(pair()?).unwrap_or(text).into(),
        "partition" => match text.split_once(not_empty(pair()?)?) {
            Some((before, after)) => triple(state, before, pair()?, after)?,
            None => triple(state, text, "", "")?,
        },
        "rpartition" => match text.rsplit_once(not_empty(pair()?)?) {
            Some((before, after)) => triple(state, before, pair()?, after)?,
            None => triple(state, "", "", text)?,
        },
        "split" => split(state, text, args)?,
        "rsplit" => rsplit(state, text, args)?,
        "splitlines" => split_lines(state, text, args)?,
        "strip" | "lstrip" | "rstrip" => {
            let (characters,): (Option<&str>,) = from_args(args)?;
            let strip = |c: char| characters.map_or_else(|| is_space(c), |all| all.contains(c));
            let text = match name {
                "rstrip" => text,
                _ => text.trim_start_matches(strip),
            };
            match name {
                "lstrip" => text,
                _ => text.trim_end_matches(strip),
            }
            .into()
        }
        "title" => {
            let () = from_args(args)?;
            let mut inside = false;
            let mut title = String::with_capacity(text.len());
            for c in text.chars() {
                if inside {
                    title.extend(c.to_lowercase());
                } else {
                    title.extend(c.to_uppercase());
                }
                inside = c.is_lowercase() || c.is_uppercase();
            }
            title.into()
        }
        "join" => {
            let (items,): (&Value,) = from_args(args)?;
            let mut joined = String::new();
            for (at, item) in iterated(items.clone())?.try_iter()?.enumerate() {
                let part = item.as_str().ok_or_else(|| {
                    invalid(format!(
                        "sequence item {at}: expected a string, found {}",
                        item.kind()
                    ))
                })?;
                state.consume_fuel(1)?;
                let length = joined.len().saturating_add(text.len());
                budget::afford(state, length.saturating_add(part.len()))?;
                if at > 0 {
                    joined.push_str(text);
                }
                joined.push_str(part);
            }
            joined.into()
        }
        "format" => {
            afford_format(state, FormatStyle::StrFormat, text, args)?;
            format(FormatStyle::StrFormat, text, args)?.into()
        }
        "find" | "rfind" | "index" | "rindex" | "count" | "startswith" | "endswith" => {
            return search(text, name, args);
        }
        "zfill" => {
            let (width,): (usize,) = from_args(args)?;
            let (sign, digits) = match text.strip_prefix(['+', '-']) {
                Some(digits) => text.split_at(text.len() - digits.len()),
                None => ("", text),
            };
            let zeros = width.min(LONGEST).saturating_sub(text.chars().count());
            format!("{sign}{}{digits}", "0".repeat(zeros)).into()
        }
        "ljust" | "rjust" | "center" => {
            let (width, fill): (usize, Option<&str>) = from_args(args)?;
            let fill = fill.unwrap_or(" ");
            if fill.chars().count() != 1 {
                return Err(invalid("the fill character must be one character"));
            }
            let width = width.min(LONGEST);
            let missing = width.saturating_sub(text.chars().count());
            let left = match name {
                "ljust" => 0,
                "rjust" => missing,
                // CPython's rounding.
                _ => missing / 2 + (missing & width & 1),
            };
            format!("{}{text}{}", fill.repeat(left), fill.repeat(missing - left)).into()
        }
        _ => return Ok(None),
    }))
}

/// The methods that look for something between `start` and `end`, which count characters.
fn search(text: &str, name: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let (wanted, start, end): (&Value, Option<i64>, Option<i64>) = from_args(args)?;
    let length = text.chars().count() as i64;
    let at = |position: i64| {
        let position = if position < 0 {
            position + length
        } else {
            position
        };
        position.clamp(0, length)
    };
    let (first, last) = (at(start.unwrap_or(0)), at(end.unwrap_or(length)));
    let byte = |position: i64| {
        let mut starts = text.char_indices().map(|(byte, _)| byte);
        starts.nth(position as usize).unwrap_or(text.len())
    };
    let part = &text[byte(first)..byte(last.max(first))];
    if let "startswith" | "endswith" = name {
        let matches = |wanted: &Value| match wanted.as_str() {
            Some(wanted) if name == "startswith" => Ok(part.starts_with(wanted)),
            Some(wanted) => Ok(part.ends_with(wanted)),
            None => Err(invalid(format!(
                "{name} expects a string or a tuple of strings, not {}",
                wanted.kind()
            ))),
        };
        if wanted.kind() != ValueKind::Seq {
            return matches(wanted).map(|found| Some(found.into()));
        }
        for wanted in wanted.try_iter()? {
            if matches(&wanted)? {
                return Ok(Some(true.into()));
            }
        }
        return Ok(Some(false.into()));
    }
    let Some(wanted) = wanted.as_str() else {
        return Err(invalid(format!(
            "{name} expects a string, not {}",
            wanted.kind()
        )));
    };
    if name == "count" {
        return Ok(Some(part.matches(wanted).count().into()));
    }
    let found = if name.starts_with('r') {
        part.rfind(wanted)
    } else {
        part.find(wanted)
    };
    Ok(Some(match found {
        Some(byte) => (first + part[..byte].chars().count() as i64).into(),
        None if name.ends_with("find") => (-1).into(),
        None => return Err(invalid("substring not found")),
    }))
}

/// The arguments of `split` and `rsplit`: a separator, and how often to split at most.
fn split_arguments(args: &[Value]) -> Result<(Option<String>, usize), Error> {
    let (separator, most, named): (Option<&str>, Option<i64>, Kwargs) = from_args(args)?;
    let separator = or_named(separator, &named, "sep")?.map(str::to_owned);
    let most = or_named(most, &named, "maxsplit")?.unwrap_or(-1);
    named.assert_all_used()?;
    if let Some(separator) = &separator {
        not_empty(separator)?;
    }
    Ok((separator, usize::try_from(most).unwrap_or(usize::MAX - 1)))
}

fn split(state: &State<'_, '_>, text: &str, args: &[Value]) -> Result<Value, Error> {
    let (separator, most) = split_arguments(args)?;
    if let Some(separator) = separator {
        let mut words = Vec::new();
        for word in text.splitn(most + 1, &separator) {
            budget::push(state, &mut words, word)?;
        }
        return Ok(words.into());
    }
    let mut words = Vec::new();
    let mut rest = text.trim_start_matches(is_space);
    while !rest.is_empty() {
        let end = match rest.find(is_space) {
            Some(end) if words.len() < most => end,
            _ => rest.len(),
        };
        budget::push(state, &mut words, &rest[..end])?;
        rest = rest[end..].trim_start_matches(is_space);
    }
    Ok(words.into())
}

fn rsplit(state: &State<'_, '_>, text: &str, args: &[Value]) -> Result<Value, Error> {
    let (separator, most) = split_arguments(args)?;
    let mut words: Vec<Value> = Vec::new();
    if let Some(separator) = separator {
        for word in text.rsplitn(most + 1, &separator) {
            budget::push(state, &mut words, word)?;
        }
    } else {
        let mut rest = text.trim_end_matches(is_space);
        while !rest.is_empty() {
            let begin = match rest.char_indices().rfind(|&(_, c)| is_space(c)) {
                Some((at, space)) if words.len() < most => at + space.len_utf8(),
                _ => 0,
            };
            budget::push(state, &mut words, &rest[begin..])?;
            rest = rest[..begin].trim_end_matches(is_space);
        }
    }
    words.reverse();
    Ok(words.into())
}

fn split_lines(state: &State<'_, '_>, text: &str, args: &[Value]) -> Result<Value, Error> {
    let (keep, named): (Option<bool>, Kwargs) = from_args(args)?;
    let keep = or_named(keep, &named, "keepends")?.unwrap_or(false);
    named.assert_all_used()?;
    let ends =
        |c: char| matches!(c, '\n'..='\r' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}');
    let mut lines = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let line = rest.find(ends).unwrap_or(rest.len());
        let end = if rest[line..].starts_with("\r\n") {
            2
        } else {
            rest[line..].chars().next().map_or(0, char::len_utf8)
        };
        let shown = if keep { line + end } else { line };
        budget::push(state, &mut lines, &rest[..shown])?;
        rest = &rest[line + end..];
    }
    Ok(lines.into())
}

fn not_empty(separator: &str) -> Result<&str, Error> {
    if separator.is_empty() {
        return Err(invalid("empty separator"));
    }
    Ok(separator)
}

fn triple(state: &State<'_, '_>, a: &str, b: &str, c: &str) -> Result<Value, Error> {
    budget::charge(state, a.len() + b.len() + c.len())?;
    Ok(Value::from(Tuple::from([
        Value::from(a),
        Value::from(b),
        Value::from(c),
    ])))
}
