//! Where the guest's output goes, and how much of it.
//!
//! What is over the limit is dropped, not delayed: a UART that is not ready would hold the vCPU in its driver's loop, with
//! interrupts off in Linux's `printk`, and a guest would stand still because it talks. Bytes cost the host no system call when they
//! go into a ring or are dropped; that a vCPU leaves the guest for each of them is the guest's own time.

use std::fs::File;
use std::io::{self, Write};

use serde::{Deserialize, Serialize};

use crate::config::{RateLimiter, TokenBucket};
use crate::console::ConsoleWriter;
use crate::devices::limiter::{Clock, Limiter, SavedLimiter};

/// Where output goes.
#[derive(Debug)]
pub enum Sink {
    /// A console ring.
    Ring(ConsoleWriter),
    /// A terminal or pipe, in stand-alone mode: a reader that stops reading stops the guest's output.
    Terminal(File),
    /// A file or pipe that never waits (`O_NONBLOCK`): what has no room is lost.
    File(File),
    /// Nowhere.
    Null,
}

/// Output so far, bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    /// What the guest wrote.
    pub(super) written: u64,
    /// What of it was over the limit.
    pub(super) dropped: u64,
    /// What of it had no room, or failed.
    pub(super) lost: u64,
}

/// What a snapshot holds of the way out.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct SavedOutput {
    limit: Option<TokenBucket>,
    level: SavedLimiter,
}

/// The way out of the port.
#[derive(Debug)]
pub(super) struct Output {
    sink: Sink,
    limit: Option<TokenBucket>,
    limiter: Limiter,
    clock: Clock,
    counts: Counts,
}

impl Output {
    pub(super) fn new(sink: Sink, limit: Option<TokenBucket>) -> Self {
        let limiter = Limiter::new(RateLimiter { bandwidth: limit, ops: None });
        Self { sink, limit, limiter, clock: Clock::start(), counts: Counts::default() }
    }

    /// The limit and its level, for a snapshot.
    pub(super) fn save(&self) -> SavedOutput {
        SavedOutput { limit: self.limit, level: self.limiter.save(self.clock.now()) }
    }

    /// Goes on with a snapshot's level, unless the limit is another here.
    pub(super) fn restore(&mut self, saved: &SavedOutput) {
        if saved.limit == self.limit {
            self.limiter.restore(&saved.level, self.clock.now());
        }
    }

    pub(super) const fn counts(&self) -> Counts {
        self.counts
    }

    /// Whether so many bytes may pass; they are charged then.
    fn passes(&mut self, bytes: u64) -> bool {
        if self.limiter.is_unlimited() {
            return true;
        }
        let passes = self.limiter.blocked(self.clock.now()).is_none();
        if passes {
            self.limiter.charge(bytes);
        }
        passes
    }
}

impl Write for Output {
    /// Takes all of it, whatever becomes of it.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len() as u64;
        self.counts.written += count;
        if !self.passes(count) {
            if self.counts.dropped == 0 {
                crate::log::line("serial: output is over its limit, and dropped (GET /metrics counts it)");
            }
            self.counts.dropped += count;
            return Ok(bytes.len());
        }
        let done = match &mut self.sink {
            Sink::Ring(ring) => {
                ConsoleWriter::write(ring, bytes);
                count
            }
            Sink::Terminal(file) => file.write_all(bytes).map_or(0, |()| count),
            // One try: whoever does not read must not hold the vCPU.
            Sink::File(file) => file.write(bytes).unwrap_or(0) as u64,
            Sink::Null => count,
        };
        if done < count && self.counts.lost == 0 {
            crate::log::line("serial: output cannot be written, and is lost (GET /metrics counts it)");
        }
        self.counts.lost += count - done;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
