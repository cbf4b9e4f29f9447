//! Who does a disk's work while the device thread goes on: [`super::uring`] or [`super::worker`]. What both take is here.

use std::io;
use std::os::fd::RawFd;

use super::backend::Backend;
use super::ranges::{Kind, Range};
use crate::memory::{Memory, Slice};

/// Requests of one disk that may be under way at a time. What is beyond waits in the guest's queues.
pub const ROOM: usize = 128;

/// What the host has to do for a request; `D` is where its data is.
#[derive(Debug)]
pub enum Work<D> {
    /// Fill memory from the disk.
    Read {
        /// Bytes from the disk's begin.
        offset: u64,
        /// Memory.
        data: D,
    },
    /// Write memory to the disk.
    Write {
        /// Bytes from the disk's begin.
        offset: u64,
        /// Memory.
        data: D,
        /// Put it on stable storage as well.
        stable: bool,
    },
    /// Discard or zero ranges inside the disk.
    Clear {
        /// Which of the two.
        kind: Kind,
        /// The ranges.
        ranges: Vec<Range>,
        /// Put it on stable storage as well.
        stable: bool,
    },
    /// Put on stable storage what was finished before.
    Flush,
}

impl<D> Work<D> {
    /// The same work with its data named in another way.
    pub fn map<E>(self, name: impl FnOnce(D) -> E) -> Work<E> {
        match self {
            Self::Read { offset, data } => Work::Read { offset, data: name(data) },
            Self::Write { offset, data, stable } => Work::Write { offset, data: name(data), stable },
            Self::Clear { kind, ranges, stable } => Work::Clear { kind, ranges, stable },
            Self::Flush => Work::Flush,
        }
    }
}

impl Work<Vec<Slice<'_>>> {
    /// Does it here and now.
    ///
    /// # Errors
    /// The host's error.
    pub fn perform(&self, backend: &mut dyn Backend) -> io::Result<()> {
        let stable = match self {
            Self::Read { offset, data } => {
                backend.read(*offset, data)?;
                false
            }
            Self::Write { offset, data, stable } => {
                backend.write(*offset, data)?;
                *stable
            }
            Self::Clear { kind, ranges, stable } => {
                for range in ranges {
                    match kind {
                        Kind::Discard => backend.discard(range.offset, range.length)?,
                        Kind::Zero => backend.write_zeroes(range.offset, range.length, range.unmap)?,
                    }
                }
                *stable
            }
            Self::Flush => true,
        };
        if stable { backend.flush() } else { Ok(()) }
    }
}

/// Does work beside the device thread. Dropping it waits for what is under way.
pub trait Engine: Send {
    /// Memory that work is about from here on. It is kept as long as something is under way.
    fn attach(&mut self, memory: &Memory);
    /// Takes work over. `token` names it, and no other work that is under way; at most [`ROOM`] are.
    fn submit(&mut self, token: u16, work: Work<Vec<Slice<'_>>>);
    /// Lets the host begin with what was submitted.
    fn start(&mut self);
    /// What is finished, one by one, in any order. To be looked at after each [`Engine::start`] too, until there is none: what is finished
    /// later is told, by [`Engine::descriptor`] or the bell that the engine was made with.
    fn finished(&mut self) -> Option<(u16, io::Result<()>)>;
    /// Becomes readable when there is something finished again (edge-triggered), if no bell is rung for that.
    fn descriptor(&self) -> Option<RawFd> {
        None
    }
    /// Waits until all that was submitted is finished.
    fn wait_all(&mut self);
}
