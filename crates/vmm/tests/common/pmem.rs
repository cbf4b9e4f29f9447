//! The driver's side of files in memory.

use super::Code;
use super::virtio::{Device, NEXT, Ring, WRITE, register};

/// What regions' sizes are multiples of.
pub const ALIGNMENT: u64 = 2 << 20;
/// Where the first region is on a machine with little memory and nothing else above it.
pub const START: u64 = 0x1_0800_0000;
/// Where the guest sees it once it has [`Code::map_region`]ped it: the second GiB, at which there is nothing.
pub const WINDOW: u32 = 0x4000_0000;
/// The boot page tables' directory of the second GiB.
const DIRECTORY: u32 = 0xc000;

/// The one request.
pub const FLUSH: u32 = 0;
/// Answers.
pub const OK: u32 = 0;
pub const FAILED: u32 = u32::MAX;

impl Code {
    /// Maps so many large pages from an address on into the window.
    pub fn map_region(self, start: u64, pages: u32) -> Self {
        (0..pages).fold(self, |code, n| {
            let entry = (start + ALIGNMENT * u64::from(n)) | 0x83;
            code.store(DIRECTORY + 8 * n, entry as u32).store(DIRECTORY + 8 * n + 4, (entry >> 32) as u32)
        })
    }
}

/// Complains unless the configuration space says this.
pub fn expect_config(code: Code, device: Device, start: u64, size: u64) -> Code {
    let words = [start as u32, (start >> 32) as u32, size as u32, (size >> 32) as u32];
    words
        .iter()
        .zip(0..)
        .fold(code, |code, (word, n)| code.expect32(device.register(register::CONFIG + 4 * n), *word))
}

/// Makes a request of this kind, as number `index` of the queue, and waits for the device.
pub fn ask(code: Code, device: Device, ring: Ring, index: u16, kind: u32) -> Code {
    let (request, answer) = (ring.base + 0xc000, answer(ring));
    let code = code.store(request, kind).store(answer, 77);
    let code = ring.descriptor(code, 0, request.into(), 4, NEXT, 1);
    let code = ring.descriptor(code, 1, answer.into(), 4, WRITE, 0);
    device.notify(ring.offer(code, index, 0), ring.queue).wait16(ring.used_index(), index + 1)
}

/// Where the answers of [`ask`] are.
pub fn answer(ring: Ring) -> u32 {
    ring.base + 0xc040
}
