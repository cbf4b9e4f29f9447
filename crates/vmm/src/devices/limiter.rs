//! How much a device may do: bytes and operations per time, each with a burst.
//!
//! A limit is a bucket of tokens that time fills. What passes is charged afterwards, when its size is known, and may leave
//! the bucket in debt; nothing more passes until time has paid. So a request larger than its bucket passes, late, and over
//! any long time the rate holds exactly.
//!
//! Pure: time is passed in, counted from any fixed point.

use std::time::Duration;

use crate::config::{RateLimiter, TokenBucket};

/// The limits of one direction of a device.
#[derive(Clone, Debug, Default)]
pub struct Limiter {
    bytes: Option<Bucket>,
    operations: Option<Bucket>,
}

#[derive(Clone, Debug)]
struct Bucket {
    /// Tokens that fit.
    size: u64,
    /// Time that fills it.
    refill: Duration,
    /// Tokens that are there once, and are spent first.
    burst: u64,
    /// Tokens that are there; below zero: debt.
    level: i128,
    /// Until when time has been turned into tokens.
    until: Duration,
}

impl Limiter {
    /// Limits as they are configured, full.
    #[must_use]
    pub fn new(config: RateLimiter) -> Self {
        Self { bytes: config.bandwidth.and_then(Bucket::new), operations: config.ops.and_then(Bucket::new) }
    }

    /// Changes limits: what `change` leaves out stays as it is, a bucket without size or time is no limit any more. Changed buckets
    /// are full.
    pub fn change(&mut self, change: RateLimiter, now: Duration) {
        let bucket = |config| Bucket::new(config).map(|bucket| Bucket { until: now, ..bucket });
        if let Some(bandwidth) = change.bandwidth {
            self.bytes = bucket(bandwidth);
        }
        if let Some(ops) = change.ops {
            self.operations = bucket(ops);
        }
    }

    /// Whether nothing ever waits.
    #[must_use]
    pub const fn is_unlimited(&self) -> bool {
        self.bytes.is_none() && self.operations.is_none()
    }

    /// How long nothing may pass; `None` when something may.
    pub fn blocked(&mut self, now: Duration) -> Option<Duration> {
        let buckets = [&mut self.bytes, &mut self.operations];
        buckets.into_iter().flatten().filter_map(|bucket| bucket.blocked(now)).max()
    }

    /// Charges one operation of so many bytes.
    pub fn charge(&mut self, bytes: u64) {
        if let Some(bucket) = &mut self.bytes {
            bucket.charge(bytes);
        }
        if let Some(bucket) = &mut self.operations {
            bucket.charge(1);
        }
    }
}

impl Bucket {
    /// A bucket without size or time is no limit.
    fn new(config: TokenBucket) -> Option<Self> {
        let refill = Duration::from_millis(config.refill_time);
        (config.size > 0 && config.refill_time > 0).then_some(Self {
            size: config.size,
            refill,
            burst: config.one_time_burst.unwrap_or(0),
            level: i128::from(config.size),
            until: Duration::ZERO,
        })
    }

    fn fill(&mut self, now: Duration) {
        let passed = now.saturating_sub(self.until).as_nanos();
        let tokens = passed.saturating_mul(u128::from(self.size)) / self.refill.as_nanos();
        let full = i128::from(self.size);
        self.level = self.level.saturating_add(i128::try_from(tokens).unwrap_or(i128::MAX));
        if self.level >= full {
            (self.level, self.until) = (full, now.max(self.until));
        } else {
            // The part of a token that this time was worth is kept as time.
            self.until += self.time_of(tokens);
        }
    }

    /// The time that so many tokens take, rounded down.
    fn time_of(&self, tokens: u128) -> Duration {
        let nanos = tokens.saturating_mul(self.refill.as_nanos()) / u128::from(self.size);
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    fn blocked(&mut self, now: Duration) -> Option<Duration> {
        self.fill(now);
        if self.burst > 0 || self.level > 0 {
            return None;
        }
        let missing = u128::try_from(1 - self.level).unwrap_or(0);
        let due = self.until.saturating_add(self.time_of(missing)).saturating_add(Duration::from_nanos(1));
        Some(due.saturating_sub(now).max(Duration::from_nanos(1)))
    }

    fn charge(&mut self, tokens: u64) {
        let from_burst = tokens.min(self.burst);
        self.burst -= from_burst;
        self.level -= i128::from(tokens - from_burst);
    }
}

mod saved;

pub use saved::{Clock, SavedLimiter};

#[cfg(test)]
mod exhaustive;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn limiter(size: u64, burst: u64, refill_ms: u64) -> Limiter {
        let bucket = TokenBucket { size, one_time_burst: Some(burst), refill_time: refill_ms };
        Limiter::new(RateLimiter { bandwidth: Some(bucket), ops: None })
    }

    /// Sends requests of one size as fast as they may pass; returns how many pass within a time.
    fn passed(limiter: &mut Limiter, bytes: u64, time: Duration) -> u64 {
        let (mut now, mut count) = (Duration::ZERO, 0);
        loop {
            match limiter.blocked(now) {
                Some(wait) => now += wait,
                None if now > time => return count,
                None => {
                    limiter.charge(bytes);
                    count += 1;
                }
            }
            if now > time {
                return count;
            }
        }
    }

    #[test]
    fn without_limits_nothing_waits() {
        let none = TokenBucket { size: 0, one_time_burst: None, refill_time: 100 };
        for config in [RateLimiter::default(), RateLimiter { bandwidth: Some(none), ops: Some(none) }] {
            let mut limiter = Limiter::new(config);
            for _ in 0..100 {
                limiter.charge(1 << 40);
                assert_eq!(limiter.blocked(Duration::ZERO), None);
            }
        }
    }

    #[test]
    fn the_bucket_then_the_rate() {
        // 1000 bytes per second: what is in the bucket, and then ten times as much.
        assert_eq!(passed(&mut limiter(1000, 0, 1000), 100, Duration::from_secs(10)), 110);
        assert_eq!(passed(&mut limiter(1000, 5000, 1000), 100, Duration::from_secs(10)), 160);
        assert_eq!(passed(&mut limiter(1000, 0, 1000), 5000, Duration::from_secs(10)), 3);
    }

    #[test]
    fn limits_come_change_and_go_one_by_one() {
        let mut limiter = Limiter::default();
        let bucket = |size, refill_time| Some(TokenBucket { size, one_time_burst: None, refill_time });
        let bandwidth = |size| RateLimiter { bandwidth: bucket(size, 1000), ops: None };
        assert!(limiter.is_unlimited());
        limiter.change(bandwidth(1000), Duration::ZERO);
        limiter.charge(1000);
        assert!(!limiter.is_unlimited() && limiter.blocked(Duration::ZERO).is_some());
        // Operations are limited too; the bytes' debt is still there, until that limit goes.
        limiter.change(RateLimiter { bandwidth: None, ops: bucket(1, 1000) }, Duration::ZERO);
        assert!(limiter.blocked(Duration::ZERO).is_some());
        limiter.change(bandwidth(0), Duration::ZERO);
        assert_eq!(limiter.blocked(Duration::ZERO), None);
        limiter.charge(1 << 40);
        assert!(limiter.blocked(Duration::ZERO).is_some());
        // A changed bucket is full, and not more than that.
        let late = Duration::from_secs(1000);
        limiter.change(RateLimiter { bandwidth: None, ops: bucket(2, 1000) }, late);
        limiter.charge(1);
        limiter.charge(1);
        assert!(limiter.blocked(late).is_some());
        limiter.change(RateLimiter { bandwidth: None, ops: bucket(5, 0) }, Duration::ZERO);
        assert!(limiter.is_unlimited());
    }

    #[test]
    fn the_slower_of_two_limits_counts() {
        let bucket = |size| Some(TokenBucket { size, one_time_burst: None, refill_time: 1000 });
        let mut both = Limiter::new(RateLimiter { bandwidth: bucket(1_000_000), ops: bucket(10) });
        assert_eq!(passed(&mut both, 1, Duration::from_millis(9_001)), 100);
        let mut both = Limiter::new(RateLimiter { bandwidth: bucket(10), ops: bucket(1_000_000) });
        assert_eq!(passed(&mut both, 1, Duration::from_millis(9_001)), 100);
    }

    #[test]
    fn a_long_idle_time_gives_one_bucket() {
        let mut limiter = limiter(1000, 0, 1000);
        limiter.charge(1000);
        let late = Duration::from_secs(86_400);
        for _ in 0..10 {
            assert_eq!(limiter.blocked(late), None);
            limiter.charge(100);
        }
        assert!(limiter.blocked(late).is_some());
    }

    proptest! {
        /// Whatever the sizes and the moments of looking: never more than bucket, burst, the rate, and one request.
        #[test]
        fn the_rate_holds(
            size in 1..1_000_000_u64, burst in 0..10_000_u64, refill in 1..10_000_u64,
            steps in proptest::collection::vec((0..2_000_000_u64, 0..100_000_u64), 1..200),
        ) {
            let mut limiter = limiter(size, burst, refill);
            let (mut now, mut sent, mut largest) = (Duration::ZERO, 0_u128, 0_u64);
            for (micros, bytes) in steps {
                now += Duration::from_micros(micros);
                if limiter.blocked(now).is_none() {
                    limiter.charge(bytes);
                    sent += u128::from(bytes);
                    largest = largest.max(bytes);
                }
                let rate = now.as_nanos() * u128::from(size) / Duration::from_millis(refill).as_nanos();
                let most = u128::from(size + burst + largest) + rate + 1;
                prop_assert!(sent <= most, "{} sent, {} allowed", sent, most);
            }
        }

        /// Waiting as long as was said is enough, and not much too long.
        #[test]
        fn the_wait_is_right(size in 1..1_000_000_u64, refill in 1..10_000_u64, debt in 1..5_000_000_u64) {
            let mut limiter = limiter(size, 0, refill);
            limiter.charge(size + debt);
            let wait = limiter.blocked(Duration::ZERO).unwrap();
            prop_assert!(limiter.clone().blocked(wait.mul_f64(0.99)).is_some() || wait < Duration::from_micros(1));
            let mut later = limiter;
            prop_assert_eq!(later.blocked(wait + Duration::from_nanos(2)), None);
        }
    }
}
