//! Records the kernel that draws tokens from rows of logits; see `sampling.cu`.

use super::backend::CudaBackend;
use super::params::{self, Pointer};

/// Bytes of shared memory: `Desk` of `sampling.cu`.
const SHARED: usize = 3 * 2048 * 4 + 2 * 2048 * 8 + 32 * 16 + 32 * 8 + 48 + 8;

impl CudaBackend {
    /// Records the step's draws from `logits` `[rows, vocabulary]`, whose order is the plan's.
    pub(super) fn draw_from(&mut self, logits: Pointer, vocabulary: usize) {
        let draws = self.plan.draws;
        if draws == 0 {
            return;
        }
        let sample = params::Sample {
            step: self.step_at(),
            logits,
            tokens: self.drawn.at(),
            vocabulary: vocabulary as i32,
            one: fixed_point(vocabulary),
        };
        self.launch("sample", (draws, 1), SHARED, &sample);
    }
}

/// What a weight of 1 is in fixed point: the sum of as many as there are tokens is below 2^63.
fn fixed_point(vocabulary: usize) -> f32 {
    2.0_f32.powi(62 - vocabulary.next_power_of_two().trailing_zeros() as i32)
}
