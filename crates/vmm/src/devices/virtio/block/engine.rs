//! Who does a disk's work while the device thread goes on: [`super::uring`] or [`super::worker`]. What both take is here.

use std::io;
use std::os::fd::RawFd;

use vm_memory::VolatileSlice;
use vm_memory::bitmap::Bitmap;

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

/// A piece of guest memory by its host address, in the layout of an `iovec`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    address: usize,
    length: usize,
}

/// A request's data by host addresses, which stay valid as long as the guest's memory is there.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Pieces(Vec<Piece>);

impl Pieces {
    /// Memory that the host will read.
    #[must_use]
    pub fn to_read(slices: &[Slice<'_>]) -> Self {
        let piece =
            |slice: &Slice<'_>| Piece { address: slice.ptr_guard().as_ptr() as usize, length: slice.len() };
        Self(slices.iter().map(piece).collect())
    }

    /// Memory that the host will write. It is noted as written now: a snapshot waits for all that is under way before it looks.
    #[must_use]
    pub fn to_write(slices: &[Slice<'_>]) -> Self {
        for slice in slices {
            slice.bitmap().mark_dirty(0, slice.len());
        }
        Self::to_read(slices)
    }

    /// Bytes.
    #[must_use]
    pub fn length(&self) -> usize {
        self.0.iter().map(|piece| piece.length).sum()
    }

    /// As the kernel takes it: pointer and count of `iovec`s.
    #[must_use]
    pub fn vector(&self) -> (*const libc::iovec, u32) {
        (self.0.as_ptr().cast(), u32::try_from(self.0.len()).unwrap_or(u32::MAX))
    }

    /// The only piece, if it is one.
    #[must_use]
    pub fn single(&self) -> Option<(*mut u8, u32)> {
        match self.0[..] {
            [Piece { address, length }] => Some((address as *mut u8, u32::try_from(length).ok()?)),
            _ => None,
        }
    }

    /// Leaves out the first `bytes`, which are done.
    pub fn advance(&mut self, mut bytes: usize) {
        self.0.retain_mut(|piece| {
            let done = bytes.min(piece.length);
            bytes -= done;
            piece.address += done;
            piece.length -= done;
            piece.length > 0
        });
    }

    /// The memory itself.
    ///
    /// # Safety
    /// The guest's memory must stay mapped as long as the result is used.
    #[must_use]
    pub unsafe fn slices<'m>(&self) -> Vec<Slice<'m>> {
        let slice = |piece: &Piece| {
            // SAFETY: the piece was a slice of guest memory, which is still mapped, as the caller promises. What is written to
            // it has been noted already.
            unsafe { VolatileSlice::with_bitmap(piece.address as *mut u8, piece.length, None, None) }
        };
        self.0.iter().map(slice).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Whatever was done: what is left follows it, byte for byte.
        #[test]
        fn what_is_left_follows_what_is_done(
            lengths in proptest::collection::vec(1..100_usize, 1..20), done in 0..3000_usize,
        ) {
            let mut next = 0x1000;
            let pieces: Vec<Piece> = lengths
                .iter()
                .map(|length| {
                    let piece = Piece { address: next, length: *length };
                    next += length + 50;
                    piece
                })
                .collect();
            let bytes = |pieces: &[Piece]| -> Vec<usize> {
                pieces.iter().flat_map(|piece| piece.address..piece.address + piece.length).collect()
            };
            let mut left = Pieces(pieces.clone());
            left.advance(done);
            let all = bytes(&pieces);
            prop_assert_eq!(bytes(&left.0), &all[done.min(all.len())..]);
            prop_assert_eq!(left.length(), all.len().saturating_sub(done));
            prop_assert!(left.0.iter().all(|piece| piece.length > 0));
        }
    }
}
