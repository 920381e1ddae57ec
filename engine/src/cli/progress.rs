//! A progress bar for loading; silent where nobody watches.

use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};

use crate::model::LoadProgress;

/// Shows how far loading has come, and a line when it is done.
pub(super) struct Loading {
    bar: ProgressBar,
    started: Instant,
}

impl Loading {
    pub fn start(name: &str) -> Self {
        let bar = ProgressBar::new(0).with_message(format!("loading {name}"));
        bar.set_style(
            ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {eta}")
                .unwrap_or_else(|_| ProgressStyle::default_bar()),
        );
        Self {
            bar,
            started: Instant::now(),
        }
    }

    pub fn update(&self, progress: LoadProgress) {
        self.bar.set_length(progress.total);
        self.bar.set_position(progress.done);
    }

    /// Takes the bar away; says how long it took.
    pub fn finish(self) -> std::time::Duration {
        self.bar.finish_and_clear();
        self.started.elapsed()
    }
}
