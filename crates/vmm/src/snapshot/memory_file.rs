//! The memory file: guest memory region by region, and a page behind it that says which snapshot this is.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};

use serde::{Deserialize, Serialize};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use crate::error::{Error, Result};
use crate::memory::{Memory, PAGE};

/// First bytes of the page behind the memory.
const MAGIC: [u8; 8] = *b"ROOSTMEM";
/// Most bytes that are written at once.
const CHUNK: u64 = 1 << 20;

/// Which pages a file has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pages {
    /// All; what is a hole is zero.
    All,
    /// Those that were written since another snapshot.
    Since([u8; 16]),
}

/// A memory file, open.
#[derive(Debug)]
pub struct MemoryFile {
    file: File,
}

/// What the page behind the memory says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Trailer {
    bytes: u64,
    id: [u8; 16],
    pages: Pages,
}

impl Trailer {
    fn to_bytes(self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(self.bytes.to_le_bytes());
        bytes.extend(self.id);
        match self.pages {
            Pages::All => bytes.extend([0; 24]),
            Pages::Since(base) => {
                bytes.extend(1_u64.to_le_bytes());
                bytes.extend(base);
            }
        }
        bytes
    }

    fn parse(bytes: &[u8; 56]) -> Option<Self> {
        let word = |at: usize| bytes[at..].first_chunk().map_or(0, |word| u64::from_le_bytes(*word));
        let id = |at: usize| bytes[at..].first_chunk().copied().unwrap_or_default();
        let pages = match word(32) {
            0 => Pages::All,
            1 => Pages::Since(id(40)),
            _ => return None,
        };
        (bytes[..8] == MAGIC).then(|| Self { bytes: word(8), id: id(16), pages })
    }

    fn check_whole(self) -> Result<()> {
        if self.pages == Pages::All {
            return Ok(());
        }
        Err(Error::Snapshot(
            "the memory file is of a diff snapshot: `roost-vmm rebase --base FILE --diff FILE` puts it on top of the one \
             before it"
                .into(),
        ))
    }

    /// Reads it from the end of a file.
    fn read(file: &File) -> Result<Self> {
        let size = file.metadata().map_err(Error::io("finding the memory file's size"))?.len();
        let refuse = |why: &str| Error::Snapshot(format!("this is no memory file, or it is cut off: {why}"));
        let at = size.checked_sub(PAGE).ok_or_else(|| refuse("it is shorter than a page"))?;
        let mut bytes = [0; 56];
        file.read_exact_at(&mut bytes, at).map_err(Error::io("reading the memory file's end"))?;
        let trailer =
            Self::parse(&bytes).ok_or_else(|| refuse("its last page does not begin with ROOSTMEM"))?;
        if trailer.bytes == at {
            Ok(trailer)
        } else {
            Err(refuse(&format!("it has {at} bytes of memory, and says {}", trailer.bytes)))
        }
    }
}

impl MemoryFile {
    /// A file to be written. What it holds goes.
    #[must_use]
    pub const fn new(file: File) -> Self {
        Self { file }
    }

    /// A file whose whole memory is that of snapshot `id`: `bytes` of it.
    ///
    /// # Errors
    /// [`Error::Snapshot`] for another file, or one that has only what was written since another snapshot.
    pub fn open(file: File, id: [u8; 16], bytes: u64) -> Result<File> {
        let trailer = Trailer::read(&file)?;
        let refuse = |why: String| Err(Error::Snapshot(why));
        if trailer.id != id {
            return refuse("state file and memory file are of two snapshots".into());
        }
        trailer.check_whole()?;
        if trailer.bytes != bytes {
            return refuse(format!("the machine has {bytes} bytes of memory, the file {}", trailer.bytes));
        }
        Ok(file)
    }

    /// Writes the pages that `wanted` says, of each region by number and page by number, and puts the file on stable storage.
    /// Returns how many pages were written. No vCPU runs, no device works.
    ///
    /// # Errors
    /// The host's error.
    pub fn write(
        &self,
        memory: &Memory,
        id: [u8; 16],
        pages: Pages,
        wanted: impl Fn(usize, u64) -> bool,
    ) -> Result<u64> {
        self.write_pages(memory, id, pages, wanted).map_err(Error::io("writing the memory file"))
    }

    fn write_pages(
        &self,
        memory: &Memory,
        id: [u8; 16],
        pages: Pages,
        wanted: impl Fn(usize, u64) -> bool,
    ) -> io::Result<u64> {
        let bytes: u64 = memory.iter().map(GuestMemoryRegion::len).sum();
        // What was there before is gone: nothing of an older snapshot shines through a hole.
        self.file.set_len(0)?;
        self.file.set_len(bytes + PAGE)?;
        let (mut start, mut written) = (0, 0);
        for (number, region) in memory.iter().enumerate() {
            let host = region.get_host_address(MemoryRegionAddress(0)).map_err(io::Error::other)?;
            let mut run = 0..0;
            for page in 0..region.len() / PAGE {
                // A page of zeroes is a hole of a full file; in a diff it must be said.
                if !wanted(number, page) || pages == Pages::All && is_zero(host, page * PAGE) {
                    continue;
                }
                let at = page * PAGE;
                written += 1;
                if run.end == at && at + PAGE - run.start <= CHUNK {
                    run.end = at + PAGE;
                    continue;
                }
                self.write_run(host, &run, start)?;
                run = at..at + PAGE;
            }
            self.write_run(host, &run, start)?;
            start += region.len();
        }
        self.file.write_all_at(&Trailer { bytes, id, pages }.to_bytes(), bytes)?;
        self.file.sync_all()?;
        Ok(written)
    }

    /// Writes a range of a region that is mapped at `host` and begins at `start` of the file.
    fn write_run(&self, host: *const u8, run: &std::ops::Range<u64>, start: u64) -> io::Result<()> {
        let mut run = run.clone();
        while !run.is_empty() {
            let (from, count) = (usize::try_from(run.start), usize::try_from(run.end - run.start));
            let (from, count) = (from.map_err(io::Error::other)?, count.map_err(io::Error::other)?);
            let offset = libc::off_t::try_from(start + run.start).map_err(io::Error::other)?;
            let source = host.wrapping_add(from).cast();
            // SAFETY: the range lies inside one mapping of guest memory, which lives as long as the machine; the kernel reads it.
            let done = unsafe { libc::pwrite(self.file.as_raw_fd(), source, count, offset) };
            match u64::try_from(done) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(done) => run.start += done,
                Err(_) => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error => return Err(error),
                },
            }
        }
        Ok(())
    }
}

/// Whether the page at `offset` from `host` is all zeroes.
fn is_zero(host: *const u8, offset: u64) -> bool {
    let page = host.wrapping_add(usize::try_from(offset).unwrap_or(0)).cast::<[u64; 8]>();
    (0..64).all(|line| {
        // SAFETY: the page lies inside guest memory and begins at a page's border; no vCPU runs and no device works, so that
        // nobody writes it meanwhile.
        let line = unsafe { page.wrapping_add(line).read_volatile() };
        line == [0; 8]
    })
}

/// Which snapshot a file has all memory of, and how many bytes that is.
///
/// # Errors
/// [`Error::Snapshot`] for another file, or one that has only what was written since another snapshot.
pub fn whole(file: &File) -> Result<([u8; 16], u64)> {
    let trailer = Trailer::read(file)?;
    trailer.check_whole()?;
    Ok((trailer.id, trailer.bytes))
}

/// Puts the pages of `diff` on top of `base`, which then is the memory file of the diff's snapshot.
///
/// # Errors
/// [`Error::Snapshot`] if they do not belong on top of each other; the base is as it was then. [`Error::Io`].
pub fn rebase(base: &File, diff: &File) -> Result<u64> {
    let (below, above) = (Trailer::read(base)?, Trailer::read(diff)?);
    let refuse = |why: &str| Err(Error::Snapshot(why.into()));
    if below.pages != Pages::All {
        return refuse("the base is a diff itself: it must be put on top of the one before it first");
    }
    if above.pages == Pages::All {
        return refuse("the diff is a full memory file: it needs no base");
    }
    if above.pages != Pages::Since(below.id) || above.bytes != below.bytes {
        return refuse("the diff was not made on top of this base");
    }
    if same_file(base, diff).map_err(Error::io("looking at the files"))? {
        return refuse("base and diff are one file");
    }
    // Until it is whole it is nobody's: a crash half-way must not leave a file that looks like either.
    let failed = || Error::io("writing the base");
    base.write_all_at(&[0; 56], below.bytes).map_err(failed())?;
    base.sync_all().map_err(failed())?;
    let copied = copy_data(base, diff, below.bytes).map_err(Error::io("copying pages"))?;
    base.sync_all().map_err(failed())?;
    let trailer = Trailer { pages: Pages::All, ..above };
    base.write_all_at(&trailer.to_bytes(), below.bytes).map_err(failed())?;
    base.sync_all().map_err(failed())?;
    Ok(copied)
}

fn same_file(one: &File, other: &File) -> io::Result<bool> {
    let (one, other) = (one.metadata()?, other.metadata()?);
    Ok((one.dev(), one.ino()) == (other.dev(), other.ino()))
}

/// Copies what is no hole of the first `end` bytes.
fn copy_data(to: &File, from: &File, end: u64) -> io::Result<u64> {
    let seek = |at: u64, whence| {
        let at = libc::off_t::try_from(at).map_err(io::Error::other)?;
        // SAFETY: a plain call on an open descriptor.
        let found = unsafe { libc::lseek(from.as_raw_fd(), at, whence) };
        match u64::try_from(found) {
            Ok(found) => Ok(Some(found)),
            Err(_) => match io::Error::last_os_error() {
                error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
                error => Err(error),
            },
        }
    };
    let mut buffer = vec![0; usize::try_from(CHUNK).unwrap_or(1 << 20)];
    let (mut at, mut copied) = (0, 0);
    while let Some(start) = seek(at, libc::SEEK_DATA)?.filter(|start| *start < end) {
        let stop = seek(start, libc::SEEK_HOLE)?.unwrap_or(end).min(end);
        at = start;
        while at < stop {
            let count = usize::try_from((stop - at).min(CHUNK)).unwrap_or(0);
            from.read_exact_at(&mut buffer[..count], at)?;
            to.write_all_at(&buffer[..count], at)?;
            at += count as u64;
            copied += count as u64;
        }
    }
    Ok(copied)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;
    use vm_memory::{Bytes, GuestAddress};

    const ID: [u8; 16] = [1; 16];
    const NEXT: [u8; 16] = [2; 16];

    fn file_of(
        memory: &Memory,
        id: [u8; 16],
        pages: Pages,
        wanted: impl Fn(usize, u64) -> bool,
    ) -> (File, u64) {
        let file = tempfile::tempfile().unwrap();
        let written = MemoryFile::new(file.try_clone().unwrap()).write(memory, id, pages, wanted).unwrap();
        (file, written)
    }

    fn content(file: &File) -> Vec<u8> {
        let mut bytes = vec![0; 4 << 20];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    #[test]
    fn a_full_file_has_what_is_not_zero() {
        let memory = memory::create(4).unwrap();
        for page in [0, 1, 2, 700, 1023] {
            memory.write_obj(7_u8, GuestAddress(page * PAGE + 4095)).unwrap();
        }
        let (file, written) = file_of(&memory, ID, Pages::All, |_, _| true);
        assert_eq!(written, 5);
        assert_eq!(file.metadata().unwrap().len(), (4 << 20) + PAGE);
        assert!(file.metadata().unwrap().blocks() * 512 < 64 * 1024, "holes take room");
        let bytes = content(&file);
        assert_eq!(bytes.iter().filter(|byte| **byte == 7).count(), 5);
        assert_eq!(bytes[1023 * 4096 + 4095], 7);
        assert!(MemoryFile::open(file.try_clone().unwrap(), ID, 4 << 20).is_ok());
        for (id, bytes) in [(NEXT, 4 << 20), (ID, 8 << 20)] {
            assert!(MemoryFile::open(file.try_clone().unwrap(), id, bytes).is_err());
        }
    }

    #[test]
    fn a_diff_on_top_of_its_base_is_the_memory() {
        let memory = memory::create(4).unwrap();
        memory.write_obj(7_u8, GuestAddress(0)).unwrap();
        memory.write_obj(7_u8, GuestAddress(5 * PAGE)).unwrap();
        let (base, _) = file_of(&memory, ID, Pages::All, |_, _| true);
        memory.write_obj(0_u8, GuestAddress(5 * PAGE)).unwrap();
        memory.write_obj(9_u8, GuestAddress(9 * PAGE)).unwrap();
        let (diff, written) = file_of(&memory, NEXT, Pages::Since(ID), |_, page| page == 5 || page == 9);
        assert_eq!(written, 2);
        let refused = MemoryFile::open(diff.try_clone().unwrap(), NEXT, 4 << 20).unwrap_err().to_string();
        assert!(refused.contains("rebase"), "{refused}");

        rebase(&base, &diff).unwrap();
        let bytes = content(&base);
        assert_eq!([0, 5, 9].map(|page| bytes[page * 4096]), [7, 0, 9]);
        assert!(MemoryFile::open(base.try_clone().unwrap(), NEXT, 4 << 20).is_ok());
        // Once more: the base is another one now.
        let before = content(&base);
        assert!(rebase(&base, &diff).unwrap_err().to_string().contains("not made on top"));
        assert!(rebase(&diff, &diff).is_err() && rebase(&base, &base).is_err());
        assert!(content(&base) == before);
    }

    #[test]
    fn what_is_no_memory_file_is_refused() {
        let file = tempfile::tempfile().unwrap();
        for size in [0, 1, PAGE, 3 * PAGE] {
            file.set_len(size).unwrap();
            assert!(MemoryFile::open(file.try_clone().unwrap(), ID, 4 << 20).is_err(), "{size}");
        }
        let memory = memory::create(4).unwrap();
        let (file, _) = file_of(&memory, ID, Pages::All, |_, _| true);
        file.set_len(2 << 20).unwrap();
        assert!(MemoryFile::open(file, ID, 4 << 20).unwrap_err().to_string().contains("cut off"));
    }
}
