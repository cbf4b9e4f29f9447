//! virtio-balloon: memory that the guest does without goes back to the host (virtio 1.2, 5.5).
//!
//! The host says how much it wants; the guest's driver takes pages from the guest and lists them. Nothing forces a guest to:
//! what limits it is the limit on its monitor's memory, not the balloon.

pub mod config;
pub mod metrics;
pub mod queue;
pub mod statistics;

#[cfg(test)]
mod tests;

use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use virtio_queue::QueueT;
use vmm_sys_util::timerfd::TimerFd;

use super::pace::timer;
use super::queue::{Broken, Turn};
use super::{Active, F_EVENT_IDX, F_INDIRECT_DESC, VirtioDevice};
use crate::memory::{self, FilePages};
use config::{BalloonConfig, PAGES_PER_MIB};
use metrics::Metrics;
use queue::{F_DEFLATE_ON_OOM, F_REPORTING, F_STATISTICS, Role};
use statistics::Statistics;

/// virtio device id of a balloon.
pub const KIND: u32 = 5;
const QUEUE_SIZE: u16 = 128;
/// All queues that a balloon can have.
const QUEUES: [u16; 5] = [QUEUE_SIZE; 5];
/// The queue that statistics come by, if the device has any.
const STATISTICS: usize = 2;
/// Where the configuration space holds the pages that the guest has put into the balloon (virtio 1.2, 5.5.4).
const ACTUAL: usize = 4;

/// A balloon.
pub struct Balloon {
    features: u64,
    /// Pages that the host wants.
    target: u32,
    /// Pages that the guest says it has given.
    actual: u32,
    /// Rings when statistics are due; there if there are any.
    clock: Option<TimerFd>,
    pages: FilePages,
    active: Option<Active>,
    /// The guest's buffer for statistics, until they are wanted again.
    held: Option<u16>,
    latest: Statistics,
    scratch: Vec<u32>,
    metrics: Metrics,
}

/// What a snapshot holds of a balloon: pages wanted, pages given, and the statistics' buffer.
#[derive(Serialize, Deserialize)]
struct SavedBalloon {
    target: u32,
    actual: u32,
    held: Option<u16>,
}

impl Balloon {
    /// A balloon as configured. `pages` says which pages of the guest are a file's.
    ///
    /// # Errors
    /// The host gives no timer.
    pub fn new(config: &BalloonConfig, pages: FilePages) -> std::io::Result<Self> {
        let statistics = config.stats_polling_interval_s > 0;
        let flag = |on: bool, feature: u64| if on { feature } else { 0 };
        let mut balloon = Self {
            features: flag(statistics, F_STATISTICS)
                | flag(config.deflate_on_oom, F_DEFLATE_ON_OOM)
                | flag(config.free_page_reporting, F_REPORTING),
            target: 0,
            actual: 0,
            clock: statistics.then(timer).transpose()?,
            pages,
            active: None,
            held: None,
            latest: Statistics::default(),
            scratch: Vec::new(),
            metrics: Metrics::default(),
        };
        balloon.set_target(config.amount_mib);
        balloon.set_interval(config.stats_polling_interval_s)?;
        Ok(balloon)
    }

    /// Says how much the host wants; a driver that is there hears of it.
    pub fn set_target(&mut self, amount_mib: u64) {
        self.target = u32::try_from(amount_mib.saturating_mul(PAGES_PER_MIB)).unwrap_or(u32::MAX);
        if let Some(active) = &self.active {
            active.interrupt.config_changed(&self.config());
        }
    }

    /// Sets how often statistics are asked for, from now on. Without statistics there is nothing to set.
    ///
    /// # Errors
    /// The host's error.
    pub fn set_interval(&mut self, seconds: u64) -> std::io::Result<()> {
        let Some(clock) = &mut self.clock else { return Ok(()) };
        let interval = Duration::from_secs(seconds.max(1));
        clock.reset(interval, Some(interval)).map_err(std::io::Error::from)
    }

    /// Target, size, and what the guest last said about its memory.
    #[must_use]
    pub fn statistics(&self) -> Map<String, Value> {
        let mut all = Map::new();
        for (name, pages) in [("target", self.target), ("actual", self.actual)] {
            all.insert(format!("{name}_pages"), json!(pages));
            all.insert(format!("{name}_mib"), json!(u64::from(pages) / PAGES_PER_MIB));
        }
        all.extend(self.latest.named());
        all
    }

    fn serve(&mut self, index: usize, role: Role) -> Result<Turn, Broken> {
        let Some(active) = &mut self.active else { return Ok(Turn::default()) };
        let Active { memory, queues, .. } = active;
        let Some(queue) = queues.get_mut(index).filter(|queue| queue.ready()) else {
            return Ok(Turn::default());
        };
        let (memory, pages) = (&*memory, &self.pages);
        let give_back = |range| memory::give_back(memory, pages, range);
        match role {
            Role::Inflate => queue::inflate(queue, memory, &mut self.scratch, give_back, &mut self.metrics),
            Role::Deflate => queue::deflate(queue, memory, &mut self.scratch, &mut self.metrics),
            Role::Reporting => queue::report(queue, memory, give_back, &mut self.metrics),
            Role::Statistics => {
                queue::take_statistics(queue, memory, &mut self.held, &mut self.latest, &mut self.metrics)
            }
        }
    }

    fn ask(&mut self) -> Result<Turn, Broken> {
        let Some(active) = &mut self.active else { return Ok(Turn::default()) };
        let Some(queue) = active.queues.get_mut(2) else { return Ok(Turn::default()) };
        let interrupt = queue::ask(queue, &active.memory, &mut self.held)?;
        Ok(Turn { interrupt, more: false })
    }

    fn finish(&mut self, result: Result<Turn, Broken>) -> bool {
        let Some(active) = &self.active else { return false };
        active.interrupt.end_turn("balloon", result).unwrap_or_else(|| {
            self.reset();
            false
        })
    }
}

impl VirtioDevice for Balloon {
    fn kind(&self) -> u32 {
        KIND
    }

    fn name(&self) -> &str {
        "balloon"
    }

    fn features(&self) -> u64 {
        self.features | F_EVENT_IDX | F_INDIRECT_DESC
    }

    fn queue_sizes(&self) -> &[u16] {
        let count = match self.features & (F_STATISTICS | F_REPORTING) {
            0 => 2,
            F_STATISTICS => 3,
            _ => 5,
        };
        &QUEUES[..count]
    }

    /// virtio 1.2, 5.5.4: pages that the host wants, pages that the guest has given.
    fn config(&self) -> Vec<u8> {
        [self.target.to_le_bytes(), self.actual.to_le_bytes()].concat()
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        if let (ACTUAL, Ok(bytes)) = (offset, <[u8; 4]>::try_from(data)) {
            self.actual = u32::from_le_bytes(bytes);
        }
    }

    fn activate(&mut self, active: Active) -> Result<(), String> {
        self.active = Some(active);
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
        self.actual = 0;
        self.held = None;
        self.latest = Statistics::default();
        self.scratch = Vec::new();
    }

    fn queue_event(&mut self, index: usize) -> bool {
        let features = self.active.as_ref().map_or(0, |active| active.features);
        let Some(role) = Role::of(index, features) else { return false };
        let result = self.serve(index, role);
        self.finish(result)
    }

    fn timers(&self) -> Vec<(usize, RawFd)> {
        self.clock.as_ref().map(|clock| (STATISTICS, clock.as_raw_fd())).into_iter().collect()
    }

    fn timer_event(&mut self, _queue: usize) {
        if let Some(clock) = &mut self.clock {
            let _ = clock.wait();
        }
        let result = self.ask();
        self.finish(result);
    }

    fn active(&self) -> Option<&Active> {
        self.active.as_ref()
    }

    fn save(&self) -> Value {
        json!(SavedBalloon { target: self.target, actual: self.actual, held: self.held })
    }

    fn restore(&mut self, state: &Value) -> Result<(), String> {
        let saved = SavedBalloon::deserialize(state).map_err(|error| error.to_string())?;
        (self.target, self.actual, self.held) = (saved.target, saved.actual, saved.held);
        Ok(())
    }

    fn metrics(&self) -> Value {
        json!(self.metrics)
    }
}
