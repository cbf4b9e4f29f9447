//! Disk images, through imago: raw, and qcow2 overlays on a read-only raw base.
//!
//! Every file of a chain is an open descriptor given by name; a name inside an image opens nothing
//! (`DenyImplicitOpenGate`), as the image may be a tenant's.

use std::fs::File;
use std::io;
use std::sync::Arc;

use imago::io_buffers::{IoVector, IoVectorMut};
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, StorageOpenOptions};

use super::qcow2;
use crate::config::DriveFormat;
use crate::memory::{Slice, slice_of};

/// What request processing needs of a disk.
pub trait Backend: Send {
    /// Bytes.
    fn size(&self) -> u64;
    /// Fills memory from the disk. The range lies inside the disk.
    ///
    /// # Errors
    /// The host's error.
    fn read(&self, offset: u64, target: &[Slice<'_>]) -> io::Result<()>;
    /// Writes memory to the disk. The range lies inside the disk.
    ///
    /// # Errors
    /// The host's error.
    fn write(&self, offset: u64, source: &[Slice<'_>]) -> io::Result<()>;
    /// Forgets a range inside the disk, as far as the host can: what is read there afterwards is not promised.
    ///
    /// # Errors
    /// The host's error.
    fn discard(&mut self, offset: u64, length: u64) -> io::Result<()>;
    /// Makes a range inside the disk read as zeroes; `unmap` gives its space back where the host can.
    ///
    /// # Errors
    /// The host's error.
    fn write_zeroes(&mut self, offset: u64, length: u64, unmap: bool) -> io::Result<()>;
    /// Puts everything written on stable storage.
    ///
    /// # Errors
    /// The host's error.
    fn flush(&self) -> io::Result<()>;
}

/// An image.
pub struct Image {
    access: FormatAccess<imago::file::File>,
    /// Bytes of a cluster; 0 where there are none.
    cluster: u64,
}

impl Image {
    /// Opens an image from its descriptors.
    ///
    /// # Errors
    /// The image is broken, or needs files that were not handed over.
    pub fn open(file: File, format: DriveFormat, backing: Option<File>, writable: bool) -> io::Result<Self> {
        let cluster = if format == DriveFormat::Qcow2 { qcow2::check(&file, backing.as_ref())? } else { 0 };
        let storage = storage(file, writable)?;
        match format {
            DriveFormat::Raw => {
                Ok(Self { access: FormatAccess::new(Raw::open_image(storage, writable)?), cluster })
            }
            DriveFormat::Qcow2 => {
                let backing = match backing {
                    Some(base) => {
                        Some(FormatAccess::new(Raw::open_image(self::storage(base, false)?, false)?))
                    }
                    None => None,
                };
                let qcow2 = Qcow2::builder(storage)
                    .write(writable)
                    .backing(backing.map(Arc::new))
                    .data_file(None)
                    .open(DenyImplicitOpenGate::default())?;
                Ok(Self { access: FormatAccess::new(qcow2), cluster })
            }
        }
    }
}

fn storage(file: File, writable: bool) -> io::Result<imago::file::File> {
    imago::file::File::from_open_file(file, StorageOpenOptions::new().write(writable))
}

impl Backend for Image {
    fn size(&self) -> u64 {
        self.access.size()
    }

    fn read(&self, offset: u64, target: &[Slice<'_>]) -> io::Result<()> {
        let (vector, _guard) = IoVectorMut::from_volatile_slice(target);
        self.access.readv(vector, offset)
    }

    fn write(&self, offset: u64, source: &[Slice<'_>]) -> io::Result<()> {
        let (vector, _guard) = IoVector::from_volatile_slice(source);
        self.access.writev(vector, offset)
    }

    fn discard(&mut self, offset: u64, length: u64) -> io::Result<()> {
        supported(self.access.discard_to_any(offset, length)).map(drop)
    }

    fn write_zeroes(&mut self, offset: u64, length: u64, unmap: bool) -> io::Result<()> {
        if length == 0 {
            return Ok(());
        }
        // On a disk that is smaller than one cluster, imago 0.2.6 zeroes more than it is asked to: it subtracts a cluster from
        // the disk's size to find where whole ones end.
        if self.access.size() < self.cluster {
            let mut zeroes = vec![0; usize::try_from(length).map_err(io::Error::other)?];
            return self.write(offset, &[slice_of(&mut zeroes[..])]);
        }
        if unmap && supported(self.access.discard_to_zero(offset, length))? {
            return Ok(());
        }
        self.access.write_zeroes(offset, length)
    }

    fn flush(&self) -> io::Result<()> {
        self.access.flush()?;
        self.access.sync()
    }
}

/// Not every file system and format can make holes.
fn supported(result: io::Result<()>) -> io::Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(false),
        Err(error) => Err(error),
    }
}

impl std::fmt::Debug for Image {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Image({} bytes)", self.access.size())
    }
}
