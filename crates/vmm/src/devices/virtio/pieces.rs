//! Guest memory as the host's kernel takes it: lists of addresses and lengths.

use vm_memory::VolatileSlice;
use vm_memory::bitmap::Bitmap;

use crate::memory::Slice;

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
