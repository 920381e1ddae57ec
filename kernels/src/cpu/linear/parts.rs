//! Products of groups of rows, each with its own part of a matrix: the experts of a mixture. (Groups of rows here, not the groups of columns that share a scale.)
//!
//! Every group is a product like any other, so its bits are those it has alone; the tasks of all groups are one list, so that threads have work
//! even where each expert has a row or two.

use super::super::matrix::{Elements, Layout, Matrix, PANEL, Segment};
use super::super::memory::Shared;
use super::super::pool::Pool;
use super::super::simd::Isa;
use super::rows::{Rows, interleave};
use super::{Linear, Output, Share, TASK_PANELS, multiply};
use crate::Error;

/// Rows that are multiplied with the same part of a matrix.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OfPart {
    /// Which part: that many times the features.
    pub part: usize,
    /// Its first row, and how many there are.
    pub first: usize,
    pub rows: usize,
}

/// Products of the rows of `x` [rows, cols] with parts of a matrix of `features` rows each; `y` [rows, features].
pub(crate) struct PartProducts<'a> {
    pub matrix: &'a Matrix,
    pub features: usize,
    pub x: &'a [f32],
    pub groups: &'a [OfPart],
    /// `[parts · features]`
    pub bias: Option<&'a [f32]>,
}

/// A few panels of one segment for one group.
#[derive(Debug, Clone, Copy)]
struct Task {
    group: usize,
    segment: usize,
    first: usize,
    last: usize,
}

/// Working memory, kept from step to step.
#[derive(Debug, Default)]
pub(crate) struct Tasks {
    /// Of each node.
    multiply: Vec<Vec<Task>>,
    /// `(group, first row of the tile within it)`
    lay_out: Vec<(usize, usize)>,
    /// Where each group's rows are laid out, and how.
    at: Vec<usize>,
    layouts: Vec<Layout>,
}

impl PartProducts<'_> {
    /// Computes the products into `y`. The caller has checked the shapes: groups lie within `x` and `y`, parts within the matrix, and features are a
    /// multiple of a panel.
    pub fn run(
        &self,
        y: &mut [f32],
        rows: &mut Rows,
        tasks: &mut Tasks,
        pool: &Pool,
        isa: Isa,
    ) -> Result<(), Error> {
        self.matrix.check_nodes(pool)?;
        tasks.multiply.resize_with(pool.nodes(), Vec::new);
        let y = Shared::new(y);
        // Formats want different rows, and so do parts whose columns are sorted differently: as many passes as that makes for any group.
        for elements in Elements::ALL {
            for pass in 0.. {
                self.plan(elements, pass, tasks, isa);
                if tasks.multiply.iter().all(Vec::is_empty) {
                    break;
                }
                self.run_planned(elements, y, rows, tasks, pool, isa)?;
            }
        }
        Ok(())
    }

    /// Does the tasks of a pass.
    fn run_planned(
        &self,
        elements: Elements,
        y: Shared<f32>,
        rows: &mut Rows,
        tasks: &Tasks,
        pool: &Pool,
        isa: Isa,
    ) -> Result<(), Error> {
        let k = self.matrix.cols;
        let padded = self.groups.iter().map(|group| {
            let interleave = interleave(group.rows, elements, isa);
            group.rows.next_multiple_of(interleave)
        });
        let sorted = tasks.layouts.iter().any(|layout| layout.order.is_some());
        rows.reserve(padded.sum(), k, elements, sorted)?;
        let most = self.groups.iter().map(|group| group.rows).max();
        rows.reserve_unpacked(most.unwrap_or(0), k, pool.threads())?;
        let target = rows.target(k, elements);
        pool.each(tasks.lay_out.len(), &|task| {
            let (group, row) = tasks.lay_out[task];
            let at = tasks.at[group] + row;
            let order = self.matrix.order(tasks.layouts[group]);
            let group = &self.groups[group];
            let interleave = interleave(group.rows, elements, isa);
            let end = group.first + (row + interleave).min(group.rows);
            let x = &self.x[(group.first + row) * k..end * k];
            // SAFETY: each tile is written by one task.
            unsafe { target.tile(x, order, at, interleave, isa) };
        });
        let (rows, unpacked) = rows.unpacked(k);
        pool.near(&|node| tasks.multiply[node].len(), &|turn| {
            let task = tasks.multiply[turn.node][turn.task];
            let group = &self.groups[task.group];
            let linear = Linear {
                matrix: self.matrix,
                first: group.part * self.features,
                features: self.features,
                x: &self.x[group.first * k..(group.first + group.rows) * k],
                rows: group.rows,
                at: tasks.at[task.group],
                y_at: group.first * self.features,
                bias: self.bias,
                output: Output::Set,
            };
            let segment = &self.matrix.segments[task.segment];
            let share = Share {
                linear: &linear,
                segment,
                weights: segment.panels(task.first..task.last),
                rows,
                interleave: interleave(group.rows, elements, isa),
                unpacked: unpacked.of(turn.thread),
                y,
                first: task.first,
                last: task.last,
            };
            multiply(&share, isa);
        });
        Ok(())
    }

    /// The segments that hold rows of a part.
    fn segments(&self, part: usize) -> impl Iterator<Item = (usize, &Segment)> {
        let (begin, end) = (part * self.features, (part + 1) * self.features);
        let segments = &self.matrix.segments;
        let first = segments.partition_point(|segment| segment.first + segment.rows <= begin);
        let within = segments.iter().enumerate().skip(first);
        within.take_while(move |(_, segment)| segment.first < end)
    }

    /// The layout of pass `pass` for the rows of a part: that many others of the same kind come before it.
    fn layout(&self, part: usize, elements: Elements, pass: usize) -> Option<Layout> {
        let of_kind = || {
            let layouts = self.segments(part).map(|(_, segment)| segment.layout());
            layouts.filter(|layout| layout.elements == elements)
        };
        let first_of_its_like = |&(at, layout): &(usize, Layout)| {
            of_kind().position(|other| other == layout) == Some(at)
        };
        let mut distinct = of_kind().enumerate().filter(first_of_its_like);
        distinct.nth(pass).map(|(_, layout)| layout)
    }

    /// Lists the tasks of a pass: on segments that multiply such elements and want one layout of each group's rows.
    fn plan(&self, elements: Elements, pass: usize, tasks: &mut Tasks, isa: Isa) {
        tasks.multiply.iter_mut().for_each(Vec::clear);
        tasks.lay_out.clear();
        tasks.at.clear();
        tasks.layouts.clear();
        let mut at = 0;
        for (index, group) in self.groups.iter().enumerate() {
            let layout = self.layout(group.part, elements, pass);
            tasks.at.push(at);
            tasks.layouts.push(layout.unwrap_or_default());
            let Some(layout) = layout else {
                continue;
            };
            let interleave = interleave(group.rows, elements, isa);
            at += group.rows.next_multiple_of(interleave);
            let rows = (0..group.rows).step_by(interleave);
            tasks.lay_out.extend(rows.map(|row| (index, row)));
            let (begin, end) = (group.part * self.features, (group.part + 1) * self.features);
            for (segment_index, segment) in self.segments(group.part) {
                if segment.layout() != layout {
                    continue;
                }
                let (from, to) = (
                    segment.first.max(begin),
                    (segment.first + segment.rows).min(end),
                );
                let panels = (from - segment.first) / PANEL..(to - segment.first).div_ceil(PANEL);
                for (node, panels) in segment.runs_of(panels) {
                    for first in panels.clone().step_by(TASK_PANELS) {
                        tasks.multiply[node].push(Task {
                            group: index,
                            segment: segment_index,
                            first,
                            last: (first + TASK_PANELS).min(panels.end),
                        });
                    }
                }
            }
        }
    }
}
