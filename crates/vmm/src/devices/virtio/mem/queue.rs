//! Requests for blocks and their answers (virtio 1.2, 5.15.6): memory and a queue in, ranges to give back out.

use std::io;

use virtio_queue::Queue;

use super::blocks::{Blocks, Kind, Refusal};
use super::metrics::Metrics;
use crate::devices::virtio::queue::{Broken, Buffers, Turn, copy_in, copy_out, drain, length};
use crate::memory::{Memory, Range};

/// Bytes of a request: its kind, and for all but one kind the first block's address and how many blocks.
pub const REQUEST: usize = 24;
/// Bytes of an answer: its kind, and what blocks are.
pub const ANSWER: usize = 10;

/// Kinds of requests.
pub const PLUG: u16 = 0;
/// The guest gives blocks.
pub const UNPLUG: u16 = 1;
/// The guest gives all that it has.
pub const UNPLUG_ALL: u16 = 2;
/// The guest asks what blocks are.
pub const STATE: u16 = 3;

/// Answer: done.
pub const ACK: u16 = 0;
/// Answer: not now, as the host wants the guest to have less.
pub const NACK: u16 = 1;
/// Answer: the request makes no sense.
pub const ERROR: u16 = 3;

/// Longest chain that is looked at, bytes.
const MAX_BYTES: u64 = 4096;

/// Answers every request in the queue. What goes is handed to `give_back`.
///
/// # Errors
/// [`Broken`]: the guest broke the queue.
pub fn serve(
    queue: &mut Queue,
    memory: &Memory,
    blocks: &mut Blocks,
    mut give_back: impl FnMut(Range) -> io::Result<u64>,
    metrics: &mut Metrics,
) -> Result<Turn, Broken> {
    drain(queue, memory, |chain| {
        let Ok(buffers) = Buffers::new(memory, chain, MAX_BYTES) else {
            metrics.refused += 1;
            return 0;
        };
        let mut request = [0; REQUEST];
        if copy_out(&buffers.readable, &mut request) < REQUEST || length(&buffers.writable) < ANSWER as u64 {
            metrics.refused += 1;
            return 0;
        }
        let answer = answer(&request, blocks, &mut give_back, metrics);
        u32::try_from(copy_in(&buffers.writable, &answer)).unwrap_or(0)
    })
}

fn answer(
    request: &[u8; REQUEST],
    blocks: &mut Blocks,
    give_back: &mut impl FnMut(Range) -> io::Result<u64>,
    metrics: &mut Metrics,
) -> [u8; ANSWER] {
    let half = |at: usize| u16::from_le_bytes([request[at], request[at + 1]]);
    let address = (8..16).rev().fold(0, |address, at| address << 8 | u64::from(request[at]));
    let count = half(16);
    metrics.requests += 1;
    let mut back = |range: Range, metrics: &mut Metrics| {
        static LOG: crate::log::Limited = crate::log::Limited::new();
        if let Err(error) = give_back(range) {
            metrics.failed += 1;
            LOG.line(|| format!("mem: memory could not be given back: {error}"));
        }
    };
    let result = match half(0) {
        PLUG => blocks.plug(address, count).map(|range| {
            metrics.plugged_bytes += range.size;
            Kind::Plugged
        }),
        UNPLUG => blocks.unplug(address, count).map(|range| {
            metrics.unplugged_bytes += range.size;
            back(range, metrics);
            Kind::Plugged
        }),
        UNPLUG_ALL => {
            metrics.unplugged_bytes += blocks.unplug_all();
            // All of the region, not only what the guest had: it may have written where it should not.
            back(blocks.region(), metrics);
            Ok(Kind::Plugged)
        }
        STATE => blocks.kind(address, count),
        _ => Err(Refusal::Error),
    };
    let (kind, state) = match result {
        Ok(kind) => (ACK, kind as u16),
        Err(Refusal::TooMuch) => {
            metrics.too_much += 1;
            (NACK, 0)
        }
        Err(Refusal::Error) => {
            metrics.errors += 1;
            (ERROR, 0)
        }
    };
    let mut answer = [0; ANSWER];
    answer[..2].copy_from_slice(&kind.to_le_bytes());
    answer[8..].copy_from_slice(&state.to_le_bytes());
    answer
}
