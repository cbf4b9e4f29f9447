//! What a snapshot holds of limits: what is in their buckets. How large those are is the configuration's.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{Bucket, Limiter};

/// The levels at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedLimiter {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    bytes: Option<SavedBucket>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    operations: Option<SavedBucket>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedBucket {
    /// Tokens; below zero: debt.
    level: i64,
    /// What is left of the tokens that are there once.
    burst: u64,
    /// Time that is no whole token yet.
    passed_ns: u64,
}

impl SavedBucket {
    fn of(bucket: &Bucket, now: Duration) -> Self {
        let mut bucket = bucket.clone();
        bucket.fill(now);
        let passed = now.saturating_sub(bucket.until).as_nanos();
        Self {
            // A debt of more than that is none that time will pay.
            level: i64::try_from(bucket.level).unwrap_or(if bucket.level < 0 { i64::MIN } else { i64::MAX }),
            burst: bucket.burst,
            passed_ns: u64::try_from(passed).unwrap_or(u64::MAX),
        }
    }
}

impl Limiter {
    /// Reads the levels.
    #[must_use]
    pub fn save(&self, now: Duration) -> SavedLimiter {
        let saved = |bucket: &Option<Bucket>| bucket.as_ref().map(|bucket| SavedBucket::of(bucket, now));
        SavedLimiter { bytes: saved(&self.bytes), operations: saved(&self.operations) }
    }

    /// Goes on with levels of the same limits. No bucket holds more than as if it were new, and one that was not there is full.
    pub fn restore(&mut self, saved: &SavedLimiter, now: Duration) {
        for (bucket, saved) in [(&mut self.bytes, saved.bytes), (&mut self.operations, saved.operations)] {
            let (Some(bucket), Some(saved)) = (bucket, saved) else { continue };
            bucket.level = i128::from(saved.level).min(bucket.level);
            bucket.burst = saved.burst.min(bucket.burst);
            bucket.until = now.saturating_sub(Duration::from_nanos(saved.passed_ns));
        }
    }
}

/// Time for a limiter. It begins long after its zero, as a bucket's time may have begun before its monitor did.
#[derive(Clone, Copy, Debug)]
pub struct Clock(Instant);

/// Longer than any token of use takes.
const BEFORE: Duration = Duration::from_secs(100 * 365 * 86_400);

impl Clock {
    /// It begins now.
    #[must_use]
    pub fn start() -> Self {
        Self(Instant::now())
    }

    /// The time.
    #[must_use]
    pub fn now(&self) -> Duration {
        BEFORE + self.0.elapsed()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::config::{RateLimiter, TokenBucket};

    proptest! {
        /// Whatever happens before and after a snapshot: who goes on from it may do what he may who was never in one.
        #[test]
        fn who_goes_on_from_levels_may_do_the_same(
            size in 1..1000_u64, burst in 0..1000_u64, refill in 1..100_000_u64, at in 0..30_usize,
            steps in proptest::collection::vec((0..2_000_000_u64, 0..2000_u64), 1..60),
        ) {
            let bucket = Some(TokenBucket { size, one_time_burst: Some(burst), refill_time: refill });
            let config = RateLimiter { bandwidth: bucket, ops: bucket };
            let (mut one, mut other) = (Limiter::new(config), Limiter::new(config));
            // Two clocks, of which the other's begins with the snapshot.
            let (mut now, mut theirs) = (BEFORE, BEFORE + Duration::from_secs(7));
            for (n, (micros, bytes)) in steps.into_iter().enumerate() {
                if n == at {
                    let text = serde_json::to_string(&one.save(now)).unwrap();
                    other.restore(&serde_json::from_str(&text).unwrap(), theirs);
                }
                now += Duration::from_micros(micros);
                theirs += Duration::from_micros(micros);
                let wait = one.blocked(now);
                if n >= at {
                    prop_assert_eq!(other.blocked(theirs), wait);
                }
                if wait.is_none() {
                    one.charge(bytes);
                    if n >= at {
                        other.charge(bytes);
                    }
                }
            }
        }
    }

    #[test]
    fn no_level_is_above_a_new_one() {
        let bucket = Some(TokenBucket { size: 5, one_time_burst: Some(2), refill_time: 1000 });
        let config = RateLimiter { bandwidth: bucket, ops: None };
        let mut limiter = Limiter::new(config);
        let text = r#"{"bytes":{"level":9000000000000000000,"burst":9000000000000000000,"passed_ns":0},
            "operations":{"level":0,"burst":0,"passed_ns":0}}"#;
        limiter.restore(&serde_json::from_str(text).unwrap(), BEFORE);
        assert_eq!(limiter.save(BEFORE), Limiter::new(config).save(BEFORE));
    }
}
