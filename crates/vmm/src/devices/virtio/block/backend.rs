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

use crate::config::DriveFormat;
use crate::memory::Slice;

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
pub struct Image(FormatAccess<imago::file::File>);

impl Image {
    /// Opens an image from its descriptors.
    ///
    /// # Errors
    /// The image is broken, or needs files that were not handed over.
    pub fn open(file: File, format: DriveFormat, backing: Option<File>, writable: bool) -> io::Result<Self> {
        let storage = storage(file, writable)?;
        match format {
            DriveFormat::Raw => Ok(Self(FormatAccess::new(Raw::open_image(storage, writable)?))),
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
                if qcow2.requires_external_data_file() {
                    return Err(io::Error::other("qcow2 images with an external data file are not taken"));
                }
                Ok(Self(FormatAccess::new(qcow2)))
            }
        }
    }
}

fn storage(file: File, writable: bool) -> io::Result<imago::file::File> {
    imago::file::File::from_open_file(file, StorageOpenOptions::new().write(writable))
}

impl Backend for Image {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read(&self, offset: u64, target: &[Slice<'_>]) -> io::Result<()> {
        let (vector, _guard) = IoVectorMut::from_volatile_slice(target);
        self.0.readv(vector, offset)
    }

    fn write(&self, offset: u64, source: &[Slice<'_>]) -> io::Result<()> {
        let (vector, _guard) = IoVector::from_volatile_slice(source);
        self.0.writev(vector, offset)
    }

    fn discard(&mut self, offset: u64, length: u64) -> io::Result<()> {
        supported(self.0.discard_to_any(offset, length)).map(drop)
    }

    fn write_zeroes(&mut self, offset: u64, length: u64, unmap: bool) -> io::Result<()> {
        if unmap && supported(self.0.discard_to_zero(offset, length))? {
            return Ok(());
        }
        self.0.write_zeroes(offset, length)
    }

    fn flush(&self) -> io::Result<()> {
        self.0.flush()?;
        self.0.sync()
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
        write!(formatter, "Image({} bytes)", self.0.size())
    }
}
