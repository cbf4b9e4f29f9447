//! A virtio driver as a bare-metal guest has one: code that writes registers, descriptors and rings.
//!
//! Every instruction names its address in full and uses RDI (and RCX where it counts), so that any sequence of these calls
//! is a program.

use super::Code;

/// First virtio-mmio window; device number `n` is at `WINDOW + n * WINDOW_SIZE`.
pub const WINDOW: u32 = 0xc000_0000;
pub const WINDOW_SIZE: u32 = 0x1000;

/// Registers (virtio 1.2, 4.2.2).
pub mod register {
    pub const DEVICE_FEATURES_SELECT: u32 = 0x14;
    pub const DRIVER_FEATURES: u32 = 0x20;
    pub const DRIVER_FEATURES_SELECT: u32 = 0x24;
    pub const QUEUE_SELECT: u32 = 0x30;
    pub const QUEUE_SIZE: u32 = 0x38;
    pub const QUEUE_READY: u32 = 0x44;
    pub const QUEUE_NOTIFY: u32 = 0x50;
    pub const INTERRUPT_STATUS: u32 = 0x60;
    pub const INTERRUPT_ACKNOWLEDGE: u32 = 0x64;
    pub const STATUS: u32 = 0x70;
    pub const CONFIG_GENERATION: u32 = 0xfc;
    pub const DESCRIPTORS: u32 = 0x80;
    pub const AVAILABLE: u32 = 0x90;
    pub const USED: u32 = 0xa0;
    pub const CONFIG: u32 = 0x100;
}

/// Descriptor flags.
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

impl Code {
    /// mov edi, ADDRESS; mov dword [rdi], VALUE
    pub fn store(self, address: u32, value: u32) -> Self {
        self.address(address).bytes(&[0xc7, 0x07]).bytes(&value.to_le_bytes())
    }

    /// mov edi, ADDRESS; mov word [rdi], VALUE
    pub fn store16(self, address: u32, value: u16) -> Self {
        self.address(address).bytes(&[0x66, 0xc7, 0x07]).bytes(&value.to_le_bytes())
    }

    /// mov edi, ADDRESS
    pub fn address(self, address: u32) -> Self {
        self.bytes(&[0xbf]).bytes(&address.to_le_bytes())
    }

    /// Waits until the word at an address has a value: again: cmp word [rdi], VALUE; jne again
    pub fn wait16(self, address: u32, value: u16) -> Self {
        self.address(address).bytes(&[0x66, 0x81, 0x3f]).bytes(&value.to_le_bytes()).bytes(&[0x75, 0xf9])
    }

    /// Waits as [`Code::wait16`] does, but for a number of looks at most: a device that the guest has broken answers
    /// nothing. mov ecx, LOOKS; again: cmp word [rdi], VALUE; loopne again
    pub fn look16(self, address: u32, value: u16, looks: u32) -> Self {
        let code = self.address(address).bytes(&[0xb9]).bytes(&looks.to_le_bytes());
        code.bytes(&[0x66, 0x81, 0x3f]).bytes(&value.to_le_bytes()).bytes(&[0xe0, 0xf9])
    }

    /// Waits until all these bits of a register are set: again: mov eax, [rdi]; and eax, BITS; cmp eax, BITS; jne again
    pub fn wait_bits(self, address: u32, bits: u32) -> Self {
        let [and, compare] = [0x25, 0x3d].map(|operation| [&[operation][..], &bits.to_le_bytes()].concat());
        self.address(address).bytes(&[0x8b, 0x07]).bytes(&and).bytes(&compare).bytes(&[0x75, 0xf2])
    }

    /// Waits until a register has a value: again: mov eax, [rdi]; cmp eax, VALUE; jne again
    pub fn wait32(self, address: u32, value: u32) -> Self {
        let code = self.address(address).bytes(&[0x8b, 0x07, 0x3d]).bytes(&value.to_le_bytes());
        code.bytes(&[0x75, 0xf7])
    }

    /// Writes a word to the beginning of each of these pages: mov ecx, PAGES; again: mov dword [rdi], VALUE; add edi, 4096;
    /// loop again
    pub fn fill_pages(self, address: u32, pages: u32, value: u32) -> Self {
        let code = self.address(address).bytes(&[0xb9]).bytes(&pages.to_le_bytes()).bytes(&[0xc7, 0x07]);
        code.bytes(&value.to_le_bytes()).bytes(&[0x81, 0xc7, 0, 0x10, 0, 0, 0xe2, 0xf2])
    }

    /// Prints a `!` unless each of these pages begins with a zero: mov ecx, PAGES; xor eax, eax; again: or eax, [rdi];
    /// add edi, 4096; loop again; test eax, eax; jz over; …; over:
    pub fn expect_zero_pages(self, address: u32, pages: u32) -> Self {
        let complaint = Self::default().print("!").0;
        let code = self.address(address).bytes(&[0xb9]).bytes(&pages.to_le_bytes()).bytes(&[0x31, 0xc0]);
        let code = code.bytes(&[0x0b, 0x07, 0x81, 0xc7, 0, 0x10, 0, 0, 0xe2, 0xf6, 0x85, 0xc0]);
        code.bytes(&[0x74, complaint.len() as u8]).bytes(&complaint)
    }

    /// Prints a `!` unless the word at an address has a value: cmp dword [rdi], VALUE; je over; …; over:
    pub fn expect32(self, address: u32, value: u32) -> Self {
        let complaint = Self::default().print("!").0;
        let code = self.address(address).bytes(&[0x81, 0x3f]).bytes(&value.to_le_bytes());
        code.bytes(&[0x74, complaint.len() as u8]).bytes(&complaint)
    }

    /// Does something a number of times (in RSI, which it must leave alone): mov esi, TIMES; again: …; dec esi; jnz again
    pub fn times(self, times: u32, body: &Self) -> Self {
        let back = -i32::try_from(body.0.len() + 8).unwrap();
        let code = self.bytes(&[0xbe]).bytes(&times.to_le_bytes()).bytes(&body.0);
        code.bytes(&[0xff, 0xce, 0x0f, 0x85]).bytes(&back.to_le_bytes())
    }
}

/// One device's registers.
#[derive(Clone, Copy)]
pub struct Device(pub u32);

impl Device {
    pub fn register(self, offset: u32) -> u32 {
        WINDOW + self.0 * WINDOW_SIZE + offset
    }

    /// Resets the device and agrees on these features (and VIRTIO_F_VERSION_1).
    pub fn negotiate(self, code: Code, features: u32) -> Code {
        let status = |code: Code, value| code.store(self.register(register::STATUS), value);
        let feature = |code: Code, select, value| {
            code.store(self.register(register::DRIVER_FEATURES_SELECT), select)
                .store(self.register(register::DRIVER_FEATURES), value)
        };
        let code = status(status(status(code, 0), 1), 3);
        status(feature(feature(code, 0, features), 1, 1), 11)
    }

    /// Sets a queue up.
    pub fn queue(self, code: Code, ring: Ring) -> Code {
        let code = code
            .store(self.register(register::QUEUE_SELECT), ring.queue)
            .store(self.register(register::QUEUE_SIZE), u32::from(ring.size));
        let addresses = [
            (register::DESCRIPTORS, ring.descriptors()),
            (register::AVAILABLE, ring.available()),
            (register::USED, ring.used()),
        ];
        let code = addresses.into_iter().fold(code, |code, (register, address)| {
            code.store(self.register(register), address).store(self.register(register + 4), 0)
        });
        code.store(self.register(register::QUEUE_READY), 1)
    }

    /// Says that the driver is ready.
    pub fn go(self, code: Code) -> Code {
        code.store(self.register(register::STATUS), 15)
    }

    /// Rings a queue's bell.
    pub fn notify(self, code: Code, queue: u32) -> Code {
        code.store(self.register(register::QUEUE_NOTIFY), queue)
    }
}

/// A queue in memory: 64 KiB from `base` on.
#[derive(Clone, Copy)]
pub struct Ring {
    pub queue: u32,
    pub size: u16,
    pub base: u32,
}

impl Ring {
    pub fn descriptors(self) -> u32 {
        self.base
    }

    pub fn available(self) -> u32 {
        self.base + 0x4000
    }

    pub fn used(self) -> u32 {
        self.base + 0x8000
    }

    /// Where the device says how many chains it has returned.
    pub fn used_index(self) -> u32 {
        self.used() + 2
    }

    pub fn descriptor(self, code: Code, n: u16, address: u64, length: u32, flags: u16, next: u16) -> Code {
        let at = self.descriptors() + 16 * u32::from(n);
        code.store(at, address as u32)
            .store(at + 4, (address >> 32) as u32)
            .store(at + 8, length)
            .store(at + 12, u32::from(flags) | u32::from(next) << 16)
    }

    /// Makes a chain available as number `index` of all.
    pub fn offer(self, code: Code, index: u16, head: u16) -> Code {
        code.store16(self.available() + 4 + 2 * u32::from(index % self.size), head)
            .store16(self.available() + 2, index.wrapping_add(1))
    }
}

/// Kinds of block requests.
pub mod block {
    pub const IN: u32 = 0;
    pub const OUT: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const DISCARD: u32 = 11;
    pub const WRITE_ZEROES: u32 = 13;
}

/// Writes the header of a block request into memory.
pub fn block_header(code: Code, address: u32, kind: u32, sector: u64) -> Code {
    code.store(address, kind)
        .store(address + 4, 0)
        .store(address + 8, sector as u32)
        .store(address + 12, (sector >> 32) as u32)
}

/// Makes one block request with one buffer and waits for it: `index` counts the queue's requests.
pub fn block_request(
    code: Code,
    ring: Ring,
    index: u16,
    kind: u32,
    sector: u64,
    buffer: u32,
    length: u32,
) -> Code {
    block_offer(code, Device(0), ring, index, kind, sector, (buffer, length))
        .wait16(ring.used_index(), index.wrapping_add(1))
}

/// Makes one block request with one buffer, its address and length: `index` counts the queue's requests.
pub fn block_offer(
    code: Code,
    device: Device,
    ring: Ring,
    index: u16,
    kind: u32,
    sector: u64,
    (buffer, length): (u32, u32),
) -> Code {
    let (header, status) = (ring.base + 0xc000, ring.base + 0xc010);
    let code = block_header(code, header, kind, sector);
    let code = ring.descriptor(code, 0, header.into(), 16, NEXT, 1);
    let direction = if kind == block::IN { WRITE } else { 0 };
    let code = if length == 0 {
        ring.descriptor(code, 1, status.into(), 1, WRITE, 0)
    } else {
        let code = ring.descriptor(code, 1, buffer.into(), length, NEXT | direction, 2);
        ring.descriptor(code, 2, status.into(), 1, WRITE, 0)
    };
    device.notify(ring.offer(code, index, 0), ring.queue)
}

/// Makes a discard or write-zeroes request of one range and waits for it.
pub fn block_clear(code: Code, ring: Ring, index: u16, kind: u32, sector: u64, sectors: u32) -> Code {
    let range = ring.base + 0xc100;
    let code = code.store(range, sector as u32).store(range + 4, (sector >> 32) as u32);
    let code = code.store(range + 8, sectors).store(range + 12, 0);
    block_request(code, ring, index, kind, 0, range, 16)
}
