//! virtio-net: one interface, one pair of queues (to the guest, from it) for each of its taps.
//!
//! With several pairs there is a control queue behind them, by which the driver says how many it uses (virtio 1.2, 5.1.6.5.5); until
//! then it is one. The host spreads its packets over the taps in use by their flows. The device thread serves all queues, and the
//! limits are the interface's.
//!
//! With vhost-net ([`kernel`]) the host's kernel serves all queues but the control queue: no packet passes the monitor then, so that there
//! are neither limits nor counters.

pub mod config;
pub mod control;
pub mod kernel;
pub mod metrics;
pub mod queue;
pub mod tap;
pub mod vhost;

#[cfg(test)]
mod tests;

use std::os::fd::RawFd;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use virtio_queue::QueueT;
use vmm_sys_util::eventfd::EventFd;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
};

use super::pace::Pace;
use super::queue::{Broken, Turn};
use super::{Active, F_EVENT_IDX, F_INDIRECT_DESC, Interrupt, VirtioDevice};
use crate::config::RateLimiter;
use crate::devices::limiter::SavedLimiter;
use crate::log::Limited;
use crate::memory::Memory;
use kernel::Kernel;
use metrics::Metrics;
use queue::Waiting;
use tap::TapDevice;

/// virtio device id of a network interface.
pub const KIND: u32 = 1;
const QUEUE_SIZE: u16 = 256;
/// Pairs of queues that an interface can have.
pub const MAX_PAIRS: usize = 8;
const CONTROL_SIZE: u16 = 64;
/// All queues that an interface can have, but for the control queue.
const QUEUES: [u16; 2 * MAX_PAIRS] = [QUEUE_SIZE; 2 * MAX_PAIRS];
/// The first pair; the others follow in the same way. Timers have the same numbers.
const RX: usize = 0;
const TX: usize = 1;

const TUN_F_CSUM: u32 = 1;
const TUN_F_TSO4: u32 = 2;
const TUN_F_TSO6: u32 = 4;

/// Turns in the direction to the guest, one after the other.
const TURNS: usize = 16;

/// How much an interface may carry.
pub struct Limits {
    /// To the guest.
    pub rx: Pace,
    /// From the guest.
    pub tx: Pace,
}

/// A tap, and what was taken from it.
struct Pair {
    tap: TapDevice,
    waiting: Waiting,
}

/// What a snapshot holds of an interface.
#[derive(Serialize, Deserialize)]
struct SavedNet {
    used_pairs: usize,
    rx: SavedLimiter,
    tx: SavedLimiter,
}

/// An interface.
pub struct Net {
    id: String,
    mac: [u8; 6],
    mtu: Option<u16>,
    pairs: Vec<Pair>,
    /// How many the driver uses.
    used_pairs: usize,
    queue_sizes: Vec<u16>,
    limits: Limits,
    /// Who moves the packets, if it is not this device.
    kernel: Option<Kernel>,
    active: Option<Active>,
    metrics: Metrics,
}

impl Net {
    /// An interface on these taps, within these limits.
    #[must_use]
    pub fn new(id: String, mac: [u8; 6], mtu: Option<u16>, taps: Vec<TapDevice>, limits: Limits) -> Self {
        let pairs: Vec<Pair> =
            taps.into_iter().take(MAX_PAIRS).map(|tap| Pair { tap, waiting: Waiting::default() }).collect();
        let mut queue_sizes = QUEUES[..2 * pairs.len()].to_vec();
        if pairs.len() > 1 {
            queue_sizes.push(CONTROL_SIZE);
        }
        Self {
            id,
            mac,
            mtu,
            pairs,
            used_pairs: 1,
            queue_sizes,
            limits,
            kernel: None,
            active: None,
            metrics: Metrics::default(),
        }
    }

    /// Lets the host's kernel move the packets.
    #[must_use]
    pub fn with_kernel(self, kernel: Option<Kernel>) -> Self {
        Self { kernel, ..self }
    }

    /// Changes the limits to the guest and from it, at once.
    pub fn change_limits(&mut self, rx: Option<RateLimiter>, tx: Option<RateLimiter>) {
        for (pace, change) in [(&mut self.limits.rx, rx), (&mut self.limits.tx, tx)] {
            if let Some(change) = change {
                pace.change(change);
            }
        }
    }

    const fn pace(&mut self, queue: usize) -> Option<&mut Pace> {
        match queue {
            RX => Some(&mut self.limits.rx),
            TX => Some(&mut self.limits.tx),
            _ => None,
        }
    }

    /// The control queue's number, if the driver has one: behind all pairs, or behind the first for a driver that knows of no other
    /// (virtio 1.2, 5.1.2).
    fn control_queue(&self) -> Option<usize> {
        let features = self.active.as_ref()?.features;
        let pairs = if features & 1 << VIRTIO_NET_F_MQ == 0 { 1 } else { self.pairs.len() };
        (features & 1 << VIRTIO_NET_F_CTRL_VQ != 0).then_some(2 * pairs)
    }

    fn transmit(&mut self, pair: usize) -> bool {
        if self.kernel.is_some() {
            return false;
        }
        let Some(Active { memory, queues, .. }) = &mut self.active else { return false };
        let Some(queue) = queues.get_mut(2 * pair + TX).filter(|queue| queue.ready()) else { return false };
        let Some(Pair { tap, .. }) = self.pairs.get_mut(pair) else { return false };
        let pace = Some(&mut self.limits.tx);
        let result = queue::transmit(queue, memory, tap, pace, &mut self.metrics);
        self.finish(result)
    }

    /// Several turns, after each of which the guest is told; then it is another device's turn.
    fn receive(&mut self, pair: usize) -> bool {
        (0..TURNS).all(|_| self.receive_some(pair))
    }

    fn receive_some(&mut self, pair: usize) -> bool {
        if self.kernel.is_some() {
            return false;
        }
        let Some(Active { memory, queues, features, .. }) = &mut self.active else { return false };
        let mergeable = *features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0;
        let Some(queue) = queues.get_mut(2 * pair + RX).filter(|queue| queue.ready()) else { return false };
        let Some(Pair { tap, waiting }) = self.pairs.get_mut(pair) else { return false };
        let pace = Some(&mut self.limits.rx);
        let result = queue::receive(queue, memory, tap, waiting, pace, mergeable, &mut self.metrics);
        self.finish(result)
    }

    fn control(&mut self, index: usize) -> bool {
        let Some(Active { memory, queues, features, .. }) = &mut self.active else { return false };
        let Some(queue) = queues.get_mut(index).filter(|queue| queue.ready()) else { return false };
        let (pairs, used, id) = (&mut self.pairs, &mut self.used_pairs, &self.id);
        let most = if *features & 1 << VIRTIO_NET_F_MQ == 0 { 1 } else { pairs.len() };
        let result = control::process(queue, memory, most, |count| match attach(pairs, count) {
            Ok(()) => {
                *used = count;
                true
            }
            Err(error) => {
                static LOG: Limited = Limited::new();
                LOG.line(|| format!("interface {id:?}: {count} pairs of queues: {error}"));
                false
            }
        });
        self.finish(result)
    }

    /// Every pair that the driver uses takes a turn in one direction; says whether one has more to do.
    fn all(&mut self, direction: usize) -> bool {
        let mut more = false;
        for pair in 0..self.used_pairs {
            more |= if direction == RX { self.receive(pair) } else { self.transmit(pair) };
        }
        more
    }

    fn finish(&mut self, result: Result<Turn, Broken>) -> bool {
        let Some(active) = &self.active else { return false };
        active.interrupt.end_turn(&format!("interface {:?}", self.id), result).unwrap_or_else(|| {
            self.stop();
            false
        })
    }

    /// No queue is touched any more.
    fn stop(&mut self) {
        if let Some(kernel) = &mut self.kernel {
            kernel.stop();
        }
        self.active = None;
    }
}

/// Lets packets from the host come by the first so many taps, and by no other.
fn attach(pairs: &mut [Pair], count: usize) -> std::io::Result<()> {
    pairs.iter_mut().enumerate().try_for_each(|(index, pair)| pair.tap.attach(index < count))
}

impl VirtioDevice for Net {
    fn kind(&self) -> u32 {
        KIND
    }

    fn name(&self) -> &str {
        &self.id
    }

    fn features(&self) -> u64 {
        let mtu = if self.mtu.is_some() { 1 << VIRTIO_NET_F_MTU } else { 0 };
        let several = if self.pairs.len() > 1 { 1 << VIRTIO_NET_F_MQ | 1 << VIRTIO_NET_F_CTRL_VQ } else { 0 };
        let features = mtu
            | several
            | 1 << VIRTIO_NET_F_MAC
            | 1 << VIRTIO_NET_F_CSUM
            | 1 << VIRTIO_NET_F_GUEST_CSUM
            | 1 << VIRTIO_NET_F_HOST_TSO4
            | 1 << VIRTIO_NET_F_HOST_TSO6
            | 1 << VIRTIO_NET_F_GUEST_TSO4
            | 1 << VIRTIO_NET_F_GUEST_TSO6
            | 1 << VIRTIO_NET_F_MRG_RXBUF
            | F_EVENT_IDX
            | F_INDIRECT_DESC;
        self.kernel.as_ref().map_or(features, |kernel| kernel.offered(features))
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    /// virtio 1.2, 5.1.4: mac, status, max_virtqueue_pairs, mtu.
    fn config(&self) -> Vec<u8> {
        let mut config = self.mac.to_vec();
        config.extend(1_u16.to_le_bytes());
        config.extend(u16::try_from(self.pairs.len()).unwrap_or(1).to_le_bytes());
        config.extend(self.mtu.unwrap_or(1500).to_le_bytes());
        config
    }

    fn activate(&mut self, active: Active) -> Result<(), String> {
        let offload = [
            (VIRTIO_NET_F_GUEST_CSUM, TUN_F_CSUM),
            (VIRTIO_NET_F_GUEST_TSO4, TUN_F_TSO4),
            (VIRTIO_NET_F_GUEST_TSO6, TUN_F_TSO6),
        ];
        let flags =
            offload.iter().filter(|(feature, _)| active.features & 1 << feature != 0).fold(0, |f, o| f | o.1);
        let Some(first) = self.pairs.first() else { return Err("it has no tap".into()) };
        // They are one interface's.
        first
            .tap
            .set_offload(flags)
            .map_err(|error| format!("the tap refuses offload {flags:#x}: {error}"))?;
        let count = self.used_pairs;
        attach(&mut self.pairs, count).map_err(|error| format!("{count} pairs of queues: {error}"))?;
        if let Some(kernel) = &mut self.kernel {
            kernel.start(&active, self.pairs.iter().map(|pair| pair.tap.raw_fd()))?;
        }
        self.active = Some(active);
        Ok(())
    }

    fn connect(&mut self, memory: &Memory, bells: &[EventFd], interrupt: &Interrupt) -> std::io::Result<()> {
        self.kernel.as_ref().map_or(Ok(()), |kernel| kernel.connect(memory, bells, interrupt))
    }

    fn kernel_hears(&self, queue: usize) -> bool {
        self.kernel.as_ref().is_some_and(|kernel| kernel.hears(queue))
    }

    fn hold(&mut self) -> std::io::Result<()> {
        let (Some(kernel), Some(active)) = (&self.kernel, &mut self.active) else { return Ok(()) };
        kernel.hold(active)
    }

    fn go_on(&mut self) {
        let (Some(kernel), Some(active)) = (&self.kernel, &self.active) else { return };
        if let Err(error) = kernel.go_on(self.pairs.iter().map(|pair| pair.tap.raw_fd())) {
            crate::log::line(&format!("interface {:?}: vhost-net: {error}", self.id));
            active.interrupt.needs_reset();
            self.stop();
        }
    }

    fn reset(&mut self) {
        self.stop();
        self.used_pairs = 1;
        self.pairs.iter_mut().for_each(|pair| pair.waiting.clear());
    }

    fn queue_event(&mut self, index: usize) -> bool {
        if self.control_queue() == Some(index) {
            return self.control(index);
        }
        if index % 2 == RX { self.receive(index / 2) } else { self.transmit(index / 2) }
    }

    fn backend_fds(&self) -> Vec<RawFd> {
        match &self.kernel {
            Some(kernel) => vec![kernel.broken_fd()],
            None => self.pairs.iter().map(|pair| pair.tap.raw_fd()).collect(),
        }
    }

    fn backend_event(&mut self) -> bool {
        match &self.kernel {
            Some(kernel) if kernel.is_broken() => {
                self.finish(Err(Broken("the kernel cannot go on with it".into())))
            }
            Some(_) => false,
            None => self.all(RX),
        }
    }

    fn timers(&self) -> Vec<(usize, RawFd)> {
        vec![(RX, self.limits.rx.alarm()), (TX, self.limits.tx.alarm())]
    }

    /// The limits are the interface's, so any pair may have waited.
    fn timer_event(&mut self, direction: usize) {
        if let Some(pace) = self.pace(direction) {
            pace.silence();
        }
        let more = self.all(direction);
        if let Some(pace) = self.pace(direction).filter(|_| more) {
            pace.soon();
        }
    }

    fn save(&self) -> Value {
        let Limits { rx, tx } = &self.limits;
        json!(SavedNet { used_pairs: self.used_pairs, rx: rx.save(), tx: tx.save() })
    }

    fn restore(&mut self, state: &Value) -> Result<(), String> {
        let saved = SavedNet::deserialize(state).map_err(|error| error.to_string())?;
        if !(1..=self.pairs.len()).contains(&saved.used_pairs) {
            return Err(format!("{} pairs of queues, there are {}", saved.used_pairs, self.pairs.len()));
        }
        self.used_pairs = saved.used_pairs;
        self.limits.rx.restore(&saved.rx);
        self.limits.tx.restore(&saved.tx);
        Ok(())
    }

    fn active(&self) -> Option<&Active> {
        self.active.as_ref()
    }

    fn metrics(&self) -> Value {
        if self.kernel.is_some() { json!({ "vhost": true }) } else { json!(self.metrics) }
    }
}
