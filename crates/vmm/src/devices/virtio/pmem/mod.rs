//! virtio-pmem: a file of the host's in the guest's memory (virtio 1.2, 5.19).
//!
//! The guest reads and writes it by itself. What is left for the device is to say where it is, and to put what was written on stable
//! storage when the guest asks: beside the device thread, as a disk's work is done, so that no other device waits. One call of the
//! host's at a time serves all flushes that came before it began.
//!
//! The region is not RAM: a snapshot's memory file does not have it, no dirty log notes it, a balloon gives none of it. Devices reach
//! it all the same ([`image::reach`]), as Linux sends them to pages of a file system that it uses in place (DAX).

pub mod config;
pub mod image;
pub mod metrics;
pub mod queue;

#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use virtio_queue::QueueT;
use vmm_sys_util::eventfd::EventFd;

use super::block::SharedImage;
use super::block::backend::Backend;
use super::block::engine::{Engine, Work};
use super::block::uring::Ring;
use super::block::worker::Worker;
use super::pace::Pace;
use super::queue::{Broken, Turn};
use super::{Active, F_EVENT_IDX, F_INDIRECT_DESC, VirtioDevice};
use crate::bus::{BusDevice, Outcome};
use crate::config::RateLimiter;
use crate::devices::limiter::SavedLimiter;
use crate::memory::{self, Slice};
use config::PmemConfig;
use image::Image;
use metrics::Metrics;
use queue::Flushes;

/// virtio device id of persistent memory.
pub const KIND: u32 = 27;
const QUEUES: [u16; 1] = [64];

/// The device.
pub struct Pmem {
    // First, so that nothing is under way any more when the rest goes.
    engine: Option<Box<dyn Engine>>,
    bell: EventFd,
    flushes: Flushes,
    id: String,
    image: Arc<Image>,
    pace: Pace,
    active: Option<Active>,
    metrics: Metrics,
    discarded: Arc<Discarded>,
}

/// What a snapshot holds.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct PmemState {
    start: u64,
    size: u64,
    limiter: SavedLimiter,
}

impl Pmem {
    /// A device as configured, of this file, within these limits.
    ///
    /// # Errors
    /// The host gives no eventfd.
    pub fn new(config: &PmemConfig, image: Arc<Image>, pace: Pace) -> io::Result<Self> {
        Ok(Self {
            engine: None,
            bell: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            flushes: Flushes::default(),
            id: config.id.clone(),
            discarded: Arc::new(Discarded { id: config.id.clone(), count: AtomicU64::new(0) }),
            image,
            pace,
            active: None,
            metrics: Metrics::default(),
        })
    }

    /// Changes the limits, at once.
    pub fn change_limits(&mut self, change: RateLimiter) {
        self.pace.change(change);
    }

    /// Who hears of writes to a read-only region, with where that is. `None`: the guest may write.
    #[must_use]
    pub fn discards(&self) -> Option<(memory::Range, Arc<dyn BusDevice>)> {
        let discarded = Arc::clone(&self.discarded);
        self.image.read_only().then(|| (self.image.range(), discarded as _))
    }

    /// As after power-on.
    ///
    /// # Errors
    /// The host's error.
    pub fn power_on(&self) -> io::Result<()> {
        self.image.power_on()
    }

    /// Answers what is finished, takes what is in the queue, and lets the host begin. Says whether there is more to take.
    fn turn(&mut self) -> bool {
        let result = self.try_turn();
        let Some(active) = &self.active else { return false };
        active.interrupt.end_turn(&self.id, result).unwrap_or_else(|| {
            self.reset();
            false
        })
    }

    fn try_turn(&mut self) -> Result<Turn, Broken> {
        let interrupt = self.complete()?;
        let Some(active) = &mut self.active else { return Ok(Turn::default()) };
        let Active { memory, queues, .. } = active;
        let Some(queue) = queues.first_mut().filter(|queue| queue.ready()) else {
            return Ok(Turn::default());
        };
        // Of a read-only file there is nothing that could be lost.
        if self.image.read_only() {
            return queue::serve_read_only(queue, memory, &mut self.metrics);
        }
        let mut turn = self.flushes.take(queue, memory, &mut self.metrics)?;
        turn.interrupt |= interrupt;
        // What is finished at once must be looked at here.
        while self.begin(true) {
            turn.interrupt |= self.complete()?;
        }
        Ok(turn)
    }

    /// Lets the host begin with what waits, if it is not at work. Says whether it did.
    fn begin(&mut self, limited: bool) -> bool {
        let Some(engine) = self.engine.as_mut().filter(|_| self.flushes.may_begin()) else { return false };
        if limited && !self.pace.may_pass() {
            self.metrics.limited += 1;
            return false;
        }
        self.pace.charge(self.image.range().size);
        self.metrics.syncs += 1;
        self.flushes.begin();
        engine.submit(0, Work::Flush);
        engine.start();
        true
    }

    /// Answers what is finished; says whether the guest wants an interrupt.
    fn complete(&mut self) -> Result<bool, Broken> {
        let mut interrupt = false;
        while let Some((_, result)) = self.engine.as_mut().and_then(|engine| engine.finished()) {
            static LOG: crate::log::Limited = crate::log::Limited::new();
            if let Err(error) = &result {
                self.metrics.failed += 1;
                LOG.line(|| {
                    format!("pmem {:?}: its file could not be put on stable storage: {error}", self.id)
                });
            }
            let Some(active) = &mut self.active else { continue };
            let Some(queue) = active.queues.first_mut() else { continue };
            interrupt |= self.flushes.finish(queue, &active.memory, result.is_ok(), &mut self.metrics)?;
        }
        Ok(interrupt)
    }

    fn wait(&mut self) {
        if let Some(engine) = &mut self.engine {
            engine.wait_all();
        }
    }
}

impl VirtioDevice for Pmem {
    fn kind(&self) -> u32 {
        KIND
    }

    fn name(&self) -> &str {
        &self.id
    }

    fn features(&self) -> u64 {
        F_EVENT_IDX | F_INDIRECT_DESC
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUES
    }

    /// virtio 1.2, 5.19.4.
    fn config(&self) -> Vec<u8> {
        let memory::Range { start, size } = self.image.range();
        [start, size].iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    /// As for a raw disk: a ring, or a thread where the host has none. A read-only file needs neither.
    fn prepare(&mut self) -> io::Result<()> {
        if self.image.read_only() {
            return Ok(());
        }
        self.engine = Some(match Ring::new(self.image.file()) {
            Ok(ring) => Box::new(ring),
            Err(error) => {
                let id = &self.id;
                crate::log::line(&format!("pmem {id:?}: no io_uring ({error}), so it has a thread instead"));
                let file: SharedImage = Arc::new(Mutex::new(Box::new(Stable(Arc::clone(&self.image)))));
                Box::new(Worker::new(file, self.bell.try_clone()?)?)
            }
        });
        Ok(())
    }

    fn activate(&mut self, active: Active) -> Result<(), String> {
        self.active = Some(active);
        Ok(())
    }

    /// What is under way is waited for, so that the next driver gets none of its answers.
    fn reset(&mut self) {
        self.active = None;
        self.wait();
        let _ = self.complete();
        self.flushes.forget();
    }

    fn queue_event(&mut self, _index: usize) -> bool {
        self.turn()
    }

    fn backend_fds(&self) -> Vec<RawFd> {
        let engine = self.engine.as_ref().and_then(|engine| engine.descriptor());
        [Some(self.bell.as_raw_fd()), engine].into_iter().flatten().collect()
    }

    fn backend_event(&mut self) -> bool {
        self.turn()
    }

    fn timers(&self) -> Vec<(usize, RawFd)> {
        vec![(0, self.pace.alarm())]
    }

    fn timer_event(&mut self, _queue: usize) {
        self.pace.silence();
        if self.turn() {
            self.pace.soon();
        }
    }

    /// What was taken is answered, whatever the limits: a snapshot has nothing of it.
    fn quiesce(&mut self) {
        loop {
            self.wait();
            let answered = self.complete().map(|interrupt| Turn { interrupt, more: false });
            let Some(active) = &self.active else { break };
            if active.interrupt.end_turn(&self.id, answered).is_none() {
                self.reset();
            }
            if self.flushes.is_empty() || self.engine.is_none() {
                break;
            }
            self.begin(false);
        }
        // What found no room has some now.
        let _ = self.bell.write(1);
    }

    fn flush(&mut self) -> io::Result<()> {
        self.quiesce();
        self.image.sync()
    }

    fn active(&self) -> Option<&Active> {
        self.active.as_ref()
    }

    fn save(&self) -> Value {
        let memory::Range { start, size } = self.image.range();
        json!(PmemState { start, size, limiter: self.pace.save() })
    }

    fn restore(&mut self, state: &Value) -> Result<(), String> {
        let state = PmemState::deserialize(state).map_err(|error| error.to_string())?;
        let memory::Range { start, size } = self.image.range();
        if (state.start, state.size) == (start, size) {
            self.pace.restore(&state.limiter);
            return Ok(());
        }
        Err(format!(
            "the guest knows {} bytes at {:#x}; the file that is there now would be {size} bytes at {start:#x}",
            state.size, state.start
        ))
    }

    fn metrics(&self) -> Value {
        json!(Metrics { discarded_writes: self.discarded.count.load(Ordering::Relaxed), ..self.metrics })
    }
}

/// The file, for those who do a disk's work: of that there is only the flush.
struct Stable(Arc<Image>);

impl Backend for Stable {
    fn size(&self) -> u64 {
        self.0.range().size
    }

    fn read(&self, _: u64, _: &[Slice<'_>]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn write(&self, _: u64, _: &[Slice<'_>]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn discard(&mut self, _: u64, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn write_zeroes(&mut self, _: u64, _: u64, _: bool) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn flush(&self) -> io::Result<()> {
        self.0.sync()
    }
}

/// What answers where a read-only region is: KVM reads it for the guest, and brings the writes here.
struct Discarded {
    id: String,
    count: AtomicU64,
}

impl BusDevice for Discarded {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&self, offset: u64, data: &[u8]) -> Outcome {
        static LOG: crate::log::Limited = crate::log::Limited::new();
        self.count.fetch_add(1, Ordering::Relaxed);
        let (id, length) = (&self.id, data.len());
        LOG.line(|| format!("pmem {id:?}: the guest's write of {length} bytes at {offset:#x} is discarded: it is read-only"));
        Outcome::Done
    }
}
