//! The data path in the host's kernel: one [`Vhost`] for each tap of an interface.
//!
//! The kernel waits for the guest's bells itself, and raises the interrupt line itself, so that no thread of the monitor takes part. What
//! it does not have is the transport's interrupt status; see [`Interrupt::start`].

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use vmm_sys_util::eventfd::EventFd;

use super::vhost::Vhost;
use crate::devices::virtio::{Active, Interrupt};
use crate::memory::Memory;

/// The kernel's side of an interface.
#[derive(Debug)]
pub struct Kernel {
    pairs: Vec<Vhost>,
    broken: EventFd,
}

impl Kernel {
    /// One for each tap.
    ///
    /// # Errors
    /// There is no eventfd left.
    pub fn new(pairs: Vec<Vhost>) -> io::Result<Self> {
        Ok(Self { pairs, broken: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)? })
    }

    /// What is left of the interface's features.
    #[must_use]
    pub fn offered(&self, features: u64) -> u64 {
        self.pairs.iter().fold(features, |features, pair| pair.offered(features))
    }

    /// Whether the kernel alone waits for a queue's bell. The third queue of several is the control queue of a driver that knows of one
    /// pair only (virtio 1.2, 5.1.2), so that bell is heard here too; it rings when the guest has new buffers and the kernel
    /// was out of them.
    #[must_use]
    pub fn hears(&self, queue: usize) -> bool {
        queue < 2 * self.pairs.len() && queue != 2
    }

    /// Says where memory, bells and line are. The guest has not started yet.
    ///
    /// # Errors
    /// The host's error.
    pub fn connect(&self, memory: &Memory, bells: &[EventFd], interrupt: &Interrupt) -> io::Result<()> {
        let mut pairs = self.pairs.iter().zip(bells.chunks(2));
        pairs.try_for_each(|(pair, bells)| pair.connect(memory, bells, interrupt.line(), &self.broken))
    }

    /// Lets the kernel work on the queues.
    ///
    /// # Errors
    /// A sentence; the kernel does nothing then.
    pub fn start(&mut self, active: &Active, taps: impl Iterator<Item = RawFd>) -> Result<(), String> {
        let Active { memory, queues, features, .. } = active;
        for ((pair, queues), tap) in self.pairs.iter_mut().zip(queues.chunks(2)).zip(taps) {
            if let Err(error) = pair.start(*features, memory, queues, tap) {
                self.stop();
                return Err(format!("vhost-net: {error}"));
            }
        }
        Ok(())
    }

    /// Ends the kernel's work. No ring is touched any more when this returns, and what was broken is forgotten: the device thread may
    /// hear of it only when the guest has set the device up again.
    pub fn stop(&mut self) {
        for pair in &mut self.pairs {
            if let Err(error) = pair.stop() {
                // Of a descriptor that once took a tap it has no way to fail.
                crate::log::line(&format!("vhost-net: {error}"));
            }
        }
        let _ = self.broken.read();
    }

    /// Holds the kernel's work, and puts down where it is.
    ///
    /// # Errors
    /// The host's error.
    pub fn hold(&self, active: &mut Active) -> io::Result<()> {
        let mut pairs = self.pairs.iter().zip(active.queues.chunks_mut(2));
        pairs.try_for_each(|(pair, queues)| pair.hold(&active.memory, queues))
    }

    /// Lets it go on.
    ///
    /// # Errors
    /// The host's error.
    pub fn go_on(&self, taps: impl Iterator<Item = RawFd>) -> io::Result<()> {
        self.pairs.iter().zip(taps).try_for_each(|(pair, tap)| pair.go_on(tap))
    }

    /// Becomes readable when the guest has broken a ring.
    #[must_use]
    pub fn broken_fd(&self) -> RawFd {
        self.broken.as_raw_fd()
    }

    /// Whether the guest has broken a ring since the last time.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.broken.read().is_ok()
    }
}
