//! `manifest.json` of an image folder.

use crate::error::{Error, Result};
use serde::Deserialize;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

/// What an image is made of; file names are relative to the manifest. Other fields
/// are for other readers: the smallest volume, for one, follows from the size of the root disk.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Manifest {
    /// Name to register it under.
    pub name: String,
    /// Kernel: ELF vmlinux or bzImage.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    #[serde(default)]
    pub initrd: Option<PathBuf>,
    /// Raw root disk.
    pub root: PathBuf,
    /// Kernel command line.
    pub boot_args: String,
    /// The login that gets the key pair.
    pub default_user: String,
    /// A sentence.
    #[serde(default)]
    pub description: String,
}

/// Reads the manifest of a folder, or a manifest; its file names become whole paths.
pub fn read(path: &Path) -> Result<Manifest> {
    let file = if path.is_dir() { path.join("manifest.json") } else { path.to_owned() };
    let text = std::fs::read_to_string(&file).map_err(|source| Error::File {
        action: "read",
        path: file.clone(),
        source,
    })?;
    let mut manifest: Manifest = serde_json::from_str(&text).map_err(|error| {
        Error::parameter(format!(
            "{} is not an image's manifest: {error}; it needs name, kernel, root, boot_args and default_user",
            file.display()
        ))
    })?;
    let folder = file.parent().unwrap_or(Path::new("."));
    for name in [&mut manifest.kernel, &mut manifest.root].into_iter().chain(manifest.initrd.as_mut()) {
        *name = folder.join(&*name);
    }
    check_kernel(&manifest.kernel)?;
    Ok(manifest)
}

/// Whether the file begins like something that the monitor boots: an ELF, or a bzImage ("HdrS" at 0x202).
fn check_kernel(path: &Path) -> Result<()> {
    let failed = |source| Error::File { action: "read", path: path.into(), source };
    let mut head = [0; 0x206];
    match File::open(path).and_then(|mut file| file.read_exact(&mut head)) {
        Ok(()) if head.starts_with(b"\x7fELF") || head.ends_with(b"HdrS") => Ok(()),
        Err(error) if error.kind() != ErrorKind::UnexpectedEof => Err(failed(error)),
        _ => Err(Error::parameter(format!(
            "{} is no kernel: neither an ELF (vmlinux) nor a bzImage",
            path.display()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"{"name":"tiny","kernel":"vmlinux","root":"root.raw","boot_args":"console=ttyS0",
        "default_user":"root","description":"d","min_volume_gib":1,"something_new":true}"#;

    #[test]
    fn names_are_relative_to_the_manifest_and_new_fields_do_no_harm() {
        let folder = tempfile::tempdir().unwrap();
        let mut kernel = vec![0; 0x206];
        kernel[..4].copy_from_slice(b"\x7fELF");
        std::fs::write(folder.path().join("vmlinux"), kernel).unwrap();
        std::fs::write(folder.path().join("manifest.json"), TEXT).unwrap();
        let manifest = read(folder.path()).unwrap();
        assert_eq!(manifest, read(&folder.path().join("manifest.json")).unwrap());
        assert_eq!(manifest.root, folder.path().join("root.raw"));
        assert_eq!(manifest.initrd, None);
    }

    #[test]
    fn what_is_no_kernel_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("manifest.json"), TEXT).unwrap();
        for content in [&b""[..], b"#!/bin/sh", &[0; 4096]] {
            std::fs::write(folder.path().join("vmlinux"), content).unwrap();
            let error = read(folder.path()).unwrap_err();
            assert!(error.to_string().contains("vmlinux is no kernel"), "{error}");
        }
        let error = read(&folder.path().join("nowhere")).unwrap_err();
        assert_eq!(error.exit_code(), 3);
    }
}
