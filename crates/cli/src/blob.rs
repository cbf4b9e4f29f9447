//! Files as the controller keeps them: zstd-compressed, named by the SHA-256 of the compressed bytes.
//!
//! The same content gives the same bytes, however it lies on the disk: holes of a sparse file are not read, but
//! compressed as the zeros that they are.

use crate::error::{Error, Result};
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use roost_types::BlobId;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

/// Level of compression: a disk of some GiB in seconds, and nearly as small as it gets.
const LEVEL: i32 = 3;
/// Bytes taken at a time.
const CHUNK: usize = 1024 * 1024;

/// A compressed copy in an unnamed temporary file, which is gone with the process, however that ends.
pub struct Packed {
    /// Its name.
    pub id: BlobId,
    /// Compressed bytes.
    pub length: u64,
    /// Bytes before.
    pub raw_length: u64,
    /// The copy, at its beginning.
    pub file: File,
}

/// Writes to a file and hashes what it writes.
struct Hashing {
    file: File,
    hash: Sha256,
    length: u64,
}

impl Write for Hashing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.hash.update(&bytes[..written]);
        self.length += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Compresses a file. `seen` is told how far it is; setting `cancelled` ends it with an error.
pub fn pack(path: &Path, cancelled: &AtomicBool, seen: impl Fn(u64)) -> Result<Packed> {
    let reading = |source| Error::File { action: "read", path: path.into(), source };
    let copying = |source| Error::File { action: "write a compressed copy of", path: path.into(), source };
    let mut source = File::open(path).map_err(reading)?;
    let metadata = source.metadata().map_err(reading)?;
    if !metadata.is_file() {
        return Err(Error::parameter(format!("{} is not a file", path.display())));
    }
    let raw_length = metadata.len();
    if raw_length == 0 {
        return Err(Error::parameter(format!("{} is empty", path.display())));
    }
    let sink = Hashing { file: tempfile::tempfile().map_err(copying)?, hash: Sha256::new(), length: 0 };
    let mut encoder = zstd::Encoder::new(sink, LEVEL).map_err(copying)?;
    encoder.set_pledged_src_size(Some(raw_length)).map_err(copying)?;
    encoder.include_checksum(true).map_err(copying)?;
    let mut chunk = vec![0; CHUNK];
    let zeros = vec![0; CHUNK];
    let mut at = 0;
    while at < raw_length {
        if cancelled.load(Ordering::Relaxed) {
            return Err(Error::Internal("interrupted".to_owned()));
        }
        let data = next_data(&source, at).map_err(reading)?.unwrap_or(raw_length).min(raw_length);
        let (bytes, from) = if data > at { (data - at, &zeros) } else { (raw_length - at, &chunk) };
        let now = from.len().min(usize::try_from(bytes).unwrap_or(usize::MAX));
        if data > at {
            encoder.write_all(&zeros[..now]).map_err(copying)?;
        } else {
            source.seek(SeekFrom::Start(at)).map_err(reading)?;
            source.read_exact(&mut chunk[..now]).map_err(reading)?;
            encoder.write_all(&chunk[..now]).map_err(copying)?;
        }
        at += now as u64;
        seen(at);
    }
    let mut sink = encoder.finish().map_err(copying)?;
    sink.flush().map_err(copying)?;
    sink.file.rewind().map_err(copying)?;
    Ok(Packed {
        id: BlobId::from_sha256(sink.hash.finalize().into()),
        length: sink.length,
        raw_length,
        file: sink.file,
    })
}

/// Where data begins at or after this offset; `None` where there is only a hole to the end.
fn next_data(file: &File, at: u64) -> io::Result<Option<u64>> {
    let from = i64::try_from(at).map_err(io::Error::other)?;
    match lseek(file, from, Whence::SeekData) {
        Ok(found) => Ok(u64::try_from(found).ok()),
        Err(Errno::ENXIO) => Ok(None),
        // A file system that does not know holes has none.
        Err(Errno::EINVAL | Errno::EOPNOTSUPP) => Ok(Some(at)),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packed(path: &Path) -> Packed {
        pack(path, &AtomicBool::new(false), |_| {}).unwrap()
    }

    #[test]
    fn a_sparse_file_and_a_full_one_of_the_same_content_are_one_blob() {
        let folder = tempfile::tempdir().unwrap();
        let (sparse, full) = (folder.path().join("sparse"), folder.path().join("full"));
        let content: Vec<u8> = {
            let mut content = vec![0; 5 * CHUNK + 123];
            content[3 * CHUNK + 17..3 * CHUNK + 5000].fill(7);
            content
        };
        std::fs::write(&full, &content).unwrap();
        let mut file = File::create(&sparse).unwrap();
        file.set_len(content.len() as u64).unwrap();
        file.seek(SeekFrom::Start(3 * CHUNK as u64 + 17)).unwrap();
        file.write_all(&content[3 * CHUNK + 17..3 * CHUNK + 5000]).unwrap();
        drop(file);

        let (one, mut other) = (packed(&sparse), packed(&full));
        assert_eq!(one.id, other.id);
        let mut bytes = Vec::new();
        other.file.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes.len() as u64, other.length);
        assert_eq!(BlobId::from_sha256(Sha256::digest(&bytes).into()), other.id);
        assert_eq!(zstd::decode_all(bytes.as_slice()).unwrap(), content);
        assert_eq!(other.raw_length, content.len() as u64);
    }

    #[test]
    fn an_empty_or_missing_file_and_a_folder_are_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let empty = folder.path().join("empty.raw");
        File::create(&empty).unwrap();
        for path in [empty.as_path(), folder.path(), &folder.path().join("missing")] {
            let error = pack(path, &AtomicBool::new(false), |_| {}).err().unwrap();
            assert!(error.chain().contains(&path.display().to_string()), "{}", error.chain());
            assert_eq!(error.exit_code(), 3);
        }
    }

    #[test]
    fn cancelling_ends_it() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"x").unwrap();
        assert!(pack(file.path(), &AtomicBool::new(true), |_| {}).is_err());
    }
}
