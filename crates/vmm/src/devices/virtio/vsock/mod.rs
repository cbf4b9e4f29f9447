//! virtio-vsock: connections between guest and host without a network (virtio 1.2, 5.10), each a unix socket on the host.
//!
//! ```text
//!   host program ── connects to NAME, says "CONNECT 52\n" ──▶ guest's port 52     "OK 1073741824\n" comes back
//!   guest ── connects to port 52 of CID 2 ──▶ host program that listens on NAME_52
//! ```
//! [`connection`] is one connection's state, [`switch`] holds all of them, [`queue`] moves packets, [`host`] has the sockets.

pub mod config;
pub mod connection;
pub mod host;
pub mod metrics;
pub mod packet;
pub mod queue;
pub mod switch;

#[cfg(test)]
mod tests;

use std::os::fd::{OwnedFd, RawFd};

use virtio_queue::QueueT;

use super::queue::{Broken, Turn};
use super::{Active, F_EVENT_IDX, F_INDIRECT_DESC, VirtioDevice};
use config::VsockConfig;
use host::{HostSocket, HostSockets};
use queue::MAX_PACKET;
use switch::Switch;

/// virtio device id of a vsock device.
pub const KIND: u32 = 19;
const QUEUE_SIZE: u16 = 256;
const RX: usize = 0;
const TX: usize = 1;
/// Tells of a restored snapshot; nothing else ever comes there.
const EVENT: usize = 2;
const QUEUES: [u16; 3] = [QUEUE_SIZE; 3];

/// A vsock device.
pub struct Vsock {
    guest_cid: u64,
    sockets: HostSockets,
    switch: Switch<HostSocket>,
    active: Option<Active>,
    scratch: Box<[u8]>,
    /// Whether the guest must be told that its connections are gone.
    lost: Lost,
}

/// A guest that goes on from a snapshot has lost its connections. It ends those that it has when it hears of that, whenever they
/// began: new ones wait until it has heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lost {
    /// It knows.
    Nothing,
    /// It has not been told.
    Untold,
    /// It has been told, and has not given the buffer back yet in which it was.
    Told,
}

impl Vsock {
    /// A device as configured, with its sockets in this folder.
    ///
    /// # Errors
    /// The host's error.
    pub fn new(config: &VsockConfig, folder: OwnedFd) -> std::io::Result<Self> {
        let (_, name) = config.place();
        Ok(Self {
            guest_cid: config.guest_cid,
            sockets: HostSockets::new(folder, name.to_owned())?,
            switch: Switch::new(config.guest_cid),
            active: None,
            scratch: vec![0; MAX_PACKET].into_boxed_slice(),
            lost: Lost::Nothing,
        })
    }

    /// Looks at the sockets, at the guest's packets if it has rung, and gives it what there is. A program that connects before
    /// the guest has a driver waits.
    fn turn(&mut self, rung: bool) -> Result<Turn, Broken> {
        let Some(active) = &mut self.active else { return Ok(Turn::default()) };
        let Active { memory, queues, .. } = active;
        let [rx, tx, ..] = queues.as_mut_slice() else { return Ok(Turn::default()) };
        if !rx.ready() || !tx.ready() || self.lost != Lost::Nothing {
            return Ok(Turn::default());
        }
        self.sockets.poll(&mut self.switch);
        let mut turn = Turn::default();
        if rung {
            turn = queue::transmit(tx, memory, &mut self.switch, &mut self.sockets, &mut self.scratch)?;
        }
        let received = queue::receive(rx, memory, &mut self.switch, &mut self.scratch)?;
        Ok(Turn { interrupt: turn.interrupt || received.interrupt, more: turn.more || received.more })
    }

    /// The guest has given a buffer for events.
    fn event_turn(&mut self) -> Result<Turn, Broken> {
        let Some(active) = &mut self.active else { return Ok(Turn::default()) };
        let queue = active.queues.get_mut(EVENT).filter(|queue| queue.ready());
        match (self.lost, queue) {
            (Lost::Nothing, _) => Ok(Turn::default()),
            (Lost::Untold, Some(queue)) => {
                let turn = queue::event(queue, &active.memory, queue::TRANSPORT_RESET)?;
                if turn.interrupt {
                    self.lost = Lost::Told;
                }
                Ok(turn)
            }
            // A driver without this queue cannot be told.
            (Lost::Told, _) | (Lost::Untold, None) => {
                self.lost = Lost::Nothing;
                self.turn(true)
            }
        }
    }

    fn finish(&mut self, result: Result<Turn, Broken>) -> bool {
        let Some(active) = &self.active else { return false };
        active.interrupt.end_turn("vsock", result).unwrap_or_else(|| {
            self.reset();
            false
        })
    }
}

impl VirtioDevice for Vsock {
    fn kind(&self) -> u32 {
        KIND
    }

    fn name(&self) -> &str {
        "vsock"
    }

    fn features(&self) -> u64 {
        F_EVENT_IDX | F_INDIRECT_DESC
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUES
    }

    /// virtio 1.2, 5.10.4.
    fn config(&self) -> Vec<u8> {
        self.guest_cid.to_le_bytes().to_vec()
    }

    fn prepare(&mut self) -> std::io::Result<()> {
        self.sockets.listen()
    }

    fn activate(&mut self, active: Active) -> Result<(), String> {
        self.active = Some(active);
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
        self.switch.clear();
        self.lost = Lost::Nothing;
    }

    fn queue_event(&mut self, index: usize) -> bool {
        let result = match index {
            RX | TX => self.turn(index == TX),
            EVENT => self.event_turn(),
            _ => return false,
        };
        self.finish(result)
    }

    fn backend_fds(&self) -> Vec<RawFd> {
        vec![self.sockets.descriptor()]
    }

    fn backend_event(&mut self) -> bool {
        let result = self.turn(false);
        self.finish(result)
    }

    fn active(&self) -> Option<&Active> {
        self.active.as_ref()
    }

    /// Connections end with the process that holds their sockets; the guest is told when the device works again.
    fn restore(&mut self, _state: &serde_json::Value) -> Result<(), String> {
        self.lost = Lost::Untold;
        Ok(())
    }

    fn metrics(&self) -> serde_json::Value {
        serde_json::json!(self.switch.metrics())
    }
}
