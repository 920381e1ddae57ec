//! When requests of an open load arrive: a Poisson process, of single requests or of bursts, drawn before the load begins.

use std::time::Duration;

use crate::random::Random;

/// The moments, from the beginning of the load, at which `requests` requests arrive, `rate` a second on average, `burst` at a time.
///
/// Gaps of a Poisson process are exponential and independent: -ln(u) / rate for uniform u. Bursts come at a `burst`th of the rate.
pub fn poisson(rate: f64, burst: u32, requests: u32, seed: u64) -> impl Iterator<Item = Duration> {
    let mut random = Random::nth(seed, u64::MAX);
    let mut at = 0.0;
    (0..requests).map(move |n| {
        if n % burst == 0 {
            at -= f64::from(burst) * random.unit().ln() / rate;
        }
        Duration::from_secs_f64(at)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrivals_come_at_their_rate_in_order_and_repeat() {
        let times: Vec<Duration> = poisson(50.0, 1, 20_000, 3).collect();
        assert!(times.is_sorted());
        let seconds = times[times.len() - 1].as_secs_f64();
        assert!(
            (seconds - 400.0).abs() < 12.0,
            "{seconds} s, expected about 400"
        );
        assert!(poisson(50.0, 1, 20_000, 3).eq(times.iter().copied()));
        assert_ne!(poisson(50.0, 1, 1, 4).next(), Some(times[0]));
    }

    #[test]
    fn gaps_are_exponential() {
        let times: Vec<f64> = poisson(1.0, 1, 50_000, 9)
            .map(|t| t.as_secs_f64())
            .collect();
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

    #[test]
    fn bursts_arrive_together_and_keep_the_rate() {
        let times: Vec<Duration> = poisson(50.0, 8, 40_000, 3).collect();
        assert!(
            times
                .chunks(8)
                .all(|burst| burst.iter().all(|t| *t == burst[0]))
        );
        assert!(times.chunks(8).is_sorted_by(|a, b| a[0] < b[0]));
        let seconds = times[times.len() - 1].as_secs_f64();
        assert!(
            (seconds - 800.0).abs() < 40.0,
            "{seconds} s, expected about 800"
        );
    }
}
