//! The addresses of an interface, on either side of a tap.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Gives an interface its address (of a /24) and takes it up.
pub fn bring_up(name: &str, address: Ipv4Addr) -> io::Result<()> {
    // SAFETY: makes a socket.
    let socket = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if socket < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call above made it, and nothing else owns it.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    let mut request = named(name);
    request.ifr_ifru.ifru_addr = plain(address);
    ask(&socket, libc::SIOCSIFADDR, &mut request)?;
    request.ifr_ifru.ifru_netmask = plain(Ipv4Addr::new(255, 255, 255, 0));
    ask(&socket, libc::SIOCSIFNETMASK, &mut request)?;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    ask(&socket, libc::SIOCSIFFLAGS, &mut request)
}

/// A request about this interface.
pub fn named(name: &str) -> libc::ifreq {
    // SAFETY: an ifreq is plain data, for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (target, byte) in request.ifr_name.iter_mut().zip(name.bytes()).take(libc::IFNAMSIZ - 1) {
        *target = byte.cast_signed();
    }
    request
}

fn ask(socket: &OwnedFd, what: libc::c_ulong, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: each of these requests reads the ifreq that it is given.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), what as libc::Ioctl, request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn plain(address: Ipv4Addr) -> libc::sockaddr {
    let internet = libc::sockaddr_in {
        sin_family: libc::AF_INET as libc::sa_family_t,
        sin_port: 0,
        sin_addr: libc::in_addr { s_addr: u32::from(address).to_be() },
        sin_zero: [0; 8],
    };
    // SAFETY: both are plain data of sixteen bytes; the first two say which address it is.
    unsafe { std::mem::transmute(internet) }
}
