//! [`Matrix`]: a weight matrix packed in panels of rows, in the precision it is stored in.
//!
//! A panel holds [`PANEL`] rows side by side, so that a vector's lanes are output rows and the sum over k runs inside each lane, in
//! order. That order is the same whatever number of activation rows is multiplied at once — the root of promise 2.
//!
//! | format | a panel is | for |
//! |---|---|---|
//! | f32, f16 | `[k][PANEL]` elements | each k: one element of every row |
//! | bf16 | `[k/2][PANEL][2]` elements | two k of every row, which are multiplied together; see `pairs` of [`super::linear`] |
//! | Q8_0 | `[k/32]` × 8 groups of 64 bytes, then `[k/32][PANEL]` f16 scales | see [`super::simd::Simd::dot_i8`] |
//! | Q4_0 | `[k/32]` × 4 groups of 64 bytes, then `[k/32][PANEL]` f16 scales | see [`super::simd::Simd::dot_q4`] |
//! | grouped, E4M3 | one unit a group, see [`super::groups`] | `integers` and `floats` of [`super::linear`] |
//! | other quantised ones | one unit a block, see [`super::planes`] | [`super::linear`]'s blocks |
//!
//! On several NUMA nodes the panels of every part — queries, keys and values; each expert's gate — are divided among the nodes in proportion to
//! their threads, and a node's threads write theirs first, into memory of its own. Rows of output are whole wherever their panel is, so where panels
//! are makes no difference to any bit.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use half::{bf16, f16};

use super::groups;
use super::memory::{Buffer, Shared};
use super::planes::{read_row, unit_bytes, write_block, write_row};
use super::pool::Pool;
pub(crate) use super::simd::PANEL;
use super::simd::QUAD;
use crate::quantize::{self, BLOCK, BlockFormat, LARGEST_BLOCK, Tq2_0, with_block_format};
use crate::{Error, Format, MatrixPart, Shard};

/// Bytes of a panel's f16 scales for one block.
pub(crate) const SCALES: usize = 2 * PANEL;
/// Bytes of a panel's Q8_0 quants for one block.
pub(crate) const Q8_0_QUANTS: usize = 8 * QUAD;
/// Bytes of a panel's Q4_0 quants for one block.
pub(crate) const Q4_0_QUANTS: usize = 4 * QUAD;

/// A packed weight matrix, `[rows, cols]`: segments of rows, each in one format.
pub struct Matrix {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) segments: Vec<Segment>,
    /// Orders of columns, each the input feature of every column. `[cols]`
    orders: Vec<Vec<u32>>,
    /// What it is of the matrix that several ranks have; `None`: all of it, or rows that are as good as a matrix of their own.
    pub(crate) shard: Option<Shard>,
}

/// Consecutive rows of a matrix, packed in one format.
pub(crate) struct Segment {
    /// Where they begin in the matrix.
    pub(crate) first: usize,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) format: Format,
    /// What it is multiplied with.
    elements: Elements,
    /// Which of the matrix's orders its columns are in, where they are sorted.
    order: Option<usize>,
    /// Bytes of a panel.
    panel_bytes: usize,
    /// Of each node, its panels.
    nodes: Vec<Buffer<u8>>,
    /// Where panels are, in order.
    runs: Vec<Run>,
}

/// Consecutive panels that are one after the other in a node's memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) panels: Range<usize>,
    pub(crate) node: usize,
    /// How many of the node's panels come before them.
    at: usize,
}

/// What activations are multiplied as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Elements {
    /// f32.
    #[default]
    Floats,
    /// f32, two k together: with weights of bfloat16.
    Pairs,
    /// The same, rounded to bfloat16.
    RoundedPairs,
    /// 8 bits, blocks of 32 under a scale.
    Quants,
}

impl Elements {
    pub(crate) const ALL: [Self; 4] = [Self::Floats, Self::Pairs, Self::RoundedPairs, Self::Quants];

    /// What products with a format want; `round`: of bfloat16, as such.
    fn of(format: Format, round: bool) -> Self {
        match format {
            Format::Bf16 if round => Self::RoundedPairs,
            Format::Bf16 => Self::Pairs,
            _ if format.multiplies_integers() => Self::Quants,
            _ => Self::Floats,
        }
    }
}

/// What a segment wants of the activations it is multiplied with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Layout {
    pub(crate) elements: Elements,
    /// Which of the matrix's orders they are in.
    pub(crate) order: Option<usize>,
}

impl std::fmt::Debug for Matrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Matrix[{}, {}]", self.rows, self.cols)?;
        for segment in &self.segments {
            write!(f, " {:?} × {}", segment.format, segment.rows)?;
        }
        Ok(())
    }
}

/// Bytes of one packed panel.
pub(crate) fn panel_bytes(format: Format, cols: usize) -> usize {
    match format {
        Format::F32 => PANEL * cols * 4,
        Format::F16 => PANEL * cols * 2,
        Format::Bf16 => PANEL * cols.div_ceil(2) * 4,
        Format::Q8_0 => cols / BLOCK * (Q8_0_QUANTS + SCALES),
        Format::Q4_0 => cols / BLOCK * (Q4_0_QUANTS + SCALES),
        Format::Grouped(grouped) => cols / grouped.group * groups::unit_bytes(grouped),
        Format::F8E4m3 { group } => cols / group * groups::f8_unit_bytes(group),
        _ => with_block_format!(format, F => cols / F::SIZE * unit_bytes::<F>(), 0),
    }
}

impl Matrix {
    /// Packs the parts' rows, one part after the other, on all threads. What it returns is for the same pool. `round`: activations are rounded to bfloat16
    /// where weights are.
    pub(crate) fn pack(
        parts: &[MatrixPart<'_>],
        quantize: Option<Format>,
        round: bool,
        pool: &Pool,
    ) -> Result<Self, Error> {
        let first = parts
            .first()
            .ok_or_else(|| Error::Shape("a matrix without parts".to_owned()))?;
        let cols = first.cols;
        let mut rows = 0_usize;
        for part in parts {
            check(part, cols)?;
            rows = rows
                .checked_add(part.rows)
                .ok_or_else(|| Error::Shape("a matrix with too many rows".to_owned()))?;
        }
        let targets = parts
            .iter()
            .map(|part| target(part, quantize))
            .collect::<Result<Vec<_>, _>>()?;
        let mut orders: Vec<Vec<u32>> = Vec::new();
        let mut segments = Vec::new();
        let (mut begin, mut first) = (0, 0);
        while begin < parts.len() {
            let format = targets[begin];
            let order = parts[begin].order;
            let same = targets[begin..].iter().zip(&parts[begin..]);
            let same = same.take_while(|&(&target, part)| target == format && part.order == order);
            let end = begin + same.count();
            let order = order.map(|order| {
                let known = orders.iter().position(|known| known == order);
                known.unwrap_or_else(|| {
                    orders.push(order.to_vec());
                    orders.len() - 1
                })
            });
            let segment = Segment::pack(
                &parts[begin..end],
                (format, Elements::of(format, round)),
                order,
                first,
                pool,
            )?;
            first += segment.rows;
            begin = end;
            segments.push(segment);
        }
        Ok(Self {
            rows,
            cols,
            segments,
            orders,
            shard: None,
        })
    }

    /// The input feature of each column of segments with this layout, where they are sorted.
    pub(crate) fn order(&self, layout: Layout) -> Option<&[u32]> {
        layout.order.map(|order| &self.orders[order][..])
    }

    /// Whether a panel has rows of two parts, where every part is `features` rows.
    pub(crate) fn parts_share_a_panel(&self, features: usize) -> bool {
        self.segments.iter().any(|segment| {
            let left = features - segment.first % features;
            segment.rows > left && !left.is_multiple_of(PANEL)
        })
    }

    /// Bytes of all panels.
    pub(crate) fn bytes(&self) -> usize {
        let bytes = |s: &Segment| s.rows.div_ceil(PANEL) * s.panel_bytes;
        self.segments.iter().map(bytes).sum()
    }

    /// Refuses a matrix that was packed for another number of nodes.
    pub(crate) fn check_nodes(&self, pool: &Pool) -> Result<(), Error> {
        let fits = |segment: &Segment| segment.nodes.len() == pool.nodes();
        if self.segments.iter().all(fits) {
            return Ok(());
        }
        Err(Error::Shape(format!(
            "{self:?} was packed for another number of NUMA nodes than {}",
            pool.nodes()
        )))
    }

    /// Widens row `row` to `out`, times `scale`. `[cols]`
    pub(crate) fn row(&self, row: usize, scale: f32, out: &mut [f32]) {
        let last = self.segments.partition_point(|s| s.first <= row) - 1;
        let segment = &self.segments[last];
        let order = self.order(segment.layout());
        segment.row(row - segment.first, scale, order, out);
    }
}

impl Segment {
    /// Packs parts whose target format is the same.
    fn pack(
        parts: &[MatrixPart<'_>],
        (format, elements): (Format, Elements),
        order: Option<usize>,
        first: usize,
        pool: &Pool,
    ) -> Result<Self, Error> {
        let cols = parts[0].cols;
        let rows = parts.iter().map(|part| part.rows).sum::<usize>();
        if format.row_bytes(cols).is_none() {
            return Err(Error::Shape(format!(
                "{format:?} needs a multiple of {} columns, the matrix has {cols}",
                format.block_size()
            )));
        }
        let panels = rows.div_ceil(PANEL);
        let bytes = panel_bytes(format, cols);
        // No node's part overflows if the whole does not.
        panels.checked_mul(bytes).ok_or(Error::OutOfMemory {
            what: "a weight matrix",
            bytes: usize::MAX,
        })?;
        let runs = runs(parts, pool);
        let mut nodes = Vec::with_capacity(pool.nodes());
        for node in 0..pool.nodes() {
            let own = runs.iter().filter(|run| run.node == node);
            let own = own.map(|run| run.panels.len()).sum::<usize>() * bytes;
            nodes.push(if pool.nodes() == 1 {
                Buffer::zeroed(own, "a weight matrix")?
            } else {
                Buffer::own_pages(own, "a weight matrix")?
            });
        }
        let mut segment = Self {
            first,
            rows,
            cols,
            format,
            elements,
            order,
            panel_bytes: bytes,
            nodes,
            runs,
        };
        let lossy = AtomicUsize::new(usize::MAX);
        segment.write(pool, &|panel, out| {
            for lane in 0..PANEL {
                let at = panel * PANEL + lane;
                if let Some((part, row)) = locate(parts, at) {
                    if format == Format::Tq2_0 && !part.format.is_quantised() {
                        if pack_ternary(part, row, lane, out).is_err() {
                            lossy.fetch_min(at, Ordering::Relaxed);
                        }
                    } else {
                        pack_row(part, row, format, lane, out);
                    }
                }
            }
        });
        if let Some((part, row)) = locate(parts, lossy.into_inner()) {
            return Err(not_ternary(part, row));
        }
        Ok(segment)
    }

    /// Has every panel written by a thread of its node: where a page is written first, there it is.
    fn write(&mut self, pool: &Pool, write: &(dyn Fn(usize, &mut [u8]) + Sync)) {
        // Of each node its runs, in the order in which they are in its memory.
        let runs: Vec<Vec<&Run>> = (0..self.nodes.len())
            .map(|node| self.runs.iter().filter(|run| run.node == node).collect())
            .collect();
        let bytes = self.panel_bytes;
        let of_node = |node: usize| runs[node].iter().map(|run| run.panels.len()).sum();
        let out: Vec<Shared<u8>> = self
            .nodes
            .iter_mut()
            .map(|node| Shared::new(node.as_mut_slice()))
            .collect();
        let _at_home = pool.visit();
        pool.at_home(&of_node, &|turn| {
            let runs = &runs[turn.node];
            let run = runs[runs.partition_point(|run| run.at <= turn.task) - 1];
            // SAFETY: each panel is written by one task, and the buffers outlive the call.
            let out = unsafe { out[turn.node].range(turn.task * bytes, bytes) };
            write(run.panels.start + turn.task - run.at, out);
        });
    }

    /// What it wants of activations.
    pub(crate) fn layout(&self) -> Layout {
        Layout {
            elements: self.elements,
            order: self.order,
        }
    }

    /// The bytes of panels of one run.
    pub(crate) fn panels(&self, panels: Range<usize>) -> &[u8] {
        let run = self.runs.partition_point(|r| r.panels.end <= panels.start);
        let run = &self.runs[run];
        assert!(panels.end <= run.panels.end, "panels of one run");
        let at = run.at + panels.start - run.panels.start;
        &self.nodes[run.node].as_slice()[at * self.panel_bytes..][..panels.len() * self.panel_bytes]
    }

    /// Bytes of a panel.
    pub(crate) fn panel_bytes(&self) -> usize {
        self.panel_bytes
    }

    /// The parts of `panels` that are in one run each, with the run's node.
    pub(crate) fn runs_of(
        &self,
        panels: Range<usize>,
    ) -> impl Iterator<Item = (usize, Range<usize>)> {
        let first = self.runs.partition_point(|r| r.panels.end <= panels.start);
        let runs = self.runs[first..].iter();
        let within = runs.take_while(move |run| run.panels.start < panels.end);
        within.map(move |run| {
            let first = run.panels.start.max(panels.start);
            (run.node, first..run.panels.end.min(panels.end))
        })
    }

    /// How many tasks of up to `at_once` panels a node has.
    pub(crate) fn tasks(&self, node: usize, at_once: usize) -> usize {
        let runs = self.runs.iter().filter(|run| run.node == node);
        runs.map(|run| run.panels.len().div_ceil(at_once)).sum()
    }

    /// The panels of a node's `task`-th task, all of one run.
    pub(crate) fn task(&self, node: usize, at_once: usize, mut task: usize) -> Range<usize> {
        for run in self.runs.iter().filter(|run| run.node == node) {
            let tasks = run.panels.len().div_ceil(at_once);
            if task < tasks {
                let first = run.panels.start + task * at_once;
                return first..(first + at_once).min(run.panels.end);
            }
            task -= tasks;
        }
        unreachable!("a task below `tasks`")
    }

    /// Widens row `row` to `out`, times `scale`; column `k` goes to `order[k]`. `[cols]`
    fn row(&self, row: usize, scale: f32, order: Option<&[u32]>, out: &mut [f32]) {
        let panel = row / PANEL;
        let panel = self.panels(panel..panel + 1);
        let lane = row % PANEL;
        let at16 = |element: usize| [panel[2 * element], panel[2 * element + 1]];
        let value = |k: usize| match self.format {
            Format::F32 => {
                let at = (k * PANEL + lane) * 4;
                f32::from_le_bytes([panel[at], panel[at + 1], panel[at + 2], panel[at + 3]])
            }
            Format::F16 => f16::from_le_bytes(at16(k * PANEL + lane)).to_f32(),
            Format::Bf16 => bf16::from_le_bytes(at16(of_pair(lane, k))).to_f32(),
            Format::Q8_0 => {
                let q = panel[k / BLOCK * Q8_0_QUANTS + q8_0_offset(lane, k % BLOCK)];
                let scale = scale_at(panel, self.cols, k / BLOCK, lane, Q8_0_QUANTS);
                scale * (f32::from(q) - 128.0)
            }
            _ => {
                let (offset, high) = q4_0_offset(lane, k % BLOCK);
                let byte = panel[k / BLOCK * Q4_0_QUANTS + offset];
                let q = if high { byte >> 4 } else { byte & 15 };
                let scale = scale_at(panel, self.cols, k / BLOCK, lane, Q4_0_QUANTS);
                scale * (f32::from(q) - 8.0)
            }
        };
        match self.format {
            Format::F32 | Format::F16 | Format::Bf16 | Format::Q8_0 | Format::Q4_0 => {
                for (k, out) in out.iter_mut().enumerate() {
                    *out = value(k) * scale;
                }
            }
            Format::Grouped(grouped) => {
                groups::read_row(grouped, panel, lane, scale, order, out);
            }
            Format::F8E4m3 { group } => groups::read_f8_row(group, panel, lane, scale, out),
            _ => with_block_format!(self.format, F => read_row::<F>(panel, lane, scale, out), ()),
        }
    }
}

/// Where a lane's scale of a block is in a panel of `cols` columns.
fn scale_offset(cols: usize, block: usize, lane: usize, quants: usize) -> usize {
    cols / BLOCK * quants + block * SCALES + 2 * lane
}

fn scale_at(panel: &[u8], cols: usize, block: usize, lane: usize, quants: usize) -> f32 {
    let at = scale_offset(cols, block, lane, quants);
    f16::from_le_bytes([panel[at], panel[at + 1]]).to_f32()
}

/// Which element of a panel of pairs element `k` of a lane is.
fn of_pair(lane: usize, k: usize) -> usize {
    (k / 2 * PANEL + lane) * 2 + k % 2
}

/// Where element `k` of a lane is in a block of Q8_0 quants.
pub(crate) fn q8_0_offset(lane: usize, k: usize) -> usize {
    k / 4 * QUAD + lane * 4 + k % 4
}

/// Where element `k` of a lane is in a block of Q4_0 quants, and whether it is the high half of that byte.
pub(crate) fn q4_0_offset(lane: usize, k: usize) -> (usize, bool) {
    (k / 8 * QUAD + lane * 4 + k % 4, k % 8 >= 4)
}

fn check(part: &MatrixPart<'_>, cols: usize) -> Result<(), Error> {
    if part.cols != cols || cols == 0 || part.rows == 0 {
        return Err(Error::Shape(format!(
            "a matrix part of {} × {}, expected at least one row of {cols} columns",
            part.rows, part.cols
        )));
    }
    check_order(part)?;
    let expected = part
        .format
        .row_bytes(cols)
        .and_then(|bytes| bytes.checked_mul(part.rows));
    match expected {
        Some(expected) if expected == part.data.len() => Ok(()),
        Some(expected) => Err(Error::Shape(format!(
            "{} bytes of data for {} × {cols} {:?}, expected {expected}",
            part.data.len(),
            part.rows,
            part.format
        ))),
        None => Err(Error::Shape(format!(
            "{:?} cannot hold rows of {cols} columns",
            part.format
        ))),
    }
}

/// Refuses an order that is no permutation: it would read activations that are not there.
fn check_order(part: &MatrixPart<'_>) -> Result<(), Error> {
    let Some(order) = part.order else {
        return Ok(());
    };
    if !matches!(part.format, Format::Grouped(_)) {
        return Err(Error::Shape(format!(
            "{:?} with an order of columns; only grouped integers have one",
            part.format
        )));
    }
    let mut seen = vec![false; part.cols];
    let mut once = |&feature: &u32| {
        let seen = seen.get_mut(feature as usize);
        seen.is_some_and(|seen| !std::mem::replace(seen, true))
    };
    if order.len() == part.cols && order.iter().all(&mut once) {
        return Ok(());
    }
    Err(Error::Shape(format!(
        "an order of {} columns that is no permutation of {}",
        order.len(),
        part.cols
    )))
}

/// The format a part's rows are packed in: their own, or what they are quantised to.
fn target(part: &MatrixPart<'_>, quantize: Option<Format>) -> Result<Format, Error> {
    match quantize {
        // Already quantised: kept as it is; widening it or quantising it again would change it.
        _ if part.format.is_quantised() => Ok(part.format),
        None => Ok(part.format),
        Some(format @ (Format::Q8_0 | Format::Q4_0 | Format::Tq2_0)) => Ok(format),
        Some(format) if format.is_quantised() => Err(Error::Shape(format!(
            "cannot quantise to {format:?}; expected Q8_0, Q4_0 or Tq2_0"
        ))),
        Some(format) => Err(Error::Shape(format!(
            "{format:?} is not a quantised format"
        ))),
    }
}

/// Divides the panels of every part among the nodes. A panel belongs to the part that its first row is of.
fn runs(parts: &[MatrixPart<'_>], pool: &Pool) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    let mut before = vec![0; pool.nodes()];
    let mut row = 0_usize;
    for part in parts {
        let panels = row.div_ceil(PANEL)..(row + part.rows).div_ceil(PANEL);
        row += part.rows;
        for (node, before) in before.iter_mut().enumerate() {
            let share = pool.share(panels.len(), node);
            if share.is_empty() {
                continue;
            }
            let share = panels.start + share.start..panels.start + share.end;
            match runs.last_mut() {
                Some(run) if run.node == node => run.panels.end = share.end,
                _ => runs.push(Run {
                    panels: share.clone(),
                    node,
                    at: *before,
                }),
            }
            *before += share.len();
        }
    }
    runs
}

fn locate<'a>(parts: &'a [MatrixPart<'a>], row: usize) -> Option<(&'a MatrixPart<'a>, usize)> {
    let mut row = row;
    for part in parts {
        if row < part.rows {
            return Some((part, row));
        }
        row -= part.rows;
    }
    None
}

/// Element `k` of a stored float row.
fn float_at(format: Format, row: &[u8], k: usize) -> f32 {
    match format {
        Format::F32 => {
            f32::from_le_bytes([row[4 * k], row[4 * k + 1], row[4 * k + 2], row[4 * k + 3]])
        }
        Format::Bf16 => bf16::from_le_bytes([row[2 * k], row[2 * k + 1]]).to_f32(),
        _ => f16::from_le_bytes([row[2 * k], row[2 * k + 1]]).to_f32(),
    }
}

/// Writes one stored row into its lane of a panel.
fn pack_row(part: &MatrixPart<'_>, row: usize, format: Format, lane: usize, out: &mut [u8]) {
    let bytes = part.data.len() / part.rows;
    let stored = &part.data[row * bytes..(row + 1) * bytes];
    match format {
        Format::F32 => {
            for k in 0..part.cols {
                let at = (k * PANEL + lane) * 4;
                out[at..at + 4].copy_from_slice(&float_at(part.format, stored, k).to_le_bytes());
            }
        }
        // A 16-bit target has parts of that very format.
        Format::F16 => {
            for (k, element) in stored.chunks_exact(2).enumerate() {
                let at = (k * PANEL + lane) * 2;
                out[at..at + 2].copy_from_slice(element);
            }
        }
        // The last of an odd number has a zero beside it: that is what the panel was.
        Format::Bf16 => {
            for (k, pair) in stored.chunks(4).enumerate() {
                let at = of_pair(lane, 2 * k) * 2;
                out[at..at + pair.len()].copy_from_slice(pair);
            }
        }
        Format::Q8_0 => {
            for block in 0..part.cols / BLOCK {
                let (scale, q) = match part.format {
                    Format::Q8_0 => quantize::read_q8_0(block_at(stored, block)),
                    other => quantize::q8_0(&floats_at(other, stored, block)),
                };
                let at = scale_offset(part.cols, block, lane, Q8_0_QUANTS);
                out[at..at + 2].copy_from_slice(&scale.to_le_bytes());
                for (i, quad) in q.as_chunks::<4>().0.iter().enumerate() {
                    // Plus 128: unsigned bytes are what the products want.
                    let quad = quad.map(|q| q.cast_unsigned() ^ 0x80);
                    let at = block * Q8_0_QUANTS + q8_0_offset(lane, 4 * i);
                    out[at..at + 4].copy_from_slice(&quad);
                }
            }
        }
        Format::Q4_0 => {
            for block in 0..part.cols / BLOCK {
                let (scale, q) = match part.format {
                    Format::Q4_0 => quantize::read_q4_0(block_at(stored, block)),
                    other => quantize::q4_0(&floats_at(other, stored, block)),
                };
                let at = scale_offset(part.cols, block, lane, Q4_0_QUANTS);
                out[at..at + 2].copy_from_slice(&scale.to_le_bytes());
                // As planes of nibbles lie.
                write_block(4, &q, lane, &mut out[block * Q4_0_QUANTS..][..Q4_0_QUANTS]);
            }
        }
        Format::Grouped(grouped) => groups::write_row(grouped, stored, lane, out),
        Format::F8E4m3 { group } => groups::write_f8_row(group, stored, lane, out),
        _ => with_block_format!(format, F => write_row::<F>(stored, lane, out), ()),
    }
}

/// Writes one stored row of floats into its lane of a panel of TQ2_0; refuses what would not be the same.
fn pack_ternary(
    part: &MatrixPart<'_>,
    row: usize,
    lane: usize,
    out: &mut [u8],
) -> Result<(), (f32, f32)> {
    let bytes = part.data.len() / part.rows;
    let stored = &part.data[row * bytes..(row + 1) * bytes];
    let mut blocks = Vec::with_capacity(part.cols / LARGEST_BLOCK * Tq2_0::BYTES);
    for block in 0..part.cols / LARGEST_BLOCK {
        let at = |i| float_at(part.format, stored, block * LARGEST_BLOCK + i);
        blocks.extend(quantize::tq2_0(&std::array::from_fn(at))?);
    }
    write_row::<Tq2_0>(&blocks, lane, out);
    Ok(())
}

fn not_ternary(part: &MatrixPart<'_>, row: usize) -> Error {
    let mut panel = vec![0; panel_bytes(Format::Tq2_0, part.cols)];
    let why = match pack_ternary(part, row, 0, &mut panel) {
        Err((value, largest)) if value != largest => format!("{value} beside {largest}"),
        Err((value, _)) => format!("{value}, which is no f16"),
        Ok(()) => "nothing".to_owned(),
    };
    Error::Shape(format!(
        "cannot quantise to TQ2_0: row {row} has {why}, but every 256 weights must be -s, 0 and s for some s; is the model ternary?"
    ))
}

fn block_at<const N: usize>(row: &[u8], block: usize) -> &[u8; N] {
    row[block * N..]
        .first_chunk()
        .expect("`check` has compared the data's length with the shape")
}

fn floats_at(format: Format, row: &[u8], block: usize) -> [f32; BLOCK] {
    std::array::from_fn(|i| float_at(format, row, block * BLOCK + i))
}
