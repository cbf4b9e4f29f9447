//! Time and randomness, passed in so that tests own them.

use roost_types::Micros;
use rustix::time::{ClockId, clock_gettime};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

/// What time it is.
pub trait Clock: Send + Sync {
    /// The controller's time in UTC. It never steps while the controller runs, whatever the wall
    /// clock does.
    fn now(&self) -> Micros;
    /// The monotonic clock, for durations and for the age of reports.
    fn monotonic(&self) -> Micros;
    /// The current wall clock, for values that others compare with their own, such as a signature's
    /// date.
    fn wall(&self) -> Micros {
        self.now()
    }
    /// The wall clock's trouble, for administrators.
    fn trouble(&self) -> Option<String> {
        None
    }
}

/// Random bytes for ids.
pub trait Random: Send + Sync {
    /// Fills the buffer.
    fn fill(&self, bytes: &mut [u8]);
}

/// Clocks of a machine.
pub trait Machine: Send + Sync {
    /// CLOCK_REALTIME, which any program with the right may set.
    fn wall(&self) -> Micros;
    /// CLOCK_BOOTTIME, which cannot be set and counts through suspend.
    fn boottime(&self) -> Micros;
}

impl<M: Machine + ?Sized> Machine for Arc<M> {
    fn wall(&self) -> Micros {
        (**self).wall()
    }

    fn boottime(&self) -> Micros {
        (**self).boottime()
    }
}

/// Clocks of this program's machine.
#[derive(Debug, Default)]
pub struct ThisMachine;

impl Machine for ThisMachine {
    fn wall(&self) -> Micros {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Micros(i64::try_from(since.as_micros()).unwrap_or(i64::MAX))
    }

    fn boottime(&self) -> Micros {
        let at = clock_gettime(ClockId::Boottime);
        Micros(at.tv_sec.saturating_mul(1_000_000).saturating_add(at.tv_nsec / 1000))
    }
}

/// A larger difference to the wall clock is a step, not drift.
const STEP: Micros = Micros::from_secs(2);
/// Most slew of the controller's time towards the wall clock, as a divisor of elapsed time.
const APPROACH: i64 = 100;

/// Wall time anchored to CLOCK_BOOTTIME.
///
/// The clock takes the wall clock's time at the controller's start, but never less than
/// `not_before`, the newest time in the database. After that it follows CLOCK_BOOTTIME and slews
/// towards the wall clock by at most 1/100 of elapsed time. A step of an hour takes 100 hours.
pub struct SystemClock<M = ThisMachine> {
    machine: M,
    anchor: Mutex<Anchor>,
}

struct Anchor {
    boottime: Micros,
    now: Micros,
    /// Newest time that was returned.
    given: Micros,
    /// Wall clock minus the controller's time, if that exceeds [`STEP`].
    off: Option<Micros>,
}

impl SystemClock {
    /// The clock of a program without state.
    pub fn new() -> Self {
        Self::over(ThisMachine, Micros::default())
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

impl<M: Machine> SystemClock<M> {
    /// Creates a clock that begins at the wall clock's time, or at `not_before` if that is later.
    pub fn over(machine: M, not_before: Micros) -> Self {
        let now = machine.wall().max(not_before);
        let anchor = Anchor { boottime: machine.boottime(), now, given: now, off: None };
        Self { machine, anchor: Mutex::new(anchor) }
    }

    fn read(&self) -> (Micros, Option<Micros>) {
        let mut anchor = self.anchor.lock().unwrap_or_else(PoisonError::into_inner);
        let (boottime, wall) = (self.machine.boottime(), self.machine.wall());
        let passed = Micros((boottime - anchor.boottime).0.max(0));
        let raw = anchor.now + passed;
        let most = passed.0 / APPROACH;
        let now = raw + Micros((wall - raw).0.clamp(-most, most));
        anchor.given = anchor.given.max(now);
        let now = anchor.given;
        if passed >= Micros::SECOND {
            anchor.boottime = boottime;
            anchor.now = now;
        }
        let gap = wall - now;
        let off = (gap.0.abs() > STEP.0).then_some(gap);
        match (anchor.off, off) {
            (None, Some(gap)) => tracing::error!("{}", sentence(gap)),
            (Some(_), None) => tracing::info!("the wall clock and the controller's time agree again"),
            _ => {}
        }
        anchor.off = off;
        (now, off)
    }
}

/// The administrator's sentence about a wall clock that differs from the controller's time by
/// `gap`.
fn sentence(gap: Micros) -> String {
    let side = if gap.0 > 0 { "ahead of" } else { "behind" };
    format!(
        "the clock of the controller's machine is {} s {side} the controller's time: somebody set it. Bills and \
         deadlines do not notice; the controller's time approaches it by 36 s an hour. If the clock is right now, \
         restart the controller to take it over (it never goes back before what is written)",
        Micros(gap.0.abs()).floor_secs()
    )
}

impl<M: Machine> Clock for SystemClock<M> {
    fn now(&self) -> Micros {
        self.read().0
    }

    fn monotonic(&self) -> Micros {
        self.machine.boottime()
    }

    fn wall(&self) -> Micros {
        self.machine.wall()
    }

    fn trouble(&self) -> Option<String> {
        self.read().1.map(sentence)
    }
}

/// The operating system's randomness.
#[derive(Debug, Default)]
pub struct SystemRandom;

impl Random for SystemRandom {
    /// # Panics
    /// If the operating system has no randomness to give: an id that repeats would be worse.
    fn fill(&self, bytes: &mut [u8]) {
        if let Err(error) = getrandom::fill(bytes) {
            panic!("the operating system gives no randomness: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicI64, Ordering::SeqCst};

    #[derive(Default)]
    struct Hands {
        wall: AtomicI64,
        boottime: AtomicI64,
    }

    impl Hands {
        fn pass(&self, seconds: i64) {
            self.wall.fetch_add(seconds * 1_000_000, SeqCst);
            self.boottime.fetch_add(seconds * 1_000_000, SeqCst);
        }
    }

    impl Machine for Hands {
        fn wall(&self) -> Micros {
            Micros(self.wall.load(SeqCst))
        }
        fn boottime(&self) -> Micros {
            Micros(self.boottime.load(SeqCst))
        }
    }

    const HOUR: i64 = 3600 * 1_000_000;

    #[test]
    fn a_step_of_the_wall_clock_moves_the_controllers_time_by_a_hundredth_of_what_passes() {
        for step in [HOUR, -HOUR] {
            let hands = Arc::new(Hands::default());
            hands.wall.store(10 * HOUR, SeqCst);
            let clock = SystemClock::over(Arc::clone(&hands), Micros::default());
            hands.pass(100);
            assert_eq!(clock.now(), Micros(10 * HOUR) + Micros::from_secs(100));
            assert_eq!(clock.trouble(), None);
            hands.wall.fetch_add(step, SeqCst);
            assert_eq!(clock.now(), Micros(10 * HOUR) + Micros::from_secs(100), "not at once");
            let said = clock.trouble().unwrap();
            assert!(said.contains(if step > 0 { "3600 s ahead" } else { "3600 s behind" }), "{said}");
            hands.pass(100);
            let moved = clock.now() - Micros(10 * HOUR) - Micros::from_secs(200);
            assert_eq!(moved, Micros(Micros::SECOND.0 * step.signum()));
            let mut before = clock.now();
            for _ in 0..5 * 24 * 60 {
                hands.pass(60);
                assert!(clock.now() > before, "it never goes back");
                before = clock.now();
            }
            assert_eq!((clock.now(), clock.trouble()), (hands.wall(), None), "followed within five days");
        }
    }

    #[test]
    fn a_start_under_a_clock_that_is_behind_dates_nothing_before_what_is_written() {
        let hands = Arc::new(Hands::default());
        hands.wall.store(9 * HOUR, SeqCst);
        let clock = SystemClock::over(Arc::clone(&hands), Micros(10 * HOUR));
        assert_eq!(clock.now(), Micros(10 * HOUR));
        assert!(clock.trouble().unwrap().contains("3600 s behind"));
        assert_eq!(clock.wall(), Micros(9 * HOUR));
    }
}
