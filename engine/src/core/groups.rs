//! Which layers of a model share pages, and where its keys change.

use quire_scheduler::PageGroup;

use crate::model::{ModelConfig, PageLayout};

/// The page groups of a model, each of equally many layers: layers of one group keep the same positions.
pub(super) fn page_groups(model: &ModelConfig) -> Vec<PageGroup> {
    PageLayout::of(model)
        .windows
        .into_iter()
        .map(|window| PageGroup { window })
        .collect()
}

/// The length beyond which a sequence's keys are computed with other rotary frequencies, if the model has such a switch.
pub(super) fn recompute_beyond(model: &ModelConfig) -> Option<u32> {
    model.rope_switch()
}
