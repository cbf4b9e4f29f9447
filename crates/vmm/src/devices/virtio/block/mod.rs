//! virtio-block: one disk, with one or several queues.
//!
//! The device thread serves all queues of a disk, and they share its ring and thread, its limits, and the room for requests that are
//! under way. What several queues save is the guest's: its CPUs do not wait for each other to hand a request in.

pub mod backend;
pub mod clear;
pub mod config;
pub mod engine;
pub mod flying;
pub mod metrics;
mod qcow2;
pub mod queue;
pub mod ranges;
pub mod uring;
pub mod worker;

#[cfg(test)]
mod engine_tests;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Deserialize;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_queue::QueueT;
use vmm_sys_util::eventfd::EventFd;

use super::pace::Pace;
use super::queue::Broken;
use super::{Active, F_EVENT_IDX, F_INDIRECT_DESC, VirtioDevice};
use crate::config::{Drive, IoEngine, RateLimiter};
use crate::devices::limiter::SavedLimiter;
use crate::error::{Error, Result};
use crate::log::Limited;
use backend::Backend;
use config::Opened;
use engine::Engine;
use flying::InFlight;
use metrics::Metrics;
use queue::Host;
use uring::Ring;
use worker::Worker;

/// virtio device id of a disk.
pub const KIND: u32 = 2;
const QUEUE_SIZE: u16 = 256;
/// Queues that a disk can have.
pub const MAX_QUEUES: usize = 16;
const QUEUES: [u16; MAX_QUEUES] = [QUEUE_SIZE; MAX_QUEUES];
/// Sectors: holes are made of whole blocks of the host's file system.
const DISCARD_ALIGNMENT: u32 = 8;
/// Data segments per request: the queue less header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;

/// Rounds that one turn makes at most over queues that found no room.
const ROUNDS: usize = 4;

/// An image, for those who work on it.
pub type SharedImage = Arc<Mutex<Box<dyn Backend>>>;

/// Who works: see [`IoEngine`].
enum Worked {
    /// The device thread.
    Here,
    /// Somebody whose bell this is, once the device thread is about to be locked down.
    Soon(EventFd),
    /// A ring, and a parked thread for the images that a ring cannot read: one may come while the machine runs, when no thread can be
    /// started any more.
    Ring(Box<Ring>, Worker, EventFd),
    /// A thread.
    Thread(Worker, EventFd),
}

/// A disk.
pub struct Block {
    // First, so that nothing is under way any more when the rest goes.
    worked: Worked,
    flying: InFlight,
    id: String,
    read_only: bool,
    queues: u8,
    size: u64,
    image: SharedImage,
    /// The image's file, if it is a raw one.
    raw: Option<File>,
    pace: Pace,
    active: Option<Active>,
    metrics: Metrics,
}

impl Block {
    /// A disk as configured, of this image, within these limits.
    ///
    /// # Errors
    /// The host gives no eventfd.
    pub fn new(drive: &Drive, opened: Opened, pace: Pace) -> std::io::Result<Self> {
        let worked = match drive.io_engine {
            IoEngine::Sync => Worked::Here,
            IoEngine::Async => Worked::Soon(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?),
        };
        let Opened { image, raw } = opened;
        Ok(Self {
            worked,
            flying: InFlight::default(),
            id: drive.drive_id.clone(),
            read_only: drive.is_read_only,
            queues: drive.num_queues,
            size: image.size(),
            image: Arc::new(Mutex::new(image)),
            raw,
            pace,
            active: None,
            metrics: Metrics::default(),
        })
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
    pub fn replace(&mut self, open: impl FnOnce() -> Result<Opened>) -> Result<()> {
        let failed = |what: &str| {
            let (id, what) = (self.id.clone(), what.to_owned());
            move |source| Error::Disk { id, what, source }
        };
        let (flushing, registering) = (failed("flushing its image"), failed("giving the ring its image"));
        self.flush().map_err(flushing)?;
        let Opened { image, raw } = open()?;
        if let (Worked::Ring(ring, ..), Some(file)) = (&mut self.worked, &raw) {
            ring.set_file(file).map_err(registering)?;
        }
        self.size = image.size();
        *lock(&self.image) = image;
        self.raw = raw;
        self.metrics.replaced += 1;
        if let Some(active) = &self.active {
            active.interrupt.config_changed(&self.config());
        }
        Ok(())
    }

    /// The engine, if it has the work.
    fn engine<'a>(worked: &'a mut Worked, raw: Option<&File>) -> Option<&'a mut (dyn Engine + 'static)> {
        match worked {
            Worked::Ring(ring, ..) if raw.is_some() => Some(ring.as_mut()),
            Worked::Ring(_, worker, _) | Worked::Thread(worker, _) => Some(worker),
            Worked::Here | Worked::Soon(_) => None,
        }
    }

    /// Looks at these queues, one bit each, and at what is finished. Returns the queues that must be looked at again; those that found
    /// no room are noted, and what is under way wakes them.
    fn turn(&mut self, mut queues: u64) -> u64 {
        let mut again = 0;
        for _ in 0..ROUNDS {
            again |= self.round(queues);
            queues = self.flying.take_stalled();
            if queues == 0 || !self.flying.is_empty() {
                break;
            }
        }
        if self.flying.is_empty() {
            return again | queues;
        }
        self.flying.stall(queues);
        again
    }

    fn round(&mut self, queues: u64) -> u64 {
        self.try_round(queues).unwrap_or_else(|broken| {
            static LOG: Limited = Limited::new();
            LOG.line(|| format!("disk {:?}: {broken}", self.id));
            if let Some(active) = self.active.take() {
                active.interrupt.needs_reset();
            }
            0
        })
    }

    fn try_round(&mut self, queues: u64) -> std::result::Result<u64, Broken> {
        let mut engine = Self::engine(&mut self.worked, self.raw.as_ref());
        let Some(active) = &mut self.active else {
            // The guest broke a queue, or has reset the disk: nobody wants the answers.
            while let Some((token, _)) = engine.as_mut().and_then(|engine| engine.finished()) {
                self.flying.take(token);
            }
            return Ok(0);
        };
        let mut again = 0;
        // What is finished makes room for more.
        let mut interrupt =
            Self::complete(active, engine.as_deref_mut(), &mut self.flying, &self.id, &mut self.metrics)?;
        let mut image = None;
        for (index, queue) in active.queues.iter_mut().enumerate() {
            if queues >> index & 1 == 0 || !queue.ready() {
                continue;
            }
            let host = match &mut engine {
                Some(engine) => Host::Beside(*engine, &mut self.flying, index),
                None => Host::Here(image.get_or_insert_with(|| lock(&self.image)).as_mut()),
            };
            let mut disk = queue::Disk {
                host,
                size: self.size,
                read_only: self.read_only,
                write_through: active.features & 1 << VIRTIO_BLK_F_FLUSH == 0,
                pace: Some(&mut self.pace),
                id: &self.id,
            };
            let turn = queue::process(queue, &active.memory, &mut disk, &mut self.metrics)?;
            again |= u64::from(turn.more) << index;
            interrupt |= turn.interrupt;
        }
        if let Some(engine) = &mut engine {
            engine.start();
        }
        interrupt |= Self::complete(active, engine, &mut self.flying, &self.id, &mut self.metrics)?;
        if interrupt {
            active.interrupt.used();
        }
        Ok(again)
    }

    fn complete(
        active: &mut Active,
        engine: Option<&mut (dyn Engine + 'static)>,
        flying: &mut InFlight,
        id: &str,
        metrics: &mut Metrics,
    ) -> std::result::Result<bool, Broken> {
        let Some(engine) = engine else { return Ok(false) };
        queue::complete(&mut active.queues, &active.memory, (engine, flying), id, metrics)
    }

    /// Shows who works the guest's memory.
    fn attach(&mut self) {
        let Some(active) = &self.active else { return };
        match &mut self.worked {
            Worked::Ring(ring, worker, _) => {
                ring.attach(&active.memory);
                worker.attach(&active.memory);
            }
            Worked::Thread(worker, _) => worker.attach(&active.memory),
            Worked::Here | Worked::Soon(_) => {}
        }
    }

    fn bell(&self) -> Option<&EventFd> {
        match &self.worked {
            Worked::Here => None,
            Worked::Soon(bell) | Worked::Ring(.., bell) | Worked::Thread(_, bell) => Some(bell),
        }
    }

    /// Lets queues be looked at again as soon as other devices had their turn.
    fn later(&mut self, queues: u64) {
        if queues == 0 {
            return;
        }
        self.flying.stall(queues);
        match self.bell() {
            Some(bell) => drop(bell.write(1)),
            None => self.pace.soon(),
        }
    }

    fn all_queues(&self) -> u64 {
        (1 << self.queue_sizes().len()) - 1
    }
}

fn lock(image: &SharedImage) -> MutexGuard<'_, Box<dyn Backend>> {
    image.lock().unwrap_or_else(PoisonError::into_inner)
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
        let several = if self.queues > 1 { 1 << VIRTIO_BLK_F_MQ } else { 0 };
        writing
            | several
            | 1 << VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | F_EVENT_IDX
            | F_INDIRECT_DESC
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUES[..usize::from(self.queues).min(MAX_QUEUES)]
    }

    /// virtio 1.2, 5.2.4.
    fn config(&self) -> Vec<u8> {
        let mut config = (self.size / queue::SECTOR).to_le_bytes().to_vec();
        config.extend(0_u32.to_le_bytes());
        config.extend(SEG_MAX.to_le_bytes());
        // Geometry (none), block size, topology (none), writeback, queues.
        config.extend([0; 4]);
        config.extend(512_u32.to_le_bytes());
        config.extend([0; 10]);
        config.extend(u16::from(self.queues).to_le_bytes());
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

    /// A ring for a raw image, and a thread for others.
    fn prepare(&mut self) -> std::io::Result<()> {
        let Worked::Soon(bell) = &self.worked else { return Ok(()) };
        let (bell, theirs) = (bell.try_clone()?, bell.try_clone()?);
        let ring = self.raw.as_ref().and_then(|file| {
            Ring::new(file)
                .inspect_err(|error| {
                    let id = &self.id;
                    crate::log::line(&format!(
                        "disk {id:?}: no io_uring ({error}), so its thread does all the work"
                    ));
                })
                .ok()
        });
        let worker = Worker::new(Arc::clone(&self.image), theirs)?;
        self.worked = match ring {
            Some(ring) => Worked::Ring(Box::new(ring), worker, bell),
            None => Worked::Thread(worker, bell),
        };
        // A machine from a snapshot is at work already.
        self.attach();
        Ok(())
    }

    fn activate(&mut self, active: Active) -> std::result::Result<(), String> {
        self.active = Some(active);
        self.attach();
        Ok(())
    }

    /// What is under way is waited for: the guest may use its memory for other things then (virtio 1.2, 2.4).
    fn reset(&mut self) {
        self.active = None;
        self.quiesce();
        self.flying.take_stalled();
    }

    fn queue_event(&mut self, index: usize) -> bool {
        if index >= self.queue_sizes().len() {
            return false;
        }
        let stalled = self.flying.take_stalled();
        let again = self.turn(1 << index | stalled);
        self.later(again & !(1 << index));
        again >> index & 1 == 1
    }

    fn backend_fds(&self) -> Vec<RawFd> {
        let ring = match &self.worked {
            Worked::Ring(ring, ..) => ring.descriptor(),
            _ => None,
        };
        self.bell().map(AsRawFd::as_raw_fd).into_iter().chain(ring).collect()
    }

    fn backend_event(&mut self) -> bool {
        let stalled = self.flying.take_stalled();
        let again = self.turn(stalled);
        self.flying.stall(again);
        again != 0
    }

    fn timers(&self) -> Vec<(usize, RawFd)> {
        vec![(0, self.pace.alarm())]
    }

    /// The limits are the disk's, so any queue may have waited.
    fn timer_event(&mut self, _queue: usize) {
        self.pace.silence();
        let again = self.turn(self.all_queues());
        self.later(again);
    }

    fn quiesce(&mut self) {
        if let Some(engine) = Self::engine(&mut self.worked, self.raw.as_ref()) {
            engine.wait_all();
        }
        self.round(0);
        let stalled = self.flying.take_stalled();
        self.later(stalled);
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.quiesce();
        if self.read_only { Ok(()) } else { lock(&self.image).flush() }
    }

    fn active(&self) -> Option<&Active> {
        self.active.as_ref()
    }

    fn save(&self) -> serde_json::Value {
        serde_json::json!(self.pace.save())
    }

    fn restore(&mut self, state: &serde_json::Value) -> std::result::Result<(), String> {
        self.pace.restore(&SavedLimiter::deserialize(state).map_err(|error| error.to_string())?);
        Ok(())
    }

    fn metrics(&self) -> serde_json::Value {
        serde_json::json!(self.metrics)
    }
}
