//! virtio-entropy: random bytes of the host (virtio 1.2, 5.4).

pub mod config;
pub mod queue;

use std::os::fd::RawFd;

use serde::Deserialize;

use super::pace::Pace;
use super::{Active, F_EVENT_IDX, F_INDIRECT_DESC, VirtioDevice};
use crate::devices::limiter::SavedLimiter;
use queue::Metrics;

/// virtio device id of an entropy source.
pub const KIND: u32 = 4;
const QUEUE_SIZE: u16 = 64;

/// The entropy device.
pub struct Entropy {
    pace: Pace,
    active: Option<Active>,
    metrics: Metrics,
}

impl Entropy {
    /// The device, within these limits.
    #[must_use]
    pub fn new(pace: Pace) -> Self {
        Self { pace, active: None, metrics: Metrics::default() }
    }
}

impl VirtioDevice for Entropy {
    fn kind(&self) -> u32 {
        KIND
    }

    fn name(&self) -> &str {
        "entropy"
    }

    fn features(&self) -> u64 {
        F_EVENT_IDX | F_INDIRECT_DESC
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn activate(&mut self, active: Active) -> Result<(), String> {
        self.active = Some(active);
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
    }

    fn queue_event(&mut self, index: usize) -> bool {
        let Some(active) = &mut self.active else { return false };
        let Some(queue) = active.queues.get_mut(index) else { return false };
        let turn =
            queue::process(queue, &active.memory, host_random, Some(&mut self.pace), &mut self.metrics);
        active.interrupt.end_turn("entropy", turn).unwrap_or_else(|| {
            self.active = None;
            false
        })
    }

    fn timers(&self) -> Vec<(usize, RawFd)> {
        vec![(0, self.pace.alarm())]
    }

    fn timer_event(&mut self, queue: usize) {
        self.pace.silence();
        if self.queue_event(queue) {
            self.pace.soon();
        }
    }

    fn active(&self) -> Option<&Active> {
        self.active.as_ref()
    }

    fn save(&self) -> serde_json::Value {
        serde_json::json!(self.pace.save())
    }

    fn restore(&mut self, state: &serde_json::Value) -> Result<(), String> {
        self.pace.restore(&SavedLimiter::deserialize(state).map_err(|error| error.to_string())?);
        Ok(())
    }

    fn metrics(&self) -> serde_json::Value {
        serde_json::json!(self.metrics)
    }
}

/// Fills a buffer with the host's random bytes; says how many there were.
pub fn host_random(buffer: &mut [u8]) -> usize {
    // SAFETY: the buffer is valid for its length.
    let count = unsafe { libc::getrandom(buffer.as_mut_ptr().cast(), buffer.len(), 0) };
    usize::try_from(count).unwrap_or(0)
}
