//! Files from outside that are put below `/opt/roost`: each share is one read-only ext4 disk, made by
//! `mke2fs -d`, cached by what is in it, and laid under a writable layer inside.

use super::process::{Process, run};
use super::seat::{cache_dir, private_dir};
use super::{Error, Result};
use std::ffi::OsString;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Changes when disks are made in another way.
const LAYOUT: u32 = 2;

/// Some files that appear in one folder below `/opt/roost`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Share {
    /// The folder's name below `/opt/roost`.
    pub name: String,
    /// Files and folders that are put into it under their own names.
    pub entries: Vec<PathBuf>,
}

impl Share {
    /// Everything inside `folder` as `/opt/roost/NAME`.
    ///
    /// # Errors
    /// When the folder cannot be listed.
    pub fn folder(folder: &Path, name: &str) -> Result<Self> {
        let mut entries = Vec::new();
        for entry in fs::read_dir(folder).map_err(Error::file("cannot list", folder))? {
            entries.push(entry.map_err(Error::file("cannot list", folder))?.path());
        }
        entries.sort();
        Ok(Self { name: name.to_owned(), entries })
    }

    /// Changes with anything that the share holds: names, sizes, times, modes.
    pub(super) fn key(&self) -> Result<String> {
        // SipHash with fixed keys: this tells builds apart, it guards nothing.
        let mut hasher = DefaultHasher::new();
        LAYOUT.hash(&mut hasher);
        self.name.hash(&mut hasher);
        self.walk(&mut |path, meta| {
            (path, meta.len(), meta.mtime(), meta.mtime_nsec(), meta.mode()).hash(&mut hasher);
        })?;
        Ok(format!("{:016x}", hasher.finish()))
    }

    fn walk(&self, visit: &mut impl FnMut(&Path, &fs::Metadata)) -> Result<()> {
        fn below(path: &Path, visit: &mut impl FnMut(&Path, &fs::Metadata)) -> Result<()> {
            let meta = fs::symlink_metadata(path).map_err(Error::file("cannot read", path))?;
            visit(path, &meta);
            if meta.is_dir() {
                let list = fs::read_dir(path).map_err(Error::file("cannot list", path))?;
                let mut children = Vec::new();
                for child in list {
                    children.push(child.map_err(Error::file("cannot list", path))?.path());
                }
                children.sort();
                for child in children {
                    below(&child, visit)?;
                }
            }
            Ok(())
        }
        self.entries.iter().try_for_each(|entry| below(entry, visit))
    }

    /// The disk that holds this share; made now unless the cache has it.
    pub(super) fn disk(&self) -> Result<PathBuf> {
        let folder = cache_dir().join("shares");
        private_dir(&folder)?;
        let label = self.name.replace('/', "_");
        let disk = folder.join(format!("{label}-{}.img", self.key()?));
        if !disk.exists() {
            let work = folder.join(format!(".new-{label}-{}", std::process::id()));
            let made = self.make_disk(&work, &disk);
            let _ = fs::remove_dir_all(&work);
            made?;
            prune(&folder, &label);
        }
        Ok(disk)
    }

    fn make_disk(&self, work: &Path, disk: &Path) -> Result<()> {
        let (mut bytes, mut files) = (0, 0);
        self.walk(&mut |_, meta| {
            bytes += meta.blocks() * 512;
            files += 1;
        })?;
        let _ = fs::remove_dir_all(work);
        // A folder of its own below the root, where mke2fs puts lost+found.
        let root = work.join("root");
        let stage = root.join("files");
        private_dir(&stage)?;
        run(Command::new("chmod").arg("755").args([&root, &stage]))?;
        if !self.entries.is_empty() {
            // Links cost nothing; another file system needs copies.
            let copy =
                |how: &[&str]| run(Command::new("cp").args(how).arg("--").args(&self.entries).arg(&stage));
            copy(&["-al"]).or_else(|_| {
                run(Command::new("find").arg(&stage).args(["-mindepth", "1", "-delete"]))?;
                copy(&["-a", "--sparse=auto", "--reflink=auto"])
            })?;
        }
        let image = work.join("image");
        let kib = bytes / 1024 * 9 / 8 + 8192;
        run(Command::new("/sbin/mke2fs")
            .args([
                "-q",
                "-F",
                "-t",
                "ext4",
                "-O",
                "^has_journal,^resize_inode",
                "-m",
                "0",
                "-E",
                "root_owner=0:0,nodiscard",
            ])
            .args(["-N", &(files + 64).to_string(), "-d"])
            .args([&root, &image])
            .arg(format!("{kib}K")))?;
        fs::rename(&image, disk).map_err(Error::file("cannot create", disk))
    }
}

/// Removes half-made disks whose maker was killed.
pub(super) fn sweep() {
    let dead = |name: &OsString| {
        let maker = name.to_string_lossy().strip_prefix(".new-")?.rsplit_once('-')?.1.parse().ok()?;
        Process::find(maker).is_none().then_some(())
    };
    let Ok(list) = fs::read_dir(cache_dir().join("shares")) else { return };
    for entry in list.flatten().filter(|entry| dead(&entry.file_name()).is_some()) {
        let _ = fs::remove_dir_all(entry.path());
    }
}

/// Keeps the two newest disks of a share; a running virtual host keeps what it has open.
fn prune(folder: &Path, name: &str) {
    let mine = |file: &OsString| {
        let file = file.to_string_lossy();
        file.strip_suffix(".img").and_then(|stem| stem.rsplit_once('-')).is_some_and(|(stem, _)| stem == name)
    };
    let Ok(list) = fs::read_dir(folder) else { return };
    let mut disks: Vec<_> = list
        .flatten()
        .filter(|entry| mine(&entry.file_name()))
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .collect();
    disks.sort();
    for (_, old) in disks.iter().rev().skip(2) {
        let _ = fs::remove_file(old);
    }
}

/// What a checkout gives to its virtual host: the release programs that are built, as `bin`, and `scripts`.
///
/// # Errors
/// When the checkout cannot be read.
pub fn workspace_shares(root: &Path) -> Result<Vec<Share>> {
    let named = std::env::var_os("CARGO_TARGET_DIR").filter(|dir| !dir.is_empty());
    let target = named.map_or_else(|| root.join("target"), |dir| root.join(dir));
    let programs = ["roost", "roost-vmm", "roost-agent", "roost-controller"];
    let newest = [target.join("x86_64-unknown-linux-gnu/release"), target.join("release")]
        .into_iter()
        .find(|folder| programs.iter().any(|program| folder.join(program).is_file()));
    let entries = newest.map_or_else(Vec::new, |folder| {
        programs.iter().map(|program| folder.join(program)).filter(|path| path.is_file()).collect()
    });
    Ok(vec![Share { name: "bin".to_owned(), entries }, Share::folder(&root.join("scripts"), "scripts")?])
}

#[cfg(test)]
mod tests {
    use super::Share;
    use std::fs;

    #[test]
    fn a_share_has_another_key_after_any_change() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        fs::create_dir(dir.path().join("sub")).expect("created");
        fs::write(dir.path().join("sub/file"), "one").expect("written");
        let key = || Share::folder(dir.path(), "x").expect("listed").key().expect("readable");
        let first = key();
        assert_eq!(first, key());
        fs::write(dir.path().join("sub/file"), "three").expect("written");
        let second = key();
        assert_ne!(first, second);
        fs::write(dir.path().join("new"), "").expect("written");
        assert_ne!(second, key());
    }
}
