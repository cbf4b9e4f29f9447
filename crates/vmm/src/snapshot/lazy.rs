//! Memory that another program fills page by page, as the guest touches it (userfaultfd), in the way of Firecracker's page-fault
//! handlers: the program listens on a unix socket and gets one message, a JSON list of what is mapped where, with the
//! descriptor. From then on it answers faults, and is told which ranges the guest gives back.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use serde::{Deserialize, Serialize};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::error::{Error, Result};
use crate::memory::{Memory, PAGE};

/// `UFFDIO_API`, `UFFDIO_REGISTER`, `USERFAULTFD_IOC_NEW` (linux/userfaultfd.h).
const UFFDIO_API: libc::Ioctl = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::Ioctl = 0xc020_aa00;
const USERFAULTFD_IOC_NEW: libc::Ioctl = 0xaa00;
const UFFD_API: u64 = 0xaa;
/// The handler hears of ranges that are given back.
const UFFD_FEATURE_EVENT_REMOVE: u64 = 1 << 3;
const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;

/// One region, as the handler is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mapping {
    /// Where it is in the monitor: what faults name.
    pub base_host_virt_addr: u64,
    /// Bytes.
    pub size: u64,
    /// Where its content begins in the memory file.
    pub offset: u64,
    /// Bytes of a page.
    pub page_size: u64,
    /// The same; the older name, of which the unit is not to be believed.
    pub page_size_kib: u64,
}

/// The connection to a handler. When it ends, nobody answers faults any more.
#[derive(Debug)]
pub struct Handler {
    stream: UnixStream,
    /// As long as it is open, a fault that nobody answers waits instead of ending the monitor.
    _faults: OwnedFd,
}

impl AsRawFd for Handler {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Register {
    start: u64,
    length: u64,
    mode: u64,
    ioctls: u64,
}

impl Handler {
    /// Gives the faults of fresh memory to the program at the other end. `device` is `/dev/userfaultfd`, if it is at hand; else the
    /// system call is made, which few may make.
    ///
    /// # Errors
    /// [`Error::Io`]: the host has no userfaultfd or forbids it, or nobody listens.
    pub fn connect(memory: &Memory, stream: UnixStream, device: Option<File>) -> Result<Self> {
        let faults = userfaultfd(device).map_err(Error::io(
            "userfaultfd: the host forbids it (it needs CAP_SYS_PTRACE, vm.unprivileged_userfaultfd=1, or /dev/userfaultfd)",
        ))?;
        let mut api = Api { api: UFFD_API, features: UFFD_FEATURE_EVENT_REMOVE, ioctls: 0 };
        // SAFETY: UFFDIO_API reads and fills the struct that it is given.
        let agreed = unsafe { libc::ioctl(faults.as_raw_fd(), UFFDIO_API, &raw mut api) };
        check(agreed).map_err(Error::io("userfaultfd: its version and features"))?;
        let (mut offset, mut mappings) = (0, Vec::new());
        for region in memory.iter() {
            let host = region
                .get_host_address(MemoryRegionAddress(0))
                .map_err(Error::memory("address of a region"))?;
            let (start, length) = (host as u64, region.len());
            let mut register = Register { start, length, mode: UFFDIO_REGISTER_MODE_MISSING, ioctls: 0 };
            // SAFETY: UFFDIO_REGISTER reads and fills the struct that it is given; the range is one mapping of guest memory.
            let registered = unsafe { libc::ioctl(faults.as_raw_fd(), UFFDIO_REGISTER, &raw mut register) };
            check(registered).map_err(Error::io("userfaultfd: registering guest memory"))?;
            mappings.push(Mapping {
                base_host_virt_addr: start,
                size: length,
                offset,
                page_size: PAGE,
                page_size_kib: PAGE,
            });
            offset += length;
        }
        let text = serde_json::to_string(&mappings).map_err(|error| Error::Snapshot(error.to_string()))?;
        let sent = stream.send_with_fd(text.as_bytes(), faults.as_raw_fd()).map_err(io::Error::from);
        sent.map_err(Error::io("telling the page-fault handler"))?;
        stream.set_nonblocking(true).map_err(Error::io("the page-fault handler's socket"))?;
        Ok(Self { stream, _faults: faults })
    }

    /// Whether the handler has closed the connection. What it says is not listened to.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        let mut byte = [0; 64];
        loop {
            match self.stream.recv_with_fd(&mut byte).map_err(io::Error::from) {
                Ok((0, _)) => return true,
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return error.kind() != ErrorKind::WouldBlock,
            }
        }
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn userfaultfd(device: Option<File>) -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    let descriptor = match device {
        // SAFETY: makes a descriptor; the flags are its argument.
        Some(device) => unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) }.into(),
        // SAFETY: makes a descriptor.
        None => unsafe { libc::syscall(libc::SYS_userfaultfd, flags) },
    };
    let descriptor = RawFd::try_from(descriptor).map_err(io::Error::other)?;
    check(descriptor)?;
    // SAFETY: the call just made this descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}
