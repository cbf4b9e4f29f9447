//! A tap in a network namespace of its own, made as the agent makes one and handed over as a descriptor.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
/// `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`.
const FLAGS: libc::c_short = 2 | 0x1000 | 0x4000;
const MULTI_QUEUE: libc::c_short = 0x0100;

/// A tap whose interface is up. The namespace lives as long as the descriptor. `None` (said aloud) without root.
pub fn create() -> Option<File> {
    create_with_wire().map(|(tap, _)| tap)
}

/// The other side of a tap: what is sent here arrives at the tap.
pub struct Wire(OwnedFd);

impl Wire {
    /// Sends an Ethernet frame.
    pub fn send(&self, frame: &[u8]) {
        // SAFETY: sends bytes that are there.
        let sent = unsafe { libc::send(self.0.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        assert_eq!(usize::try_from(sent).ok(), Some(frame.len()), "{}", io::Error::last_os_error());
    }
}

/// A tap as [`create`] makes it, and its other side.
pub fn create_with_wire() -> Option<(File, Wire)> {
    let (mut taps, wire) = create_several(1)?;
    Some((taps.remove(0), wire))
}

/// So many taps of one interface, and their other side.
pub fn create_several(count: usize) -> Option<(Vec<File>, Wire)> {
    // SAFETY: asks for a number.
    if unsafe { libc::geteuid() } != 0 {
        eprintln!("NOT RUN: a tap needs root");
        return None;
    }
    // The namespace is that of one thread, which ends.
    Some(std::thread::spawn(move || make(count)).join().unwrap().unwrap())
}

fn make(count: usize) -> io::Result<(Vec<File>, Wire)> {
    let check = |result: i32| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
    // SAFETY: moves this thread alone into a fresh network namespace.
    check(unsafe { libc::unshare(libc::CLONE_NEWNET) })?;
    // SAFETY: an ifreq is plain data, for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (target, byte) in request.ifr_name.iter_mut().zip(b"tap0") {
        *target = byte.cast_signed();
    }
    let mut taps = Vec::new();
    for _ in 0..count {
        let tap = File::options().read(true).write(true).open("/dev/net/tun")?;
        request.ifr_ifru.ifru_flags = FLAGS | if count > 1 { MULTI_QUEUE } else { 0 };
        // SAFETY: TUNSETIFF reads the ifreq that it is given.
        check(unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETIFF, &raw mut request) })?;
        taps.push(tap);
    }
    // SAFETY: makes a socket.
    let socket = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    check(socket)?;
    // SAFETY: the call above made it, and nothing else owns it.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads the ifreq that it is given.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as libc::Ioctl, &raw const request) })?;
    // SAFETY: SIOCGIFINDEX fills the ifreq that it is given.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFINDEX as libc::Ioctl, &raw mut request) })?;
    // SAFETY: SIOCGIFINDEX filled the index of the union.
    let index = unsafe { request.ifr_ifru.ifru_ifindex };
    // SAFETY: makes a socket.
    let wire = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    check(wire)?;
    // SAFETY: the call above made it, and nothing else owns it.
    let wire = unsafe { OwnedFd::from_raw_fd(wire) };
    // SAFETY: a sockaddr_ll is plain data, for which all zeroes is a valid value.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    (address.sll_family, address.sll_ifindex) = (libc::AF_PACKET as u16, index);
    let length = libc::socklen_t::try_from(size_of_val(&address)).unwrap();
    // SAFETY: bind reads the address that it is given.
    check(unsafe { libc::bind(wire.as_raw_fd(), (&raw const address).cast(), length) })?;
    Ok((taps, Wire(wire)))
}
