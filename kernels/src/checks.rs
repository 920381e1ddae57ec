//! What a step, its block tables and a layer must be for the kernels to rely on it.

use crate::{AttentionShape, Draws, Error, KvDtype, KvLayer, KvShape, Span, Step};

/// Positions that kernels walk a KV cache in; blocks are a multiple of it.
pub(crate) const KV_TILE: usize = 16;

/// Refuses a step whose parts do not fit each other; the kernels rely on it.
pub(crate) fn check_step(step: &Step) -> Result<(), Error> {
    let rows = step.rows();
    let fault = |text: String| Err(Error::Shape(text));
    if step.positions.len() != rows {
        return fault(format!(
            "{rows} tokens and {} positions",
            step.positions.len()
        ));
    }
    let mut next = 0_usize;
    for span in &step.spans {
        if span.row as usize != next || span.rows == 0 {
            return fault(format!(
                "span {span:?}, expected one that begins at row {next}"
            ));
        }
        next += span.rows as usize;
        if next > rows || span.start.checked_add(span.rows).is_none() {
            return fault(format!("span {span:?} is longer than the step"));
        }
        for i in 0..span.rows {
            if step.positions[(span.row + i) as usize] != span.start + i {
                return fault(format!("positions of {span:?} are not consecutive"));
            }
        }
    }
    if next != rows {
        return fault(format!("spans cover {next} of {rows} rows"));
    }
    if step.logit_rows.iter().any(|&row| row as usize >= rows) {
        return fault(format!("logits of rows beyond {rows} are asked for"));
    }
    Ok(())
}

/// Refuses draws that a kernel could not do: of rows that are not there, or with numbers outside their ranges.
pub(crate) fn check_draws(step: &Step) -> Result<(), Error> {
    let mut next = 0;
    for draw in &step.draws {
        let changes = draw
            .changes
            .iter()
            .try_fold(draw.first_change, |end, &n| end.checked_add(n));
        let there = changes.is_some_and(|end| end as usize <= step.changes.len());
        if draw.row < next
            || draw.row as usize >= step.logit_rows.len()
            || !there
            || !drawable(draw)
        {
            return Err(Error::Shape(format!(
                "{draw:?} among {} rows of logits and {} changes",
                step.logit_rows.len(),
                step.changes.len()
            )));
        }
        next = draw.row + 1;
    }
    Ok(())
}

/// Refuses rows of drawn tokens that are not there, or whose tokens are not among the `drawn` of the step before.
#[cfg(any(feature = "cuda", feature = "cuda-emulation"))]
pub(crate) fn check_drawn_rows(step: &Step, drawn: usize) -> Result<(), Error> {
    let mut next = 0;
    for row in &step.drawn_rows {
        if row.row < next || row.row as usize >= step.rows() || row.draw as usize >= drawn {
            return Err(Error::Shape(format!(
                "{row:?} of {} rows after a step of {drawn} draws",
                step.rows()
            )));
        }
        next = row.row + 1;
    }
    Ok(())
}

/// Whether a draw's numbers are in their ranges.
fn drawable(draw: &crate::Draw) -> bool {
    let scale = draw.inverse_temperature;
    draw.greedy
        || (scale.is_finite()
            && scale > 0.0
            && draw.top_p > 0.0
            && draw.top_p <= 1.0
            && draw.within >= 0.0
            && (0.0..1.0).contains(&draw.place))
}

/// Refuses draws that are not among those of a device which never has a step that it has not finished.
pub(crate) fn check_draws_among(draws: Draws, step: &Step) -> Result<(), Error> {
    let all = step.draws.iter().all(|draw| draws.include(draw));
    if all && step.drawn_rows.is_empty() && !step.deferred {
        return check_draws(step);
    }
    Err(Error::Shape(format!(
        "{} draws, {} rows of drawn tokens, deferred: {}, for a device that does these draws: {draws:?}",
        step.draws.len(),
        step.drawn_rows.len(),
        step.deferred
    )))
}

/// Refuses block tables that leave the cache: entries of page group `group` that rows with this window see.
pub(crate) fn check_tables(
    step: &Step,
    kv: &KvShape,
    group: usize,
    window: Option<u32>,
) -> Result<(), Error> {
    if group >= step.groups {
        return Err(Error::Shape(format!(
            "page group {group} of a step of {}",
            step.groups
        )));
    }
    for span in &step.spans {
        let block_size = kv.block_size;
        let blocks = ((span.start + span.rows) as usize).div_ceil(block_size);
        let seen = oldest_seen(span, window) / block_size;
        let table = span.table as usize;
        let Some(table) = step.block_tables.get(table..table + blocks * step.groups) else {
            return Err(Error::Shape(format!(
                "the block table of {span:?} has fewer than {blocks} blocks"
            )));
        };
        let mut entries = table.iter().skip(group).step_by(step.groups).skip(seen);
        if let Some(block) = entries.find(|&&b| b as usize >= kv.blocks) {
            return Err(Error::Shape(format!(
                "block {block} of a cache of {}",
                kv.blocks
            )));
        }
    }
    Ok(())
}

/// The oldest position that a span's rows see.
fn oldest_seen(span: &Span, window: Option<u32>) -> usize {
    window.map_or(0, |window| (span.start + 1).saturating_sub(window)) as usize
}

pub(crate) fn check_layer(
    shape: &AttentionShape,
    layer: KvLayer,
    kv: &KvShape,
) -> Result<(), Error> {
    let fits = layer.index < kv.layers
        && shape.window != Some(0)
        && shape.kv_heads == kv.kv_heads
        && shape.head_dim == kv.head_dim
        && shape.heads > 0
        && shape.heads.is_multiple_of(shape.kv_heads);
    if fits {
        Ok(())
    } else {
        Err(Error::Shape(format!(
            "{layer:?} of {shape:?} does not fit the cache {kv:?}"
        )))
    }
}

/// Refuses a rotary table that turns more than heads of `head_dim` elements have, or half a pair.
pub(crate) fn check_rotary(cols: usize, head_dim: usize) -> Result<(), Error> {
    if cols <= head_dim && cols.is_multiple_of(2) {
        return Ok(());
    }
    Err(Error::Shape(format!(
        "a rotary table of {cols} columns for heads of {head_dim}"
    )))
}

/// The bytes of a KV cache of this shape, on a device that has caches of these `dtypes`.
///
/// # Errors
/// It has another one, is empty, has blocks that kernels do not walk, or is larger than any memory.
pub(crate) fn kv_bytes(shape: &KvShape, dtypes: &[KvDtype], device: &str) -> Result<usize, Error> {
    if !dtypes.contains(&shape.dtype) {
        return Err(Error::Shape(format!(
            "a KV cache in {}: {device} has {}",
            shape.dtype.name(),
            KvDtype::names(dtypes)
        )));
    }
    if !shape.block_size.is_multiple_of(KV_TILE) {
        return Err(Error::Shape(format!(
            "KV blocks of {} positions, expected a multiple of {KV_TILE}",
            shape.block_size
        )));
    }
    let sizes = [
        shape.layers,
        shape.kv_heads,
        shape.block_size,
        shape.head_dim,
    ];
    if sizes.contains(&0) {
        return Err(Error::Shape(format!("an empty KV cache shape: {shape:?}")));
    }
    // Keys and values of up to 8 bytes an element, scales included: what is less cannot overflow in `block_bytes`.
    let mut most = sizes.into_iter().chain([shape.blocks, 2 * 8]);
    most.try_fold(1_usize, usize::checked_mul)
        .ok_or(Error::OutOfMemory {
            what: "the KV cache",
            bytes: usize::MAX,
        })?;
    Ok(shape.block_bytes() * shape.blocks)
}
