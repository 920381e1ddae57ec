//! When requests of an open load arrive: a Poisson process, drawn before the load begins.

use std::time::Duration;

use crate::random::Random;

/// The moments, from the beginning of the load, at which `requests` requests arrive, `rate` a second on average.
///
/// Gaps of a Poisson process are exponential and independent: -ln(u) / rate for uniform u.
pub fn poisson(rate: f64, requests: u32, seed: u64) -> impl Iterator<Item = Duration> {
    let mut random = Random::nth(seed, u64::MAX);
    let mut at = 0.0;
    (0..requests).map(move |_| {
        at -= random.unit().ln() / rate;
        Duration::from_secs_f64(at)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrivals_come_at_their_rate_in_order_and_repeat() {
        let times: Vec<Duration> = poisson(50.0, 20_000, 3).collect();
        assert!(times.is_sorted());
        let seconds = times[times.len() - 1].as_secs_f64();
        assert!(
            (seconds - 400.0).abs() < 12.0,
            "{seconds} s, expected about 400"
        );
        assert!(poisson(50.0, 20_000, 3).eq(times.iter().copied()));
        assert_ne!(poisson(50.0, 1, 4).next(), Some(times[0]));
    }

    #[test]
    fn gaps_are_exponential() {
        let times: Vec<f64> = poisson(1.0, 50_000, 9).map(|t| t.as_secs_f64()).collect();
        let gaps = || times.windows(2).map(|pair| pair[1] - pair[0]);
        // Of an exponential distribution a share of e^-t is longer than t.
        for t in [0.1_f64, 1.0, 3.0] {
            let longer = gaps().filter(|&gap| gap > t).count() as f64 / 49_999.0;
            assert!(
                (longer - (-t).exp()).abs() < 0.01,
                "{longer} longer than {t}"
            );
        }
    }
}
