//! What a template pays for memory, and for the time that minijinja does not charge for.
//!
//! minijinja charges a filter or a method for the value it returns, once that is there: by then a text of a terabyte has been asked for,
//! and a process that is refused memory ends. So what is about to be made is paid for, or at least affordable, before it is made.

use minijinja::value::{Value, ValueKind};
use minijinja::{Error, State};

use super::python::invalid;

/// Bytes that one unit of fuel pays for: minijinja's own rate.
const BYTES: u64 = 64;
/// What a value in a list takes.
const SLOT: usize = 32;

/// Pays for `bytes` that nothing else is charged for.
pub(super) fn charge(state: &State<'_, '_>, bytes: usize) -> Result<(), Error> {
    state.consume_fuel((bytes as u64).div_ceil(BYTES))
}

/// Refuses what the fuel that is left cannot pay for. It is charged for once it is there.
pub(super) fn afford(state: &State<'_, '_>, bytes: usize) -> Result<(), Error> {
    let needed = bytes as u64 / BYTES;
    match state.fuel_levels() {
        Some((_, left)) if needed >= left => state.consume_fuel(needed.saturating_add(1)),
        _ => Ok(()),
    }
}

/// Pays for an item of a list.
pub(super) fn slot(state: &State<'_, '_>) -> Result<(), Error> {
    charge(state, SLOT)
}

/// Appends to a list of texts, of which minijinja sees the list but not the texts.
pub(super) fn push(state: &State<'_, '_>, list: &mut Vec<Value>, text: &str) -> Result<(), Error> {
    charge(state, SLOT + text.len())?;
    list.push(text.into());
    Ok(())
}

/// Pays for walking over all of the value, as whoever compares or hashes it does, which minijinja charges as one instruction.
pub(super) fn comparison(state: &State<'_, '_>, value: &Value) -> Result<(), Error> {
    if let Some(text) = value.as_str() {
        return charge(state, text.len());
    }
    if value.as_object().is_none() {
        return Ok(());
    }
    let mut open = vec![value.clone()];
    while let Some(value) = open.pop() {
        let keyed = match value.kind() {
            ValueKind::Map => true,
            ValueKind::Seq | ValueKind::Iterable => false,
            // minijinja compares their texts, whose length cannot be seen.
            ValueKind::Plain => return Err(invalid("only data can be compared")),
            _ => {
                charge(state, value.as_str().map_or(0, str::len))?;
                continue;
            }
        };
        for item in value.try_iter()? {
            state.consume_fuel(1)?;
            if keyed {
                open.push(value.get_item(&item)?);
            }
            open.push(item);
        }
    }
    Ok(())
}

/// About how many bytes the value has as text, if they are affordable. A few bytes can mean many: a repeated list is one list that is read
/// again and again.
pub(super) fn text(state: &State<'_, '_>, value: &Value) -> Result<usize, Error> {
    let mut bytes = 0_usize;
    let mut open = vec![value.clone()];
    while let Some(value) = open.pop() {
        bytes = bytes.saturating_add(match value.as_str() {
            Some(text) => text.len(),
            None => SLOT,
        });
        afford(state, bytes)?;
        let keyed = value.kind() == ValueKind::Map;
        if !keyed && !matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable) {
            continue;
        }
        for item in value.try_iter().into_iter().flatten() {
            state.consume_fuel(1)?;
            if keyed {
                open.push(value.get_item(&item).unwrap_or_default());
            }
            open.push(item);
        }
    }
    Ok(bytes)
}
