//! Opens what a configuration names, as the monitor would by itself, and puts each descriptor under the very name that the
//! configuration has for it: the monitor looks names up among descriptors first, so that no configuration is rewritten.
//!
//! A snapshot's state file holds a configuration too. Nothing that only that one names is opened: a monitor wrote it, which may have been
//! broken into, and root would open whatever it liked. Such a name must be handed over, or another be given for it (`drive_overrides`, …).

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::check;
use crate::config::{CpuConfig, NetworkInterface, SerialConfig, VmConfig, VsockConfig};
use crate::descriptors::{Access, Descriptors};
use crate::devices::virtio::net::tap::TapDevice;
use crate::error::{Error, Result};
use crate::preboot::{KVM_NAME, USERFAULTFD_NAME};
use crate::snapshot::requests::{BackendType, LoadSnapshot};

/// Opens all of it.
///
/// # Errors
/// [`Error::Open`], [`Error::Io`], [`Error::KvmLacks`].
pub fn open(config: &VmConfig, descriptors: &Descriptors) -> Result<()> {
    let file = |name: &str, what, access| {
        if descriptors.has(name) {
            return Ok(());
        }
        descriptors.insert(name, descriptors.file(name, what, access)?)
    };
    if let Some(name) = &config.status {
        file(name, "status file", Access::Append)?;
    }
    if let Some(name) = config.logger.as_ref().and_then(|logger| logger.log_path.as_ref()) {
        file(name, "log", Access::Output)?;
    }
    if let Some(metrics) = &config.metrics {
        file(&metrics.metrics_path, "metrics", Access::Output)?;
    }
    if let Some(boot) = &config.boot_source {
        file(&boot.kernel_image_path, "kernel", Access::Read)?;
        if let Some(name) = &boot.initrd_path {
            file(name, "initrd", Access::Read)?;
        }
    }
    // What one disk writes and another one reads has one name, and so one descriptor.
    let mut drives: Vec<_> = config.drives.iter().collect();
    drives.sort_by_key(|drive| drive.is_read_only);
    for drive in &drives {
        file(&drive.path_on_host, "disk image", drive.access())?;
    }
    for name in drives.iter().filter_map(|drive| drive.backing.as_ref()) {
        file(name, "base image", Access::Read)?;
    }
    // The same file in several machines, or in one twice: who may write comes first.
    let mut pmem: Vec<_> = config.pmem.iter().collect();
    pmem.sort_by_key(|image| image.read_only);
    for image in &pmem {
        file(&image.path_on_host, "pmem file", image.access())?;
    }
    if let Some(CpuConfig::Named(name)) = &config.cpu_config {
        file(name, "CPU template", Access::Read)?;
    }
    config.network_interfaces.iter().try_for_each(|interface| taps(interface, descriptors))?;
    for serial in
        config.serial.iter().chain(config.snapshot.iter().filter_map(|s| s.serial_override.as_ref()))
    {
        console(serial, &file)?;
    }
    if let Some(request) = &config.snapshot {
        snapshot(request, descriptors, &file)?;
    }
    let places = config.vsock.iter().map(|vsock| vsock.uds_path.as_str());
    let others = config.snapshot.iter().filter_map(|snapshot| snapshot.vsock_override.as_ref());
    let places = places.chain(others.map(|other| other.uds_path.as_str()));
    for place in places {
        let place = VsockConfig { uds_path: place.to_owned(), ..VsockConfig::default() };
        let name = place.place().0;
        descriptors.insert(name, descriptors.folder(name, "folder of vsock sockets")?)?;
    }
    Ok(())
}

/// `/dev/kvm`, which every monitor needs.
///
/// # Errors
/// As when a monitor opens it.
pub fn open_kvm(descriptors: &Descriptors) -> Result<()> {
    if descriptors.has(KVM_NAME) {
        return Ok(());
    }
    let kvm = crate::vm::open_kvm(None)?;
    // SAFETY: the descriptor is open as long as the value lives, which is longer than the borrow.
    let borrowed = unsafe { BorrowedFd::borrow_raw(kvm.as_raw_fd()) };
    let owned = borrowed.try_clone_to_owned().map_err(Error::io("duplicating /dev/kvm"))?;
    descriptors.insert(KVM_NAME, owned)
}

fn taps(interface: &NetworkInterface, descriptors: &Descriptors) -> Result<()> {
    if interface.vhost {
        for name in (0..interface.num_queue_pairs).map(|index| interface.vhost_name(index)) {
            if !descriptors.has(&name) {
                // Its owner is whoever uses it first: the monitor.
                descriptors.insert(&name, interface.open_fresh_vhost(&name)?)?;
            }
        }
    }
    if descriptors.has(&interface.host_dev_name) {
        return Ok(());
    }
    for (index, tap) in (0..).zip(interface.open(descriptors)?) {
        descriptors.insert(interface.tap_name(index), tap)?;
    }
    Ok(())
}

fn console(serial: &SerialConfig, file: &impl Fn(&str, &'static str, Access) -> Result<()>) -> Result<()> {
    if let Some(name) = serial.output.as_deref().filter(|name| *name != "stdout") {
        file(name, "console", Access::CreateReadWrite)?;
    }
    if let Some(name) = &serial.serial_out_path {
        file(name, "console", Access::Output)?;
    }
    if let Some(name) = serial.input.as_deref().filter(|name| *name != "stdin") {
        file(name, "console input", Access::Read)?;
    }
    Ok(())
}

fn snapshot(
    request: &LoadSnapshot,
    descriptors: &Descriptors,
    file: &impl Fn(&str, &'static str, Access) -> Result<()>,
) -> Result<()> {
    file(&request.snapshot_path, "state file", Access::Read)?;
    let memory = request.memory()?;
    match memory.backend_type {
        BackendType::File => file(&memory.backend_path, "memory file", Access::Read)?,
        BackendType::Uffd => {
            if !descriptors.has(&memory.backend_path) {
                let stream = descriptors.stream(&memory.backend_path, "page-fault handler")?;
                descriptors.insert(&memory.backend_path, stream)?;
            }
            // Where there is none, the monitor says what it needs.
            if let Ok(device) = File::open("/dev/userfaultfd")
                && !descriptors.has(USERFAULTFD_NAME)
            {
                descriptors.insert(USERFAULTFD_NAME, device)?;
            }
        }
    }
    for change in &request.drive_overrides {
        // The state file knows whether the guest may write it, and is not believed.
        let access = if change.is_read_only { Access::Read } else { Access::ReadWrite };
        file(&change.path_on_host, "disk image", access)?;
        if let Some(name) = &change.backing {
            file(name, "base image", Access::Read)?;
        }
    }
    for change in &request.pmem_overrides {
        let access = if change.read_only { Access::Read } else { Access::ReadWrite };
        file(&change.path_on_host, "pmem file", access)?;
    }
    for change in request.network_overrides.iter().filter(|change| !descriptors.has(&change.host_dev_name)) {
        let name = &change.host_dev_name;
        let tap = TapDevice::open(name, false).map_err(Error::io(format!("tap {name:?}")))?;
        descriptors.insert(name, tap)?;
    }
    Ok(())
}

/// A folder as a mount of its own, so that `..` leads nowhere. Nothing: it is no folder. There is one use of a folder, which is to make
/// sockets in it.
///
/// # Errors
/// [`Error::Io`].
pub fn folder(name: &str, descriptor: &OwnedFd) -> Result<Option<OwnedFd>> {
    // SAFETY: plain data, for which all zeroes is a valid value.
    let mut about: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: fills the struct that it is given.
    let known = check(unsafe { libc::fstat(descriptor.as_raw_fd(), &raw mut about) });
    known.map_err(Error::io(format!("looking at the descriptor {name:?}")))?;
    if about.st_mode & libc::S_IFMT != libc::S_IFDIR {
        return Ok(None);
    }
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | libc::AT_EMPTY_PATH.cast_unsigned();
    // SAFETY: an open descriptor and an empty, null-terminated path.
    let mount = unsafe { libc::syscall(libc::SYS_open_tree, descriptor.as_raw_fd(), c"".as_ptr(), flags) };
    let Ok(mount @ 0..) = i32::try_from(mount) else {
        let why = io::Error::last_os_error();
        return Err(Error::io(format!("making a mount of its own of the folder {name:?}"))(why));
    };
    // SAFETY: open_tree has just made it.
    Ok(Some(unsafe { OwnedFd::from_raw_fd(mount) }))
}
