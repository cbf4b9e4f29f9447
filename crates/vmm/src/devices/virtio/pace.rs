//! A limiter with its clock and its alarm: what a device holds, limited or not, as limits may come while it works.

use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use vmm_sys_util::timerfd::TimerFd;

use crate::config::RateLimiter;
use crate::devices::limiter::{Clock, Limiter, SavedLimiter};

/// The host's timers are not worth more.
const SHORTEST: Duration = Duration::from_micros(50);

/// A timer whose reading never waits: it may be set anew between its ringing and the look at it.
///
/// # Errors
/// The host gives none.
pub fn timer() -> std::io::Result<TimerFd> {
    let timer = TimerFd::new().map_err(std::io::Error::from)?;
    // SAFETY: a plain fcntl call on an open descriptor.
    if unsafe { libc::fcntl(timer.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) } < 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(timer)
}

/// Limits of a device that waits for an alarm when it may do nothing. Without a limit the alarm is a descriptor that never rings.
pub struct Pace {
    limiter: Limiter,
    clock: Clock,
    alarm: TimerFd,
}

impl Pace {
    /// Limits as configured; nothing: none for now.
    ///
    /// # Errors
    /// The host gives no timer.
    pub fn new(config: Option<RateLimiter>) -> std::io::Result<Self> {
        Ok(Self { limiter: Limiter::new(config.unwrap_or_default()), clock: Clock::start(), alarm: timer()? })
    }

    /// Changes limits, as [`Limiter::change`] does. Who waits looks again at once.
    pub fn change(&mut self, change: RateLimiter) {
        self.limiter.change(change, self.clock.now());
        self.soon();
    }

    /// Whether something may pass now; if not, the alarm is set for when it may.
    pub fn may_pass(&mut self) -> bool {
        if self.limiter.is_unlimited() {
            return true;
        }
        // Without an alarm nothing would ever pass again.
        match self.limiter.blocked(self.clock.now()) {
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

    /// The levels, for a snapshot.
    #[must_use]
    pub fn save(&self) -> SavedLimiter {
        self.limiter.save(self.clock.now())
    }

    /// Goes on with a snapshot's levels. Who waits looks again when his device is activated.
    pub fn restore(&mut self, saved: &SavedLimiter) {
        self.limiter.restore(saved, self.clock.now());
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
