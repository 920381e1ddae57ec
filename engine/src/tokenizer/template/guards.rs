//! What keeps a template from taking time and stack that minijinja does not charge for.
//!
//! Texts that values become, comparisons, and what variables remember: [`dialect`](super::dialect) sends what operators and statements take through the
//! filters here, and filters and tests that do the same have a guard in front of them.

use minijinja::value::{Kwargs, Rest, Tuple, Value, ValueKind, ValueOrKwargs};
use minijinja::{Environment, Error, State, filters, functions, tests as predicates};

use super::budget;
use super::python::{dictsort, invalid};

/// Deepest nesting of a value that is kept; JSON from outside has at most 128 levels.
const DEEPEST: usize = 256;

/// A filter: what `~` joins.
pub(super) const CONCATENATED: &str = "__concatenated";
/// A filter: what is compared, or looked up by.
pub(super) const COMPARED: &str = "__compared";
/// A filter: what `in` looks into.
pub(super) const SEARCHED: &str = "__searched";
/// A filter: a key of a dict, refused where Python would.
pub(super) const HASHED: &str = "__hashed";
/// A filter: what a variable may hold.
pub(super) const KEPT: &str = "__kept";
/// A filter: what an attribute of a namespace may hold.
pub(super) const KEPT_IN_NAMESPACE: &str = "__kept_in_namespace";

/// Puts guards before what minijinja has.
pub(super) fn add_to(environment: &mut Environment<'_>) {
    // Of whose arguments all but the first few may become texts.
    for (name, lists, filter) in [
        ("string", 0, Value::from_function(filters::string)),
        ("lower", 0, Value::from_function(filters::lower)),
        ("upper", 0, Value::from_function(filters::upper)),
        ("title", 0, Value::from_function(filters::title)),
        ("capitalize", 0, Value::from_function(filters::capitalize)),
        ("pprint", 0, Value::from_function(filters::pprint)),
        ("safe", 0, Value::from_function(filters::safe)),
        ("select", 1, Value::from_function(filters::select)),
        ("reject", 1, Value::from_function(filters::reject)),
        ("selectattr", 1, Value::from_function(filters::selectattr)),
        ("rejectattr", 1, Value::from_function(filters::rejectattr)),
    ] {
        let pay = |state: &State<'_, '_>, text: &Value| budget::text(state, text).map(drop);
        add_paid(environment, name, lists, pay, filter);
    }
    // And of whose arguments all but the first few are compared.
    for (name, free, filter) in [
        ("sort", 0, Value::from_function(filters::sort)),
        ("unique", 0, Value::from_function(filters::unique)),
        ("min", 0, Value::from_function(filters::min)),
        ("max", 0, Value::from_function(filters::max)),
        ("groupby", 0, Value::from_function(filters::groupby)),
        ("dictsort", 0, Value::from_function(dictsort)),
        ("attr", 1, Value::from_function(filters::attr)),
    ] {
        add_paid(environment, name, free, budget::comparison, filter);
    }
    for (names, compare) in [
        (
            ["eq", "equalto", "=="],
            predicates::is_eq as fn(&Value, &Value) -> bool,
        ),
        (["ne", "ne", "!="], predicates::is_ne),
        (["lt", "lessthan", "<"], predicates::is_lt),
        (["le", "le", "<="], predicates::is_le),
        (["gt", "greaterthan", ">"], predicates::is_gt),
        (["ge", "ge", ">="], predicates::is_ge),
        (["sameas"; 3], predicates::is_sameas),
    ] {
        for name in names {
            environment.add_test(name, move |state: &State<'_, '_>, a: &Value, b: &Value| {
                afford_comparison(state, a, b)?;
                Ok::<_, Error>(compare(a, b))
            });
        }
    }
    environment.add_test(
        "in",
        |state: &State<'_, '_>, wanted: &Value, all: &Value| {
            budget::comparison(state, wanted)?;
            searched(state, all.clone())?;
            predicates::is_in(state, wanted, all)
        },
    );
    environment.add_function("dict", dict);
    // Values that remember what they were made of, without end; jinja2 does not have them.
    environment.remove_filter("chain");
    environment.remove_filter("zip");
    environment.add_filter(CONCATENATED, concatenated);
    environment.add_filter(COMPARED, compared);
    environment.add_filter(SEARCHED, searched);
    environment.add_filter(HASHED, hashed);
    environment.add_filter(KEPT, kept);
    environment.add_filter(KEPT_IN_NAMESPACE, kept_in_namespace);
}

/// A filter of whose arguments all but the first `free` are paid for.
fn add_paid(
    environment: &mut Environment<'_>,
    name: &'static str,
    free: usize,
    pay: fn(&State<'_, '_>, &Value) -> Result<(), Error>,
    filter: Value,
) {
    environment.add_filter(
        name,
        move |state: &mut State<'_, '_>, args: Rest<ValueOrKwargs>| -> Result<Value, Error> {
            for argument in args.iter().skip(free) {
                pay(state, argument)?;
            }
            filter.call(state, &args.into_values())
        },
    );
}

fn concatenated(state: &State<'_, '_>, value: Value) -> Result<Value, Error> {
    budget::text(state, &value)?;
    Ok(value)
}

fn compared(state: &State<'_, '_>, value: Value) -> Result<Value, Error> {
    // minijinja charges a filter for texts.
    if value.as_object().is_some() {
        budget::comparison(state, &value)?;
    }
    Ok(value)
}

fn searched(state: &State<'_, '_>, value: Value) -> Result<Value, Error> {
    match value.kind() {
        // A key is looked up, whatever else there is.
        ValueKind::Map => Ok(value),
        _ => compared(state, value),
    }
}

fn hashed(state: &State<'_, '_>, value: Value) -> Result<Value, Error> {
    let tuple = value.downcast_object_ref::<Tuple>().is_some();
    if !tuple && value.as_object().is_some() {
        return Err(invalid(format!("unhashable type: {}", value.kind())));
    }
    compared(state, value)
}

fn afford_comparison(state: &State<'_, '_>, a: &Value, b: &Value) -> Result<(), Error> {
    // What differs in kind differs at once.
    let texts = a.as_str().is_some() && b.as_str().is_some();
    if texts || a.as_object().is_some() && b.as_object().is_some() {
        budget::comparison(state, a)?;
        budget::comparison(state, b)?;
    }
    Ok(())
}

fn dict(state: &State<'_, '_>, value: Option<Value>, named: Kwargs) -> Result<Value, Error> {
    for key in value.iter().filter(|value| value.kind() == ValueKind::Map) {
        for key in key.try_iter()? {
            budget::comparison(state, &key)?;
        }
    }
    functions::dict(value, named)
}

/// Refuses values so deep that whoever walks them would run out of stack.
fn kept(state: &State<'_, '_>, value: Value) -> Result<Value, Error> {
    keep(state, value, false)
}

/// As [`kept`]; and what is in a namespace holds no namespace, lest it hold itself, and no macro or loop, whose depth cannot be seen.
fn kept_in_namespace(state: &State<'_, '_>, value: Value) -> Result<Value, Error> {
    keep(state, value, true)
}

fn keep(state: &State<'_, '_>, value: Value, data_only: bool) -> Result<Value, Error> {
    let lazy = check_depth(state, &value, data_only)?;
    if lazy {
        plain(state, &value)
    } else {
        Ok(value)
    }
}

/// The value with lists in place of slices and the like, which remember what they are slices of: a chain of them has no visible depth.
fn plain(state: &State<'_, '_>, value: &Value) -> Result<Value, Error> {
    if is_opaque(value) {
        return Ok(value.clone());
    }
    let item = |item: Value| {
        budget::slot(state)?;
        plain(state, &item)
    };
    Ok(match value.kind() {
        ValueKind::Map => {
            let pairs = value.try_iter()?.map(|key| {
                budget::comparison(state, &key)?;
                Ok((item(key.clone())?, item(value.get_item(&key)?)?))
            });
            Value::from_pairs(pairs.collect::<Result<Vec<_>, Error>>()?)
        }
        ValueKind::Seq | ValueKind::Iterable => {
            let items = value.try_iter()?.map(item);
            let items = items.collect::<Result<Vec<_>, _>>()?;
            match value.downcast_object_ref::<Tuple>() {
                Some(_) => Value::from(Tuple::from(items)),
                None => items.into(),
            }
        }
        _ => value.clone(),
    })
}

/// Whether it cannot be seen what the value holds.
fn is_opaque(value: &Value) -> bool {
    value.as_object().is_some_and(|object| {
        let name = object.type_name();
        value.kind() == ValueKind::Plain
            || ["Namespace", "Macro", "Loop"]
                .iter()
                .any(|kind| name.ends_with(kind))
    })
}

/// Whether there is something lazy in the value.
fn check_depth(state: &State<'_, '_>, value: &Value, data_only: bool) -> Result<bool, Error> {
    let mut lazy = false;
    let mut open = vec![(value.clone(), 0)];
    while let Some((value, depth)) = open.pop() {
        if value.as_object().is_none() {
            continue;
        }
        let opaque = is_opaque(&value);
        if opaque && data_only {
            return Err(invalid("only data can be kept in a namespace"));
        }
        if opaque {
            continue;
        }
        if depth > DEEPEST {
            return Err(invalid(format!(
                "a value nested deeper than {DEEPEST} levels"
            )));
        }
        lazy |= value.kind() == ValueKind::Iterable;
        if value.kind() == ValueKind::Map {
            for key in value.try_iter()? {
                state.consume_fuel(1)?;
                open.push((value.get_item(&key)?, depth + 1));
                open.push((key, depth + 1));
            }
        } else {
            for item in value.try_iter()? {
                state.consume_fuel(1)?;
                open.push((item, depth + 1));
            }
        }
    }
    Ok(lazy)
}
