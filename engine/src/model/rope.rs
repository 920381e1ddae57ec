//! Rotary frequencies: the geometric progression of Su et al. 2021 and the rules that stretch it for longer contexts.

use std::f64::consts::TAU;

use super::{RopeConfig, RopeScaling};

/// Radians per position for each pair of a head's elements, fastest first. `[head_dim / 2]`
pub(super) fn frequencies(rope: &RopeConfig, head_dim: usize) -> Vec<f32> {
    (0..head_dim / 2)
        .map(|i| {
            let frequency = rope.theta.powf(-2.0 * i as f64 / head_dim as f64);
            stretched(i, frequency, &rope.scaling) as f32
        })
        .collect()
}

/// Frequency `i`, stretched.
fn stretched(i: usize, frequency: f64, scaling: &RopeScaling) -> f64 {
    match *scaling {
        RopeScaling::Divisors(ref divisors) => {
            frequency / divisors.get(i).copied().map_or(1.0, f64::from)
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

    #[test]
    fn the_first_pair_turns_one_radian_per_position() {
        let rope = RopeConfig {
            theta: 10_000.0,
            scaling: RopeScaling::None,
        };
        let f = frequencies(&rope, 64);
        assert_eq!(f.len(), 32);
        assert!((f[0] - 1.0).abs() < f32::EPSILON);
        assert!((f[16] - 0.01).abs() < 1e-8, "theta^-1/2 in the middle");
    }

    #[test]
    fn linear_scaling_divides_every_frequency() {
        assert!((stretched(0, 0.5, &RopeScaling::Linear { factor: 4.0 }) - 0.125).abs() < 1e-12);
    }

    #[test]
    fn llama3_keeps_short_waves_divides_long_ones_and_is_continuous_between() {
        let at = |turns: f64| {
            let frequency = turns * TAU / 8192.0;
            stretched(0, frequency, &LLAMA3) / frequency
        };
        assert!((at(100.0) - 1.0).abs() < 1e-12);
        assert!((at(0.5) - 0.125).abs() < 1e-12);
        assert!((at(1.0 + 1e-9) - 0.125).abs() < 1e-6);
        assert!((at(4.0 - 1e-9) - 1.0).abs() < 1e-6);
        assert!(at(2.0) > 0.125 && at(2.0) < 1.0);
    }
}
