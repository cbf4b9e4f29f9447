//! virtio devices behind virtio-mmio (virtio 1.2, modern only).
//!
//! A device is a folder: `queue.rs` (pure: memory + queue in, completions out), `mod.rs` (the device: configuration
//! space, activation, event glue), `metrics.rs`, and for the disk its backend. [`mmio`] is the transport that all share.
//!
//! Who runs what: vCPU threads read and write the transport's registers; activation and reset happen there too. The
//! device thread runs [`VirtioDevice::queue_event`] and [`VirtioDevice::backend_event`]. A device's own lock is what
//! orders the two; the interrupt status is outside of it, so that a guest acknowledges interrupts while I/O runs.

pub mod balloon;
pub mod block;
pub mod entropy;
pub mod mem;
pub mod mmio;
pub mod net;
pub mod pace;
pub mod pieces;
pub mod pmem;
pub mod queue;
#[cfg(test)]
mod testing;
pub mod vsock;

use std::os::fd::RawFd;
use std::sync::Arc;

use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use crate::log::Limited;
use crate::memory::Memory;
use mmio::page::Page;
use mmio::{GENERATION, INTERRUPT_STATUS, NEEDS_RESET, STATUS};

/// `VIRTIO_F_VERSION_1`.
pub const F_VERSION_1: u64 = 1 << 32;
/// `VIRTIO_F_RING_EVENT_IDX`.
pub const F_EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_F_RING_INDIRECT_DESC`.
pub const F_INDIRECT_DESC: u64 = 1 << 28;

/// Interrupt status bit: a used buffer.
const STATUS_USED: u32 = 1;
/// Interrupt status bit: the configuration changed.
const STATUS_CONFIG: u32 = 2;

/// A device's interrupt, and what the guest reads about it.
#[derive(Debug)]
pub struct Interrupt {
    line: EventFd,
    page: Page,
}

impl Interrupt {
    /// `line` is an irqfd, `page` what the guest reads of the device's window.
    #[must_use]
    pub const fn new(line: EventFd, page: Page) -> Self {
        Self { line, page }
    }

    /// What the guest reads of the window.
    #[must_use]
    pub const fn page(&self) -> &Page {
        &self.page
    }

    /// Tells the guest that there are used buffers. Of that the status register says nothing new: see [`Interrupt::start`].
    pub fn used(&self) {
        self.ring();
    }

    /// Tells the guest that the device is broken until it resets it (virtio 1.2, 2.1.2: `DEVICE_NEEDS_RESET`).
    pub fn needs_reset(&self) {
        self.page.change(STATUS, NEEDS_RESET, 0);
        self.raise(STATUS_CONFIG);
    }

    /// Ends a turn of the device of this name: the guest is interrupted if it wants to be, or hears that it broke the device. Says
    /// whether there is more to do; nothing: the device is to forget the guest's settings.
    pub fn end_turn(&self, name: &str, turn: Result<queue::Turn, queue::Broken>) -> Option<bool> {
        match turn {
            Ok(turn) => {
                if turn.interrupt {
                    self.used();
                }
                Some(turn.more)
            }
            Err(broken) => {
                static LOG: Limited = Limited::new();
                LOG.line(|| format!("{name}: {broken}"));
                self.needs_reset();
                None
            }
        }
    }

    /// Tells the guest that the configuration space has changed; whoever was reading it finds another generation.
    pub fn config_changed(&self, config: &[u8]) {
        self.show_config(config);
        self.page.set(GENERATION, self.page.get(GENERATION).wrapping_add(1));
        self.raise(STATUS_CONFIG);
    }

    /// Shows the configuration space as it is now, of which the guest need not be told.
    pub fn show_config(&self, config: &[u8]) {
        self.page.set_config(config);
    }

    /// Whether the guest may have used buffers or a change to look at.
    #[must_use]
    pub fn may_be_due(&self) -> bool {
        self.page.get(INTERRUPT_STATUS) != 0
    }

    /// The eventfd, for whoever raises it in the device's place.
    #[must_use]
    pub const fn line(&self) -> &EventFd {
        &self.line
    }

    /// A driver is at work. From here to the reset the status register has the bit for used buffers, whether or not there are some: an
    /// interrupt may always come without (virtio 1.2, 2.7.7: suppressing them is a hint), so drivers look into their queues. So the
    /// guest's acknowledgement of that bit changes nothing, and KVM takes it without waking anybody ([`mmio::ACKNOWLEDGE`]); the host's
    /// kernel can raise the line in the device's place; and no interrupt can be lost between the bit and the line.
    fn start(&self) {
        self.page.change(INTERRUPT_STATUS, STATUS_USED, 0);
    }

    fn raise(&self, bit: u32) {
        self.page.change(INTERRUPT_STATUS, bit, 0);
        self.ring();
    }

    fn ring(&self) {
        // An eventfd write fails only when its counter is full, and then the interrupt is pending anyway.
        let _ = self.line.write(1);
    }

    fn acknowledge(&self, bits: u32) {
        self.page.change(INTERRUPT_STATUS, 0, bits & STATUS_CONFIG);
    }

    /// Shows the device's status. That it is broken stays until it is reset.
    fn show_status(&self, status: u32) {
        self.page.change(STATUS, status, !NEEDS_RESET);
    }

    fn reset(&self) {
        self.page.set(STATUS, 0);
        self.page.set(INTERRUPT_STATUS, 0);
    }

    fn save(&self) -> SavedInterrupt {
        SavedInterrupt {
            status: self.page.get(INTERRUPT_STATUS),
            needs_reset: self.page.get(STATUS) & NEEDS_RESET != 0,
            generation: self.page.get(GENERATION),
        }
    }

    /// What the guest has not acknowledged is raised once more ([`Transport::remind`](mmio::Transport::remind)): the first time may have
    /// been under way.
    fn restore(&self, saved: &SavedInterrupt) {
        self.page.set(STATUS, if saved.needs_reset { NEEDS_RESET } else { 0 });
        self.page.set(GENERATION, saved.generation);
        self.page.set(INTERRUPT_STATUS, saved.status);
    }
}

/// What a snapshot holds of an interrupt.
#[derive(Clone, Copy, Debug, serde::Serialize, serde::Deserialize)]
pub struct SavedInterrupt {
    status: u32,
    needs_reset: bool,
    generation: u32,
}

/// What a device gets when the driver says that it is ready.
#[derive(Debug)]
pub struct Active {
    /// Guest memory.
    pub memory: Memory,
    /// The queues, each ready and inside memory, or not ready at all.
    pub queues: Vec<Queue>,
    /// Features that both sides have.
    pub features: u64,
    /// How to interrupt the guest.
    pub interrupt: Arc<Interrupt>,
}

/// What the transport and the device thread need of every device.
pub trait VirtioDevice: Send {
    /// Device id (virtio 1.2, 5).
    fn kind(&self) -> u32;
    /// Name for messages and metrics.
    fn name(&self) -> &str;
    /// Features that the device offers.
    fn features(&self) -> u64;
    /// Largest size of each queue.
    fn queue_sizes(&self) -> &[u16];
    /// Configuration space.
    fn config(&self) -> Vec<u8>;
    /// Called once on the device thread, before that is locked down and before there is a guest.
    ///
    /// # Errors
    /// The host's error.
    fn prepare(&mut self) -> std::io::Result<()> {
        Ok(())
    }
    /// Called once before there is a guest, for devices whose queues the host's kernel serves: where memory is, the queues' bells, and
    /// what interrupts the guest.
    ///
    /// # Errors
    /// The host's error.
    fn connect(
        &mut self,
        _memory: &Memory,
        _bells: &[EventFd],
        _interrupt: &Interrupt,
    ) -> std::io::Result<()> {
        Ok(())
    }
    /// Whether the host's kernel waits for a queue's bell, so that the device thread does not.
    fn kernel_hears(&self, _queue: usize) -> bool {
        false
    }
    /// The guest writes to the configuration space. Most devices have nothing there to write.
    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}
    /// Starts the device.
    ///
    /// # Errors
    /// A sentence; the guest sees `DEVICE_NEEDS_RESET`.
    fn activate(&mut self, active: Active) -> Result<(), String>;
    /// Stops the device and forgets the guest's settings.
    fn reset(&mut self);
    /// The guest rang a queue's bell. Returns true if there is more to do that must wait its turn.
    fn queue_event(&mut self, queue: usize) -> bool;
    /// Descriptors that wake [`VirtioDevice::backend_event`] when one of them becomes readable (edge-triggered).
    fn backend_fds(&self) -> Vec<RawFd> {
        Vec::new()
    }
    /// The backend became readable. Returns true if there is more to do that must wait its turn.
    fn backend_event(&mut self) -> bool {
        false
    }
    /// Timers that wake [`VirtioDevice::timer_event`] when a queue that must wait may go on, each with its queue.
    fn timers(&self) -> Vec<(usize, RawFd)> {
        Vec::new()
    }
    /// A queue's timer rang.
    fn timer_event(&mut self, _queue: usize) {}
    /// Waits until no request is half done; what is finished is in guest memory. Requests that wait in a queue stay there.
    fn quiesce(&mut self) {}
    /// Puts everything on stable storage (a snapshot is taken, or the machine is about to end); no request is half done then.
    ///
    /// # Errors
    /// Why that failed.
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
    /// Holds what works without the device's lock, and learns where its queues are, for a snapshot; until [`VirtioDevice::go_on`].
    ///
    /// # Errors
    /// The host's error.
    fn hold(&mut self) -> std::io::Result<()> {
        Ok(())
    }
    /// Lets that go on.
    fn go_on(&mut self) {}
    /// What the device got at its activation, while it works.
    fn active(&self) -> Option<&Active>;
    /// What a snapshot holds of the device beyond queues and registers. Called with no request half done.
    fn save(&self) -> serde_json::Value {
        serde_json::Value::Null
    }
    /// Takes over what [`VirtioDevice::save`] gave, before the activation.
    ///
    /// # Errors
    /// What is wrong with it.
    fn restore(&mut self, _state: &serde_json::Value) -> Result<(), String> {
        Ok(())
    }
    /// Counters.
    fn metrics(&self) -> serde_json::Value;
}
