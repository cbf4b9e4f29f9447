//! virtio-net: one interface on one tap, one queue in each direction.

pub mod config;
pub mod metrics;
pub mod queue;
pub mod tap;

#[cfg(test)]
mod tests;

use std::os::fd::RawFd;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU,
};

use super::pace::Pace;
use super::queue::{Broken, Turn};
use super::{Active, F_EVENT_IDX, F_INDIRECT_DESC, VirtioDevice};
use crate::config::RateLimiter;
use metrics::Metrics;
use queue::{MAX_PACKET, Waiting};
use tap::TapDevice;

/// virtio device id of a network interface.
pub const KIND: u32 = 1;
const QUEUE_SIZE: u16 = 256;
const RX: usize = 0;
const TX: usize = 1;

const TUN_F_CSUM: u32 = 1;
const TUN_F_TSO4: u32 = 2;
const TUN_F_TSO6: u32 = 4;

/// How much an interface may carry.
pub struct Limits {
    /// To the guest.
    pub rx: Pace,
    /// From the guest.
    pub tx: Pace,
}

/// An interface.
pub struct Net {
    id: String,
    mac: [u8; 6],
    mtu: Option<u16>,
    tap: TapDevice,
    limits: Limits,
    active: Option<Active>,
    waiting: Waiting,
    scratch: Box<[u8]>,
    metrics: Metrics,
}

impl Net {
    /// An interface on this tap, within these limits.
    #[must_use]
    pub fn new(id: String, mac: [u8; 6], mtu: Option<u16>, tap: TapDevice, limits: Limits) -> Self {
        let scratch = vec![0; MAX_PACKET].into_boxed_slice();
        Self {
            id,
            mac,
            mtu,
            tap,
            limits,
            active: None,
            waiting: Waiting::default(),
            scratch,
            metrics: Metrics::default(),
        }
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

    fn transmit(&mut self) -> bool {
        let Some(active) = &mut self.active else { return false };
        let Active { memory, queues, .. } = active;
        let Some(queue) = queues.get_mut(TX) else { return false };
        let pace = Some(&mut self.limits.tx);
        let result =
            queue::transmit(queue, memory, &mut self.tap, &mut self.scratch, pace, &mut self.metrics);
        self.finish(result)
    }

    fn receive(&mut self) -> bool {
        let Some(active) = &mut self.active else { return false };
        let mergeable = active.features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0;
        let Active { memory, queues, .. } = active;
        let Some(queue) = queues.get_mut(RX) else { return false };
        let pace = Some(&mut self.limits.rx);
        let result = queue::receive(
            queue,
            memory,
            &mut self.tap,
            &mut self.waiting,
            pace,
            mergeable,
            &mut self.metrics,
        );
        self.finish(result)
    }

    fn finish(&mut self, result: Result<Turn, Broken>) -> bool {
        let Some(active) = &self.active else { return false };
        match result {
            Ok(turn) => {
                if turn.interrupt {
                    active.interrupt.used();
                }
                turn.more
            }
            Err(broken) => {
                crate::log::line(&format!("interface {:?}: {broken}", self.id));
                active.interrupt.needs_reset();
                self.active = None;
                false
            }
        }
    }
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
        mtu | 1 << VIRTIO_NET_F_MAC
            | 1 << VIRTIO_NET_F_CSUM
            | 1 << VIRTIO_NET_F_GUEST_CSUM
            | 1 << VIRTIO_NET_F_HOST_TSO4
            | 1 << VIRTIO_NET_F_HOST_TSO6
            | 1 << VIRTIO_NET_F_GUEST_TSO4
            | 1 << VIRTIO_NET_F_GUEST_TSO6
            | 1 << VIRTIO_NET_F_MRG_RXBUF
            | F_EVENT_IDX
            | F_INDIRECT_DESC
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }

    /// virtio 1.2, 5.1.4: mac, status, max_virtqueue_pairs, mtu.
    fn config(&self) -> Vec<u8> {
        let mut config = self.mac.to_vec();
        config.extend(1_u16.to_le_bytes());
        config.extend(1_u16.to_le_bytes());
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
        self.tap
            .set_offload(flags)
            .map_err(|error| format!("the tap refuses offload {flags:#x}: {error}"))?;
        self.active = Some(active);
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
        self.waiting.clear();
    }

    fn queue_event(&mut self, index: usize) -> bool {
        match index {
            RX => self.receive(),
            TX => self.transmit(),
            _ => false,
        }
    }

    fn backend_fd(&self) -> Option<RawFd> {
        Some(self.tap.raw_fd())
    }

    fn backend_event(&mut self) -> bool {
        self.receive()
    }

    fn timers(&self) -> Vec<(usize, RawFd)> {
        vec![(RX, self.limits.rx.alarm()), (TX, self.limits.tx.alarm())]
    }

    fn timer_event(&mut self, queue: usize) {
        if let Some(pace) = self.pace(queue) {
            pace.silence();
        }
        let more = self.queue_event(queue);
        if let Some(pace) = self.pace(queue).filter(|_| more) {
            pace.soon();
        }
    }

    fn active(&self) -> Option<&Active> {
        self.active.as_ref()
    }

    fn metrics(&self) -> serde_json::Value {
        serde_json::json!(self.metrics)
    }
}
