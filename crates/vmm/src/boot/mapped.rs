//! Loading without copying: whole pages of a kernel or an initrd are mapped into guest memory from the file's page cache,
//! privately. The guest finds the file's bytes, keeps what it writes there for itself, and all guests of one kernel share
//! the pages that none of them has changed.
//!
//! A file that is loaded this way must not change while its machine exists (which holds for disk bases too).

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};

use vm_memory::bitmap::BitmapSlice;
use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice};

use crate::memory::{self, FilePages, Memory, PAGE};

/// Below this, copying costs less than another mapping.
const WORTH_MAPPING: u64 = 16 * PAGE;

/// A file whose reads into guest memory are mappings where they can be.
pub struct MappedFile<'a> {
    file: &'a File,
    /// Bytes in the file: pages behind its end must never be mapped, as touching them is a bus error.
    size: u64,
    memory: &'a Memory,
    pages: &'a FilePages,
}

impl<'a> MappedFile<'a> {
    /// A file to load into `memory`; which pages are mapped then is noted in `pages`.
    ///
    /// # Errors
    /// Its size cannot be found.
    pub fn new(file: &'a File, memory: &'a Memory, pages: &'a FilePages) -> io::Result<Self> {
        Ok(Self { file, size: file.metadata()?.len(), memory, pages })
    }

    /// Maps the whole pages of `target` from the file's position on; returns how many bytes that were.
    fn map(&mut self, target: *mut u8, length: usize) -> io::Result<usize> {
        let position = self.file.stream_position()?;
        let there = self.size.saturating_sub(position).min(length as u64) / PAGE * PAGE;
        let aligned = position.is_multiple_of(PAGE) && (target as u64).is_multiple_of(PAGE);
        let Ok(bytes) = usize::try_from(there) else { return Ok(0) };
        let worth = aligned && there >= WORTH_MAPPING;
        if !worth || !memory::map_file(self.memory, self.pages, target, bytes, self.file, position) {
            return Ok(0);
        }
        self.file.seek(SeekFrom::Start(position + there))?;
        Ok(bytes)
    }
}

impl Read for MappedFile<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.file.read(buffer)
    }
}

impl Seek for MappedFile<'_> {
    fn seek(&mut self, position: SeekFrom) -> io::Result<u64> {
        self.file.seek(position)
    }
}

impl ReadVolatile for MappedFile<'_> {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        target: &mut VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        let mapped = self.map(target.ptr_guard_mut().as_ptr(), target.len());
        let mapped = mapped.map_err(VolatileMemoryError::IOError)?;
        // Callers take less than they asked for as the file's end, so what is no whole page is read in the same call.
        let mut rest = target.offset(mapped)?;
        Ok(mapped + self.file.read_volatile(&mut rest)?)
    }
}
