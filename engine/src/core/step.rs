//! Turns a scheduler's plan into what the decoder runs.

use quire_kernels::{DrawnRow, Span, Step};
use quire_scheduler::{BlockId, Scheduler};

const _: () = assert!(BlockId::NONE.0 == Step::NO_BLOCK);

/// Fills `step` and `copies` from the batch the scheduler has just planned; both keep their memory from step to step. `draws`, by the slots of sequences whose
/// last token is not known yet: which draw of the step before it is.
pub(super) fn fill(
    scheduler: &Scheduler,
    draws: &[u32],
    step: &mut Step,
    copies: &mut Vec<(u32, u32)>,
) {
    step.clear();
    copies.clear();
    let batch = scheduler.batch();
    copies.extend(batch.copies.iter().map(|copy| (copy.from.0, copy.to.0)));
    let block_size = scheduler.config().block_size;
    step.groups = scheduler.config().groups.len();
    for scheduled in &batch.sequences {
        let end = scheduled.start + scheduled.len;
        let row = step.tokens.len() as u32;
        step.spans.push(Span {
            row,
            rows: scheduled.len,
            start: scheduled.start,
            table: step.block_tables.len() as u32,
            beyond: scheduled.beyond,
        });
        let tokens = scheduler.tokens(scheduled.seq);
        step.tokens.extend(
            tokens[scheduled.start as usize..end as usize]
                .iter()
                .map(|token| token.0),
        );
        step.positions.extend(scheduled.start..end);
        if end as usize == tokens.len() && scheduler.is_pending(scheduled.seq) {
            step.drawn_rows.push(DrawnRow {
                row: row + scheduled.len - 1,
                draw: draws[scheduled.seq.slot()],
            });
        }
        // Interleaved, as the scheduler keeps it: `BlockId::NONE` is `Step::NO_BLOCK`.
        let entries = end.div_ceil(block_size) as usize * step.groups;
        let table = scheduler.block_table(scheduled.seq);
        step.block_tables
            .extend(table[..entries].iter().map(|block| block.0));
        let end = row + scheduled.len;
        let rows = scheduled.prompt_logits + scheduled.logits;
        step.logit_rows.extend(end - rows..end);
    }
}
