//! virtio-mem: memory that comes and goes while the machine runs (virtio 1.2, 5.15).
//!
//! A region above all RAM, of equal blocks, is there from the start, as memory of the host's that nobody has touched. The host
//! says how much of it the guest should have; the guest's driver asks for blocks, or gives some, until that is so. A block that
//! is given goes back to the host at once.
//!
//! Nobody keeps a guest from blocks that it does not have: it finds zeroes there, and may use them. What limits it is the limit on
//! its monitor's memory (`memory.max`), which must follow what the host wants. In exchange the region is one slot of KVM's, made
//! before the interrupt controllers, and an address that the guest hands to a device is never one that cannot be accessed.

pub mod blocks;
pub mod config;
pub mod metrics;
pub mod queue;

#[cfg(test)]
mod tests;

use serde::Deserialize;
use serde_json::{Value, json};
use virtio_queue::QueueT;

use super::queue::{Broken, Turn};
use super::{Active, F_EVENT_IDX, F_INDIRECT_DESC, VirtioDevice};
use crate::memory::{self, FilePages, Range};
use blocks::{Blocks, MemState};
use config::{MemoryHotplugConfig, MemoryHotplugStatus};
use metrics::Metrics;

/// virtio device id of a memory device.
pub const KIND: u32 = 24;
const QUEUES: [u16; 1] = [128];

/// The device.
pub struct Mem {
    config: MemoryHotplugConfig,
    blocks: Blocks,
    pages: FilePages,
    active: Option<Active>,
    metrics: Metrics,
}

impl Mem {
    /// A device as configured, whose region is at that range of guest memory. `pages` says which pages of the guest are a file's.
    #[must_use]
    pub fn new(config: MemoryHotplugConfig, region: Range, pages: FilePages) -> Self {
        let blocks = Blocks::new(region, config.block_size_mib << 20);
        Self { config, blocks, pages, active: None, metrics: Metrics::default() }
    }

    /// Says how much the guest should have; a driver that is there hears of it.
    pub fn request(&mut self, mib: u64) {
        self.blocks.request(mib.saturating_mul(1 << 20));
        if let Some(active) = &self.active {
            active.interrupt.config_changed(&self.config());
        }
    }

    /// What the guest has and should have.
    #[must_use]
    pub const fn status(&self) -> MemoryHotplugStatus {
        MemoryHotplugStatus {
            config: self.config,
            plugged_size_mib: self.blocks.plugged() >> 20,
            requested_size_mib: self.blocks.requested() >> 20,
        }
    }

    /// As after power-on (which a device's reset is not, virtio 1.2, 5.15.5.2): the guest has nothing, and should have what the
    /// host last said. Whoever calls clears the memory.
    pub fn power_on(&mut self) {
        self.blocks.unplug_all();
    }

    fn serve(&mut self) -> Result<Turn, Broken> {
        let Some(active) = &mut self.active else { return Ok(Turn::default()) };
        let Active { memory, queues, .. } = active;
        let Some(queue) = queues.first_mut().filter(|queue| queue.ready()) else {
            return Ok(Turn::default());
        };
        let (memory, pages) = (&*memory, &self.pages);
        let give_back = |range| memory::give_back(memory, pages, range);
        queue::serve(queue, memory, &mut self.blocks, give_back, &mut self.metrics)
    }
}

impl VirtioDevice for Mem {
    fn kind(&self) -> u32 {
        KIND
    }

    fn name(&self) -> &str {
        "mem"
    }

    fn features(&self) -> u64 {
        F_EVENT_IDX | F_INDIRECT_DESC
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUES
    }

    /// virtio 1.2, 5.15.4: block size, node (none), address, size, usable size (all of it), plugged, requested.
    fn config(&self) -> Vec<u8> {
        let Range { start, size } = self.blocks.region();
        let words =
            [self.blocks.block_size(), 0, start, size, size, self.blocks.plugged(), self.blocks.requested()];
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    fn activate(&mut self, active: Active) -> Result<(), String> {
        self.active = Some(active);
        Ok(())
    }

    /// The guest keeps its blocks (virtio 1.2, 5.15.5.2).
    fn reset(&mut self) {
        self.active = None;
    }

    fn queue_event(&mut self, _index: usize) -> bool {
        let result = self.serve();
        let Some(active) = &self.active else { return false };
        // Before the answer: the driver may look how much it has.
        active.interrupt.show_config(&self.config());
        active.interrupt.end_turn("mem", result).unwrap_or_else(|| {
            self.reset();
            false
        })
    }

    fn active(&self) -> Option<&Active> {
        self.active.as_ref()
    }

    fn save(&self) -> Value {
        json!(self.blocks.state())
    }

    fn restore(&mut self, state: &Value) -> Result<(), String> {
        let state = MemState::deserialize(state).map_err(|error| error.to_string())?;
        if self.blocks.restore(state) { Ok(()) } else { Err("it has other blocks".to_owned()) }
    }

    fn metrics(&self) -> Value {
        json!(self.metrics)
    }
}
