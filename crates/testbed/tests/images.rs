//! Guest images come out the same, byte for byte, whenever and wherever they are built.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

fn cache() -> PathBuf {
    let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache");
    std::env::var_os("XDG_CACHE_HOME").map_or_else(home, PathBuf::from).join("roost")
}

/// Builds `tiny` with the Debian kernel in a cache of its own, which shares only downloaded packages.
fn build_afresh(folder: &Path) -> PathBuf {
    fs::create_dir_all(cache().join("apt")).expect("the cache can be written");
    fs::create_dir_all(folder.join("roost")).expect("the folder can be written");
    symlink(cache().join("apt"), folder.join("roost/apt")).expect("linked");
    let program = roost_testbed::repository_root().join("guest-images/build");
    let output = Command::new(program)
        .args(["tiny", "--kernel", "debian"])
        .env("XDG_CACHE_HOME", folder)
        .output()
        .expect("guest-images/build runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    PathBuf::from(String::from_utf8_lossy(&output.stdout).trim())
}

#[test]
fn the_same_packages_and_recipe_give_the_same_bytes() {
    let (first, second) = (tempfile::tempdir().expect("made"), tempfile::tempdir().expect("made"));
    let first = build_afresh(first.path());
    let second = build_afresh(second.path());
    assert_eq!(first.file_name(), second.file_name(), "the names hold the key of the inputs");
    for file in ["root.ext4", "initrd", "kernel", "manifest.json"] {
        let (one, other) =
            (fs::read(first.join(file)).expect("built"), fs::read(second.join(file)).expect("built"));
        let differs = one.iter().zip(&other).position(|(a, b)| a != b);
        assert!(
            one == other,
            "{file} differs, first at byte {differs:?} of {} and {}",
            one.len(),
            other.len()
        );
    }
}

#[test]
fn tiny_is_under_four_megabytes() {
    let folder = tempfile::tempdir().expect("made");
    let image = build_afresh(folder.path());
    let size = fs::metadata(image.join("root.ext4")).expect("built").len();
    assert!(size < 4_000_000, "root.ext4 has {size} bytes");
}
