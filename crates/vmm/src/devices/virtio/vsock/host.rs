//! The host's side: unix sockets in one folder, all waited for at one descriptor.
//!
//! The address of a unix socket is a path, and no call takes a folder beside it. So the device thread, alone of all threads,
//! stands in the folder (`docs/decisions/0013-vsock-in-one-folder.md`) and uses bare names.

use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::switch::{Event, Host, Socket, Switch};

/// Token of the listener; those of connections begin behind it.
const LISTENER: u64 = 0;
/// Events that are fetched at a time.
const EVENTS: usize = 32;

/// A host program's end of a connection.
#[derive(Debug)]
pub struct HostSocket(UnixStream);

/// The sockets of one device.
pub struct HostSockets {
    epoll: Epoll,
    /// Until the device thread stands in it.
    folder: Option<OwnedFd>,
    name: String,
    listener: Option<UnixListener>,
}

impl HostSockets {
    /// Sockets that will be made in this folder.
    ///
    /// # Errors
    /// The host gives no epoll.
    pub fn new(folder: OwnedFd, name: String) -> io::Result<Self> {
        Ok(Self { epoll: Epoll::new()?, folder: Some(folder), name, listener: None })
    }

    /// Becomes readable when something happens to any of the sockets.
    #[must_use]
    pub fn descriptor(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// Moves the calling thread into the folder and listens there. A socket that a dead monitor left is replaced.
    ///
    /// # Errors
    /// The host's error.
    pub fn listen(&mut self) -> io::Result<()> {
        let Some(folder) = self.folder.take() else { return Ok(()) };
        // SAFETY: gives this thread a working folder of its own; no memory is concerned.
        if unsafe { libc::unshare(libc::CLONE_FS) } < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: plain call on an open descriptor.
        if unsafe { libc::fchdir(folder.as_raw_fd()) } < 0 {
            return Err(io::Error::last_os_error());
        }
        let dead = UnixStream::connect(&self.name).is_err_and(|e| e.kind() == ErrorKind::ConnectionRefused);
        if dead {
            std::fs::remove_file(&self.name)?;
        }
        let listener = UnixListener::bind(&self.name)?;
        listener.set_nonblocking(true)?;
        self.watch(listener.as_raw_fd(), LISTENER, EventSet::IN)?;
        self.listener = Some(listener);
        Ok(())
    }

    fn watch(&self, descriptor: RawFd, token: u64, events: EventSet) -> io::Result<()> {
        let event = EpollEvent::new(events | EventSet::EDGE_TRIGGERED, token);
        self.epoll.ctl(ControlOperation::Add, descriptor, event)
    }

    fn adopt(&self, stream: UnixStream, token: u64) -> io::Result<HostSocket> {
        let events = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP;
        self.watch(stream.as_raw_fd(), token, events)?;
        Ok(HostSocket(stream))
    }

    /// Tells the switch all that has happened.
    pub fn poll(&self, switch: &mut Switch<HostSocket>) {
        let mut events = [EpollEvent::default(); EVENTS];
        loop {
            let count = self.epoll.wait(0, &mut events).unwrap_or(0);
            for event in &events[..count] {
                let has = |set: EventSet| event.event_set().intersects(set);
                if event.data() == LISTENER {
                    self.accept(switch);
                } else {
                    let gone = has(EventSet::HANG_UP | EventSet::ERROR);
                    let readable = has(EventSet::IN | EventSet::READ_HANG_UP);
                    switch.event(event.data(), Event { readable, writable: has(EventSet::OUT), gone });
                }
            }
            if count < EVENTS {
                return;
            }
        }
    }

    /// Takes every host program that has come; those that are too many are sent away.
    fn accept(&self, switch: &mut Switch<HostSocket>) {
        let Some(listener) = &self.listener else { return };
        loop {
            let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
            // SAFETY: plain call on an open descriptor; no address is asked for.
            let accepted = unsafe {
                libc::accept4(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut(), flags)
            };
            if accepted < 0 {
                if io::Error::last_os_error().kind() == ErrorKind::Interrupted {
                    continue;
                }
                return;
            }
            // SAFETY: accept4 just made this descriptor, and nothing else owns it.
            let stream = UnixStream::from(unsafe { OwnedFd::from_raw_fd(accepted) });
            let token = switch.token();
            if switch.has_room()
                && let Ok(socket) = self.adopt(stream, token)
            {
                switch.add(token, socket);
            }
        }
    }
}

impl Host for HostSockets {
    type Socket = HostSocket;

    fn connect(&mut self, port: u32, token: u64) -> io::Result<HostSocket> {
        let (address, length) = address(&format!("{}_{port}", self.name))?;
        let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: makes a socket.
        let socket = unsafe { libc::socket(libc::AF_UNIX, kind, 0) };
        if socket < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call above made this descriptor, and nothing else owns it.
        let stream = UnixStream::from(unsafe { OwnedFd::from_raw_fd(socket) });
        // A unix socket is connected at once or not at all: no room in the listener's queue is an error, too.
        // SAFETY: the address is valid for its length.
        let result = unsafe { libc::connect(socket, (&raw const address).cast(), length) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        self.adopt(stream, token)
    }
}

/// The address of a name in the folder that the thread stands in.
fn address(name: &str) -> io::Result<(libc::sockaddr_un, libc::socklen_t)> {
    // SAFETY: all zeroes is a valid value.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    if name.len() >= address.sun_path.len() {
        return Err(ErrorKind::InvalidInput.into());
    }
    address.sun_family = libc::sa_family_t::try_from(libc::AF_UNIX).map_err(io::Error::other)?;
    for (target, byte) in address.sun_path.iter_mut().zip(name.bytes()) {
        *target = byte.cast_signed();
    }
    let length = libc::socklen_t::try_from(size_of::<libc::sockaddr_un>()).map_err(io::Error::other)?;
    Ok((address, length))
}

impl Socket for HostSocket {
    fn read(&mut self, target: &mut [u8]) -> io::Result<usize> {
        self.0.read(target)
    }

    fn write(&mut self, source: &[u8]) -> io::Result<usize> {
        self.0.write(source)
    }

    fn shut(&mut self, how: Shutdown) {
        // It fails when the other side is gone, which is noticed elsewhere.
        let _ = self.0.shutdown(how);
    }
}
