//! The driver's side of memory that comes and goes.

use super::Code;
use super::virtio::{Device, NEXT, Ring, WRITE, register};

/// Bytes of a block.
pub const BLOCK: u64 = 2 << 20;
/// Where the region is on a machine with little memory.
pub const START: u64 = 0x1_0800_0000;
/// Where the guest sees it once it has [`Code::map`]ped it: the second GiB, at which there is nothing.
pub const WINDOW: u32 = 0x4000_0000;
/// The boot page tables' directory of the second GiB.
const DIRECTORY: u32 = 0xc000;

/// Kinds of requests and answers.
pub const PLUG: u16 = 0;
pub const UNPLUG: u16 = 1;
pub const UNPLUG_ALL: u16 = 2;
pub const STATE: u16 = 3;
pub const ACK: u16 = 0;
pub const NACK: u16 = 1;
pub const ERROR: u16 = 3;

/// Configuration space: what the guest has and should have, bytes (the lower half of each).
pub const PLUGGED: u32 = register::CONFIG + 40;
pub const REQUESTED: u32 = register::CONFIG + 48;

impl Code {
    /// Maps large pages of the region into the window.
    pub fn map(self, blocks: u32) -> Self {
        (0..blocks).fold(self, |code, n| {
            let entry = (START + BLOCK * u64::from(n)) | 0x83;
            code.store(DIRECTORY + 8 * n, entry as u32).store(DIRECTORY + 8 * n + 4, (entry >> 32) as u32)
        })
    }
}

/// A request: its number in the queue, its kind, the first block, how many, and where the answer goes.
#[derive(Clone, Copy)]
pub struct Request {
    pub index: u16,
    pub kind: u16,
    pub address: u64,
    pub blocks: u16,
    pub answer: u64,
}

/// Where the answers of [`ask`] are.
pub fn answer(ring: Ring) -> u32 {
    ring.base + 0xc040
}

/// Makes a request and waits for the device.
pub fn send(code: Code, device: Device, ring: Ring, request: Request) -> Code {
    let at = ring.base + 0xc000;
    let code = code.store(at, request.kind.into()).store(at + 4, 0);
    let code = code.store(at + 8, request.address as u32).store(at + 12, (request.address >> 32) as u32);
    let code = code.store(at + 16, request.blocks.into()).store(at + 20, 0);
    let code = ring.descriptor(code, 0, at.into(), 24, NEXT, 1);
    let code = ring.descriptor(code, 1, request.answer, 10, WRITE, 0);
    let code = device.notify(ring.offer(code, request.index, 0), ring.queue);
    code.wait16(ring.used_index(), request.index + 1)
}

/// Makes requests, one after the other, and says `!` for each whose answer is not as expected: kind, first block, how many, the
/// answer's kind and state.
pub fn ask(
    code: Code,
    device: Device,
    ring: Ring,
    first: u16,
    requests: &[(u16, u64, u16, u16, u16)],
) -> Code {
    (first..).zip(requests).fold(code, |code, (index, (kind, address, blocks, is, state))| {
        let at = answer(ring);
        let code = code.store(at, u32::MAX).store(at + 8, 0xffff);
        let request = Request { index, kind: *kind, address: *address, blocks: *blocks, answer: at.into() };
        send(code, device, ring, request).expect32(at, (*is).into()).expect32(at + 8, (*state).into())
    })
}
