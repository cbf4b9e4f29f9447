//! The monitors in the virtual host, and the machine that each gives its guest.

use std::fs::{self, File};
use std::io::{self, Read};
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::guest;
use crate::report::Who;

/// Any one start ends within this.
pub const LIMIT: Duration = Duration::from_secs(60);
const BOOT_ARGS: &str = "console=ttyS0 reboot=k panic=-1 quiet";

/// What a guest is given.
#[derive(Clone, Copy)]
pub struct Machine<'a> {
    pub cpus: u32,
    pub memory_mib: u64,
    pub does: Does,
    /// More words of its kernel's command line.
    pub words: &'static str,
    /// Without them there is a serial port only.
    pub devices: Option<Devices<'a>>,
}

/// What a guest's init does.
#[derive(Clone, Copy)]
pub enum Does {
    /// Says its line ([`crate::guest`]).
    Nothing,
    /// Serves at this address ([`crate::load`]).
    Load(Ipv4Addr),
    /// Replies over vsock (the same).
    Reply,
}

/// A disk and a tap.
#[derive(Clone, Copy)]
pub struct Devices<'a> {
    pub disk: &'a str,
    pub disk_queues: u32,
    pub tap: &'a File,
    /// Whether the host's kernel moves the packets.
    pub vhost: bool,
}

impl Machine<'_> {
    /// One CPU, 128 MiB, nothing else.
    pub const PLAIN: Self = Self { cpus: 1, memory_mib: 128, does: Does::Nothing, words: "", devices: None };

    fn boot_args(&self) -> String {
        let words = self.words;
        match self.does {
            Does::Nothing => format!("{BOOT_ARGS} {words}").trim_end().to_owned(),
            Does::Load(address) => format!("{BOOT_ARGS} {words} bench=load address={address}"),
            Does::Reply => format!("{BOOT_ARGS} {words} bench=load"),
        }
    }

    const fn initrd(&self) -> &'static str {
        match self.does {
            Does::Nothing => "/guest.cpio",
            Does::Load(_) | Does::Reply => "/load.cpio",
        }
    }
}

/// The command of such a machine, whose console is its stdout.
pub fn command(who: Who, machine: Machine<'_>) -> Command {
    let mut command = match who {
        Who::Roost => roost(machine),
        Who::Qemu => qemu(machine),
    };
    command.stdin(Stdio::null()).stderr(File::create("/tmp/stderr").unwrap());
    if let Some(Devices { tap, .. }) = machine.devices {
        let tap = tap.as_raw_fd();
        let hand_over = move || {
            // SAFETY: the descriptor is open; the copy is not closed by the exec.
            if unsafe { libc::dup2(tap, 9) } < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
        };
        // SAFETY: only a system call, which a forked child may make.
        unsafe { command.pre_exec(hand_over) };
    }
    command
}

fn roost(machine: Machine<'_>) -> Command {
    fs::write("/tmp/config", config(machine).to_string()).unwrap();
    let mut command = Command::new("/bin/roost-vmm");
    command.args(["run", "--config", "/tmp/config"]);
    if machine.devices.is_some() {
        command.args(["--fd", "tap=9"]);
    }
    command
}

/// The configuration of such a machine for our monitor.
pub fn config(machine: Machine<'_>) -> Value {
    let mut config = json!({
        "boot-source":
            { "kernel_image_path": "/kernel", "initrd_path": machine.initrd(), "boot_args": machine.boot_args() },
        "machine-config": { "vcpu_count": machine.cpus, "mem_size_mib": machine.memory_mib },
    });
    if let Some(Devices { disk, disk_queues, vhost, .. }) = machine.devices {
        config["drives"] = json!([{ "drive_id": "disk", "path_on_host": disk, "num_queues": disk_queues }]);
        config["network-interfaces"] = json!([{ "iface_id": "eth0", "host_dev_name": "tap" }]);
        if vhost {
            config["network-interfaces"][0]["vhost"] = json!(true);
        }
    }
    config
}

/// QEMU by its own loader, on its own libraries, as nothing else of it is in the virtual host.
fn qemu(machine: Machine<'_>) -> Command {
    let board =
        "microvm,acpi=off,pit=off,pic=off,rtc=off,isa-serial=on,x-option-roms=off,auto-kernel-cmdline=on";
    let mut command = Command::new("/qemu/loader");
    command
        .args(["--library-path", "/qemu/lib", "/qemu/qemu-system-x86_64", "-L", "/qemu/share"])
        .args(["-M", board, "-accel", "kvm", "-cpu", "host", "-smp", &machine.cpus.to_string()])
        .args(["-m", &machine.memory_mib.to_string()])
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot"])
        .args(["-kernel", "/kernel", "-initrd", machine.initrd(), "-append", &machine.boot_args()]);
    if let Some(Devices { disk, disk_queues, vhost, .. }) = machine.devices {
        let vhost = if vhost { ",vhost=on" } else { "" };
        command
            // A thread of its own for the disk is what its users give a busy one.
            .args(["-object", "iothread,id=io"])
            .args(["-drive", &format!("if=none,id=disk,format=raw,aio=io_uring,file={disk}")])
            .args(["-device", &format!("virtio-blk-device,drive=disk,iothread=io,num-queues={disk_queues}")])
            .args(["-netdev", &format!("tap,id=eth0,fd=9{vhost}")])
            .args(["-device", "virtio-net-device,netdev=eth0"]);
    }
    command
}

/// A machine whose guest has said its line. Ends with this value.
pub struct Up {
    child: Child,
    /// A monitor that writes to a pipe which nobody reads is ended.
    _output: File,
    /// From just before the fork to the line.
    pub elapsed: Duration,
}

impl Up {
    pub fn start(mut command: Command) -> Self {
        let (mut output, input) = pipe().unwrap();
        command.stdout(input);
        let start = Instant::now();
        let mut child = command.spawn().unwrap();
        // The parent's end goes with the command, so that the pipe ends with the child.
        drop(command);
        let (mut seen, mut buffer) = (Vec::new(), [0; 4096]);
        while !String::from_utf8_lossy(&seen).contains(guest::LINE) {
            let count = output.read(&mut buffer).unwrap();
            seen.extend(&buffer[..count]);
            if count == 0 || start.elapsed() > LIMIT {
                let _ = child.kill();
                let said = fs::read_to_string("/tmp/stderr").unwrap_or_default();
                panic!("no line of the guest, but {}{said}", String::from_utf8_lossy(&seen));
            }
        }
        Self { child, _output: output, elapsed: start.elapsed() }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What KVM has counted of this machine: its folder is named PID-DESCRIPTOR.
    pub fn counter(&self, name: &str) -> u64 {
        let folders = fs::read_dir("/sys/kernel/debug/kvm").unwrap().flatten();
        let prefix = format!("{}-", self.pid());
        let ours = folders.filter(|folder| folder.file_name().to_string_lossy().starts_with(&prefix));
        let read = |folder: fs::DirEntry| {
            fs::read_to_string(folder.path().join(name)).ok()?.trim().parse::<u64>().ok()
        };
        ours.filter_map(read).sum()
    }

    /// CPU time of all threads so far.
    pub fn cpu_time(&self) -> Duration {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap().flatten();
        let nanos = tasks.filter_map(|task| {
            let text = fs::read_to_string(task.path().join("schedstat")).ok()?;
            text.split(' ').next()?.parse::<u64>().ok()
        });
        Duration::from_nanos(nanos.sum())
    }

    /// CPU time of each thread so far, by name.
    pub fn threads(&self) -> Vec<(String, u64)> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap().flatten();
        let read = |task: fs::DirEntry| {
            let name = fs::read_to_string(task.path().join("comm")).ok()?.trim().to_owned();
            let text = fs::read_to_string(task.path().join("schedstat")).ok()?;
            Some((name, text.split(' ').next()?.parse().ok()?))
        };
        tasks.filter_map(read).collect()
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn pipe() -> io::Result<(File, File)> {
    let mut ends = [0; 2];
    // SAFETY: pipe2 fills the two numbers.
    if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: pipe2 just made both, and nothing else owns them.
    let [reading, writing] = ends.map(|end| File::from(unsafe { OwnedFd::from_raw_fd(end) }));
    Ok((reading, writing))
}
