//! Every short life of small buckets, and the ends of every number's range.
//!
//! Scope: buckets of 1 to 3 tokens that 1 or 3 ms fill, with a burst of 0 or 2; all sequences of five looks, each after one of
//! five times and, where it may pass, with a request of 0, 1, 2 or 5 tokens. Larger buckets differ from these in nothing but
//! the numbers, whose ends the second test tries.

use super::*;

/// A life so far: when how much passed.
struct Life {
    bucket: TokenBucket,
    passed: Vec<(Duration, u64)>,
    looks: u64,
}

const LOOKS: usize = 5;
const REQUESTS: [u64; 4] = [0, 1, 2, 5];

impl Life {
    fn steps(&self) -> [Duration; 5] {
        let refill = Duration::from_millis(self.bucket.refill_time);
        let token = refill / u32::try_from(self.bucket.size).unwrap();
        [Duration::ZERO, token - Duration::from_nanos(1), token, refill, 3 * refill]
    }

    /// Over every window: no more than the bucket, the burst, the rate, and what the last request was larger than one token.
    fn check(&self) {
        let TokenBucket { size, one_time_burst, refill_time } = self.bucket;
        let refill = Duration::from_millis(refill_time).as_nanos();
        let (to, _) = self.passed[self.passed.len() - 1];
        let (mut sent, mut over) = (0_u128, 0);
        for (from, tokens) in self.passed.iter().rev() {
            (sent, over) = (sent + u128::from(*tokens), over.max(u128::from(tokens.saturating_sub(1))));
            let most = u128::from(size + one_time_burst.unwrap_or(0)) + over;
            let allowed = most * refill + (to - *from).as_nanos() * u128::from(size);
            assert!(sent * refill <= allowed, "{:?}: {:?}", self.bucket, self.passed);
        }
    }

    fn go_on(&mut self, limiter: &Limiter, now: Duration, left: usize) {
        if left == 0 {
            return;
        }
        for step in self.steps() {
            let (mut limiter, now) = (limiter.clone(), now + step);
            self.looks += 1;
            if let Some(wait) = limiter.blocked(now) {
                assert!(!wait.is_zero());
                assert_eq!(limiter.clone().blocked(now + wait), None, "the wait that was said is enough");
                self.go_on(&limiter, now, left - 1);
                continue;
            }
            for tokens in REQUESTS {
                let mut limiter = limiter.clone();
                limiter.charge(tokens);
                self.passed.push((now, tokens));
                self.check();
                self.go_on(&limiter, now, left - 1);
                self.passed.pop();
            }
        }
    }
}

#[test]
fn in_every_short_life_of_a_small_bucket_the_rate_holds_over_every_window() {
    let mut looks = 0;
    for size in 1..=3 {
        for refill_time in [1, 3] {
            for burst in [0, 2] {
                let bucket = TokenBucket { size, one_time_burst: Some(burst), refill_time };
                let limiter = Limiter::new(RateLimiter { bandwidth: Some(bucket), ops: None });
                let mut life = Life { bucket, passed: Vec::new(), looks: 0 };
                life.go_on(&limiter, Duration::ZERO, LOOKS);
                looks += life.looks;
            }
        }
    }
    assert!(looks > 1_000_000, "only {looks} looks");
}

#[test]
fn no_number_overflows() {
    let ends = [1, 2, 1000, u64::MAX - 1, u64::MAX];
    let times = [Duration::ZERO, Duration::from_nanos(1), Duration::from_nanos(u64::MAX), Duration::MAX];
    for size in ends {
        for refill_time in ends {
            for burst in [0, 1, u64::MAX] {
                let bucket = Some(TokenBucket { size, one_time_burst: Some(burst), refill_time });
                for all in 0..4_usize.pow(3) * 4_usize.pow(3) {
                    let mut limiter = Limiter::new(RateLimiter { bandwidth: bucket, ops: bucket });
                    let mut choice = all;
                    let mut pick = || {
                        let picked = choice % 4;
                        choice /= 4;
                        picked
                    };
                    for _ in 0..3 {
                        let (now, bytes) = (times[pick()], [0, 1, u64::MAX / 2, u64::MAX][pick()]);
                        let wait = limiter.blocked(now);
                        assert!(wait.is_none_or(|wait| !wait.is_zero()));
                        limiter.charge(bytes);
                    }
                }
            }
        }
    }
}
