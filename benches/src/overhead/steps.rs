//! [`Steps`]: what the engine thread did, step by step.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use quire::core::StepReport;
use serde::Serialize;

use super::metered::Meter;

/// One step.
#[derive(Debug, Clone, Copy)]
struct One {
    ended: Instant,
    tokens: u32,
    sequences: u32,
    /// Of them on the device.
    device: Duration,
}

/// Takes notes on the engine thread. Clones write into the same book.
#[derive(Debug, Clone, Default)]
pub struct Steps(Arc<Mutex<Vec<One>>>);

/// What the steps of a full batch cost, in the mean.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Cost {
    /// How many there were.
    pub steps: usize,
    /// From the end of one to the end of the next, in milliseconds.
    pub step_ms: f64,
    /// Of them on the device.
    pub device_ms: f64,
}

impl Cost {
    /// The part of a step that is the engine's own, 0 to 1.
    pub fn own(&self) -> f64 {
        1.0 - self.device_ms / self.step_ms
    }
}

impl Steps {
    /// An observer for an engine whose device has `meter`.
    pub fn observer(&self, meter: Meter) -> Box<dyn FnMut(StepReport) + Send> {
        let book = Arc::clone(&self.0);
        Box::new(move |report| {
            let mut book = book.lock().unwrap_or_else(PoisonError::into_inner);
            book.push(One {
                ended: Instant::now(),
                tokens: report.tokens,
                sequences: report.sequences,
                device: meter.last(),
            });
        })
    }

    /// Of the steps in which exactly `batch` sequences generated and none read its prompt, and which followed one like them; the book is empty afterwards.
    /// `None`: there were none.
    pub fn cost(&self, batch: u32) -> Option<Cost> {
        let mut book = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let steps = std::mem::take(&mut *book);
        drop(book);
        let full = |one: &One| one.sequences == batch && one.tokens == batch;
        let pairs = steps
            .windows(2)
            .filter(|pair| full(&pair[0]) && full(&pair[1]));
        let (mut count, mut wall, mut device) = (0, Duration::ZERO, Duration::ZERO);
        for pair in pairs {
            count += 1;
            wall += pair[1].ended.duration_since(pair[0].ended);
            device += pair[1].device;
        }
        (count > 0).then(|| Cost {
            steps: count,
            step_ms: 1e3 * wall.as_secs_f64() / f64::from(count as u32),
            device_ms: 1e3 * device.as_secs_f64() / f64::from(count as u32),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_full_steps_after_full_steps_count() {
        let steps = Steps::default();
        let began = Instant::now();
        let note = |ms, tokens, sequences, device| {
            steps.0.lock().unwrap().push(One {
                ended: began + Duration::from_millis(ms),
                tokens,
                sequences,
                device: Duration::from_millis(device),
            });
        };
        // A prompt is read; three full steps; one with a sequence less; one full step again.
        note(100, 512, 4, 90);
        note(110, 4, 4, 9);
        note(120, 4, 4, 8);
        note(130, 4, 4, 7);
        note(140, 3, 3, 5);
        note(150, 4, 4, 5);
        let cost = steps.cost(4).unwrap();
        assert_eq!(cost.steps, 2);
        assert!((cost.step_ms - 10.0).abs() < 1e-9 && (cost.device_ms - 7.5).abs() < 1e-9);
        assert!((cost.own() - 0.25).abs() < 1e-9);
        assert_eq!(steps.cost(4), None, "the book is empty");
    }
}
