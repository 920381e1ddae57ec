//! Rotary frequencies: the geometric progression of Su et al. 2021 and the rules that stretch it for longer contexts.

use std::f64::consts::TAU;

use super::{RopeConfig, RopeScaling};

/// Radians per position for each pair of a head's rotated elements, fastest first. `[rotated / 2]`
pub(super) fn frequencies(rope: &RopeConfig) -> Vec<f32> {
    of(rope, false)
}

/// As [`frequencies`], for sequences longer than the original context; `None` where they are the same.
pub(super) fn beyond(rope: &RopeConfig) -> Option<Vec<f32>> {
    matches!(rope.scaling, RopeScaling::LongRope { .. }).then(|| of(rope, true))
}

fn of(rope: &RopeConfig, beyond: bool) -> Vec<f32> {
    (0..rope.rotated / 2)
        .map(|i| {
            let frequency = rope.theta.powf(-2.0 * i as f64 / rope.rotated as f64);
            stretched(i, frequency, rope, beyond) as f32
        })
        .collect()
}

/// Frequency `i`, stretched.
fn stretched(i: usize, frequency: f64, rope: &RopeConfig, beyond: bool) -> f64 {
    let divided = |divisors: &[f32]| frequency / divisors.get(i).copied().map_or(1.0, f64::from);
    match rope.scaling {
        RopeScaling::Divisors(ref divisors) => divided(divisors),
        RopeScaling::LongRope {
            ref short,
            ref long,
            ..
        } => divided(if beyond { long } else { short }),
        RopeScaling::Yarn {
            factor,
            beta_fast,
            beta_slow,
            original_max_position,
            truncate,
        } => {
            // The index of the frequency that turns so often within the original context.
            let index = |turns: f64| {
                let rotated = rope.rotated as f64;
                rotated * (original_max_position / (turns * TAU)).ln() / (2.0 * rope.theta.ln())
            };
            let (mut low, mut high) = (index(beta_fast), index(beta_slow));
            if truncate {
                (low, high) = (low.floor(), high.ceil());
            }
            (low, high) = (low.max(0.0), high.min(rope.rotated as f64 - 1.0));
            if low == high {
                high += 0.001;
            }
            let divided = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
            frequency / factor * divided + frequency * (1.0 - divided)
        }
        RopeScaling::None => frequency,
        RopeScaling::Linear { factor } => frequency / factor,
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position,
        } => {
            // How often the wave repeats within the context of the first training.
            let turns = original_max_position * frequency / TAU;
            if turns < low_freq_factor {
                frequency / factor
            } else if turns > high_freq_factor {
                frequency
            } else {
                let kept = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                frequency * (kept + (1.0 - kept) / factor)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LLAMA3: RopeScaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position: 8192.0,
    };

    fn rope(scaling: RopeScaling) -> RopeConfig {
        RopeConfig {
            theta: 10_000.0,
            rotated: 64,
            scaling,
            scale: 1.0,
        }
    }

    #[test]
    fn the_first_pair_turns_one_radian_per_position() {
        let f = frequencies(&rope(RopeScaling::None));
        assert_eq!(f.len(), 32);
        assert!((f[0] - 1.0).abs() < f32::EPSILON);
        assert!((f[16] - 0.01).abs() < 1e-8, "theta^-1/2 in the middle");
    }

    #[test]
    fn linear_scaling_divides_every_frequency() {
        assert!(
            (stretched(0, 0.5, &rope(RopeScaling::Linear { factor: 4.0 }), false) - 0.125).abs()
                < 1e-12
        );
    }

    #[test]
    fn llama3_keeps_short_waves_divides_long_ones_and_is_continuous_between() {
        let at = |turns: f64| {
            let frequency = turns * TAU / 8192.0;
            stretched(0, frequency, &rope(LLAMA3), false) / frequency
        };
        assert!((at(100.0) - 1.0).abs() < 1e-12);
        assert!((at(0.5) - 0.125).abs() < 1e-12);
        assert!((at(1.0 + 1e-9) - 0.125).abs() < 1e-6);
        assert!((at(4.0 - 1e-9) - 1.0).abs() < 1e-6);
        assert!(at(2.0) > 0.125 && at(2.0) < 1.0);
    }
}
