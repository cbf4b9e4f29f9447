//! What a disk is configured with, what may change of it while its machine runs, and how its image is opened.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;

use serde::{Deserialize, Serialize};

use super::MAX_QUEUES;
use super::backend::{Backend, Image};
use crate::config::RateLimiter;
use crate::descriptors::{Access, Descriptors};
use crate::error::{Error, Result};

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drive {
    /// Its name: 1–20 characters; also the serial number that the guest reads.
    pub drive_id: String,
    /// The image.
    pub path_on_host: String,
    /// The image's format; it is never guessed, as a guest could write another format's header into a raw disk.
    #[serde(default)]
    pub format: DriveFormat,
    /// The read-only raw base below a qcow2 overlay. Names inside the image open nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backing: Option<String>,
    /// First disk of the machine; `root=/dev/vda` is added to a command line that has no `root=`.
    #[serde(default)]
    pub is_root_device: bool,
    /// The guest may not write.
    #[serde(default)]
    pub is_read_only: bool,
    /// How much the guest may read and write.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
    /// Who does the host's work.
    #[serde(default)]
    pub io_engine: IoEngine,
    /// Queues, 1–16: guests with several CPUs spread their requests over them. One thread serves them all.
    #[serde(default = "crate::config::one")]
    pub num_queues: u8,
}

/// Who does a disk's work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum IoEngine {
    /// The device thread: the quickest for what the host has in memory; all devices wait while the host's disk works.
    Sync,
    /// Somebody else, so that no other device waits: io_uring for raw images, a thread of the disk's own for others and where the
    /// host has no io_uring.
    #[default]
    Async,
}

/// A disk image's format.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DriveFormat {
    /// The file is the disk.
    #[default]
    Raw,
    /// QEMU's copy-on-write format, version 2 or 3.
    Qcow2,
}

/// `PATCH /drives/{id}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriveUpdate {
    /// The disk.
    pub drive_id: String,
    /// Its image from now on. The one that it has: look at that again, as it may have grown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path_on_host: Option<String>,
    /// The image's format, if it is another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<DriveFormat>,
    /// The base below a qcow2 overlay. Left out beside another image: it has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backing: Option<String>,
    /// Buckets that replace those that are there; one of size 0 or time 0 removes a limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}

impl Drive {
    /// How its image is opened.
    #[must_use]
    pub const fn access(&self) -> Access {
        if self.is_read_only { Access::Read } else { Access::ReadWrite }
    }

    /// Checks what types cannot say.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn check(&self) -> Result<()> {
        if self.drive_id.is_empty() || self.drive_id.len() > 20 || !self.drive_id.is_ascii() {
            return Err(Error::Config(format!(
                "drives: drive_id {:?} is not 1–20 ASCII characters",
                self.drive_id
            )));
        }
        if self.num_queues == 0 || usize::from(self.num_queues) > MAX_QUEUES {
            return Err(Error::Config(format!(
                "drives: {:?}: num_queues {} is outside 1–{MAX_QUEUES}",
                self.drive_id, self.num_queues
            )));
        }
        if self.backing.is_some() && self.format == DriveFormat::Raw {
            return Err(Error::Config(format!(
                "drives: {:?} has a backing image, which only format qcow2 can have",
                self.drive_id
            )));
        }
        Ok(())
    }
}

impl DriveUpdate {
    /// The disk's configuration after the change.
    ///
    /// # Errors
    /// [`Error::Config`], naming the field.
    pub fn apply(&self, drive: &Drive) -> Result<Drive> {
        let refuse = |why: &str| Err(Error::Config(format!("drives: {:?}: {why}", self.drive_id)));
        if self.path_on_host.is_none() && (self.format.is_some() || self.backing.is_some()) {
            return refuse("format and backing are those of a path_on_host, which is missing");
        }
        if self.backing.is_some() && self.format != Some(DriveFormat::Qcow2) {
            return refuse("backing needs format qcow2 beside it");
        }
        let format = self.format.unwrap_or(drive.format);
        let path_on_host = self.path_on_host.clone().unwrap_or_else(|| drive.path_on_host.clone());
        let same = path_on_host == drive.path_on_host && format == drive.format;
        let backing = self.backing.clone().or_else(|| drive.backing.clone().filter(|_| same));
        let rate_limiter = RateLimiter::changed(drive.rate_limiter, self.rate_limiter);
        let drive = Drive { path_on_host, format, backing, rate_limiter, ..drive.clone() };
        drive.check()?;
        Ok(drive)
    }
}

/// An image that is open.
pub struct Opened {
    /// The image.
    pub image: Box<dyn Backend>,
    /// Its file, if it is nothing but the disk's bytes.
    pub raw: Option<File>,
}

/// Opens a disk's image: descriptors that were handed over, or before the lock paths.
///
/// # Errors
/// [`Error::Open`], [`Error::NotHanded`], [`Error::Config`] for a descriptor that cannot be written, [`Error::Disk`].
pub fn open(drive: &Drive, descriptors: &Descriptors) -> Result<Opened> {
    let file = descriptors.file_to_keep(&drive.path_on_host, "disk image", drive.access())?;
    if !drive.is_read_only && !is_writable(&file) {
        return Err(Error::Config(format!(
            "drives: {:?}: the descriptor {:?} cannot be written, and is_read_only is false",
            drive.drive_id, drive.path_on_host
        )));
    }
    let backing = match &drive.backing {
        Some(name) => Some(descriptors.file_to_keep(name, "base image", Access::Read)?),
        None => None,
    };
    check_kind(drive, &drive.path_on_host, &file)?;
    for (name, base) in drive.backing.iter().zip(&backing) {
        check_kind(drive, name, base)?;
    }
    let failed = |source| Error::Disk {
        id: drive.drive_id.clone(),
        what: format!("opening {:?} as {:?}", drive.path_on_host, drive.format),
        source,
    };
    let raw = (drive.format == DriveFormat::Raw).then(|| file.try_clone()).transpose().map_err(failed)?;
    let image = Image::open(file, drive.format, backing, !drive.is_read_only).map_err(failed)?;
    Ok(Opened { image: Box::new(image), raw })
}

/// Refuses every file type without blocks.
fn check_kind(drive: &Drive, name: &str, file: &File) -> Result<()> {
    let kind = file.metadata().map_err(Error::io(format!("looking at {name:?}")))?.file_type();
    let what = match kind {
        _ if kind.is_file() || kind.is_block_device() => return Ok(()),
        _ if kind.is_dir() => "a folder",
        _ if kind.is_fifo() => "a pipe",
        _ if kind.is_socket() => "a socket",
        _ => "a character device",
    };
    Err(Error::Config(format!(
        "drives: {:?}: {name:?} is {what}, must be a file or a block device",
        drive.drive_id
    )))
}

/// Whether a descriptor can be written as well as read.
pub(crate) fn is_writable(file: &File) -> bool {
    // SAFETY: F_GETFL only reads an open descriptor's flags.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    flags >= 0 && flags & libc::O_ACCMODE == libc::O_RDWR
}

#[cfg(test)]
mod tests {
    use super::*;

    fn update(text: &str) -> DriveUpdate {
        serde_json::from_str(text).unwrap()
    }

    fn drive(text: &str) -> Drive {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn what_is_left_out_stays_unless_it_belongs_to_another_image() {
        let overlay = r#""path_on_host":"o","format":"qcow2","backing":"b""#;
        let limit = r#""rate_limiter":{"ops":{"size":5,"refill_time":100}}"#;
        for (change, expected) in [
            (r#""path_on_host":"o""#.to_owned(), format!("{overlay},{limit}")),
            (r#""path_on_host":"p""#.to_owned(), format!(r#""path_on_host":"p","format":"qcow2",{limit}"#)),
            (
                r#""path_on_host":"p","format":"qcow2","backing":"c""#.to_owned(),
                format!(r#""path_on_host":"p","format":"qcow2","backing":"c",{limit}"#),
            ),
            (r#""path_on_host":"r","format":"raw""#.to_owned(), format!(r#""path_on_host":"r",{limit}"#)),
            (r#""rate_limiter":{"ops":{"size":0,"refill_time":1}}"#.to_owned(), overlay.to_owned()),
            (
                r#""rate_limiter":{"bandwidth":{"size":9,"refill_time":1}}"#.to_owned(),
                format!(
                    r#"{overlay},"rate_limiter":{{"bandwidth":{{"size":9,"refill_time":1}},
                    "ops":{{"size":5,"refill_time":100}}}}"#
                ),
            ),
        ] {
            let before = drive(&format!(r#"{{"drive_id":"d",{overlay},{limit}}}"#));
            let after = update(&format!(r#"{{"drive_id":"d",{change}}}"#)).apply(&before).unwrap();
            assert_eq!(after, drive(&format!(r#"{{"drive_id":"d",{expected}}}"#)), "{change}");
        }
    }

    #[test]
    fn what_belongs_to_an_image_needs_one() {
        let before = drive(r#"{"drive_id":"d","path_on_host":"o","format":"qcow2"}"#);
        for (change, word) in [
            (r#""format":"raw""#, "path_on_host"),
            (r#""backing":"b""#, "path_on_host"),
            (r#""path_on_host":"o","backing":"b""#, "format qcow2"),
            (r#""path_on_host":"o","format":"raw","backing":"b""#, "format qcow2"),
        ] {
            let why =
                update(&format!(r#"{{"drive_id":"d",{change}}}"#)).apply(&before).unwrap_err().to_string();
            assert!(why.contains(word) && why.contains("\"d\""), "{change}: {why}");
        }
    }
}
