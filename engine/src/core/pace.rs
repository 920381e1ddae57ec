//! [`StepRate`]: how many tokens a step may have while somebody generates, so that it takes no longer than it may.
//!
//! What a token costs depends on the model, the machine and how long the contexts are. So it is measured, by every step that computes prompts, and the scheduler
//! is told before each step: stall-free batching (Agrawal et al. 2024) whose budget is found at run time. No answer depends on it: promise 2.

use std::time::Duration;

use quire_scheduler::Pace;

use super::config::StepReport;

/// Prompts get so many tokens a step however long that takes: weights are read once for all of them, so fewer would cost nearly as much and get nobody on.
const FEWEST_PROMPT_TOKENS: u32 = 32;

/// Tokens a second until a step was measured: a slow machine's, since one that computes more will soon show it, and one stalled step is seen by everybody.
const FIRST_GUESS: f64 = 640.0;

/// Tokens a second of steps with prompts, as measured lately.
#[derive(Debug)]
pub(super) struct StepRate {
    /// What a step may take while somebody generates; `None`: as long as it takes.
    max_step: Option<Duration>,
    measured: Option<f64>,
}

impl StepRate {
    pub fn new(max_step: Option<Duration>) -> Self {
        Self {
            max_step,
            measured: None,
        }
    }

    /// For the next step.
    pub fn pace(&self) -> Option<Pace> {
        let max_step = self.max_step?;
        let rate = self.measured.unwrap_or(FIRST_GUESS);
        Some(Pace {
            // (No more than there are numbers: `as` sees to it.)
            tokens: (rate * max_step.as_secs_f64()) as u32,
            prompt_tokens: FEWEST_PROMPT_TOKENS,
        })
    }

    /// A step is done. One that only generates says nothing: there, most of the time goes into reading weights for a few tokens.
    ///
    /// The mean with what was known is a geometric one. If the rate was wrong by a factor `f`, a step brings that to `√f`: what is off by a thousand, because
    /// the process was stopped meanwhile, is off by two after four steps, and so it is when contexts suddenly are much longer.
    pub fn observe(&mut self, step: &StepReport) {
        if step.prompt_tokens < FEWEST_PROMPT_TOKENS {
            return;
        }
        // Coarse clocks may see nothing go by.
        let duration = step.duration.max(Duration::from_micros(1));
        let rate = f64::from(step.tokens) / duration.as_secs_f64();
        self.measured = Some(self.measured.map_or(rate, |known| (known * rate).sqrt()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A device of which a step takes so long, and so long for each token, in milliseconds.
    struct Device {
        step: f64,
        token: f64,
    }

    impl Device {
        fn ms(&self, tokens: u32) -> f64 {
            self.step + self.token * f64::from(tokens)
        }

        /// Computes a step of which `generated` tokens are of those who generate; the others are of prompts.
        fn run(&self, rate: &mut StepRate, tokens: u32, generated: u32) {
            let duration = Duration::from_secs_f64(self.ms(tokens) / 1e3);
            rate.observe(&report(tokens, tokens - generated, duration));
        }

        /// Plans and computes a step with prompts that have no end; its tokens.
        fn next(&self, rate: &mut StepRate, generated: u32) -> u32 {
            let pace = rate.pace().expect("there is a bound");
            let tokens = pace.tokens.max(generated + pace.prompt_tokens).min(8192);
            self.run(rate, tokens, generated);
            tokens
        }
    }

    fn report(tokens: u32, prompt_tokens: u32, duration: Duration) -> StepReport {
        StepReport {
            tokens,
            prompt_tokens,
            sequences: 2,
            drawn: 0,
            ahead: false,
            duration,
        }
    }

    fn within(ms: u64) -> StepRate {
        StepRate::new(Some(Duration::from_millis(ms)))
    }

    #[test]
    fn steps_come_to_take_as_long_as_they_may() {
        for (step, token) in [(20.0, 0.9), (0.1, 0.05), (100.0, 0.5), (0.0, 4.0)] {
            let device = Device { step, token };
            let mut rate = within(200);
            for _ in 0..30 {
                device.next(&mut rate, 5);
            }
            let took = device.ms(device.next(&mut rate, 5));
            assert!((190.0..202.0).contains(&took), "{step} {token}: {took} ms");
        }
    }

    #[test]
    fn a_first_step_is_small_and_the_one_after_it_is_measured() {
        let mut rate = within(200);
        assert_eq!(rate.pace().unwrap().tokens, 128);
        let fast = Device {
            step: 1.0,
            token: 0.01,
        };
        assert_eq!(fast.next(&mut rate, 1), 128);
        assert!(rate.pace().unwrap().tokens > 8192);
    }

    #[test]
    fn a_slow_model_gets_on_by_the_fewest() {
        let device = Device {
            step: 250.0,
            token: 20.0,
        };
        let mut rate = within(200);
        device.next(&mut rate, 3);
        for _ in 0..10 {
            assert_eq!(device.next(&mut rate, 3), 3 + FEWEST_PROMPT_TOKENS);
        }
    }

    #[test]
    fn a_stopped_process_and_a_leap_of_the_clock_are_soon_forgotten() {
        let device = Device {
            step: 20.0,
            token: 0.9,
        };
        for seconds in [1e-9, 600.0] {
            let mut rate = within(200);
            for _ in 0..30 {
                device.next(&mut rate, 5);
            }
            let usual = device.next(&mut rate, 5);
            rate.observe(&report(usual, usual - 5, Duration::from_secs_f64(seconds)));
            let after: Vec<u32> = (0..6).map(|_| device.next(&mut rate, 5)).collect();
            assert_ne!(after[0], usual, "it was to be one");
            let off = f64::from(after[5]) / f64::from(usual);
            assert!((0.7..1.5).contains(&off), "{usual}, then {after:?}");
        }
    }

    #[test]
    fn longer_contexts_make_smaller_steps() {
        let short = Device {
            step: 20.0,
            token: 0.9,
        };
        let long = Device {
            step: 20.0,
            token: 9.0,
        };
        let mut rate = within(500);
        for _ in 0..30 {
            short.next(&mut rate, 5);
        }
        let took: Vec<f64> = (0..8)
            .map(|_| long.ms(long.next(&mut rate, 5)) / 500.0)
            .collect();
        assert!(took[0] > 5.0 && took[3] < 1.5 && took[7] < 1.1, "{took:?}");
    }

    #[test]
    fn steps_without_prompts_say_nothing() {
        let mut rate = within(200);
        let device = Device {
            step: 100.0,
            token: 1.0,
        };
        device.run(&mut rate, 400, 0);
        let before = rate.pace();
        for generated in [1, 50] {
            device.run(&mut rate, generated, generated);
            device.run(&mut rate, generated + 31, generated);
        }
        assert_eq!(rate.pace(), before);
        device.run(&mut rate, 33, 1);
        assert_ne!(rate.pace(), before);
    }

    #[test]
    fn without_a_bound_there_is_no_pace() {
        let mut rate = StepRate::new(None);
        rate.observe(&report(512, 512, Duration::from_secs(5)));
        assert_eq!(rate.pace(), None);
    }
}
