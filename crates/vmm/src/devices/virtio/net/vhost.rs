//! vhost-net: the host's kernel moves packets between one pair of queues and its tap (Linux, `include/uapi/linux/vhost.h`).
//!
//! One open `/dev/vhost-net` serves one pair. What names memory and eventfds is said before the lock-down ([`Vhost::connect`]): the calls
//! that are left for a running monitor set rings up, connect the tap or let go of it, and ask where a ring is. The kernel runs a
//! worker for it (`vhost-PID`), from Linux 6.4 on a thread of this process, before that one of the kernel's in the same cgroup.

use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, RawFd};

use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::devices::virtio::{F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1};
use crate::memory::Memory;

/// Queues of a pair: to the guest, from it. The kernel numbers them in the same way.
const RINGS: usize = 2;
/// Features that are about rings and headers, which the kernel must have; all others are the tap's.
const KERNELS: u64 = F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC | 1 << VIRTIO_NET_F_MRG_RXBUF;
/// Most pieces of guest memory (the kernel's own default limit is 64).
const MAX_REGIONS: usize = 32;
/// Lets go of the tap.
const NO_TAP: RawFd = -1;

/// A ring's number, and a value.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct RingState {
    index: u32,
    value: u32,
}

/// A ring's number, and a descriptor.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct RingFile {
    index: u32,
    descriptor: RawFd,
}

/// Where a ring is, in this process's addresses.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct RingAddress {
    index: u32,
    flags: u32,
    descriptors: u64,
    used: u64,
    available: u64,
    log: u64,
}

/// A piece of guest memory.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Region {
    guest: u64,
    size: u64,
    host: u64,
    padding: u64,
}

/// All of it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct MemoryTable {
    count: u32,
    padding: u32,
    regions: [Region; MAX_REGIONS],
}

/// A call, with the type of its argument.
struct Request<T> {
    number: libc::Ioctl,
    name: &'static str,
    argument: PhantomData<T>,
}

const READ: libc::Ioctl = 2;
const WRITE: libc::Ioctl = 1;

impl<T> Request<T> {
    /// `_IOC(direction, 0xaf, number, sizeof(T))`.
    const fn new(direction: libc::Ioctl, number: libc::Ioctl, name: &'static str) -> Self {
        Self::sized(direction, number, size_of::<T>(), name)
    }

    const fn sized(direction: libc::Ioctl, number: libc::Ioctl, size: usize, name: &'static str) -> Self {
        let number = direction << 30 | (size as libc::Ioctl) << 16 | 0xaf << 8 | number;
        Self { number, name, argument: PhantomData }
    }
}

const GET_FEATURES_CALL: Request<u64> = Request::new(READ, 0x00, "VHOST_GET_FEATURES");
const SET_FEATURES_CALL: Request<u64> = Request::new(WRITE, 0x00, "VHOST_SET_FEATURES");
const SET_OWNER_CALL: Request<()> = Request::new(0, 0x01, "VHOST_SET_OWNER");
/// Its size is that of the table's head.
const SET_MEM_TABLE_CALL: Request<MemoryTable> = Request::sized(WRITE, 0x03, 8, "VHOST_SET_MEM_TABLE");
const SET_VRING_NUM_CALL: Request<RingState> = Request::new(WRITE, 0x10, "VHOST_SET_VRING_NUM");
const SET_VRING_ADDR_CALL: Request<RingAddress> = Request::new(WRITE, 0x11, "VHOST_SET_VRING_ADDR");
const SET_VRING_BASE_CALL: Request<RingState> = Request::new(WRITE, 0x12, "VHOST_SET_VRING_BASE");
const GET_VRING_BASE_CALL: Request<RingState> = Request::new(READ | WRITE, 0x12, "VHOST_GET_VRING_BASE");
const SET_VRING_KICK_CALL: Request<RingFile> = Request::new(WRITE, 0x20, "VHOST_SET_VRING_KICK");
const SET_VRING_CALL_CALL: Request<RingFile> = Request::new(WRITE, 0x21, "VHOST_SET_VRING_CALL");
const SET_VRING_ERR_CALL: Request<RingFile> = Request::new(WRITE, 0x22, "VHOST_SET_VRING_ERR");
const SET_BACKEND_CALL: Request<RingFile> = Request::new(WRITE, 0x30, "VHOST_NET_SET_BACKEND");

/// What its driver takes of the features.
pub const SET_FEATURES: libc::Ioctl = SET_FEATURES_CALL.number;
/// A ring's size.
pub const SET_VRING_NUM: libc::Ioctl = SET_VRING_NUM_CALL.number;
/// Where a ring is in memory.
pub const SET_VRING_ADDR: libc::Ioctl = SET_VRING_ADDR_CALL.number;
/// Where a ring goes on.
pub const SET_VRING_BASE: libc::Ioctl = SET_VRING_BASE_CALL.number;
/// Where a ring has stopped.
pub const GET_VRING_BASE: libc::Ioctl = GET_VRING_BASE_CALL.number;
/// A ring's tap, or none.
pub const SET_BACKEND: libc::Ioctl = SET_BACKEND_CALL.number;

/// An open `/dev/vhost-net` of this process.
#[derive(Debug)]
pub struct Vhost {
    file: File,
    features: u64,
    /// The rings that the guest has set up, from [`Vhost::start`] to [`Vhost::stop`].
    started: [bool; RINGS],
}

impl Vhost {
    /// Takes over a fresh `/dev/vhost-net`: its worker is in this process's memory from here on.
    ///
    /// # Errors
    /// It is none, has an owner already (`EBUSY`), or is too old for virtio 1.
    pub fn new(file: File) -> io::Result<Self> {
        let mut this = Self { file, features: 0, started: [false; RINGS] };
        let mut features = 0;
        this.call(&GET_FEATURES_CALL, &mut features)?;
        if features & F_VERSION_1 == 0 {
            return Err(io::Error::other(format!("its features {features:#x} lack VIRTIO_F_VERSION_1")));
        }
        this.features = features;
        this.call(&SET_OWNER_CALL, &mut ())?;
        Ok(this)
    }

    fn call<T>(&self, request: &Request<T>, argument: &mut T) -> io::Result<()> {
        // SAFETY: the request's argument has the type T, and lives during the call.
        if unsafe { libc::ioctl(self.file.as_raw_fd(), request.number, &raw mut *argument) } < 0 {
            let error = io::Error::last_os_error();
            return Err(io::Error::new(error.kind(), format!("{}: {error}", request.name)));
        }
        Ok(())
    }

    /// What is left of a device's features.
    #[must_use]
    pub const fn offered(&self, features: u64) -> u64 {
        features & (self.features | !KERNELS)
    }

    /// Says where guest memory is, and the pair's eventfds: its two `bells`, the `line` that interrupts the guest, and `broken`, which
    /// rings when the guest breaks a ring.
    ///
    /// # Errors
    /// The host's error.
    pub fn connect(
        &self,
        memory: &Memory,
        bells: &[EventFd],
        line: &EventFd,
        broken: &EventFd,
    ) -> io::Result<()> {
        self.call(&SET_MEM_TABLE_CALL, &mut table(memory)?)?;
        for (index, bell) in (0_u32..).zip(bells.iter().take(RINGS)) {
            let eventfds =
                [(SET_VRING_KICK_CALL, bell), (SET_VRING_CALL_CALL, line), (SET_VRING_ERR_CALL, broken)];
            for (request, eventfd) in eventfds {
                self.call(&request, &mut RingFile { index, descriptor: eventfd.as_raw_fd() })?;
            }
        }
        Ok(())
    }

    /// Lets the kernel serve those of the pair's queues that are ready, from where they are.
    ///
    /// # Errors
    /// The host's error; nothing is served then.
    pub fn start(&mut self, features: u64, memory: &Memory, queues: &[Queue], tap: RawFd) -> io::Result<()> {
        let started = self.start_all(features, memory, queues, tap);
        if started.is_err() {
            let _ = self.stop();
        }
        started
    }

    fn start_all(&mut self, features: u64, memory: &Memory, queues: &[Queue], tap: RawFd) -> io::Result<()> {
        self.call(&SET_FEATURES_CALL, &mut (features & KERNELS))?;
        for (index, queue) in (0_u32..).zip(queues.iter().take(RINGS)) {
            if !queue.ready() {
                continue;
            }
            let state = |value: u16| RingState { index, value: value.into() };
            self.call(&SET_VRING_NUM_CALL, &mut state(queue.size()))?;
            self.call(&SET_VRING_BASE_CALL, &mut state(queue.next_avail()))?;
            self.call(&SET_VRING_ADDR_CALL, &mut ring_address(memory, queue, index)?)?;
            self.started[index as usize] = true;
        }
        self.set_tap(tap)
    }

    /// Lets the kernel go on with what was held.
    ///
    /// # Errors
    /// The host's error.
    pub fn go_on(&self, tap: RawFd) -> io::Result<()> {
        self.set_tap(tap)
    }

    /// Holds the rings: when this returns the kernel does nothing with them, and all it has done is in guest memory. `queues` learn
    /// where it is.
    ///
    /// # Errors
    /// The host's error.
    pub fn hold(&self, memory: &Memory, queues: &mut [Queue]) -> io::Result<()> {
        self.set_tap(NO_TAP)?;
        for (index, queue) in self.rings().zip(queues.iter_mut().take(RINGS)) {
            let Some(index) = index else { continue };
            let mut state = RingState { index, value: 0 };
            self.call(&GET_VRING_BASE_CALL, &mut state)?;
            // Of a split ring it is the available index alone; where the used one is, the ring says, and a start reads it there.
            queue.set_next_avail((state.value & 0xffff) as u16);
            let used = queue.used_idx(memory, std::sync::atomic::Ordering::Acquire);
            queue.set_next_used(used.map_err(io::Error::other)?.0);
        }
        Ok(())
    }

    /// Ends the kernel's work on the rings.
    ///
    /// # Errors
    /// The host's error.
    pub fn stop(&mut self) -> io::Result<()> {
        let stopped = self.set_tap(NO_TAP);
        self.started = [false; RINGS];
        stopped
    }

    /// The number of each ring that was started.
    fn rings(&self) -> impl Iterator<Item = Option<u32>> + '_ {
        (0_u32..).zip(self.started).map(|(index, started)| started.then_some(index))
    }

    fn set_tap(&self, descriptor: RawFd) -> io::Result<()> {
        let mut rings = self.rings().flatten();
        rings.try_for_each(|index| self.call(&SET_BACKEND_CALL, &mut RingFile { index, descriptor }))
    }
}

/// Guest memory as the kernel takes it: RAM, and what may become RAM.
fn table(memory: &Memory) -> io::Result<MemoryTable> {
    let mut table = MemoryTable::default();
    for region in memory.iter() {
        let host = region.get_host_address(MemoryRegionAddress(0)).map_err(io::Error::other)?;
        let place = table.regions.get_mut(table.count as usize);
        *place
            .ok_or_else(|| io::Error::other(format!("guest memory has more than {MAX_REGIONS} regions")))? =
            Region {
                guest: region.start_addr().raw_value(),
                size: region.len(),
                host: host as u64,
                padding: 0,
            };
        table.count += 1;
    }
    Ok(table)
}

/// Where a queue is in this process's addresses.
fn ring_address(memory: &Memory, queue: &Queue, index: u32) -> io::Result<RingAddress> {
    let size = u64::from(queue.size());
    // virtio 1.2, 2.7: sizes of the three parts, each ring with its field for event suppression.
    Ok(RingAddress {
        index,
        flags: 0,
        descriptors: host_address(memory, queue.desc_table(), 16 * size)?,
        used: host_address(memory, queue.used_ring(), 6 + 8 * size)?,
        available: host_address(memory, queue.avail_ring(), 6 + 2 * size)?,
        log: 0,
    })
}

/// Where `length` bytes of guest memory are; they must be of one region, as no other is sure to follow it here.
fn host_address(memory: &Memory, address: u64, length: u64) -> io::Result<u64> {
    let found = memory.to_region_addr(GuestAddress(address));
    let whole = found.filter(|(region, offset)| region.len() - offset.raw_value() >= length);
    let (region, offset) = whole.ok_or_else(|| {
        io::Error::other(format!("a ring's {length} bytes at {address:#x} are not in one region of memory"))
    })?;
    Ok(region.get_host_address(offset).map_err(io::Error::other)? as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Tracking, create_with, hotplug_range};
    use vm_memory::Bytes;

    /// The numbers of a C program that includes `linux/vhost.h`.
    #[test]
    fn calls_have_the_kernels_numbers() {
        assert_eq!((GET_FEATURES_CALL.number, SET_FEATURES), (0x8008_af00, 0x4008_af00));
        assert_eq!((SET_OWNER_CALL.number, SET_MEM_TABLE_CALL.number), (0xaf01, 0x4008_af03));
        assert_eq!((SET_VRING_NUM, SET_VRING_ADDR), (0x4008_af10, 0x4028_af11));
        assert_eq!((SET_VRING_BASE, GET_VRING_BASE), (0x4008_af12, 0xc008_af12));
        assert_eq!((SET_VRING_KICK_CALL.number, SET_VRING_CALL_CALL.number), (0x4008_af20, 0x4008_af21));
        assert_eq!((SET_VRING_ERR_CALL.number, SET_BACKEND), (0x4008_af22, 0x4008_af30));
        assert_eq!((size_of::<Region>(), std::mem::offset_of!(MemoryTable, regions)), (32, 8));
        assert_eq!(std::mem::offset_of!(RingAddress, available), 24);
    }

    #[test]
    fn the_table_has_all_memory_and_what_may_become_memory() {
        let range = hotplug_range((3 << 10) + 4, 256, 2);
        let memory = create_with((3 << 10) + 4, Some(range), Tracking::Off).unwrap();
        let table = table(&memory).unwrap();
        let places: Vec<_> = table.regions[..3].iter().map(|region| (region.guest, region.size)).collect();
        assert_eq!(table.count, 3);
        assert_eq!(places, [(0, 3 << 30), (1 << 32, 4 << 20), (range.start, range.size)]);
        assert_eq!(table.regions[3], Region::default());
        // The addresses are those of the memory.
        memory.write_obj(0x5a_u8, GuestAddress(range.start + 9)).unwrap();
        let host = (table.regions[2].host + 9) as *const u8;
        // SAFETY: the region is longer, and lives.
        assert_eq!(unsafe { host.read_volatile() }, 0x5a);
    }

    #[test]
    fn a_ring_is_of_one_region_and_inside_of_it() {
        let range = hotplug_range(4, 128, 2);
        let memory = create_with(4, Some(range), Tracking::Off).unwrap();
        let base = table(&memory).unwrap().regions[0].host;
        let end = 4 << 20;
        assert_eq!(host_address(&memory, 0x1000, 16).unwrap(), base + 0x1000);
        assert_eq!(host_address(&memory, end - 16, 16).unwrap(), base + end - 16);
        for (address, length) in [(end - 16, 17), (end, 1), (u64::MAX, 1), (u64::MAX - 15, 16), (0, end + 1)]
        {
            assert!(host_address(&memory, address, length).is_err(), "{address:#x} {length}");
        }
        let mut queue = Queue::new(256).unwrap();
        queue.set_size(128);
        queue.set_desc_table_address(Some(0x1000), None);
        queue.set_avail_ring_address(Some(0x3000), None);
        // 1030 bytes from a multiple of 4 on.
        queue.set_used_ring_address(Some((4 << 20) - 1032), None);
        let address = ring_address(&memory, &queue, 1).unwrap();
        assert_eq!(
            (address.index, address.descriptors - base, address.available - base),
            (1, 0x1000, 0x3000)
        );
        assert_eq!(address.used - base, (4 << 20) - 1032);
        queue.set_used_ring_address(Some((4 << 20) - 1028), None);
        assert!(ring_address(&memory, &queue, 1).unwrap_err().to_string().contains("1030 bytes at 0x3ffbfc"));
    }

    #[test]
    fn the_kernel_need_not_know_what_is_the_taps_affair() {
        let vhost =
            |features| Vhost { file: File::open("/dev/null").unwrap(), features, started: [false; RINGS] };
        let mac_and_checksum = 1 << 5 | 1 << 0;
        let all = F_EVENT_IDX | F_INDIRECT_DESC | 1 << VIRTIO_NET_F_MRG_RXBUF | mac_and_checksum;
        assert_eq!(vhost(u64::MAX).offered(all), all);
        assert_eq!(vhost(F_VERSION_1 | F_EVENT_IDX).offered(all), F_EVENT_IDX | mac_and_checksum);
    }

    #[test]
    fn what_is_no_vhost_net_is_refused() {
        let error = Vhost::new(File::open("/dev/null").unwrap()).unwrap_err().to_string();
        assert!(error.starts_with("VHOST_GET_FEATURES: "), "{error}");
    }
}
