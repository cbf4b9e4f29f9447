//! What persistent memory is configured with, what may change of it while its machine runs, and how its file is opened.

use std::fs::File;

use serde::{Deserialize, Serialize};

use super::image::ALIGNMENT;
use crate::config::{Drive, RateLimiter};
use crate::descriptors::{Access, Descriptors};
use crate::devices::virtio::block::config::is_writable;
use crate::error::{Error, Result};
use crate::layout::MAX_MEMORY_MIB;

/// A file that the guest finds in its memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PmemConfig {
    /// Its name: 1–64 letters, digits, `_`, `-` and `.`.
    pub id: String,
    /// The file.
    pub path_on_host: String,
    /// It holds the root file system: `root=/dev/pmemN ro rootflags=dax rootwait` is added to a command line that has no `root=`.
    #[serde(default)]
    pub root_device: bool,
    /// The guest may not write. All machines with this file share its pages then.
    #[serde(default)]
    pub read_only: bool,
    /// How often the guest may flush; each flush counts as one operation and the whole file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}

/// `PATCH /pmem/{id}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PmemUpdate {
    /// The device.
    pub id: String,
    /// Buckets that replace those that are there; one of size 0 or time 0 removes a limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}

impl PmemConfig {
    /// How its file is opened.
    pub(crate) const fn access(&self) -> Access {
        if self.read_only { Access::Read } else { Access::ReadWrite }
    }

    fn check(&self) -> Result<()> {
        let fits = |c: u8| c.is_ascii_alphanumeric() || b"_-.".contains(&c);
        if self.id.is_empty() || self.id.len() > 64 || !self.id.bytes().all(fits) {
            return Err(Error::Config(format!(
                "pmem: id {:?} is not 1–64 letters, digits, '_', '-' and '.'",
                self.id
            )));
        }
        Ok(())
    }

    /// Opens the file: a descriptor that was handed over, or a path. Says how many bytes it has.
    ///
    /// # Errors
    /// [`Error::Open`], [`Error::NotHanded`], [`Error::Config`] for what cannot be mapped as it is asked for, [`Error::Io`].
    pub fn open(&self, descriptors: &Descriptors) -> Result<(File, u64)> {
        let file = descriptors.file(&self.path_on_host, "pmem file", self.access())?;
        let refuse =
            |why: &str| Err(Error::Config(format!("pmem: {:?}: {:?} {why}", self.id, self.path_on_host)));
        let found = file.metadata().map_err(Error::io(format!("looking at {:?}", self.path_on_host)))?;
        let size = found.len();
        if !found.is_file() {
            return refuse("is no regular file");
        }
        if !self.read_only && !is_writable(&file) {
            return refuse("cannot be written, and read_only is false");
        }
        if size == 0 || size > MAX_MEMORY_MIB << 20 {
            return refuse(&format!("has {size} bytes, which is outside 1–{}", MAX_MEMORY_MIB << 20));
        }
        if !self.read_only && !size.is_multiple_of(ALIGNMENT) {
            return refuse(&format!(
                "has {size} bytes, which is no multiple of {ALIGNMENT} (2 MiB) as it must be unless read_only is true: what a \
                 guest writes behind the end would be lost (truncate --size=%2M makes it one)"
            ));
        }
        Ok((file, size))
    }
}

impl PmemUpdate {
    /// The device's configuration after the change.
    #[must_use]
    pub fn apply(&self, config: &PmemConfig) -> PmemConfig {
        let rate_limiter = RateLimiter::changed(config.rate_limiter, self.rate_limiter);
        PmemConfig { rate_limiter, ..config.clone() }
    }
}

/// Checks what types cannot say, also against the disks.
///
/// # Errors
/// [`Error::Config`].
pub fn check(pmem: &[PmemConfig], drives: &[Drive]) -> Result<()> {
    pmem.iter().try_for_each(PmemConfig::check)?;
    crate::config::unique("pmem: id", pmem.iter().map(|pmem| &pmem.id))?;
    let roots = pmem.iter().filter(|pmem| pmem.root_device).count();
    if roots > 1 {
        return Err(Error::Config("pmem: more than one has root_device".into()));
    }
    if roots == 1 && drives.iter().any(|drive| drive.is_root_device) {
        return Err(Error::Config(
            "pmem: one has root_device, and one of the drives has is_root_device: there is one root".into(),
        ));
    }
    Ok(())
}

/// What the kernel's command line gets: the place of the root file system, unless its words say one.
#[must_use]
pub fn root_words(pmem: &[PmemConfig], cmdline: &str) -> String {
    let has = |start: &str| cmdline.split(' ').any(|word| word.starts_with(start));
    let Some((place, root)) = pmem.iter().enumerate().find(|(_, pmem)| pmem.root_device) else {
        return String::new();
    };
    if has("root=") {
        return String::new();
    }
    let mode = if root.read_only { "ro" } else { "rw" };
    // Without DAX the guest would read the file into pages of its own.
    let flags = if has("rootflags=") { "" } else { " rootflags=dax" };
    // Linux finds it beside its own start (nvdimm's bus is scanned by a worker).
    let wait = if has("rootwait") { "" } else { " rootwait" };
    format!("root=/dev/pmem{place} {mode}{flags}{wait}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::OpenOptionsExt;

    fn pmem(text: &str) -> PmemConfig {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn the_root_is_said_once() {
        let data = pmem(r#"{"id":"data","path_on_host":"d"}"#);
        let root = pmem(r#"{"id":"root","path_on_host":"r","root_device":true,"read_only":true}"#);
        let writable = PmemConfig { read_only: false, ..root.clone() };
        let words = |pmem: &[PmemConfig], line| root_words(pmem, line);
        assert_eq!(
            words(&[data.clone(), root.clone()], "quiet"),
            "root=/dev/pmem1 ro rootflags=dax rootwait"
        );
        assert_eq!(words(&[writable], ""), "root=/dev/pmem0 rw rootflags=dax rootwait");
        let root = [root];
        assert_eq!(words(&root, "rootflags=norecovery"), "root=/dev/pmem0 ro rootwait");
        assert_eq!(words(&root, "quiet root=/dev/vda"), "");
        assert_eq!(words(&[data], "quiet"), "");
    }

    #[test]
    fn what_cannot_be_is_refused_with_the_field() {
        let root = pmem(r#"{"id":"a","path_on_host":"r","root_device":true}"#);
        let other = PmemConfig { id: "b".into(), ..root.clone() };
        let drive: Drive =
            serde_json::from_str(r#"{"drive_id":"d","path_on_host":"d","is_root_device":true}"#).unwrap();
        let bad = |id: &str| PmemConfig { id: id.into(), ..root.clone() };
        for (pmem, drives, word) in [
            (vec![bad("")], vec![], "pmem: id \"\""),
            (vec![bad("a/b")], vec![], "\"a/b\""),
            (vec![bad(&"x".repeat(65))], vec![], "1–64"),
            (vec![root.clone(), root.clone()], vec![], "pmem: id \"a\" is there twice"),
            (vec![root.clone(), other], vec![], "more than one has root_device"),
            (vec![root.clone()], vec![drive], "there is one root"),
        ] {
            let why = check(&pmem, &drives).unwrap_err().to_string();
            assert!(why.contains(word), "{why}");
        }
        check(&[root], &[]).unwrap();
    }

    #[test]
    fn files_that_cannot_be_mapped_are_refused_with_the_rule() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let descriptors = Descriptors::default();
        let open = |path: &std::path::Path, read_only| {
            let config = pmem(r#"{"id":"a","path_on_host":""}"#);
            let path_on_host = path.to_str().unwrap().to_owned();
            PmemConfig { path_on_host, read_only, ..config }.open(&descriptors).map(|(_, size)| size)
        };
        let file = File::create(&path).unwrap();
        for (size, read_only, word) in [
            (0, true, "has 0 bytes"),
            (1, false, "no multiple of 2097152"),
            (ALIGNMENT + 4096, false, "truncate"),
            ((MAX_MEMORY_MIB << 20) + 1, true, "outside 1–"),
        ] {
            file.set_len(size).unwrap();
            let why = open(&path, read_only).unwrap_err().to_string();
            assert!(why.contains("\"a\"") && why.contains(word), "{why}");
        }
        file.set_len(ALIGNMENT + 1).unwrap();
        assert_eq!(open(&path, true).unwrap(), ALIGNMENT + 1);
        assert!(open(dir.path(), true).unwrap_err().to_string().contains("no regular file"));
        file.set_len(ALIGNMENT).unwrap();
        assert_eq!(open(&path, false).unwrap(), ALIGNMENT);
        // A descriptor that was opened for reading alone.
        let handed = File::options().read(true).custom_flags(libc::O_CLOEXEC).open(&path).unwrap();
        descriptors.insert("handed", handed).unwrap();
        let why = open("handed".as_ref(), false).unwrap_err().to_string();
        assert!(why.contains("cannot be written"), "{why}");
        open("handed".as_ref(), true).unwrap();
    }
}
