//! A userfaultfd descriptor of another process's memory.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};

use crate::memory::PAGE;

/// `UFFDIO_COPY`, `UFFDIO_WAKE`, `UFFDIO_ZEROPAGE`; events of a descriptor (linux/userfaultfd.h).
const UFFDIO_COPY: libc::Ioctl = 0xc028_aa03;
const UFFDIO_WAKE: libc::Ioctl = 0x8010_aa02;
const UFFDIO_ZEROPAGE: libc::Ioctl = 0xc020_aa04;
const PAGEFAULT: u8 = 0x12;
const REMOVE: u8 = 0x15;
const MESSAGE: usize = 32;

/// What happened to that memory; addresses are the other process's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A page is waited for.
    Fault(u64),
    /// A range was given back: it is zero from now on.
    Removed(Range<u64>),
}

/// What came of bringing pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Brought {
    /// So many bytes are there.
    Bytes(u64),
    /// The first page is there already, or is none that is waited for.
    There,
    /// There are events that must be read before.
    Busy,
    /// The process is gone.
    Gone,
}

/// The descriptor.
pub struct Faults(File);

impl AsRawFd for Faults {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl Faults {
    pub const fn new(descriptor: File) -> Self {
        Self(descriptor)
    }

    /// Reads what has happened, once something has.
    ///
    /// # Errors
    /// The host's; something that nobody asked to be told.
    pub fn events(&self) -> io::Result<Vec<Event>> {
        let mut messages = [0_u8; 16 * MESSAGE];
        let count = match (&self.0).read(&mut messages) {
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => 0,
            Ok(0) => return Err(io::Error::other("what came is no userfaultfd descriptor: it ends")),
            count => count?,
        };
        messages[..count].chunks_exact(MESSAGE).map(Event::parse).collect()
    }

    /// Copies bytes of this process to a range of whole pages of the other's, and wakes who waits for them.
    ///
    /// # Errors
    /// The host's.
    pub fn copy(&self, target: Range<u64>, source: u64) -> io::Result<Brought> {
        let length = target.end - target.start;
        let mut request = [target.start, source, length, 0, 0_u64];
        // SAFETY: UFFDIO_COPY reads and fills the struct that it is given; it reads the source as a system call does, and fails where
        // there is nothing.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_COPY, request.as_mut_ptr()) };
        brought(result, length, request[4])
    }

    /// The same with a page of zeroes.
    ///
    /// # Errors
    /// The host's.
    pub fn zero(&self, page: u64) -> io::Result<Brought> {
        let mut request = [page, PAGE, 0, 0_u64];
        // SAFETY: UFFDIO_ZEROPAGE reads and fills the struct that it is given.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_ZEROPAGE, request.as_mut_ptr()) };
        brought(result, PAGE, request[3])
    }

    /// Wakes who waits for a page that is there.
    pub fn wake(&self, page: u64) {
        let mut range = [page, PAGE];
        // SAFETY: UFFDIO_WAKE reads the struct that it is given. Who is gone need not be woken.
        unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_WAKE, range.as_mut_ptr()) };
    }
}

/// What a request says: its result, and how many bytes were done or an error's number below zero.
fn brought(result: libc::c_int, length: u64, done: u64) -> io::Result<Brought> {
    if result == 0 {
        return Ok(Brought::Bytes(length));
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN) if (1..length).contains(&done) => Ok(Brought::Bytes(done)),
        Some(libc::EAGAIN) => Ok(Brought::Busy),
        // Something else may have been put in the place of memory that was given back.
        Some(libc::EEXIST | libc::ENOENT) => Ok(Brought::There),
        Some(libc::ESRCH) => Ok(Brought::Gone),
        _ => Err(error),
    }
}

impl Event {
    fn parse(message: &[u8]) -> io::Result<Self> {
        let word = |at: usize| message[at..].first_chunk().map_or(0, |word| u64::from_le_bytes(*word));
        match message[0] {
            PAGEFAULT => Ok(Self::Fault(word(16) / PAGE * PAGE)),
            REMOVE => Ok(Self::Removed(word(8)..word(16))),
            other => Err(io::Error::other(format!("userfaultfd tells of {other:#x}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_told_apart() {
        let message = |kind: u8, words: [u64; 3]| {
            let mut message = vec![kind, 0, 0, 0, 0, 0, 0, 0];
            message.extend(words.iter().flat_map(|word| word.to_le_bytes()));
            message
        };
        let fault = Event::parse(&message(PAGEFAULT, [1, 0x7000_0123, 0])).unwrap();
        assert_eq!(fault, Event::Fault(0x7000_0000));
        let removed = Event::parse(&message(REMOVE, [0x1000, 0x3000, 0])).unwrap();
        assert_eq!(removed, Event::Removed(0x1000..0x3000));
        assert!(Event::parse(&message(0x13, [0; 3])).is_err());
    }
}
