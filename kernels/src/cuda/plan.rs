//! [`Plan`]: a step as the kernels read it — one header at a fixed address, one array of words — and the buckets its sizes are rounded up to.
//!
//! Steps that only generate are padded to a bucket of rows, and their lists of attention work to eighths of a power of two, so that few
//! different lists of launches occur and each is worth a graph. Padding computes rows nobody reads; it stores no keys and asks for no attention.

use super::params::Header;
use crate::{Draw, Span, Step};

/// Positions that one block walks when a sequence's positions are split. Fixed, so that a result does not depend on what else runs.
pub(crate) const SPLIT: u32 = 256;
/// Queries of a block whose warps walk the same positions together.
pub(crate) const TOGETHER: u32 = 64;
/// Queries of a block whose warps split the positions.
pub(crate) const APART: u32 = 16;
/// Queries, over all KV heads, whose partial results exist at once where prompts are split: 512 MiB with heads of 128 elements. Few in the emulation, so that
/// tests go beyond it.
const WAVE: usize = if cfg!(feature = "cuda-emulation") {
    1 << 10
} else {
    1 << 20
};
/// The largest bucket of rows; larger steps are not padded.
const LARGEST_BUCKET: usize = 512;

/// Rows that a step of `rows` rows is padded to: powers of two up to 16, then multiples of 16, then of 64.
pub(crate) fn bucket(rows: usize) -> usize {
    match rows {
        0..=16 => rows.next_power_of_two(),
        17..=128 => rows.next_multiple_of(16),
        129..=LARGEST_BUCKET => rows.next_multiple_of(64),
        _ => rows,
    }
}

/// Work items that a list of `items` is padded to. A block without work ends at once, but first it waits for its share of a multiprocessor's shared memory, as
/// those with work do: so there are a quarter more of them at most, and four lengths for each doubling.
fn padded(items: usize) -> usize {
    items.next_multiple_of((items.next_power_of_two() / 8).max(1))
}

/// The lists of attention work; see `attention.cu`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub(crate) enum List {
    /// Runs of queries whose results are final.
    Together = 0,
    /// Runs of queries with a split of their positions.
    Split = 1,
    /// What adds the splits up.
    Merge = 2,
    /// Single rows.
    Rows = 3,
}

/// How attention is planned: the same for every layer of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Heads {
    /// Query heads of a KV head, and KV heads.
    pub group: u32,
    pub of_kv: u32,
    /// By tensor cores, or row by row.
    pub tensor_cores: bool,
}

/// Work on the lists of splits and of what adds them up that is done before the next one's takes the place of its partial results.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Wave {
    /// The first item, and how many there are.
    pub splits: [usize; 2],
    pub merges: [usize; 2],
}

/// The words of an attention work item; `Item` of `attention.cuh`.
type Item = [u32; 8];
/// `Merge` of `attention.cuh`.
type Merge = [u32; 6];
/// Words of an item of each list.
const WORDS: [usize; 4] = [
    size_of::<Item>() / 4,
    size_of::<Item>() / 4,
    size_of::<Merge>() / 4,
    size_of::<Item>() / 4,
];
/// Words of a draw.
const DRAW: usize = 13;
/// `DRAWN` of `params.cuh`: the rest of a token's word is a draw of the step before.
const DRAWN: u32 = 1 << 31;
/// The row of a draw that is padding.
const NO_ROW: u32 = u32::MAX;

/// A step, laid out for the device.
#[derive(Debug)]
pub(crate) struct Plan {
    pub header: Header,
    pub words: Vec<u32>,
    /// Rows computed: the step's, or its bucket.
    pub rows: usize,
    /// Rows of logits computed.
    pub logit_rows: usize,
    /// The step only generates: its launches will come again.
    pub again: bool,
    slots: bool,
    heads: Option<Heads>,
    /// Work items of each list, padded where the step is.
    counts: [usize; 4],
    /// Queries whose partial results are kept, over all KV heads.
    pub partials: usize,
    waves: Vec<Wave>,
    /// Draws that are launched, padding included.
    pub draws: usize,
    items: [Vec<u32>; 4],
}

const EMPTY: Header = Header {
    base: 0,
    rows: 0,
    logit_rows: 0,
    tokens: 0,
    positions: 0,
    beyond: 0,
    slots: 0,
    tables: 0,
    logits: 0,
    copies: 0,
    draws: 0,
    lists: [0; 4],
    list_lengths: [0; 4],
};

impl Default for Plan {
    fn default() -> Self {
        Self {
            header: EMPTY,
            words: Vec::new(),
            rows: 0,
            logit_rows: 0,
            again: false,
            slots: false,
            heads: None,
            counts: [0; 4],
            partials: 0,
            waves: Vec::new(),
            draws: 0,
            items: Default::default(),
        }
    }
}

impl Plan {
    /// Begins the plan of a step of at most `most` rows. The step was checked.
    pub fn begin(&mut self, step: &Step, most: usize) {
        let rows = step.rows();
        self.again = rows > 0 && step.spans.iter().all(|span| span.rows == 1);
        let pad = |n: usize| if self.again { bucket(n) } else { n };
        self.rows = pad(rows).min(most).max(rows);
        self.logit_rows = pad(step.logit_rows.len()).min(self.rows.max(step.logit_rows.len()));
        self.words.clear();
        self.slots = false;
        self.heads = None;
        self.counts = [0; 4];
        self.partials = 0;
        self.waves.clear();
        self.header = Header {
            rows: rows as u32,
            logit_rows: step.logit_rows.len() as u32,
            ..EMPTY
        };
        self.header.tokens = self.padded(&step.tokens, self.rows);
        for drawn in &step.drawn_rows {
            self.words[(self.header.tokens + drawn.row) as usize] = DRAWN | drawn.draw;
        }
        self.header.positions = self.padded(&step.positions, self.rows);
        self.header.logits = self.logit_order(step);
        self.header.beyond = self.words.len() as u32;
        for span in &step.spans {
            let beyond = u32::from(span.beyond);
            self.words.extend((0..span.rows).map(|_| beyond));
        }
        let end = self.header.beyond as usize + self.rows;
        self.words.resize(end, 0);
        self.header.tables = self.padded(&step.block_tables, step.block_tables.len());
        self.draws(step);
    }

    /// Appends the rows whose logits are wanted: first those that go to the host, then those that are drawn from; where they begin.
    fn logit_order(&mut self, step: &Step) -> u32 {
        let at = self.words.len();
        let mut draws = step.draws.iter().map(|draw| draw.row as usize).peekable();
        let rows = step.logit_rows.iter().enumerate();
        let undrawn = rows.filter(|(index, _)| draws.next_if_eq(index).is_none());
        self.words.extend(undrawn.map(|(_, &row)| row));
        let drawn = step
            .draws
            .iter()
            .map(|draw| step.logit_rows[draw.row as usize]);
        self.words.extend(drawn);
        self.words.resize(at + self.logit_rows, 0);
        at as u32
    }

    /// Appends the draws and what they change, once the rows of logits have their order.
    fn draws(&mut self, step: &Step) {
        let count = step.draws.len();
        // As many as there may be, so that a bucket has two lists of launches: with draws and without.
        self.draws = match count {
            0 => 0,
            _ if self.again => self.logit_rows,
            _ => count,
        };
        let changes = self.words.len();
        let words = step
            .changes
            .iter()
            .flat_map(|change| [change.token, change.amount.to_bits()]);
        self.words.extend(words);
        self.header.draws = self.words.len() as u32;
        let first = step.logit_rows.len() - count;
        for (index, draw) in step.draws.iter().enumerate() {
            let changes = changes + 2 * draw.first_change as usize;
            self.words.extend(draw_words(draw, first + index, changes));
        }
        let end = self.header.draws as usize + self.draws * DRAW;
        self.words.resize(end, NO_ROW);
    }

    /// Appends values and as many zeroes as are missing; where they begin.
    fn padded(&mut self, values: &[u32], len: usize) -> u32 {
        let at = self.words.len();
        self.words.extend_from_slice(values);
        self.words.resize(at + len, 0);
        at as u32
    }

    /// The pairs of blocks that are copied before the step.
    pub fn copies(&mut self, pairs: &[(u32, u32)]) {
        self.header.copies = self.words.len() as u32;
        self.words
            .extend(pairs.iter().flat_map(|&(from, to)| [from, to]));
    }

    /// Where each row's keys and values go, in each page group. The block tables were checked for the groups that are used.
    pub fn slots(&mut self, step: &Step, block_size: u32) {
        if self.slots {
            return;
        }
        self.slots = true;
        let at = self.words.len();
        self.header.slots = at as u32;
        self.words.resize(at + step.groups * self.rows, u32::MAX);
        for group in 0..step.groups {
            let slots = &mut self.words[at + group * self.rows..][..self.rows];
            for span in &step.spans {
                for row in span.row..span.row + span.rows {
                    let position = step.positions[row as usize];
                    let entry = (position / block_size) as usize * step.groups + group;
                    // A group that no layer uses may have no table.
                    let block = step.block_tables.get(span.table as usize + entry);
                    if let Some(&block) = block
                        && block != Step::NO_BLOCK
                    {
                        slots[row as usize] = block * block_size + position % block_size;
                    }
                }
            }
        }
    }

    /// Lists the attention work, once a step; false where it was listed for other heads.
    pub fn attention(&mut self, step: &Step, heads: Heads, only_split: bool) -> bool {
        if let Some(before) = self.heads {
            return before == heads;
        }
        self.heads = Some(heads);
        for items in &mut self.items {
            items.clear();
        }
        let mut most = 0;
        for span in &step.spans {
            if !heads.tensor_cores {
                for row in 0..span.rows {
                    let item = item(span, row, 1, 0, span.start + row + 1, 0);
                    self.items[List::Rows as usize].extend(item);
                }
            } else if span.rows == 1 || only_split {
                self.split(span, heads, &mut most);
            } else {
                together(span, heads, &mut self.items[List::Together as usize]);
            }
        }
        self.end_wave(&mut most);
        self.partials = most;
        for list in 0..4 {
            let items = std::mem::take(&mut self.items[list]);
            let count = items.len() / WORDS[list];
            self.header.lists[list] = self.padded(&items, items.len());
            self.header.list_lengths[list] = count as u32;
            self.counts[list] = if self.again { padded(count) } else { count };
            self.items[list] = items;
        }
        if self.again {
            self.partials = self.partials.next_power_of_two();
            let (splits, merges) = (self.count(List::Split), self.count(List::Merge));
            self.waves.clear();
            self.waves.push(Wave {
                splits: [0, splits],
                merges: [0, merges],
            });
        }
        true
    }

    /// What is split, in the order in which it is to be done. A step that only generates has one wave, so that its launches will come again.
    pub fn waves(&self) -> &[Wave] {
        &self.waves
    }

    /// Blocks that a list is launched with.
    pub fn count(&self, list: List) -> usize {
        self.counts[list as usize]
    }

    /// Ends the wave that has the items since the last one; `most`: the partial results of the largest so far.
    fn end_wave(&mut self, most: &mut usize) {
        let listed = |list: List| self.items[list as usize].len() / WORDS[list as usize];
        let done = self.waves.last().copied().unwrap_or_default();
        let [splits, merges] = [done.splits, done.merges].map(|[first, count]| first + count);
        self.waves.push(Wave {
            splits: [splits, listed(List::Split) - splits],
            merges: [merges, listed(List::Merge) - merges],
        });
        *most = (*most).max(std::mem::take(&mut self.partials));
    }

    fn split(&mut self, span: &Span, heads: Heads, most: &mut usize) {
        let queries = span.rows * heads.group;
        for first in (0..queries).step_by(APART as usize) {
            let count = (queries - first).min(APART);
            let end = last(span, first + count, heads) + 1;
            let splits = end.div_ceil(SPLIT);
            let stride = count * heads.of_kv;
            let more = (splits * stride) as usize;
            if !self.again && self.partials > 0 && self.partials + more > WAVE {
                self.end_wave(most);
            }
            let merge: Merge = [span.row, first, count, self.partials as u32, stride, splits];
            self.items[List::Merge as usize].extend(merge);
            for split in 0..splits {
                let begin = split * SPLIT;
                let end = end.min(begin + SPLIT);
                let item = item(span, first, count, begin, end, self.partials as u32);
                self.items[List::Split as usize].extend(item);
                self.partials += stride as usize;
            }
        }
    }
}

/// `Draw` of `sampling.cu`: a draw from a row of the logits, whose changes begin at a word of the plan.
fn draw_words(draw: &Draw, row: usize, changes: usize) -> [u32; DRAW] {
    // Greedy logits are not multiplied.
    let scale = if draw.greedy {
        1.0
    } else {
        draw.inverse_temperature
    };
    let place = draw.place.to_bits();
    let [repeated, lowered, biased, forbidden] = draw.changes;
    [
        row as u32,
        u32::from(draw.greedy),
        scale.to_bits(),
        draw.top_k,
        draw.top_p.to_bits(),
        draw.within.to_bits(),
        place as u32,
        (place >> 32) as u32,
        changes as u32,
        repeated,
        lowered,
        biased,
        forbidden,
    ]
}

fn item(span: &Span, first: u32, count: u32, begin: u32, end: u32, partial: u32) -> Item {
    [
        span.row, span.start, span.table, first, count, begin, end, partial,
    ]
}

/// The position of the last of the span's first `queries` queries.
fn last(span: &Span, queries: u32, heads: Heads) -> u32 {
    span.start + (queries - 1) / heads.group
}

/// Longest first, so that the last blocks to finish are short ones.
fn together(span: &Span, heads: Heads, items: &mut Vec<u32>) {
    let queries = span.rows * heads.group;
    for run in (0..queries.div_ceil(TOGETHER)).rev() {
        let first = run * TOGETHER;
        let count = (queries - first).min(TOGETHER);
        let end = last(span, first + count, heads) + 1;
        items.extend(item(span, first, count, 0, end, 0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Change;

    const HEADS: Heads = Heads {
        group: 4,
        of_kv: 2,
        tensor_cores: true,
    };

    /// A step of spans `(start, rows)` in blocks of 16, one page group.
    fn step(spans: &[(u32, u32)]) -> Step {
        let mut step = Step::default();
        for &(start, rows) in spans {
            step.spans.push(Span {
                row: step.tokens.len() as u32,
                rows,
                start,
                table: step.block_tables.len() as u32,
                beyond: false,
            });
            let first = step.block_tables.len() as u32;
            step.block_tables
                .extend((0..(start + rows).div_ceil(16)).map(|i| first + i));
            step.tokens.extend(0..rows);
            step.positions.extend(start..start + rows);
        }
        step.logit_rows = step.spans.iter().map(|s| s.row + s.rows - 1).collect();
        step
    }

    fn items(plan: &Plan, list: List) -> Vec<&[u32]> {
        let at = plan.header.lists[list as usize] as usize;
        let len = plan.header.list_lengths[list as usize] as usize;
        let words = if list == List::Merge { 6 } else { 8 };
        plan.words[at..at + len * words].chunks(words).collect()
    }

    #[test]
    fn buckets_hold_their_rows_and_waste_less_than_half() {
        for rows in 1..2000 {
            let bucket = bucket(rows);
            assert!(bucket >= rows && bucket < 2 * rows.max(2), "{rows}");
        }
        let buckets: std::collections::BTreeSet<_> = (1..=512).map(bucket).collect();
        assert!(buckets.len() <= 20, "{buckets:?}");
    }

    #[test]
    fn lists_of_work_are_padded_by_a_quarter_at_most_and_to_few_lengths() {
        for items in 0..5000 {
            let padded = padded(items);
            assert!(padded >= items && 4 * (padded - items) <= items, "{items}");
        }
        let lengths: std::collections::BTreeSet<_> = (1..=4096).map(padded).collect();
        assert!(lengths.len() <= 8 + 4 * 10, "{}", lengths.len());
    }

    #[test]
    fn a_step_that_generates_is_padded_and_one_that_reads_is_not() {
        let mut plan = Plan::default();
        plan.begin(&step(&[(10, 1), (20, 1), (5, 1)]), 64);
        assert!(plan.again && plan.rows == 4 && plan.logit_rows == 4);
        plan.begin(&step(&[(10, 1), (0, 20)]), 64);
        assert!(!plan.again && plan.rows == 21 && plan.logit_rows == 2);
        plan.begin(&step(&[(10, 1), (20, 1), (5, 1)]), 3);
        assert_eq!(plan.rows, 3, "no more rows than the buffers have");
    }

    #[test]
    fn rows_that_are_drawn_from_come_last_and_draws_know_where() {
        let mut plan = Plan::default();
        let mut step = step(&[(10, 1), (20, 1), (5, 1), (7, 1), (9, 1)]);
        let changes = [(3, 0.5), (4, 0.25)].map(|(token, amount)| Change { token, amount });
        step.changes = changes.to_vec();
        step.draws = [1, 3, 4]
            .map(|row| Draw {
                row,
                greedy: row == 3,
                inverse_temperature: 2.0,
                top_k: 0,
                top_p: 1.0,
                within: f32::INFINITY,
                place: 0.5,
                first_change: u32::from(row == 4),
                changes: [0, u32::from(row == 4), 0, 0],
            })
            .to_vec();
        plan.begin(&step, 64);
        let at = plan.header.logits as usize;
        assert_eq!(plan.words[at..at + 8], [0, 2, 1, 3, 4, 0, 0, 0]);
        let at = plan.header.draws as usize;
        let draws: Vec<&[u32]> = plan.words[at..].chunks(DRAW).collect();
        assert_eq!((draws.len(), plan.draws), (8, 8));
        let rows: Vec<u32> = draws.iter().map(|draw| draw[0]).collect();
        assert_eq!(rows[..4], [2, 3, 4, NO_ROW]);
        let scales = [draws[0][2], draws[1][2]].map(f32::from_bits);
        assert_eq!(scales, [2.0, 1.0], "greedy logits are as they are");
        let change = &plan.words[draws[2][8] as usize..][..2];
        assert_eq!((change[0], f32::from_bits(change[1])), (4, 0.25));
    }

    #[test]
    fn rows_of_drawn_tokens_name_the_draw() {
        let mut plan = Plan::default();
        let mut step = step(&[(10, 1), (20, 1), (5, 1)]);
        step.tokens = vec![7, 8, 9];
        step.drawn_rows = vec![crate::DrawnRow { row: 1, draw: 4 }];
        plan.begin(&step, 64);
        let at = plan.header.tokens as usize;
        assert_eq!(plan.words[at..at + 4], [7, DRAWN | 4, 9, 0]);
    }

    #[test]
    fn padding_has_no_slot() {
        let mut plan = Plan::default();
        let step = step(&[(17, 1), (3, 1), (0, 1)]);
        plan.begin(&step, 64);
        plan.slots(&step, 16);
        let at = plan.header.slots as usize;
        assert_eq!(plan.words[at..at + 4], [17, 2 * 16 + 3, 3 * 16, u32::MAX]);
    }

    #[test]
    fn splits_cover_every_position_once_and_partials_do_not_overlap() {
        let mut plan = Plan::default();
        let step = step(&[(1000, 1), (0, 1), (255, 1), (256, 1)]);
        plan.begin(&step, 64);
        assert!(plan.attention(&step, HEADS, false));
        let (splits, merges) = (items(&plan, List::Split), items(&plan, List::Merge));
        let mut next = 0;
        let mut split = splits.iter();
        for merge in merges {
            let mut at = 0;
            for _ in 0..merge[5] {
                let item = split.next().unwrap();
                assert_eq!((item[0], item[3], item[4]), (merge[0], merge[1], merge[2]));
                assert_eq!((item[5], item[7]), (at, next));
                at = item[6];
                next += merge[4];
            }
            assert_eq!(at, step.positions[merge[0] as usize] + 1);
        }
        assert!(split.next().is_none());
        assert!(plan.partials >= next as usize && plan.partials < 2 * next as usize);
        assert_eq!(plan.count(List::Split), 8, "4, 1, 1 and 2 splits");
    }

    #[test]
    fn prompts_that_are_split_have_waves_of_bounded_memory() {
        let mut plan = Plan::default();
        // Enough for several waves: four rows have 32 results in each of their splits.
        let rows = if WAVE > 1 << 10 { 14_000 } else { 400 };
        let step = step(&[(9, 1), (300, rows), (600, 1)]);
        plan.begin(&step, step.rows());
        assert!(plan.attention(&step, HEADS, true));
        let (splits, merges) = (items(&plan, List::Split), items(&plan, List::Merge));
        let mut waves = plan.waves().to_vec();
        assert!(waves.len() > 2, "{waves:?}");
        waves.reverse();
        let (mut split, mut at, mut next) = (splits.iter(), 0, 0);
        let mut wave = waves.pop().unwrap();
        for merge in &merges {
            if at == wave.merges[0] + wave.merges[1] {
                let begun = splits.len() - split.len();
                assert_eq!(begun, wave.splits[0] + wave.splits[1]);
                wave = waves.pop().unwrap();
                assert_eq!((wave.merges[0], wave.splits[0]), (at, begun));
                next = 0;
            }
            at += 1;
            assert_eq!(merge[3], next, "results lie one behind the other in a wave");
            for item in split.by_ref().take(merge[5] as usize) {
                assert_eq!(item[7], next);
                next += merge[4];
            }
            assert!(next as usize <= plan.partials && plan.partials <= WAVE);
        }
        assert!(waves.is_empty() && split.next().is_none());
    }

    #[test]
    fn runs_of_a_prompt_cover_every_query_once_the_longest_first() {
        let mut plan = Plan::default();
        let step = step(&[(30, 37), (7, 1)]);
        plan.begin(&step, 64);
        assert!(plan.attention(&step, HEADS, false));
        let runs = items(&plan, List::Together);
        let mut queries = 37 * 4;
        for run in runs {
            assert_eq!(run[3] + run[4], queries);
            assert_eq!(run[6], 30 + (queries - 1) / 4 + 1);
            queries = run[3];
        }
        assert_eq!(queries, 0);
        assert_eq!(items(&plan, List::Split).len(), 1);
        assert!(!plan.attention(&step, Heads { group: 2, ..HEADS }, false));
    }
}
