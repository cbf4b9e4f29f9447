//! `manifest.json` of an image folder.

use crate::error::{Error, Result};
use roost_types::contents;
use serde::Deserialize;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Component, Path, PathBuf};

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
    /// Whether the image runs an ssh server, for which an instance needs a key pair.
    #[serde(default)]
    pub ssh: Option<bool>,
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
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    for name in [&mut manifest.kernel, &mut manifest.root].into_iter().chain(manifest.initrd.as_mut()) {
        *name = within(folder, name)?;
    }
    check_contents(&manifest)?;
    Ok(manifest)
}

/// Returns the regular file of this name in the folder. A stranger's manifest must name no file
/// outside the folder, neither directly nor by a symbolic link.
fn within(folder: &Path, name: &Path) -> Result<PathBuf> {
    let path = folder.join(name);
    let failed = |source| Error::File { action: "read", path: path.clone(), source };
    let plain = name.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    let real = path.canonicalize();
    let outside = match (&real, folder.canonicalize()) {
        (Ok(real), Ok(folder)) => !real.starts_with(folder),
        _ => false,
    };
    if !plain || outside {
        return Err(Error::parameter(format!(
            "the manifest names {}, which is not inside its folder {}: copy the file there if it is meant",
            name.display(),
            folder.display()
        )));
    }
    let real = real.map_err(failed)?;
    // A named pipe would block, and a device may have no end.
    if !std::fs::metadata(&real).map_err(failed)?.is_file() {
        return Err(Error::parameter(format!("{} is not a regular file", path.display())));
    }
    Ok(real)
}

/// Checks the first bytes of each file: a file that cannot boot is refused before any upload.
fn check_contents(manifest: &Manifest) -> Result<()> {
    look(&manifest.kernel, |file| file.check_kernel())?;
    if let Some(initrd) = &manifest.initrd {
        look(initrd, |file| file.check_initrd())?;
    }
    look(&manifest.root, |file| file.check_root(&manifest.boot_args, manifest.initrd.is_some()))
}

fn look(path: &Path, check: impl Fn(contents::File<'_>) -> std::result::Result<(), String>) -> Result<()> {
    let failed = |source| Error::File { action: "read", path: path.into(), source };
    let mut file = File::open(path).map_err(failed)?;
    let length = file.metadata().map_err(failed)?.len();
    if length == 0 {
        return Err(Error::parameter(format!("{} is empty", path.display())));
    }
    let (mut head, mut tail) = (Vec::new(), Vec::new());
    (&mut file).take(contents::HEAD_BYTES as u64).read_to_end(&mut head).map_err(failed)?;
    file.seek(SeekFrom::Start(length.saturating_sub(contents::TAIL_BYTES as u64))).map_err(failed)?;
    file.take(contents::TAIL_BYTES as u64).read_to_end(&mut tail).map_err(failed)?;
    let name = path.display().to_string();
    check(contents::File { name: &name, head: &head, tail: &tail }).map_err(Error::parameter)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"{"name":"tiny","kernel":"vmlinux","root":"root.raw","boot_args":"console=ttyS0",
        "default_user":"root","description":"d","min_volume_gib":1,"something_new":true}"#;

    fn with(at: usize, mark: &[u8]) -> Vec<u8> {
        let mut content = vec![0; 70_000];
        content[at..at + mark.len()].copy_from_slice(mark);
        content
    }

    /// A folder that is taken.
    fn good() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("vmlinux"), with(0, b"\x7fELF")).unwrap();
        std::fs::write(folder.path().join("root.raw"), with(0x438, b"\x53\xef")).unwrap();
        std::fs::write(folder.path().join("manifest.json"), TEXT).unwrap();
        folder
    }

    #[test]
    fn names_are_relative_to_the_manifest_and_new_fields_do_no_harm() {
        let folder = good();
        let manifest = read(folder.path()).unwrap();
        assert_eq!(manifest, read(&folder.path().join("manifest.json")).unwrap());
        assert_eq!(manifest.root, folder.path().canonicalize().unwrap().join("root.raw"));
        assert_eq!(manifest.initrd, None);
    }

    #[test]
    fn only_regular_files_inside_the_folder_are_uploaded() {
        let folder = good();
        let place = |name: &str| folder.path().join(name);
        let with_root = |name: &str| {
            std::fs::write(place("manifest.json"), TEXT.replace("root.raw", name)).unwrap();
            read(folder.path()).map(|manifest| manifest.root)
        };
        let elsewhere = good();
        std::os::unix::fs::symlink(elsewhere.path().join("root.raw"), place("out")).unwrap();
        std::os::unix::fs::symlink("root.raw", place("in")).unwrap();
        std::fs::create_dir(place("sub")).unwrap();
        std::os::unix::fs::symlink(elsewhere.path(), place("sub/out")).unwrap();
        nix::unistd::mkfifo(&place("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        for name in ["/etc/hostname", "../x", "sub/../root.raw", "out", "sub/out/root.raw"] {
            let error = with_root(name).unwrap_err();
            assert!(error.to_string().contains("not inside its folder"), "{name}: {error}");
            assert!(error.to_string().contains(name), "{name}: {error}");
        }
        for name in ["pipe", "sub"] {
            let error = with_root(name).unwrap_err();
            assert!(error.to_string().contains("is not a regular file"), "{name}: {error}");
        }
        assert!(with_root("in").unwrap().ends_with("root.raw"));
        assert!(with_root("./root.raw").is_ok());
    }

    #[test]
    fn what_cannot_boot_is_refused_with_the_command_that_mends_it() {
        let folder = good();
        for (content, said) in [
            (with(0, b"QFI\xfb"), "qemu-img convert -f qcow2 -O raw"),
            (vec![0; 70_000], "mkfs.ext4"),
            (vec![], "is empty"),
            ([vec![7; 70_000], b"conectix".to_vec(), vec![0; 504]].concat(), "-f vpc"),
        ] {
            std::fs::write(folder.path().join("root.raw"), content).unwrap();
            let error = read(folder.path()).unwrap_err();
            assert!(error.to_string().contains(said), "{error}");
            assert_eq!(error.exit_code(), 3);
        }
    }

    #[test]
    fn what_is_no_kernel_is_refused_by_name() {
        let folder = good();
        for content in [b"#!/bin/sh", &[0; 4096][..]] {
            std::fs::write(folder.path().join("vmlinux"), content).unwrap();
            let error = read(folder.path()).unwrap_err();
            assert!(error.to_string().contains("no kernel (ELF vmlinux or bzImage"), "{error}");
        }
        let error = read(&folder.path().join("nowhere")).unwrap_err();
        assert_eq!(error.exit_code(), 3);
    }
}
