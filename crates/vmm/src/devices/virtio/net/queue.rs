//! Packets between a queue and a tap (virtio 1.2, 5.1.6): memory, queues and a packet source or sink in.
//!
//! Packets carry the 12-byte virtio header on both sides: the tap speaks the same one (`IFF_VNET_HDR`).

use std::io;

use virtio_queue::{Queue, QueueOwnedT, QueueT};

use super::metrics::Metrics;
use crate::devices::virtio::pace::Pace;
use crate::devices::virtio::queue::{
    BUDGET, Broken, Buffers, Turn, add_used_together, copy_in, drain_while, length, next, wants_interrupt,
};
use crate::memory::{Memory, Slice};

/// Bytes of the virtio header.
pub const HEADER: usize = 12;
/// The longest packet: 64 KiB of IP with its Ethernet and virtio headers.
pub const MAX_PACKET: usize = 65_536 + 18 + HEADER;
/// Bytes to the guest after which it is told: it looks at them while the next ones are copied.
const TOLD: u64 = 64 << 10;
/// Where the header's count of buffers is.
const NUM_BUFFERS: usize = 10;

/// The host's side.
pub trait Tap {
    /// Takes one packet with its header; `None` when there is none now.
    ///
    /// # Errors
    /// The host's error.
    fn receive(&mut self, packet: &mut [u8]) -> io::Result<Option<usize>>;
    /// Sends one packet with its header, from where it is: whoever looks at it copies it first, as the guest may change it.
    ///
    /// # Errors
    /// The host's error: the packet is lost, as packets may be.
    fn send(&mut self, packet: &[Slice<'_>]) -> io::Result<()>;
}

/// A packet that was taken from the tap and waits for buffers.
pub struct Waiting {
    packet: Box<[u8]>,
    length: usize,
}

impl Default for Waiting {
    fn default() -> Self {
        Self { packet: vec![0; MAX_PACKET].into_boxed_slice(), length: 0 }
    }
}

impl Waiting {
    /// Forgets the packet.
    pub fn clear(&mut self) {
        self.length = 0;
    }
}

impl std::fmt::Debug for Waiting {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Waiting({} bytes)", self.length)
    }
}

/// Sends every packet that is in the queue, as far as the pace allows.
///
/// # Errors
/// [`Broken`]: the guest broke the queue.
pub fn transmit(
    queue: &mut Queue,
    memory: &Memory,
    tap: &mut dyn Tap,
    mut pace: Option<&mut Pace>,
    metrics: &mut Metrics,
) -> Result<Turn, Broken> {
    drain_while(queue, memory, |chain| {
        let Some(chain) = chain else {
            let passes = pace.as_mut().is_none_or(|pace| pace.may_pass());
            metrics.tx_limited += u64::from(!passes);
            return passes.then_some(0);
        };
        let packet = Buffers::new(memory, chain, MAX_PACKET as u64).unwrap_or_default().readable;
        let bytes = length(&packet).saturating_sub(HEADER as u64);
        if bytes > 0 && tap.send(&packet).is_ok() {
            metrics.tx_packets += 1;
            metrics.tx_bytes += bytes;
        } else {
            metrics.tx_dropped += 1;
        }
        // Lost or not: it was work.
        if let Some(pace) = &mut pace {
            pace.charge(bytes);
        }
        Some(0)
    })
}

/// Gives the guest packets until it has no more buffers, the tap no more packets or the guest enough to be told of, as far as the pace
/// allows. What must wait stays
/// in the tap, whose queue is the host's to bound.
///
/// # Errors
/// [`Broken`]: the guest broke the queue.
pub fn receive(
    queue: &mut Queue,
    memory: &Memory,
    tap: &mut dyn Tap,
    waiting: &mut Waiting,
    mut pace: Option<&mut Pace>,
    mergeable: bool,
    metrics: &mut Metrics,
) -> Result<Turn, Broken> {
    let (before, mut moved) = (queue.next_used(), 0);
    for _ in 0..BUDGET {
        if moved >= TOLD {
            break;
        }
        if !pace.as_mut().is_none_or(|pace| pace.may_pass()) {
            metrics.rx_limited += 1;
            return finish(queue, memory, before, false);
        }
        if waiting.length == 0 {
            match tap.receive(&mut waiting.packet) {
                Ok(Some(length)) if length >= HEADER => waiting.length = length,
                Ok(Some(_)) => continue,
                Ok(None) | Err(_) => return finish(queue, memory, before, false),
            }
        }
        let bytes = (waiting.length - HEADER) as u64;
        match deliver(queue, memory, &mut waiting.packet[..waiting.length], mergeable)? {
            Delivery::Done => {
                metrics.rx_packets += 1;
                metrics.rx_bytes += bytes;
            }
            Delivery::TooLong => metrics.rx_dropped += 1,
            // The guest rings when it adds buffers.
            Delivery::Later => return finish(queue, memory, before, false),
        }
        // Lost or not: it was work.
        if let Some(pace) = &mut pace {
            pace.charge(bytes);
        }
        waiting.length = 0;
        moved += bytes;
    }
    finish(queue, memory, before, true)
}

/// What was used since the index was `before` is told, if the guest wants to hear of it.
fn finish(queue: &mut Queue, memory: &Memory, before: u16, more: bool) -> Result<Turn, Broken> {
    let any = queue.next_used() != before;
    Ok(Turn { interrupt: any && wants_interrupt(queue, memory, before)?, more })
}

enum Delivery {
    Done,
    /// There are too few buffers now.
    Later,
    /// All the buffers that the queue can hold are too few.
    TooLong,
}

fn deliver(
    queue: &mut Queue,
    memory: &Memory,
    packet: &mut [u8],
    mergeable: bool,
) -> Result<Delivery, Broken> {
    let mut used: Vec<(u16, u32)> = Vec::new();
    let mut lists = Vec::new();
    let mut room = 0;
    while room < packet.len() {
        // Without mergeable buffers one chain must do (virtio 1.2, 5.1.6.3.1).
        if !used.is_empty() && !mergeable {
            let head = used[0].0;
            queue.add_used(memory, head, 0)?;
            return Ok(Delivery::TooLong);
        }
        let Some(chain) = next(queue, memory)? else {
            // A bell for what comes behind the buffers that are there; it is asked for from behind them, as the guest has rung for those.
            // Then a second look: more may have come in between.
            if queue.enable_notification(memory)? {
                continue;
            }
            for _ in &used {
                queue.go_to_previous_position();
            }
            let full = used.len() >= usize::from(queue.size());
            return Ok(if full { Delivery::TooLong } else { Delivery::Later });
        };
        let head = chain.head_index();
        let buffers = Buffers::new(memory, chain, u64::from(u32::MAX)).unwrap_or_default();
        let here = usize::try_from(length(&buffers.writable)).unwrap_or(usize::MAX).min(packet.len() - room);
        used.push((head, u32::try_from(here).unwrap_or(0)));
        lists.push(buffers.writable);
        room += here;
        if here == 0 && used.len() > usize::from(queue.size()) {
            return Err(Broken("a queue full of empty receive buffers".into()));
        }
    }
    let count = u16::try_from(used.len()).unwrap_or(u16::MAX);
    packet[NUM_BUFFERS..HEADER].copy_from_slice(&count.to_le_bytes());
    let mut at = 0;
    for (list, (_, here)) in lists.iter().zip(&used) {
        let end = at + *here as usize;
        let _ = copy_in(list, &packet[at..end]);
        at = end;
    }
    add_used_together(queue, memory, &used)?;
    Ok(Delivery::Done)
}
