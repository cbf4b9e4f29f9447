//! The driver's side of a balloon.

use super::Code;
use super::virtio::{Device, Ring, register};

/// Features that a driver may take.
pub const STATISTICS: u32 = 1 << 1;
pub const REPORTING: u32 = 1 << 5;

/// Queues, by number.
pub const INFLATE: u32 = 0;
pub const DEFLATE: u32 = 1;

/// Configuration space: how many pages the host wants, how many the guest has given.
pub const TARGET: u32 = register::CONFIG;
pub const ACTUAL: u32 = register::CONFIG + 4;

/// Writes a list of pages that follow each other: mov eax, FIRST; mov ecx, COUNT; again: stosd; inc eax; loop again
pub fn list(code: Code, address: u32, first_page: u32, count: u32) -> Code {
    let code = code.address(address).bytes(&[0xb8]).bytes(&first_page.to_le_bytes());
    let code = code.bytes(&[0xb9]).bytes(&count.to_le_bytes());
    code.bytes(&[0xab, 0xff, 0xc0, 0xe2, 0xfb])
}

/// Makes one buffer available as chain number `index` of its queue, and rings.
pub fn send(code: Code, device: Device, ring: Ring, index: u16, buffer: (u32, u32), flags: u16) -> Code {
    let code = ring.descriptor(code, index % ring.size, buffer.0.into(), buffer.1, flags, 0);
    device.notify(ring.offer(code, index, index % ring.size), ring.queue)
}

/// Lists pages that follow each other to a queue, as chain number `index`, and waits for the device.
pub fn give(code: Code, device: Device, ring: Ring, index: u16, pages: (u32, u32)) -> Code {
    let address = ring.base + 0xc000;
    let code = list(code, address, pages.0, pages.1);
    let code = send(code, device, ring, index, (address, 4 * pages.1), 0);
    code.wait16(ring.used_index(), index + 1)
}
