//! The tap descriptor.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use super::queue::{HEADER, Tap};
use crate::devices::virtio::pieces::Pieces;
use crate::memory::Slice;

const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
/// The tap's header length.
pub const TUNSETVNETHDRSZ: libc::Ioctl = 0x4004_54d8;
/// What the tap may hand over unfinished.
pub const TUNSETOFFLOAD: libc::Ioctl = 0x4004_54d0;
/// Whether packets from the host may come by this one of an interface's queues.
pub const TUNSETQUEUE: libc::Ioctl = 0x4004_54d9;
const TUNGETIFF: libc::Ioctl = 0x8004_54d2;

const IFF_TAP: libc::c_short = 2;
const IFF_NO_PI: libc::c_short = 0x1000;
const IFF_VNET_HDR: libc::c_short = 0x4000;
const IFF_MULTI_QUEUE: libc::c_short = 0x0100;
const IFF_ATTACH_QUEUE: libc::c_short = 0x0200;
const IFF_DETACH_QUEUE: libc::c_short = 0x0400;

/// A tap that is attached to its interface.
#[derive(Debug)]
pub struct TapDevice {
    file: File,
    /// Packets from the host may come by it.
    attached: bool,
}

/// The flags that a tap must have.
const fn wanted(several: bool) -> libc::c_short {
    IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | if several { IFF_MULTI_QUEUE } else { 0 }
}

impl TapDevice {
    /// Takes a tap that is attached already, one of several of its interface or the only one; its flags are checked.
    ///
    /// # Errors
    /// It is no tap, or lacks `IFF_NO_PI`, `IFF_VNET_HDR`, or as one of several `IFF_MULTI_QUEUE`.
    pub fn from_fd(descriptor: OwnedFd, several: bool) -> io::Result<Self> {
        let file = File::from(descriptor);
        // SAFETY: an ifreq is plain data, for which all zeroes is a valid value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        // SAFETY: TUNGETIFF fills the ifreq that it is given.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), TUNGETIFF, &raw mut request) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: TUNGETIFF filled the flags of the union.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        let needed = wanted(several);
        if flags & needed != needed {
            let (more, needed) = (if several { " | IFF_MULTI_QUEUE" } else { "" }, needed.cast_unsigned());
            return Err(io::Error::other(format!(
                "flags {flags:#x} lack some of IFF_TAP | IFF_NO_PI | IFF_VNET_HDR{more} ({needed:#x})"
            )));
        }
        Self::prepare(file)
    }

    /// Attaches to the tap of this name (stand-alone mode).
    ///
    /// # Errors
    /// The name is too long, the tap is missing or forbidden.
    pub fn open(name: &str, several: bool) -> io::Result<Self> {
        let file = File::options().read(true).write(true).open("/dev/net/tun")?;
        // SAFETY: an ifreq is plain data, for which all zeroes is a valid value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        if name.is_empty() || name.len() >= request.ifr_name.len() {
            return Err(io::Error::other("the name is not 1–15 bytes long"));
        }
        for (target, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *target = byte.cast_signed();
        }
        request.ifr_ifru.ifru_flags = wanted(several);
        // SAFETY: TUNSETIFF reads the ifreq that it is given.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Self::prepare(file)
    }

    fn prepare(file: File) -> io::Result<Self> {
        let size = libc::c_int::try_from(HEADER).map_err(io::Error::other)?;
        // SAFETY: TUNSETVNETHDRSZ reads one int.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETVNETHDRSZ, &raw const size) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: plain fcntl calls on an open descriptor.
        let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
        // SAFETY: as above.
        if flags < 0 || unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) } < 0
        {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { file, attached: true })
    }

    /// Says which unfinished packets the guest takes (`TUN_F_*`).
    ///
    /// # Errors
    /// The host's error.
    pub fn set_offload(&self, flags: u32) -> io::Result<()> {
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), TUNSETOFFLOAD, libc::c_ulong::from(flags)) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Says whether packets from the host may come by this one of an interface's taps.
    ///
    /// # Errors
    /// The host's error.
    pub fn attach(&mut self, attached: bool) -> io::Result<()> {
        if attached == self.attached {
            return Ok(());
        }
        // SAFETY: an ifreq is plain data, for which all zeroes is a valid value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        request.ifr_ifru.ifru_flags = if attached { IFF_ATTACH_QUEUE } else { IFF_DETACH_QUEUE };
        // SAFETY: TUNSETQUEUE reads the ifreq that it is given.
        if unsafe { libc::ioctl(self.file.as_raw_fd(), TUNSETQUEUE, &raw const request) } < 0 {
            return Err(io::Error::last_os_error());
        }
        self.attached = attached;
        Ok(())
    }

    /// The descriptor.
    #[must_use]
    pub fn raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl From<TapDevice> for OwnedFd {
    fn from(tap: TapDevice) -> Self {
        tap.file.into()
    }
}

impl Tap for TapDevice {
    fn receive(&mut self, packet: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            match self.file.read(packet) {
                Ok(count) => return Ok(Some(count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// More pieces than a call takes (1024) are no packet of a driver's that keeps to the queue's size (virtio 1.2, 2.7.5.3.1).
    fn send(&mut self, packet: &[Slice<'_>]) -> io::Result<()> {
        let pieces = Pieces::to_read(packet);
        let (pieces, count) = pieces.vector();
        let count = libc::c_int::try_from(count).map_err(io::Error::other)?;
        // SAFETY: the pieces are guest memory, which stays mapped while the slices are there.
        let sent = unsafe { libc::writev(self.file.as_raw_fd(), pieces, count) };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}
