//! virtio-block: one disk, one queue.

pub mod backend;
pub mod config;
pub mod metrics;
pub mod queue;
pub mod ranges;

#[cfg(test)]
mod tests;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_WRITE_ZEROES,
};

use std::os::fd::RawFd;

use super::pace::Pace;
use super::{Active, F_EVENT_IDX, F_INDIRECT_DESC, VirtioDevice};
use crate::config::RateLimiter;
use crate::error::Error;
use backend::{Backend, Image};
use metrics::Metrics;

/// virtio device id of a disk.
pub const KIND: u32 = 2;
const QUEUE_SIZE: u16 = 256;
/// Sectors: holes are made of whole blocks of the host's file system.
const DISCARD_ALIGNMENT: u32 = 8;
/// Data segments per request: the queue less header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;

/// A disk.
pub struct Block {
    id: String,
    read_only: bool,
    backend: Box<dyn Backend>,
    pace: Pace,
    active: Option<Active>,
    metrics: Metrics,
}

impl Block {
    /// A disk of this image, within these limits.
    #[must_use]
    pub fn new(id: String, read_only: bool, backend: Box<dyn Backend>, pace: Pace) -> Self {
        Self { id, read_only, backend, pace, active: None, metrics: Metrics::default() }
    }

    /// Changes the limits, at once.
    pub fn change_limits(&mut self, change: RateLimiter) {
        self.pace.change(change);
    }

    /// Puts another image in the place of this one, or the same one as it is now, and tells the guest that the capacity may have
    /// changed. If this fails, the disk is as it was.
    ///
    /// # Errors
    /// [`Error::Disk`] if the image that is there cannot be flushed, or that of `open`.
    pub fn replace(
        &mut self,
        open: impl FnOnce() -> crate::error::Result<Image>,
    ) -> crate::error::Result<()> {
        let flushed = self.flush();
        flushed.map_err(|source| Error::Disk {
            id: self.id.clone(),
            what: "flushing its image".into(),
            source,
        })?;
        self.backend = Box::new(open()?);
        self.metrics.replaced += 1;
        if let Some(active) = &self.active {
            active.interrupt.config_changed();
        }
        Ok(())
    }
}

impl VirtioDevice for Block {
    fn kind(&self) -> u32 {
        KIND
    }

    fn name(&self) -> &str {
        &self.id
    }

    fn features(&self) -> u64 {
        let writing = if self.read_only {
            1 << VIRTIO_BLK_F_RO
        } else {
            1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        };
        writing
            | 1 << VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | F_EVENT_IDX
            | F_INDIRECT_DESC
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    /// virtio 1.2, 5.2.4.
    fn config(&self) -> Vec<u8> {
        let mut config = (self.backend.size() / queue::SECTOR).to_le_bytes().to_vec();
        config.extend(0_u32.to_le_bytes());
        config.extend(SEG_MAX.to_le_bytes());
        // Geometry (none), block size, topology (none), writeback, queues.
        config.extend([0; 4]);
        config.extend(512_u32.to_le_bytes());
        config.extend([0; 12]);
        let limits = [
            ranges::MAX_DISCARD_SECTORS,
            ranges::MAX_DISCARD_RANGES,
            DISCARD_ALIGNMENT,
            ranges::MAX_ZERO_SECTORS,
            ranges::MAX_ZERO_RANGES,
            // write_zeroes_may_unmap, and three bytes of padding.
            1,
        ];
        limits.iter().for_each(|limit| config.extend(limit.to_le_bytes()));
        config
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
        let mut disk = queue::Disk {
            backend: self.backend.as_mut(),
            read_only: self.read_only,
            write_through: active.features & 1 << VIRTIO_BLK_F_FLUSH == 0,
            pace: Some(&mut self.pace),
            id: &self.id,
        };
        match queue::process(queue, &active.memory, &mut disk, &mut self.metrics) {
            Ok(turn) => {
                if turn.interrupt {
                    active.interrupt.used();
                }
                turn.more
            }
            Err(broken) => {
                crate::log::line(&format!("disk {:?}: {broken}", self.id));
                active.interrupt.needs_reset();
                self.active = None;
                false
            }
        }
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

    fn flush(&mut self) -> std::io::Result<()> {
        if self.read_only { Ok(()) } else { self.backend.flush() }
    }

    fn active(&self) -> Option<&Active> {
        self.active.as_ref()
    }

    fn metrics(&self) -> serde_json::Value {
        serde_json::json!(self.metrics)
    }
}
