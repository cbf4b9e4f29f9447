//! The console ring: the last 64 KiB that the guest wrote to its serial port, in a file that both the monitor and
//! the agent hold open. Neither needs the other to be alive.
//!
//! ```text
//! offset  size  field (little endian)
//! 0       8     magic "ROOSTCON"
//! 8       4     version (1)
//! 12      4     capacity of the ring in bytes (65536)
//! 16      8     reserved: bytes of the stream that may already be overwriting the ring
//! 24      8     written: bytes of the stream that are in the ring
//! 4096    …     the ring: byte n of the stream is at 4096 + n mod capacity
//! ```
//! The writer raises `reserved`, copies, raises `written`. A reader copies up to `written`, then looks at `reserved`
//! again: bytes of the stream below `reserved - capacity` may have been overwritten while it read, and are lost.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

/// First bytes of the file.
pub const MAGIC: [u8; 8] = *b"ROOSTCON";
/// Version of the format.
pub const VERSION: u32 = 1;
/// Bytes of the ring.
pub const CAPACITY: u32 = 64 * 1024;
/// Bytes before the ring.
pub const HEADER_SIZE: u64 = 4096;
/// Bytes of the whole file.
pub const FILE_SIZE: u64 = HEADER_SIZE + CAPACITY as u64;

/// Largest ring of another version of this program that is read.
const MAX_CAPACITY: u64 = 1 << 20;
/// No stream is longer: counters above are no counters, and sums of them would overflow.
const MAX_STREAM: u64 = 1 << 62;

const RESERVED_OFFSET: usize = 16;
const WRITTEN_OFFSET: usize = 24;

/// Prepares `file` as a console ring: a file that already is one keeps its content (a console lives through
/// stop and start), anything else is made an empty one.
///
/// # Errors
/// The file cannot be written, or there is no room for it.
pub fn prepare(file: &File) -> io::Result<()> {
    if file.metadata()?.len() == FILE_SIZE && Header::read(file).is_ok() {
        return Ok(());
    }
    file.set_len(0)?;
    // All blocks are allocated now: a full file system must not turn a later guest's output into SIGBUS.
    // SAFETY: plain system call on an open descriptor.
    let result = unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, FILE_SIZE.cast_signed()) };
    if result != 0 {
        return Err(io::Error::from_raw_os_error(result));
    }
    let mut header = [0; 32];
    header[..8].copy_from_slice(&MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[12..16].copy_from_slice(&CAPACITY.to_le_bytes());
    file.write_all_at(&header, 0)
}

struct Header {
    capacity: u64,
    reserved: u64,
    written: u64,
}

impl Header {
    fn read(file: &File) -> io::Result<Self> {
        let mut bytes = [0; 32];
        file.read_exact_at(&mut bytes, 0)?;
        let invalid =
            |what: &str| io::Error::new(io::ErrorKind::InvalidData, format!("no console ring: {what}"));
        let (magic, rest) = bytes.split_at(8);
        if magic != MAGIC {
            return Err(invalid("wrong magic"));
        }
        let word32 = |at: usize| u32::from_le_bytes([rest[at], rest[at + 1], rest[at + 2], rest[at + 3]]);
        let word64 = |at: usize| u64::from(word32(at)) | u64::from(word32(at + 4)) << 32;
        if word32(0) != VERSION {
            return Err(invalid(&format!("version {} is not {VERSION}", word32(0))));
        }
        let capacity = u64::from(word32(4));
        if capacity == 0 || capacity > MAX_CAPACITY {
            return Err(invalid(&format!("capacity {capacity}")));
        }
        let (reserved, written) = (word64(8), word64(16));
        if reserved > MAX_STREAM || written > MAX_STREAM {
            return Err(invalid(&format!("a stream of {} bytes", reserved.max(written))));
        }
        Ok(Self { capacity, reserved, written })
    }

    /// First byte of the stream that may still be in the ring, however wrong `reserved` is.
    fn oldest(&self) -> u64 {
        self.reserved.max(self.written).saturating_sub(self.capacity)
    }
}

/// The monitor's end: maps the file once, then needs no system call per byte.
#[derive(Debug)]
pub struct ConsoleWriter {
    map: NonNull<u8>,
    written: u64,
}

// SAFETY: the mapping belongs to this value alone and is unmapped when it is dropped; no thread-local state.
unsafe impl Send for ConsoleWriter {}

impl ConsoleWriter {
    /// Prepares and maps `file`, and goes on where its stream ended.
    ///
    /// # Errors
    /// The file cannot be written or mapped.
    pub fn new(file: &File) -> io::Result<Self> {
        prepare(file)?;
        let header = Header::read(file)?;
        if header.capacity != u64::from(CAPACITY) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "console ring of another capacity"));
        }
        // SAFETY: a fresh shared mapping of a file of exactly this size; the result is checked below.
        let map = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                Self::LENGTH,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if map == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let map = NonNull::new(map.cast()).ok_or_else(|| io::Error::other("mmap returned null"))?;
        // A writer that died between `reserved` and `written` leaves the rest of its bytes lost.
        let writer = Self { map, written: header.written.max(header.reserved) };
        writer.counter(RESERVED_OFFSET).store(writer.written, Ordering::SeqCst);
        writer.counter(WRITTEN_OFFSET).store(writer.written, Ordering::SeqCst);
        Ok(writer)
    }

    const LENGTH: usize = 4096 + CAPACITY as usize;

    #[allow(clippy::cast_ptr_alignment)] // both offsets are multiples of 8 in a page-aligned mapping
    fn counter(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: `offset` is one of the two aligned counter offsets, inside the mapping, which lives as long as self.
        let pointer = unsafe { self.map.as_ptr().add(offset) };
        // SAFETY: an aligned u64 in a mapping that lives as long as self, only ever accessed atomically here.
        unsafe { AtomicU64::from_ptr(pointer.cast()) }
    }

    /// Appends to the stream. Cannot fail: old bytes make room.
    pub fn write(&mut self, bytes: &[u8]) {
        let capacity = CAPACITY as usize;
        for chunk in bytes.chunks(capacity) {
            let end = self.written + chunk.len() as u64;
            self.counter(RESERVED_OFFSET).store(end, Ordering::SeqCst);
            let start = usize::try_from(self.written % u64::from(CAPACITY)).unwrap_or(0);
            let first = chunk.len().min(capacity - start);
            self.copy(start, &chunk[..first]);
            self.copy(0, &chunk[first..]);
            self.counter(WRITTEN_OFFSET).store(end, Ordering::SeqCst);
            self.written = end;
        }
    }

    fn copy(&mut self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= CAPACITY as usize, "ring copy inside the ring");
        // SAFETY: 4096 + at is inside the mapping.
        let target = unsafe { self.map.as_ptr().add(4096 + at) };
        // SAFETY: target..target+len is inside the mapping by the assertion above; the source is a distinct slice.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), target, bytes.len()) };
    }

    /// Bytes ever written to the stream.
    #[must_use]
    pub const fn written(&self) -> u64 {
        self.written
    }
}

impl io::Write for ConsoleWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Self::write(self, bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for ConsoleWriter {
    fn drop(&mut self) {
        // SAFETY: this value made the mapping and nothing else uses it.
        unsafe { libc::munmap(self.map.as_ptr().cast(), Self::LENGTH) };
    }
}

/// The agent's end.
#[derive(Debug)]
pub struct ConsoleReader {
    file: File,
}

/// What a read gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Bytes of the stream that were asked for but are gone from the ring.
    pub lost: u64,
    /// The bytes, oldest first.
    pub bytes: Vec<u8>,
    /// Where to go on: the stream offset after the last byte.
    pub next_offset: u64,
}

impl ConsoleReader {
    /// Reads `file`.
    ///
    /// # Errors
    /// It is no console ring.
    pub fn new(file: File) -> io::Result<Self> {
        Header::read(&file)?;
        Ok(Self { file })
    }

    /// Bytes ever written to the stream.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn written(&self) -> io::Result<u64> {
        Ok(Header::read(&self.file)?.written)
    }

    /// Reads what is there from the absolute stream offset `offset` on. An offset in the future gives nothing
    /// (and `next_offset` = `offset`).
    ///
    /// # Errors
    /// The file cannot be read, or is no console ring any more.
    pub fn read_from(&self, offset: u64) -> io::Result<Chunk> {
        let header = Header::read(&self.file)?;
        if offset >= header.written {
            return Ok(Chunk { lost: 0, bytes: Vec::new(), next_offset: offset });
        }
        let start = offset.max(header.oldest()).min(header.written);
        let length = usize::try_from(header.written - start).map_err(io::Error::other)?;
        let mut bytes = vec![0; length];
        let at = start % header.capacity;
        let first = length.min(usize::try_from(header.capacity - at).map_err(io::Error::other)?);
        let (head, tail) = bytes.split_at_mut(first);
        self.file.read_exact_at(head, HEADER_SIZE + at)?;
        self.file.read_exact_at(tail, HEADER_SIZE)?;
        let oldest = Header::read(&self.file)?.oldest();
        let good = start.max(oldest).min(header.written);
        bytes.drain(..usize::try_from(good - start).map_err(io::Error::other)?);
        Ok(Chunk { lost: good - offset, bytes, next_offset: header.written })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring() -> (tempfile::NamedTempFile, ConsoleWriter, ConsoleReader) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let writer = ConsoleWriter::new(file.as_file()).unwrap();
        let reader = ConsoleReader::new(file.reopen().unwrap()).unwrap();
        (file, writer, reader)
    }

    #[test]
    fn a_reader_follows_the_stream() {
        let (_file, mut writer, reader) = ring();
        assert_eq!(reader.read_from(0).unwrap().bytes, b"");
        writer.write(b"hello ");
        let chunk = reader.read_from(0).unwrap();
        assert_eq!((chunk.bytes.as_slice(), chunk.lost, chunk.next_offset), (&b"hello "[..], 0, 6));
        writer.write(b"world");
        assert_eq!(reader.read_from(chunk.next_offset).unwrap().bytes, b"world");
        assert_eq!(reader.read_from(99).unwrap().next_offset, 99);
    }

    #[test]
    fn old_bytes_are_lost_and_counted() {
        let (_file, mut writer, reader) = ring();
        let stream: Vec<u8> = (0..200_000_u32).map(|n| (n % 251) as u8).collect();
        for piece in stream.chunks(777) {
            writer.write(piece);
        }
        let chunk = reader.read_from(10).unwrap();
        assert_eq!(chunk.bytes.len(), CAPACITY as usize);
        assert_eq!(chunk.lost, 200_000 - 10 - u64::from(CAPACITY));
        assert_eq!(chunk.bytes, stream[stream.len() - CAPACITY as usize..]);
        assert_eq!(chunk.next_offset, 200_000);
    }

    #[test]
    fn a_new_writer_goes_on_where_the_old_one_ended() {
        let (file, mut writer, reader) = ring();
        writer.write(b"first boot\n");
        drop(writer);
        let mut writer = ConsoleWriter::new(file.as_file()).unwrap();
        writer.write(b"second boot\n");
        assert_eq!(reader.read_from(0).unwrap().bytes, b"first boot\nsecond boot\n");
    }

    #[test]
    fn other_files_are_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().write_all_at(&[7; 8192], 0).unwrap();
        assert!(ConsoleReader::new(file.reopen().unwrap()).is_err());
    }

    /// The agent reads what a monitor wrote, and a monitor goes on with what it finds.
    #[test]
    fn counters_that_no_writer_leaves_are_survived() {
        for (reserved, written, taken) in
            [(0, 1 << 50, true), (1 << 61, 1 << 61, true), (u64::MAX, 0, false), (0, u64::MAX, false)]
        {
            let (file, _, reader) = ring();
            let counters = [u64::to_le_bytes(reserved), u64::to_le_bytes(written)].concat();
            file.as_file().write_all_at(&counters, 16).unwrap();
            let chunk = reader.read_from(0);
            assert_eq!(chunk.is_ok(), taken, "{reserved} {written}");
            assert!(chunk.is_ok_and(|chunk| chunk.bytes.len() <= CAPACITY as usize) == taken);
            let mut writer = ConsoleWriter::new(file.as_file()).unwrap();
            writer.write(b"more");
            assert_eq!(reader.read_from(writer.written() - 4).unwrap().bytes, b"more");
        }
    }

    #[test]
    fn rings_of_a_gigabyte_are_none() {
        let (file, _, reader) = ring();
        file.as_file().write_all_at(&(1_u32 << 30).to_le_bytes(), 12).unwrap();
        assert!(reader.read_from(0).is_err());
    }

    #[test]
    fn a_reader_beside_a_busy_writer_never_sees_a_wrong_byte() {
        let (_file, mut writer, reader) = ring();
        let total = 3_000_000_u64;
        let thread = std::thread::spawn(move || {
            let mut n = 0_u64;
            while n < total {
                let piece: Vec<u8> = (n..(n + 1000).min(total)).map(|i| (i % 251) as u8).collect();
                writer.write(&piece);
                n += piece.len() as u64;
            }
        });
        let (mut offset, mut seen) = (0, 0);
        while offset < total {
            let chunk = reader.read_from(offset).unwrap();
            let first = chunk.next_offset - chunk.bytes.len() as u64;
            assert_eq!(first, offset + chunk.lost);
            for (i, byte) in chunk.bytes.iter().enumerate() {
                assert_eq!(u64::from(*byte), (first + i as u64) % 251);
            }
            seen += chunk.bytes.len() as u64 + chunk.lost;
            offset = chunk.next_offset;
        }
        assert_eq!(seen, total);
        thread.join().unwrap();
    }
}
