//! Filters, tests and functions of jinja2 and transformers that minijinja has otherwise or not at all.
//!
//! Everything here follows the Python of the same name; `tests/templates/idioms.json` compares.
#![expect(
    clippy::needless_pass_by_value,
    reason = "minijinja hands a filter its arguments by value"
)]

use minijinja::formatting::{self, FormatStyle};
use minijinja::value::{
    Kwargs, Rest, StringInput, Tuple, Value, ValueKind, ValueOrKwargs, from_args,
};
use minijinja::{Environment, Error, ErrorKind, Output, State, filters};

use super::{budget, guards, json, methods};

/// Teaches `environment` Python's ways.
pub(super) fn add_to(environment: &mut Environment<'_>) {
    environment.set_unknown_method_callback(methods::call);
    environment.set_formatter(print);
    environment.add_filter("tojson", tojson);
    environment.add_filter("list", list);
    environment.add_filter("trim", trim);
    environment.add_filter("join", join);
    environment.add_filter("format", format);
    guards::add_to(environment);
    environment.add_filter("int", int);
    environment.add_filter("float", float_filter);
    for name in ["e", "escape", "forceescape"] {
        environment.add_filter(name, escape);
    }
    environment.add_filter("indent", indent);
    environment.add_filter("replace", replace);
    environment.add_filter("sum", sum);
    // minijinja's own, which jinja2 does not have: texts that nobody pays for.
    environment.remove_filter("lines");
    environment.remove_filter("split");
    environment.remove_test("startingwith");
    environment.remove_test("endingwith");
    environment.add_filter(ITERATED, iterated);
    environment.add_filter(PRINTF, printf);
    environment.add_test("iterable", |value: &Value| {
        !value.is_none() && value.try_iter().is_ok()
    });
    // Whatever has a length and can be indexed; an undefined value says yes to everything.
    environment.add_test("sequence", |value: &Value| {
        match value.kind() {
            ValueKind::Seq | ValueKind::String | ValueKind::Map | ValueKind::Undefined => true,
            // A slice or a range, but no generator.
            ValueKind::Iterable => value.len().is_some(),
            _ => false,
        }
    });
    environment.add_function("cycler", |state: &State<'_, '_>, items: Rest<Value>| {
        // It can be printed.
        for item in items.iter() {
            budget::text(state, item)?;
        }
        minijinja_contrib::globals::cycler(items.to_vec())
    });
    environment.add_function("joiner", |separator: Option<Value>| {
        minijinja_contrib::globals::joiner(Some(separator.unwrap_or_else(|| ", ".into())))
    });
    environment.remove_global("debug");
}

/// A filter: what a `for` loop runs over, refused where Python would.
pub(super) const ITERATED: &str = "__iterated";
/// A filter: `text % values`.
pub(super) const PRINTF: &str = "__printf";

pub(super) fn iterated(value: Value) -> Result<Value, Error> {
    if value.is_none() {
        return Err(invalid("'NoneType' object is not iterable"));
    }
    Ok(value)
}

fn printf(state: &State<'_, '_>, text: &str, values: &Value) -> Result<String, Error> {
    let values: Vec<Value> = match values.downcast_object_ref::<Tuple>() {
        Some(_) => values.try_iter()?.collect(),
        None => vec![values.clone()],
    };
    afford_format(state, FormatStyle::Printf, text, &values)?;
    formatting::format(FormatStyle::Printf, text, &values)
}

fn format(
    state: &mut State<'_, '_>,
    text: &Value,
    values: Rest<ValueOrKwargs>,
) -> Result<Value, Error> {
    let values = values.into_values();
    afford_format(
        state,
        FormatStyle::Printf,
        text.as_str().unwrap_or_default(),
        &values,
    )?;
    filters::format(
        state,
        text,
        Rest(values.into_iter().map(Into::into).collect()),
    )
}

/// Refuses to format what could become too long a text.
pub(super) fn afford_format(
    state: &State<'_, '_>,
    style: FormatStyle,
    text: &str,
    values: &[Value],
) -> Result<(), Error> {
    let mut bytes = 0_usize;
    for value in values {
        bytes = bytes.saturating_add(budget::text(state, value)?);
    }
    // Each field can be all of the values.
    let (fields, widths) = fields(style, text);
    let bytes = bytes.saturating_mul(fields).saturating_add(widths);
    budget::afford(state, bytes.saturating_add(text.len()))
}

/// How many fields a format has, and what their widths and precisions add up to: at least those that [`formatting`] reads.
fn fields(style: FormatStyle, text: &str) -> (usize, usize) {
    let sign = match style {
        FormatStyle::Printf => '%',
        FormatStyle::StrFormat => '{',
    };
    let (mut count, mut widths) = (0, 0_usize);
    let mut rest = text;
    while let Some((_, field)) = rest.split_once(sign) {
        if let Some(escaped) = field.strip_prefix(sign) {
            rest = escaped;
            continue;
        }
        count += 1;
        let spec = match style {
            FormatStyle::Printf => field
                .strip_prefix('(')
                .map_or(field, |key| behind(key, ')')),
            FormatStyle::StrFormat => str_format_spec(field),
        };
        let other = |c: char| !c.is_ascii_digit() && !"+ -#,_.".contains(c);
        let (numbers, behind) = spec.split_at(spec.find(other).unwrap_or(spec.len()));
        for number in numbers.split(|c: char| !c.is_ascii_digit()) {
            if !number.is_empty() {
                widths = widths.saturating_add(number.parse().unwrap_or(usize::MAX));
            }
        }
        rest = behind;
    }
    (count, widths)
}

/// From a field of `str.format` what its specification has behind fill and alignment, or from the field's end on.
fn str_format_spec(field: &str) -> &str {
    let mut rest = field;
    loop {
        match rest.find([':', '[', '}']).map(|at| rest.split_at(at)) {
            Some((_, key)) if key.starts_with('[') => rest = behind(key, ']'),
            Some((_, spec)) if spec.starts_with(':') => {
                rest = &spec[1..];
                break;
            }
            Some((_, end)) => return end,
            None => return "",
        }
    }
    let mut characters = rest.chars();
    match (characters.next(), characters.next()) {
        (Some(_), Some('<' | '>' | '^')) => characters.as_str(),
        (Some('<' | '>' | '^'), _) => &rest[1..],
        _ => rest,
    }
}

fn behind(text: &str, end: char) -> &str {
    text.split_once(end).map_or("", |(_, behind)| behind)
}

fn indent(state: &mut State<'_, '_>, args: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let args = args.into_values();
    let (value, width, _, _, named): (&Value, Option<usize>, Option<bool>, Option<bool>, Kwargs) =
        from_args(&args)?;
    let width = or_named(width, &named, "width")?.unwrap_or(4);
    let bytes = budget::text(state, value)?;
    let lines = value
        .as_str()
        .map_or(bytes, |text| text.matches('\n').count() + 1);
    budget::afford(state, lines.saturating_mul(width).saturating_add(bytes))?;
    Value::from_function(filters::indent).call(state, &args)
}

fn replace(state: &mut State<'_, '_>, args: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    type Args<'a> = (&'a Value, &'a Value, &'a Value, Option<i64>, Kwargs);
    let args = args.into_values();
    let (value, from, to, count, named): Args<'_> = from_args(&args)?;
    let count = or_named(count, &named, "count")?.map_or(usize::MAX, |count| {
        usize::try_from(count).unwrap_or(usize::MAX)
    });
    named.assert_all_used()?;
    for text in [value, from, to] {
        budget::text(state, text)?;
    }
    let value = StringInput::new(state, value)?;
    let from = StringInput::new(state, from)?;
    let to = StringInput::new(state, to)?;
    if count == usize::MAX {
        return filters::replace(state, value, from, to);
    }
    let text = value.as_str();
    let places = text.matches(from.as_str()).take(count).count();
    let bytes = places.saturating_mul(to.as_str().len());
    budget::afford(state, bytes.saturating_add(text.len()))?;
    Ok(value.preserve_safety(text.replacen(from.as_str(), to.as_str(), count)))
}

/// minijinja adds lists by remembering both, a hundred thousand deep if need be.
fn sum(state: &mut State<'_, '_>, args: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let args = args.into_values();
    let (values, attribute, start, named): (Value, Option<&str>, Option<Value>, Kwargs) =
        from_args(&args)?;
    let attribute = or_named(attribute, &named, "attribute")?;
    let start = or_named(start, &named, "start")?.unwrap_or_else(|| 0.into());
    named.assert_all_used()?;
    let none = Kwargs::from_iter(Vec::<(String, Value)>::new());
    if start.is_number() {
        return filters::sum(state, values, attribute, Some(start), none);
    }
    if !matches!(start.kind(), ValueKind::Seq | ValueKind::Iterable) {
        return Err(invalid(format!("cannot sum from a {}", start.kind())));
    }
    let values = match attribute {
        Some(name) => {
            let name = Kwargs::from_iter([("attribute", Value::from(name))]);
            state.apply_filter("map", &[values, name.into()])?
        }
        None => values,
    };
    let mut all: Vec<Value> = start.try_iter()?.collect();
    for list in values.try_iter()? {
        for item in list.try_iter()? {
            state.consume_fuel(1)?;
            all.push(item);
        }
    }
    Ok(all.into())
}

/// The value as a float, if it is one and not an integer.
pub(super) fn as_float(value: &Value) -> Option<f64> {
    if value.is_number() && !value.is_integer() {
        f64::try_from(value.clone()).ok()
    } else {
        None
    }
}

/// `repr(value)`: the shortest digits that mean the same, with an exponent below 1e-4 and from 1e16 on.
pub(super) fn float(value: f64) -> String {
    if value.is_nan() {
        return "nan".to_owned();
    }
    if value.is_infinite() {
        return if value > 0.0 { "inf" } else { "-inf" }.to_owned();
    }
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let plain = value.to_string();
        return if plain.contains('.') {
            plain
        } else {
            plain + ".0"
        };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

/// What `{{ … }}` writes.
fn print(out: &mut Output<'_>, state: &mut State<'_, '_>, value: &Value) -> Result<(), Error> {
    if let Some(number) = as_float(value) {
        return out.write_str(&float(number)).map_err(Error::from);
    }
    budget::text(state, value)?;
    minijinja::escape_formatter(out, state, value)
}

/// transformers' `tojson`: `json.dumps` with these arguments, in this order.
fn tojson(state: &State<'_, '_>, args: Rest<ValueOrKwargs>) -> Result<String, Error> {
    type Args<'a> = (
        &'a Value,
        Option<bool>,
        Option<Value>,
        Option<Value>,
        Kwargs,
    );
    let args = args.into_values();
    let (value, ensure_ascii, indent, separators, named): Args<'_> = from_args(&args)?;
    let indent = or_named(indent, &named, "indent")?;
    let separators = or_named(separators, &named, "separators")?;
    let style = json::Style {
        ensure_ascii: or_named(ensure_ascii, &named, "ensure_ascii")?.unwrap_or(false),
        indent: match indent.filter(|indent| !indent.is_none()) {
            None => None,
            Some(indent) => Some(match indent.as_str() {
                Some(text) => text.to_owned(),
                None => " ".repeat(usize::try_from(indent)?.min(100)),
            }),
        },
        separators: match separators.filter(|separators| !separators.is_none()) {
            None => None,
            Some(pair) => {
                let part = |at: usize| -> Result<String, Error> {
                    pair.get_item_by_index(at)?
                        .as_str()
                        .map(str::to_owned)
                        .ok_or_else(|| invalid("separators must be two strings"))
                };
                Some((part(0)?, part(1)?))
            }
        },
        sort_keys: named.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    named.assert_all_used()?;
    json::dumps(state, value, &style)
}

pub(super) fn or_named<'a, T>(
    positional: Option<T>,
    named: &'a Kwargs,
    name: &'a str,
) -> Result<Option<T>, Error>
where
    Option<T>: minijinja::value::ArgType<'a, Output = Option<T>>,
{
    match positional {
        Some(value) => Ok(Some(value)),
        None => named.get(name),
    }
}

fn trim(
    state: &mut State<'_, '_>,
    value: &Value,
    characters: Option<&str>,
) -> Result<Value, Error> {
    budget::text(state, value)?;
    let text = StringInput::new(state, value)?;
    let strip = |c: char| characters.map_or_else(|| is_space(c), |all| all.contains(c));
    Ok(text.preserve_safety(text.as_str().trim_matches(strip).to_owned()))
}

fn list(state: &State<'_, '_>, value: Value) -> Result<Value, Error> {
    filters::list(state, iterated(value)?)
}

fn join(
    state: &mut State<'_, '_>,
    value: Value,
    separator: Option<Value>,
    attribute: Option<&str>,
    named: Kwargs,
) -> Result<Value, Error> {
    let value = iterated(value)?;
    let separator = match or_named(separator, &named, "d")? {
        Some(separator) => separator,
        None => Value::from(""),
    };
    budget::text(state, &separator)?;
    let separator = StringInput::new(state, &separator)?;
    let mut bytes = 0_usize;
    for item in value.try_iter()? {
        state.consume_fuel(1)?;
        let item = budget::text(state, &item)?;
        bytes = bytes.saturating_add(item.saturating_add(separator.as_str().len()));
        budget::afford(state, bytes)?;
    }
    filters::join(state, &value, Some(separator), attribute, named)
}

fn int(
    state: &State<'_, '_>,
    value: &Value,
    default: Option<Value>,
    base: Option<u32>,
    named: Kwargs,
) -> Result<Value, Error> {
    let default = or_named(default, &named, "default")?.unwrap_or_else(|| 0.into());
    let base = or_named(base, &named, "base")?;
    named.assert_all_used()?;
    let none = Kwargs::from_iter(Vec::<(String, Value)>::new());
    Ok(filters::int(state, value, Some(default.clone()), base, none).unwrap_or(default))
}

fn float_filter(
    state: &State<'_, '_>,
    value: &Value,
    default: Option<Value>,
    named: Kwargs,
) -> Result<Value, Error> {
    let default = or_named(default, &named, "default")?.unwrap_or_else(|| 0.0.into());
    named.assert_all_used()?;
    let none = Kwargs::from_iter(Vec::<(String, Value)>::new());
    Ok(filters::float(state, value, Some(default.clone()), none).unwrap_or(default))
}

pub(super) fn dictsort(
    value: &Value,
    case_sensitive: Option<Value>,
    by: Option<Value>,
    reverse: Option<Value>,
    named: Kwargs,
) -> Result<Value, Error> {
    let positional = [
        ("case_sensitive", case_sensitive),
        ("by", by),
        ("reverse", reverse),
    ];
    let mut all = Vec::new();
    for (name, value) in positional {
        if let Some(value) = or_named(value, &named, name)? {
            all.push((name, value));
        }
    }
    named.assert_all_used()?;
    filters::dictsort(value, Kwargs::from_iter(all))
}

/// markupsafe's `escape`.
fn escape(state: &State<'_, '_>, value: &Value) -> Result<Value, Error> {
    if value.is_safe() {
        return Ok(value.clone());
    }
    let bytes = budget::text(state, value)?;
    budget::afford(state, bytes.saturating_mul("&#34;".len()))?;
    let mut out = String::new();
    for c in value.to_string().chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\'' => out.push_str("&#39;"),
            '"' => out.push_str("&#34;"),
            c => out.push(c),
        }
    }
    Ok(Value::from_safe_string(out))
}

/// Python's `str.isspace`: Unicode's white space and four separators of ASCII.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || matches!(c, '\x1c'..='\x1f')
}

pub(super) fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_spelt_as_python_spells_them() {
        let cases = [
            (0.1, "0.1"),
            (3.0, "3.0"),
            (-0.0, "-0.0"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (0.0001, "0.0001"),
            (0.000_012_5, "1.25e-05"),
            (f64::INFINITY, "inf"),
        ];
        for (value, expected) in cases {
            assert_eq!(float(value), expected);
        }
    }
}
