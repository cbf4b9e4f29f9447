//! A second process that opens what a locked-down monitor may not open itself, in stand-alone mode.
//!
//! Scripts that were made for Firecracker name files when they need them: a snapshot's when it is taken, a disk's when it is
//! swapped. The monitor opens nothing after its lock-down. With `--open-paths` it starts this process first, asks it, and gets
//! descriptors back. Whoever takes over a monitor that has one can open what its user can, so the agent starts none: it hands
//! descriptors over (`PUT /descriptors/NAME`).

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::descriptors::Access;
use crate::seccomp::{self, Kind};
use crate::threads;

/// Longest path that is opened.
const MAX_PATH: usize = 4096;

/// The monitor's side.
#[derive(Clone, Debug)]
pub struct Opener(Arc<Mutex<UnixStream>>);

impl Opener {
    /// Starts the process. No other thread may run yet.
    ///
    /// # Errors
    /// The host's error.
    pub fn start() -> io::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        // SAFETY: this process has one thread, so the child's copy is whole; it never returns from here.
        match unsafe { libc::fork() } {
            0 => {
                drop(ours);
                let code = i32::from(run(&theirs).is_err());
                // SAFETY: ends the process.
                unsafe { libc::_exit(code) }
            }
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(Self(Arc::new(Mutex::new(ours)))),
        }
    }

    /// Opens a path.
    ///
    /// # Errors
    /// As if it had been opened here; the process has ended.
    pub fn open(&self, path: &str, access: Access) -> io::Result<File> {
        let length = u16::try_from(path.len()).map_err(|_| ErrorKind::InvalidFilename)?;
        let mut request = length.to_le_bytes().to_vec();
        request.push(access as u8);
        request.extend(path.bytes());
        let mut socket = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        socket.write_all(&request)?;
        let mut answer = [0; 4];
        let (count, file) = socket.recv_with_fd(&mut answer).map_err(io::Error::from)?;
        match (count, file) {
            (4, Some(file)) => Ok(file),
            (4, None) => Err(io::Error::from_raw_os_error(i32::from_le_bytes(answer))),
            _ => Err(ErrorKind::UnexpectedEof.into()),
        }
    }
}

/// The process's whole life: it ends with the monitor, whose end of the socket is closed then.
fn run(socket: &UnixStream) -> io::Result<()> {
    threads::name_this(threads::OPENER);
    close_others(socket.as_raw_fd());
    seccomp::sigsys::install(None).map_err(io::Error::other)?;
    let filter = seccomp::compile(Kind::Opener).map_err(io::Error::other)?;
    seccomp::install(&filter).map_err(io::Error::other)?;
    let mut reader = socket;
    loop {
        let mut head = [0; 3];
        match reader.read_exact(&mut head) {
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(()),
            result => result?,
        }
        let length = usize::from(u16::from_le_bytes([head[0], head[1]]));
        let mut path = vec![0; length];
        reader.read_exact(&mut path)?;
        let opened = match (std::str::from_utf8(&path), Access::from_number(head[2])) {
            (Ok(path), Some(access)) if length <= MAX_PATH => access.options().open(path),
            _ => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        };
        match opened {
            Ok(file) => drop(socket.send_with_fd(&[0_u8; 4][..], file.as_raw_fd()).map_err(io::Error::from)?),
            Err(error) => {
                let number = error.raw_os_error().unwrap_or(libc::EIO);
                (&mut &*socket).write_all(&number.to_le_bytes())?;
            }
        }
    }
}

/// What the monitor was handed is none of this process's business.
fn close_others(keep: i32) {
    let keep = keep.cast_unsigned();
    for (from, to) in [(3, keep - 1), (keep + 1, u32::MAX)] {
        if from <= to {
            // SAFETY: closes descriptors that nothing here uses; their owners are never dropped in this process.
            unsafe { libc::syscall(libc::SYS_close_range, from, to, 0) };
        }
    }
}
