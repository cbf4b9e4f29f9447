//! The monitors and what they are all given: kernel, initrd, one vCPU, 128 MiB.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::json;
use tempfile::TempDir;

use crate::common::elf::{Kernel, Segment};
use crate::common::footprint;
pub use crate::report::Who;

/// Guest memory, MiB.
pub const MEMORY_MIB: u64 = 128;
/// Any one start ends within this.
pub const LIMIT: Duration = Duration::from_secs(60);
/// A static init with nothing else is about this large.
const INITRD_BYTES: usize = 400 * 1024;
const BOOT_ARGS: &str = "console=ttyS0 reboot=k panic=-1 quiet";

/// What all measurements share.
pub struct Bench {
    dir: TempDir,
    monitor: PathBuf,
    qemu: Option<PathBuf>,
    kernel: PathBuf,
    /// Whether the kernel is a real one.
    pub real_kernel: bool,
}

impl Bench {
    /// Prepares a folder with what every start needs.
    pub fn new(monitor: &Path, qemu: &Path, kernel: Option<&Path>) -> io::Result<Self> {
        let dir = tempfile::tempdir()?;
        let stand_in = dir.path().join("kernel");
        if kernel.is_none() {
            std::fs::write(&stand_in, stand_in_kernel())?;
        }
        let bench = Self {
            monitor: monitor.to_owned(),
            qemu: version(qemu).map(|_| qemu.to_owned()),
            kernel: kernel.map_or(stand_in, Path::to_owned),
            real_kernel: kernel.is_some(),
            dir,
        };
        let initrd: Vec<u8> = (0..INITRD_BYTES).map(|n| (n * 31 % 251) as u8).collect();
        std::fs::write(bench.path("initrd"), initrd)?;
        let config = json!({
            "boot-source": { "kernel_image_path": bench.kernel, "initrd_path": bench.path("initrd"), "boot_args": BOOT_ARGS },
            "machine-config": { "vcpu_count": 1, "mem_size_mib": MEMORY_MIB },
        });
        std::fs::write(bench.path("config"), config.to_string())?;
        footprint::settle(&bench.monitor);
        footprint::settle(&bench.kernel);
        Ok(bench)
    }

    /// A file of the benchmark's folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The monitor's program.
    pub fn monitor(&self) -> &Path {
        &self.monitor
    }

    /// The kernel.
    pub fn kernel(&self) -> &Path {
        &self.kernel
    }

    /// QEMU's version, if it is there.
    pub fn qemu_version(&self) -> Option<String> {
        self.qemu.as_deref().and_then(version)
    }

    /// Who takes part.
    pub fn everyone(&self) -> Vec<Who> {
        if self.qemu.is_some() { vec![Who::Roost, Who::Qemu] } else { vec![Who::Roost] }
    }

    /// The command that starts the machine, its console on stdout.
    pub fn command(&self, who: Who) -> Command {
        let mut command = match who {
            Who::Roost => {
                let mut command = Command::new(&self.monitor);
                command.arg("run").arg("--config").arg(self.path("config"));
                command
            }
            Who::Qemu => self.qemu_command(),
        };
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(self.path("stderr")).unwrap());
        command
    }

    fn qemu_command(&self) -> Command {
        let mut command = Command::new(self.qemu.as_ref().unwrap());
        let machine =
            "microvm,acpi=off,pit=off,pic=off,rtc=off,isa-serial=on,x-option-roms=off,auto-kernel-cmdline=on";
        command
            .args(["-M", machine, "-accel", "kvm", "-cpu", "host,-arch-capabilities", "-smp", "1"])
            .args(["-m", &MEMORY_MIB.to_string(), "-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-serial", "stdio", "-no-reboot", "-append", BOOT_ARGS])
            .arg("-kernel")
            .arg(&self.kernel)
            .arg("-initrd")
            .arg(self.path("initrd"));
        command
    }
}

fn version(qemu: &Path) -> Option<String> {
    let output =
        Command::new(qemu).arg("--version").output().ok().filter(|output| output.status.success())?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Some(text.lines().next()?.to_owned())
}

/// An ELF kernel of the `fast` kernel's size and layout, which powers off at once.
fn stand_in_kernel() -> Vec<u8> {
    let noise = |bytes: usize| -> Vec<u8> { (0..bytes).map(|n| (n * 131 % 253) as u8).collect() };
    let text = crate::common::Code::default().power_off().0;
    Kernel {
        entry: 0x100_0000,
        segments: vec![
            Segment::at(0x100_0000, [text, noise(8 << 20)].concat()),
            Segment::at(0x1a0_0000, noise(2 << 20)),
            Segment { extra: 2 << 20, ..Segment::at(0x1d0_0000, noise(2_400_000)) },
        ],
        pvh_entry: Some(0x100_0000),
    }
    .image()
}
