//! Packets between queues and the connections (virtio 1.2, 5.10.6): memory, queues and a switch in.

use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::packet::{HEADER, Header};
use super::switch::{Host, Socket, Switch};
use crate::devices::virtio::queue::{BUDGET, Broken, Buffers, Turn, copy_in, copy_out, drain, length, next};
use crate::memory::Memory;

/// Most bytes that one packet carries.
pub const MAX_PAYLOAD: usize = 64 * 1024;
/// The longest packet.
pub const MAX_PACKET: usize = HEADER + MAX_PAYLOAD;

/// The event that all connections are gone (virtio 1.2, 5.10.6.7).
pub const TRANSPORT_RESET: u32 = 0;

/// Tells the guest of an event, if it has a buffer for it; it is interrupted then whatever it wishes, as such a thing is rare.
///
/// # Errors
/// [`Broken`]: the guest broke the queue.
pub fn event(queue: &mut Queue, memory: &Memory, event: u32) -> Result<Turn, Broken> {
    let Some(chain) = next(queue, memory)? else {
        let _ = queue.enable_notification(memory)?;
        return Ok(Turn::default());
    };
    let head = chain.head_index();
    let buffers = Buffers::new(memory, chain, u64::from(u32::MAX)).unwrap_or_default();
    let written = copy_in(&buffers.writable, &event.to_le_bytes());
    queue.add_used(memory, head, u32::try_from(written).unwrap_or(0))?;
    // The bell is to ring when it gives this buffer back, and it has others in the queue: virtio 1.2, 2.7.10: avail_event.
    let _ = queue.enable_notification(memory)?;
    let given = queue.avail_idx(memory, Ordering::Acquire)?.0;
    let avail_event = GuestAddress(queue.used_ring() + 4 + 8 * u64::from(queue.size()));
    memory.store(given.to_le(), avail_event, Ordering::Release).map_err(|error| Broken(error.to_string()))?;
    Ok(Turn { interrupt: true, more: false })
}

/// Takes every packet of the guest. `scratch` has room for one.
///
/// # Errors
/// [`Broken`]: the guest broke the queue.
pub fn transmit<H: Host>(
    queue: &mut Queue,
    memory: &Memory,
    switch: &mut Switch<H::Socket>,
    host: &mut H,
    scratch: &mut [u8],
) -> Result<Turn, Broken> {
    drain(queue, memory, |chain| {
        // Copied once and only then looked at: the guest cannot change a packet under the host.
        let count = Buffers::new(memory, chain, MAX_PACKET as u64)
            .map_or(0, |buffers| copy_out(&buffers.readable, scratch));
        let packet = scratch[..count].split_first_chunk::<HEADER>();
        match packet.and_then(|(header, rest)| Some((Header::parse(*header)?, rest))) {
            Some((header, rest)) => match rest.get(..header.len as usize) {
                Some(payload) => switch.from_guest(&header, payload, host),
                // The bytes are not there: as an operation that there is not, it ends its connection.
                None => switch.from_guest(&Header { op: 0, ..header }, &[], host),
            },
            None => switch.count_refused(),
        }
        0
    })
}

/// Gives the guest packets until it has no more buffers or there are none. `scratch` has room for one.
///
/// # Errors
/// [`Broken`]: the guest broke the queue.
pub fn receive<S: Socket>(
    queue: &mut Queue,
    memory: &Memory,
    switch: &mut Switch<S>,
    scratch: &mut [u8],
) -> Result<Turn, Broken> {
    let (mut any, mut more, mut promised) = (false, true, false);
    for _ in 0..BUDGET {
        if !switch.busy() {
            more = false;
            break;
        }
        let Some(chain) = next(queue, memory)? else {
            if promised {
                return Err(Broken("available chains that cannot be taken".into()));
            }
            // Ask for a bell, then look once more: buffers may have come in between.
            promised = queue.enable_notification(memory)?;
            if promised {
                continue;
            }
            more = false;
            break;
        };
        promised = false;
        let head = chain.head_index();
        let buffers = Buffers::new(memory, chain, u64::from(u32::MAX)).unwrap_or_default();
        let room = usize::try_from(length(&buffers.writable)).unwrap_or(usize::MAX).min(scratch.len());
        if room < HEADER {
            switch.count_refused();
            queue.add_used(memory, head, 0)?;
            any = true;
            continue;
        }
        let Some((header, count)) = switch.for_guest(&mut scratch[HEADER..room]) else {
            queue.go_to_previous_position();
            more = false;
            break;
        };
        scratch[..HEADER].copy_from_slice(&header.bytes());
        let written = copy_in(&buffers.writable, &scratch[..HEADER + count]);
        queue.add_used(memory, head, u32::try_from(written).unwrap_or(0))?;
        any = true;
    }
    Ok(Turn { interrupt: any && queue.needs_notification(memory)?, more })
}
