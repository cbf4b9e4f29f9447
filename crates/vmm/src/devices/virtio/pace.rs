//! A limiter with its clock and its alarm: what a device holds.

use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use vmm_sys_util::timerfd::TimerFd;

use crate::config::RateLimiter;
use crate::devices::limiter::Limiter;

/// The host's timers are not worth more.
const SHORTEST: Duration = Duration::from_micros(50);

/// Limits of a device that waits for an alarm when it may do nothing.
pub struct Pace {
    limiter: Limiter,
    start: Instant,
    alarm: TimerFd,
}

impl Pace {
    /// Limits as configured.
    ///
    /// # Errors
    /// The host gives no timer.
    pub fn new(config: RateLimiter) -> std::io::Result<Self> {
        let alarm = TimerFd::new().map_err(std::io::Error::from)?;
        Ok(Self { limiter: Limiter::new(config), start: Instant::now(), alarm })
    }

    /// Whether something may pass now; if not, the alarm is set for when it may.
    pub fn may_pass(&mut self) -> bool {
        // Without an alarm nothing would ever pass again.
        match self.limiter.blocked(self.start.elapsed()) {
            Some(wait) => !self.set(wait.max(SHORTEST)),
            None => true,
        }
    }

    /// Sets the alarm for another turn that comes as soon as others have had theirs.
    pub fn soon(&mut self) {
        self.set(SHORTEST);
    }

    fn set(&mut self, wait: Duration) -> bool {
        static LOG: crate::log::Limited = crate::log::Limited::new();
        let set = self.alarm.reset(wait, None);
        if let Err(error) = set {
            LOG.line(|| format!("a limit is not kept, as its timer cannot be set: {error}"));
        }
        set.is_ok()
    }

    /// Charges one operation of so many bytes.
    pub fn charge(&mut self, bytes: u64) {
        self.limiter.charge(bytes);
    }

    /// The alarm's descriptor.
    #[must_use]
    pub fn alarm(&self) -> RawFd {
        self.alarm.as_raw_fd()
    }

    /// Takes the alarm, so that it rings no more.
    pub fn silence(&mut self) {
        let _ = self.alarm.wait();
    }
}
