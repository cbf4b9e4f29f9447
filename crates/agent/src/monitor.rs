//! The monitor process of an instance: its configuration, its files, its start in the jail, its state and its end.

use crate::cgroup::Cgroups;
use crate::error::{Error, Result};
use crate::host::{Death, LastWord, MonitorFact, Started};
use crate::jail::{self, JailSpec};
use crate::names::Folders;
use crate::net::links;
use crate::outputs::{self, read_status, tail};
use crate::record::{Accepted, MonitorId, Run};
use crate::{clock, durable};
use nix::libc;
use roost_types::agent::{InstanceSpec, TimedPart};
use roost_types::ids::InstanceId;
use roost_vmm::client::Client;
use roost_vmm::config::{
    BalloonConfig, BootSource, Drive, DriveFormat, EntropyConfig, MachineConfig, NetworkInterface,
    SerialConfig, SmbiosConfig, VmConfig,
};
use roost_vmm::console::{self, ConsoleReader};
use roost_vmm::exit::ExitCode;
use roost_vmm::status::Event;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::fs::{self, File};
use std::io::{Seek, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long a monitor may take to build its machine, and to start it.
const PATIENCE: Duration = Duration::from_secs(60);
/// Unit of the start time in `/proc/<pid>/stat` (`USER_HZ`, the same on every x86).
const TICKS_PER_SECOND: u64 = 100;

/// What monitors are started with.
#[derive(Debug, Clone)]
pub struct Monitors {
    /// Where things are.
    pub folders: Folders,
    /// The cgroups.
    pub cgroups: Cgroups,
    /// The monitor's program, which builds its jail too.
    pub program: PathBuf,
    /// First of the user ids.
    pub uid_base: u32,
    /// Largest packet that a guest should send.
    pub mtu: u16,
}

/// The monitor's configuration: names are handed descriptors.
pub fn config(spec: &InstanceSpec, id: &InstanceId, mtu: u16) -> Result<VmConfig> {
    let vcpus = u8::try_from(spec.cpu.vcpus).map_err(|_| {
        Error::Impossible(format!("{} vCPUs are more than a monitor can have", spec.cpu.vcpus))
    })?;
    let uuid = uuid(id);
    let config = VmConfig {
        boot_source: Some(BootSource {
            kernel_image_path: "kernel".into(),
            initrd_path: spec.image.initrd.as_ref().map(|_| "initrd".into()),
            boot_args: Some(spec.image.boot_args.clone()),
            ..BootSource::default()
        }),
        machine_config: MachineConfig {
            vcpu_count: vcpus,
            mem_size_mib: spec.memory_mib,
            ..MachineConfig::default()
        },
        drives: vec![Drive {
            // As EBS volumes show themselves: the id without its dash.
            drive_id: format!("vol{}", spec.root_volume.volume_id.digits()),
            path_on_host: "root".into(),
            format: DriveFormat::Qcow2,
            backing: Some("base".into()),
            is_root_device: true,
            is_read_only: false,
            rate_limiter: None,
            io_engine: Default::default(),
            num_queues: 1,
        }],
        network_interfaces: vec![NetworkInterface {
            iface_id: "eth0".into(),
            guest_mac: Some(spec.interface.mac.clone()),
            host_dev_name: "tap".into(),
            num_queue_pairs: 1,
            vhost: false,
            mtu: Some(mtu),
            rx_rate_limiter: None,
            tx_rate_limiter: None,
        }],
        entropy: Some(EntropyConfig::default()),
        // Nothing is taken from the guest: what it happens not to use goes back to the host, until it is used again.
        balloon: Some(BalloonConfig {
            deflate_on_oom: true,
            free_page_reporting: true,
            ..BalloonConfig::default()
        }),
        serial: Some(SerialConfig {
            output: Some("console".into()),
            input: Some("input".into()),
            ..SerialConfig::default()
        }),
        smbios: Some(SmbiosConfig {
            manufacturer: Some("Roost".into()),
            product: Some(spec.metadata.instance_type.clone()),
            version: None,
            // Cloud-init knows EC2 by a serial number that equals the UUID, and both begin with "ec2".
            serial: Some(uuid.clone()),
            uuid: Some(uuid),
            family: Some(spec.cpu.family.clone()),
            asset_tag: Some(id.to_string()),
        }),
        snapshot: None,
        status: Some("status".into()),
        ..VmConfig::default()
    };
    config.check().map_err(|error| Error::Impossible(error.to_string()))?;
    Ok(config)
}

/// `ec2` and the instance's digits, filled up with zeroes, in a UUID's form.
fn uuid(id: &InstanceId) -> String {
    let digits = format!("{:0<32}", format!("ec2{}", id.digits()));
    let part = |from: usize, to: usize| &digits[from..to];
    format!("{}-{}-{}-{}-{}", part(0, 8), part(8, 12), part(12, 16), part(16, 20), part(20, 32))
}

impl Monitors {
    /// Starts the monitor in its jail, held, and waits until its machine is built. Blocks.
    ///
    /// # Errors
    /// A file is missing, the jail fails, or the monitor ends; its own last words are in the text.
    pub fn start(&self, of: &Accepted) -> Result<Started> {
        let (id, spec) = (of.id(), of.spec());
        let config = config(spec, id, self.mtu)?;
        let begin = Instant::now();
        durable::make_folder(&self.folders.running(id))?;
        let files = self.files(spec, id, &config)?;
        let console_from = File::open(self.folders.console(id))
            .and_then(ConsoleReader::new)
            .and_then(|reader| reader.written())
            .map_err(Error::file("read", self.folders.console(id)))?;

        let mut options = vec!["--hold".to_owned()];
        options.extend(files.options.iter().cloned());
        let handed: Vec<&OwnedFd> = files.descriptors.iter().collect();
        let log = self.folders.monitor_log(id);
        outputs::keep_short(&self.folders, id)?;
        prepare_log(&log)?;
        let jail = JailSpec {
            id: id.to_string(),
            cgroup: self.cgroups.folder(spec, id)?,
            uid: self.uid(of)?,
            threads: u64::from(spec.cpu.vcpus) + 16,
            longest_file: longest_file(spec, &self.folders)?,
            log,
            options,
        };
        let pid = jail::start(&self.program, &jail, &handed)?;
        self.cgroups.started(spec, id, pid)?;
        drop(files);
        let jailed = Instant::now();
        let monitor = MonitorId { pid, start_ticks: start_ticks(pid).unwrap_or(0) };
        self.wait_for(id, &monitor, |event| matches!(event, Event::Built { .. }).then_some(()))?;
        let timing = vec![part("agent.jail", jailed - begin), part("monitor.build", jailed.elapsed())];
        Ok(Started { monitor, console_from, timing })
    }

    fn uid(&self, of: &Accepted) -> Result<u32> {
        let uid = self.uid_base.checked_add(of.slot).filter(|uid| *uid != u32::MAX);
        uid.ok_or_else(|| {
            let base = self.uid_base;
            Error::Impossible(format!("--uid-base is {base}: {} ids above it there is none", of.slot))
        })
    }

    /// Everything that is handed to the monitor: the option that names it, and the descriptor.
    fn files(&self, spec: &InstanceSpec, id: &InstanceId, config: &VmConfig) -> Result<Handed> {
        let read = |path: &Path| File::open(path).map_err(Error::file("open", path));
        let write = |path: &Path, options: &mut fs::OpenOptions| {
            options.mode(0o600).open(path).map_err(Error::file("open", path))
        };
        let status_path = self.folders.status(id);
        // A new monitor, a new file: what the last one said has been noted durably by now.
        durable::remove_file(&status_path)?;
        let socket = self.folders.api_socket(id);
        durable::remove_file(&socket)?;
        let api = UnixListener::bind(&socket).map_err(Error::file("listen on", &socket))?;
        let config = serde_json::to_vec(config)
            .map_err(|source| Error::Damaged { path: "the monitor's configuration".into(), source })?;
        let mut handed = Handed::default();
        handed.add("--config-fd", memory_file(&config)?);
        handed.add("--api-fd", api);
        handed.name("kernel", read(&self.folders.image(&spec.image.kernel))?);
        if let Some(initrd) = &spec.image.initrd {
            handed.name("initrd", read(&self.folders.image(initrd))?);
        }
        handed.name("base", read(&self.folders.image(&spec.image.root))?);
        let volume = self.folders.volume(&spec.root_volume.volume_id);
        handed.name("root", write(&volume, File::options().read(true).write(true))?);
        handed.name("tap", links::open_tap(&self.folders, id)?);
        handed.name("console", open_console(&self.folders.console(id))?);
        handed.name("input", console_input(&self.folders.console_input(id))?);
        handed.name("status", write(&status_path, File::options().append(true).create(true))?);
        let kvm = Path::new("/dev/kvm");
        let open = File::options().read(true).write(true).open(kvm);
        handed.name("kvm", open.map_err(Error::file("open (`roost doctor` says what to do)", kvm))?);
        Ok(handed)
    }

    /// Puts the vCPU threads in their place and starts them; gives when they began. Blocks.
    ///
    /// # Errors
    /// A thread cannot be placed, or the monitor refuses or ends.
    pub fn let_run(&self, of: &Accepted, monitor: &MonitorId) -> Result<u64> {
        let (id, spec) = (of.id(), of.spec());
        self.cgroups.place_vcpus(spec, id, monitor.pid)?;
        let client = Client::new(self.folders.api_socket(id));
        let ran = |event: &Event| match event {
            Event::VcpusRunning { boottime_ns } => Some(*boottime_ns),
            _ => None,
        };
        if let Err(error) = client.start() {
            // An earlier call may have started it without living to hear so.
            let events = read_status(&self.folders.status(id));
            let before = events.iter().find_map(ran).map(|at| began(monitor, at));
            return before.ok_or_else(|| Error::NotNow(format!("starting the guest: {error}")));
        }
        self.wait_for(id, monitor, ran).map(|at| began(monitor, at))
    }

    /// Presses the power button. Blocks.
    ///
    /// # Errors
    /// The monitor does not answer.
    pub fn press_power(&self, id: &InstanceId) -> Result<()> {
        let client = Client::new(self.folders.api_socket(id));
        client.power_button().map_err(|error| Error::NotNow(format!("pressing the power button: {error}")))
    }

    /// Waits for an event in the status file, as long as the monitor lives.
    fn wait_for<T>(
        &self,
        id: &InstanceId,
        monitor: &MonitorId,
        pick: impl Fn(&Event) -> Option<T>,
    ) -> Result<T> {
        let path = self.folders.status(id);
        let deadline = Instant::now() + PATIENCE;
        loop {
            // The order matters: what a monitor wrote before it was seen dead is read after that.
            let lives = lives(monitor);
            let events = read_status(&path);
            if let Some(found) = events.iter().find_map(&pick) {
                return Ok(found);
            }
            if !lives {
                let word = last_word(&events).map(|word| word.message);
                let said = word.unwrap_or_else(|| tail(&self.folders.monitor_log(id)));
                // What the monitor cannot be made of (a kernel that is none, say) gets no better by trying again.
                let refused = events.iter().any(
                    |event| matches!(event, Event::Exited { code, .. } if *code == ExitCode::Config.code()),
                );
                let said = format!("the monitor ended: {said}");
                return Err(if refused { Error::Impossible(said) } else { Error::NotNow(said) });
            }
            if Instant::now() > deadline {
                return Err(Error::NotNow(format!(
                    "the monitor is not there after {} s",
                    PATIENCE.as_secs()
                )));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// What there is of the instance's monitor.
    pub fn look(&self, of: &Accepted, run: &Run, boot_id: &str) -> MonitorFact {
        let id = of.id();
        let rebooted = run.boot_id != boot_id;
        let Some(monitor) = &run.monitor else {
            if !self.cgroups.processes(id).is_empty() {
                return MonitorFact::Stray;
            }
            let cut_off = rebooted && run.is_open();
            return if cut_off { MonitorFact::Dead(self.death(id, None, true)) } else { MonitorFact::None };
        };
        // The same number, started at the same tick of the same boot, in the instance's cgroup.
        let lives = !rebooted && lives(monitor) && self.cgroups.processes(id).contains(&monitor.pid);
        if lives {
            if let Err(error) = outputs::keep_short(&self.folders, id) {
                tracing::warn!(instance = %id, error = %error.chain(), "a file of its monitor");
            }
            let events = read_status(&self.folders.status(id));
            let ran_ns = ran(&events).map(|at| began(monitor, at));
            MonitorFact::Alive { ran_ns, resets_ns: resets(&events) }
        } else {
            MonitorFact::Dead(self.death(id, Some(monitor), rebooted))
        }
    }

    fn death(&self, id: &InstanceId, monitor: Option<&MonitorId>, host_rebooted: bool) -> Death {
        let events = read_status(&self.folders.status(id));
        Death {
            ran_ns: ran(&events).map(|at| monitor.map_or(at, |monitor| began(monitor, at))),
            word: last_word(&events),
            out_of_memory: self.cgroups.out_of_memory(id),
            host_rebooted,
        }
    }
}

/// Descriptors and the options that tell the monitor of them.
#[derive(Default)]
struct Handed {
    options: Vec<String>,
    descriptors: Vec<OwnedFd>,
}

impl Handed {
    fn add(&mut self, option: &str, descriptor: impl Into<OwnedFd>) {
        let descriptor = descriptor.into();
        self.options.extend([option.to_owned(), descriptor.as_raw_fd().to_string()]);
        self.descriptors.push(descriptor);
    }

    fn name(&mut self, name: &str, descriptor: impl Into<OwnedFd>) {
        let descriptor = descriptor.into();
        self.options.extend(["--fd".to_owned(), format!("{name}={}", descriptor.as_raw_fd())]);
        self.descriptors.push(descriptor);
    }
}

fn memory_file(bytes: &[u8]) -> Result<File> {
    let memory = rustix::fs::memfd_create(c"monitor config", rustix::fs::MemfdFlags::CLOEXEC)
        .map_err(Error::sys("making a memory file"))?;
    let mut file = File::from(memory);
    file.write_all(bytes)
        .and_then(|()| file.rewind())
        .map_err(Error::io("writing the monitor's configuration"))?;
    Ok(file)
}

/// The console ring, made if it is not there.
fn open_console(path: &Path) -> Result<File> {
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(Error::file("open", path))?;
    console::prepare(&file).map_err(Error::file("prepare", path))?;
    Ok(file)
}

/// The reading end of the pipe that is typed into. It is open for writing too, so that it never ends.
fn console_input(path: &Path) -> Result<File> {
    match nix::unistd::mkfifo(path, nix::sys::stat::Mode::from_bits_truncate(0o600)) {
        Ok(()) | Err(nix::Error::EEXIST) => {}
        Err(error) => return Err(Error::file("make a pipe at", path)(error.into())),
    }
    File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(Error::file("open", path))
}

/// Makes a monitor's log.
fn prepare_log(path: &Path) -> Result<()> {
    let made = File::options().append(true).create(true).mode(0o600).open(path);
    made.map(drop).map_err(Error::file("open", path))
}

fn ran(events: &[Event]) -> Option<u64> {
    events.iter().find_map(|event| match event {
        Event::VcpusRunning { boottime_ns } => Some(*boottime_ns),
        _ => None,
    })
}

fn resets(events: &[Event]) -> Vec<u64> {
    let at = |event: &Event| match event {
        Event::GuestReset { boottime_ns } => Some(*boottime_ns),
        _ => None,
    };
    events.iter().filter_map(at).collect()
}

/// Returns when vCPUs began to run, as the monitor dates it, if that lies between the monitor's
/// start and now. Any other date is replaced by the monitor's own start, so that no lie shortens a
/// run.
fn began(monitor: &MonitorId, word: u64) -> u64 {
    let started = monitor.start_ticks.saturating_mul(1_000_000_000 / TICKS_PER_SECOND);
    if (started..=clock::boottime_ns()).contains(&word) { word } else { started }
}

fn last_word(events: &[Event]) -> Option<LastWord> {
    events.iter().rev().find_map(|event| match event {
        Event::Exited { boottime_ns, reason, message, .. } => {
            Some(LastWord { at_ns: *boottime_ns, reason: *reason, message: message.clone() })
        }
        _ => None,
    })
}

fn part(name: &str, took: Duration) -> TimedPart {
    TimedPart { part: name.to_owned(), took_us: u64::try_from(took.as_micros()).unwrap_or(u64::MAX) }
}

/// Bytes of the longest file that a monitor may make: the full volume and the overlay's tables
/// (1/8192 for clusters, 1/32768 for reference counts). Clusters that a killed monitor lost have
/// room too. A volume that already exists may keep its length.
fn longest_file(spec: &InstanceSpec, folders: &Folders) -> Result<u64> {
    let path = folders.volume(&spec.root_volume.volume_id);
    let length = fs::metadata(&path).map_err(Error::file("look at", &path))?.len();
    let size = spec.root_volume.size_gib.saturating_mul(1 << 30);
    Ok(size.saturating_add(size / 1024).saturating_add(256 << 20).max(length))
}

/// Field 22 of `/proc/<pid>/stat`: when the process started. The name in field 2 may hold anything, also spaces and
/// parentheses, so fields are counted from its end. A zombie has ended.
pub fn start_ticks(pid: i32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = text.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// Whether the very process that was recorded lives.
pub fn lives(monitor: &MonitorId) -> bool {
    start_ticks(monitor.pid) == Some(monitor.start_ticks)
}

fn pidfd(monitor: &MonitorId) -> Option<OwnedFd> {
    let fd = pidfd_open(Pid::from_raw(monitor.pid)?, PidfdFlags::empty()).ok()?;
    // Only now is it sure that the number has not been given to another process meanwhile.
    lives(monitor).then_some(fd)
}

/// Ends the recorded process, if it lives.
pub fn kill(monitor: &MonitorId) {
    if let Some(fd) = pidfd(monitor) {
        let _ = pidfd_send_signal(&fd, Signal::KILL);
    }
}

/// Returns when the recorded process has ended.
pub async fn ended(monitor: &MonitorId) {
    let Some(fd) = pidfd(monitor) else { return };
    // SAFETY: an owned descriptor keeps its number until the registration, which holds it, is dropped.
    let fd = unsafe { tokio::io::unix::AsyncFd::register_with_interest(fd, tokio::io::Interest::READABLE) };
    let Ok(fd) = fd else {
        // Without a place in the event loop it is watched by the tick alone.
        return std::future::pending().await;
    };
    let _ = fd.readable().await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::ensure;

    #[test]
    fn the_configuration_names_handed_files_and_looks_like_ec2() {
        let ensure = ensure(1);
        let config = config(&ensure.spec, &ensure.instance_id, 1450).unwrap();
        let smbios = config.smbios.unwrap();
        assert_eq!(smbios.uuid.as_deref(), Some("ec205050-5050-5050-5050-000000000000"));
        assert_eq!(smbios.serial, smbios.uuid);
        assert_eq!(config.drives[0].drive_id, "vol05050505050505050");
        assert_eq!(config.drives[0].backing.as_deref(), Some("base"));
        assert_eq!(config.network_interfaces[0].mtu, Some(1450));
    }

    #[test]
    fn a_spec_that_no_monitor_can_hold_is_final() {
        let mut ensure = ensure(1);
        ensure.spec.cpu.vcpus = 33;
        assert!(config(&ensure.spec, &ensure.instance_id, 1500).unwrap_err().is_permanent());
        ensure.spec.cpu.vcpus = 1000;
        assert!(config(&ensure.spec, &ensure.instance_id, 1500).unwrap_err().is_permanent());
    }

    #[tokio::test]
    async fn a_process_is_told_from_a_later_one_and_its_end_is_seen() {
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let monitor = MonitorId { pid, start_ticks: start_ticks(pid).unwrap() };
        assert!(lives(&monitor));
        let other = MonitorId { pid, start_ticks: monitor.start_ticks + 1 };
        assert!(!lives(&other));
        ended(&other).await;
        kill(&other);
        assert!(lives(&monitor), "a process of another start is not touched");
        kill(&monitor);
        tokio::time::timeout(Duration::from_secs(5), ended(&monitor)).await.unwrap();
        assert!(!lives(&monitor), "a zombie has ended");
        child.wait().unwrap();
    }
}
