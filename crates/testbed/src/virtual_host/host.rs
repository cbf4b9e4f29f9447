//! Starting, finding, using and ending a virtual host.

use super::machine::{Machine, console_word};
use super::options::check_name;
use super::process::{POLL, Process, run};
use super::seat::{Seat, state_dir};
use super::shares::{self, Share};
use super::{Accelerator, Data, Error, HostOptions, Result, identity, options, ssh};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::{OnceLock, mpsc};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

/// A running virtual host.
#[derive(Debug)]
pub struct VirtualHost {
    name: String,
    seat: Seat,
    process: Process,
    ports: BTreeMap<u16, u16>,
    tied: bool,
}

/// Who the machine lives for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Life {
    /// This process: when it ends, however it ends, the kernel kills QEMU.
    Tied,
    /// Until it is told to end.
    Detached,
}

const READY: &str = "roost-virtual-host: ready";

impl VirtualHost {
    /// Starts a virtual host that ends with this process, however that ends. Dropping it ends it, too.
    ///
    /// # Errors
    /// When a name is taken, the image cannot be built, or it is not ready in time.
    pub fn start(options: &HostOptions) -> Result<Self> {
        let seat = Seat::of(&options.name);
        check_name(&options.name)?;
        let _lock = seat.lock()?;
        if Self::find(&options.name)?.is_some() {
            return Err(Error::program("virtual host", format!("'{}' is already running", options.name)));
        }
        Self::boot(options, seat.clone(), Life::Tied)
    }

    /// Starts a virtual host that stays until it is stopped, or finds the one of this name that runs. Programs
    /// and scripts in `options.shares` that have changed since are copied into a found one.
    ///
    /// # Errors
    /// As for [`VirtualHost::start`].
    pub fn up(options: &HostOptions) -> Result<Self> {
        check_name(&options.name)?;
        let seat = Seat::of(&options.name);
        let _lock = seat.lock()?;
        match Self::find(&options.name)? {
            Some(found) => {
                // Another `up` may have been killed while it waited.
                found.wait_until_ready(options.ready_within)?;
                found.refresh(&options.shares)?;
                Ok(found)
            }
            None => Self::boot(options, seat.clone(), Life::Detached),
        }
    }

    /// The virtual host for the tests of this process: the running one that `ROOST_VIRTUAL_HOST` names, else one
    /// that is started now and ends with the process.
    ///
    /// # Errors
    /// As for [`VirtualHost::start`]; [`Error::NotRunning`] when the named one does not run.
    pub fn shared() -> Result<&'static Self> {
        static SHARED: OnceLock<std::result::Result<VirtualHost, String>> = OnceLock::new();
        let host = SHARED.get_or_init(|| {
            let named = std::env::var("ROOST_VIRTUAL_HOST").ok().filter(|name| !name.is_empty());
            let made = match named {
                Some(name) => Self::find(&name).and_then(|found| found.ok_or(Error::NotRunning(name))),
                None => super::workspace_shares(&super::repository_root()).and_then(|shares| {
                    let name = format!("tests-{}", std::process::id());
                    Self::start(&HostOptions { name, shares, ..HostOptions::default() })
                }),
            };
            made.map_err(|error| error.to_string())
        });
        host.as_ref().map_err(|error| Error::program("virtual host", error.clone()))
    }

    /// The running virtual host of this name.
    ///
    /// # Errors
    /// When the name cannot be one.
    pub fn find(name: &str) -> Result<Option<Self>> {
        check_name(name)?;
        let seat = Seat::of(name);
        Ok(seat.read_record().and_then(|record| {
            let number = |key: &str| record.get(key)?.parse::<u64>().ok();
            let process = match number("pid") {
                Some(pid) => Process { pid: u32::try_from(pid).ok()?, started: number("started")? },
                // A start that was killed between QEMU's birth and the record of it.
                None => Process::started_with(&console_word(&seat.file("console")))?,
            };
            let ports = record
                .iter()
                .filter_map(|(key, value)| {
                    Some((key.strip_prefix("port.")?.parse().ok()?, value.parse().ok()?))
                })
                .collect();
            process.lives().then(|| Self {
                name: name.to_owned(),
                seat: seat.clone(),
                process,
                ports,
                tied: false,
            })
        }))
    }

    /// The names of all that have a folder: running ones, and stopped ones whose data is kept.
    #[must_use]
    pub fn names() -> Vec<String> {
        let Ok(list) = fs::read_dir(state_dir().join("virtual-hosts")) else { return Vec::new() };
        let mut names: Vec<String> = list
            .flatten()
            .filter_map(|e| e.file_name().into_string().ok())
            .filter(|n| check_name(n).is_ok())
            .collect();
        names.sort();
        names
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The process number of its QEMU.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid
    }

    /// The port of 127.0.0.1 that reaches `inside`, if it is forwarded.
    #[must_use]
    pub fn port(&self, inside: u16) -> Option<u16> {
        self.ports.get(&inside).copied()
    }

    /// The port of 127.0.0.1 that reaches the controller's API.
    #[must_use]
    pub fn api_port(&self) -> Option<u16> {
        self.port(options::API_PORT)
    }

    /// Its serial console so far, as a file.
    #[must_use]
    pub fn console(&self) -> std::path::PathBuf {
        self.seat.file("console")
    }

    /// Runs a shell command inside as root and collects what it says.
    ///
    /// # Errors
    /// When ssh cannot be run. The command's own failure is in the output's status; 255 is ssh's.
    pub fn ssh(&self, script: &str) -> Result<Output> {
        ssh::output(&self.seat, self.ssh_port(), script)
    }

    /// An `ssh` command to add words, pipes or a terminal to.
    ///
    /// # Errors
    /// When the user's key cannot be made.
    pub fn ssh_command(&self) -> Result<Command> {
        ssh::command(&self.seat, self.ssh_port())
    }

    /// Copies files and folders into a folder inside, which is made when missing.
    ///
    /// # Errors
    /// When a source cannot be read or the folder cannot be written.
    pub fn copy_in(&self, sources: &[impl AsRef<Path>], folder: &str) -> Result<()> {
        ssh::copy_in(&self.seat, self.ssh_port(), sources, folder)
    }

    /// Powers it off; kills it when that takes longer than 30 s. What it was started with as [`Data::Kept`] stays.
    ///
    /// # Errors
    /// When its folder cannot be tidied.
    pub fn stop(mut self) -> Result<()> {
        self.tied = false;
        let _lock = self.seat.lock()?;
        self.end()
    }

    /// Ends a virtual host, running, half started or stopped, with all that it has kept. Nothing of it is wanted any
    /// more, so it is not powered off but killed.
    ///
    /// # Errors
    /// When the name cannot be one, or its folder cannot be removed.
    pub fn discard(name: &str) -> Result<()> {
        shares::sweep();
        Self::remove(name, |running| {
            running.process.end(Duration::from_secs(5));
            true
        })
    }

    /// Removes its folder, unless it runs and `end` did not end it.
    fn remove(name: &str, end: impl FnOnce(&Self) -> bool) -> Result<()> {
        check_name(name)?;
        let seat = Seat::of(name);
        if !seat.dir.exists() {
            return Ok(());
        }
        let _lock = seat.lock()?;
        if Self::find(name)?.as_ref().is_none_or(end) {
            fs::remove_dir_all(&seat.dir).map_err(Error::file("cannot remove", &seat.dir))?;
        }
        Ok(())
    }

    /// Removes the throw-away folders of virtual hosts whose owner was killed.
    pub fn sweep() {
        for name in Self::names() {
            let seat = Seat::of(&name);
            let throw_away = seat
                .read_record()
                .is_some_and(|record| record.get("data").is_some_and(|d| d == "throw-away"));
            if throw_away && matches!(Self::find(&name), Ok(None)) {
                // One that is just being started has its lock until it runs.
                let _ = Self::remove(&name, |_| false);
            }
        }
    }

    fn ssh_port(&self) -> u16 {
        self.port(22).unwrap_or_default()
    }

    fn end(&self) -> Result<()> {
        let record = self.seat.read_record().unwrap_or_default();
        let throw_away = record.get("data").is_some_and(|data| data == "throw-away");
        if throw_away {
            self.process.end(Duration::from_secs(5));
        } else if self.process.lives() {
            // `systemctl poweroff` would ask logind, which is not there.
            let _ = self
                .ssh_command()?
                .args(["-o", "ConnectTimeout=5", "systemctl start --no-block poweroff.target"])
                .output();
            if !self.process.wait(Duration::from_secs(30)) {
                self.process.end(Duration::from_secs(5));
            }
        }
        if throw_away {
            fs::remove_dir_all(&self.seat.dir).map_err(Error::file("cannot remove", &self.seat.dir))?;
        }
        Ok(())
    }

    /// Brings a running virtual host's shares up to date.
    fn refresh(&self, shares: &[Share]) -> Result<()> {
        let mut record = self.seat.read_record().unwrap_or_default();
        for share in shares {
            let (key, slot) = (share.key()?, format!("share.{}", share.name));
            if !share.entries.is_empty() && record.get(&slot) != Some(&key) {
                self.copy_in(&share.entries, &format!("/opt/roost/{}", share.name))?;
                record.insert(slot, key);
            }
        }
        self.seat.write_record(&record)
    }

    fn boot(options: &HostOptions, seat: Seat, life: Life) -> Result<Self> {
        let mut record = BTreeMap::new();
        let data = if options.data == Data::Kept { "kept" } else { "throw-away" };
        record.insert("data".to_owned(), data.to_owned());
        // Said before anything is there, so that a start that is killed leaves nothing for ever.
        seat.write_record(&record)?;

        let image = build("virtual-host")?;
        let qemu = Path::new(&build("--qemu")?).join("qemu-system-x86_64");
        let manifest = fs::read_to_string(Path::new(&image).join("manifest.json"))
            .map_err(Error::file("cannot read", Path::new(&image).join("manifest.json")))?;
        let boot_args = manifest_string(&manifest, "boot_args").ok_or_else(|| {
            Error::program("guest-images/build", format!("no boot_args in {image}/manifest.json"))
        })?;

        let mut share_disks = Vec::new();
        for share in &options.shares {
            share_disks.push(share.disk()?);
            record.insert(format!("share.{}", share.name), share.key()?);
        }
        identity::make_identity(&seat, &options.name, &options.shares)?;
        let data_disk = seat.file("data.img");
        make_data_disk(&data_disk, options)?;

        let mut ports = BTreeMap::from([(22, free_port(None)?)]);
        for (outside, inside) in &options.forwards {
            ports.insert(*inside, free_port(*outside)?);
        }
        let forwards: Vec<(u16, u16)> = ports.iter().map(|(inside, outside)| (*outside, *inside)).collect();
        let arguments = Machine {
            name: &options.name,
            accelerator: options.accelerator.unwrap_or_else(Accelerator::probe),
            cpus: options.cpus,
            lacks: &options.lacks,
            memory_mib: options.memory_mib,
            image: Path::new(&image),
            boot_args: &boot_args,
            data_disk: &data_disk,
            durable: options.data == Data::Kept,
            identity_disk: &seat.file("identity.img"),
            share_disks: &share_disks,
            forwards: &forwards,
            console: &seat.file("console"),
        }
        .arguments();
        for (inside, outside) in &ports {
            record.insert(format!("port.{inside}"), outside.to_string());
        }
        seat.write_record(&record)?;
        let _ = fs::remove_file(seat.file("console"));
        let process = spawn_qemu(&qemu, &seat, arguments, life)?;
        record.insert("pid".to_owned(), process.pid.to_string());
        record.insert("started".to_owned(), process.started.to_string());
        seat.write_record(&record)?;
        // Until it is ready it ends with this function, so that a failed start leaves nothing running.
        let mut host = Self { name: options.name.clone(), seat, process, ports, tied: true };
        host.wait_until_ready(options.ready_within)?;
        host.tied = life == Life::Tied;
        Ok(host)
    }

    fn wait_until_ready(&self, limit: Duration) -> Result<()> {
        let began = Instant::now();
        loop {
            let console = fs::read(self.console()).unwrap_or_default();
            if console.windows(READY.len()).any(|window| window == READY.as_bytes()) {
                return Ok(());
            }
            if !self.process.lives() {
                return Err(Error::Died {
                    qemu: self.seat.tail("qemu.log", 10),
                    console: self.seat.tail("console", 10),
                });
            }
            if began.elapsed() > limit {
                return Err(Error::NotReady {
                    seconds: limit.as_secs(),
                    console: self.seat.tail("console", 10),
                });
            }
            sleep(POLL);
        }
    }
}

impl Drop for VirtualHost {
    fn drop(&mut self) {
        if self.tied {
            // It was for this process, or never became ready: no need for a clean power-off.
            self.process.end(Duration::from_secs(5));
            let _ = self.end();
        }
    }
}

/// Builds or finds what `guest-images/build` calls by this name; returns its folder.
fn build(name: &str) -> Result<String> {
    let program = super::repository_root().join("guest-images/build");
    let output = Command::new(&program)
        .arg(name)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| Error::program(&program.display().to_string(), error.to_string()))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    } else {
        Err(Error::program(
            &format!("guest-images/build {name}"),
            format!("{} (its messages stand above)", output.status),
        ))
    }
}

/// A string of our own manifest, which has one key a line and no escapes in this value.
fn manifest_string(manifest: &str, key: &str) -> Option<String> {
    let rest = manifest.lines().find_map(|line| line.trim().strip_prefix(&format!("\"{key}\":")))?;
    Some(rest.trim().trim_end_matches(',').trim_matches('"').to_owned())
}

fn make_data_disk(path: &Path, options: &HostOptions) -> Result<()> {
    if options.data == Data::Kept && path.exists() {
        return Ok(());
    }
    let new = path.with_extension("new");
    let _ = fs::remove_file(&new);
    run(Command::new("/sbin/mke2fs")
        .args([
            "-q",
            "-F",
            "-t",
            "ext4",
            "-L",
            "roost-data",
            "-m",
            "0",
            "-E",
            "lazy_itable_init=1,lazy_journal_init=1",
        ])
        .arg(&new)
        .arg(format!("{}G", options.data_gib)))?;
    fs::rename(&new, path).map_err(Error::file("cannot create", path))
}

/// The wanted port of 127.0.0.1 if it is free, else one that the kernel picks.
fn free_port(wanted: Option<u16>) -> Result<u16> {
    let bound = wanted.and_then(|port| TcpListener::bind(("127.0.0.1", port)).ok());
    let listener = match bound {
        Some(listener) => listener,
        None => TcpListener::bind(("127.0.0.1", 0)).map_err(|_| Error::NoPort)?,
    };
    listener.local_addr().map(|address| address.port()).map_err(|_| Error::NoPort)
}

/// Starts QEMU. A tied one gets SIGKILL from the kernel when the thread that started it ends (prctl(2),
/// `PR_SET_PDEATHSIG`), so that thread lives as long as QEMU does; the shell in between closes the gap in which
/// the parent may already be gone.
fn spawn_qemu(qemu: &Path, seat: &Seat, arguments: Vec<String>, life: Life) -> Result<Process> {
    let log_path = seat.file("qemu.log");
    let log = File::create(&log_path).map_err(Error::file("cannot create", &log_path))?;
    let mut command = match life {
        Life::Tied => {
            let mut command = Command::new("setpriv");
            let me = std::process::id().to_string();
            command.args(["--pdeathsig", "KILL", "sh", "-c", "[ \"$PPID\" = \"$0\" ] && exec \"$@\"", &me]);
            command.arg(qemu);
            command
        }
        Life::Detached => {
            // A session of its own: no terminal and no signal of ours reaches it.
            let mut command = Command::new("setsid");
            command.arg(qemu);
            command
        }
    };
    command.args(arguments).current_dir("/").stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    // The layer over the base (`snapshot=on`) has a name for a moment; a QEMU that is killed then leaves it where it is discarded.
    command.env("TMPDIR", &seat.dir);
    let program = qemu.display().to_string();
    let (send, receive) = mpsc::channel();
    let keeper = move || match command.spawn() {
        Ok(mut child) => {
            let _ = send.send(Ok(child.id()));
            let _ = child.wait();
        }
        Err(error) => {
            let _ = send.send(Err(Error::program(&program, error.to_string())));
        }
    };
    thread::Builder::new()
        .name("qemu-keeper".to_owned())
        .spawn(keeper)
        .map_err(|e| Error::program("thread", e.to_string()))?;
    let pid = receive.recv().map_err(|error| Error::program("QEMU", error.to_string()))??;
    Process::find(pid).ok_or_else(|| Error::Died { qemu: seat.tail("qemu.log", 10), console: String::new() })
}

#[cfg(test)]
mod tests {
    use super::{free_port, manifest_string};
    use std::net::TcpListener;

    #[test]
    fn boot_arguments_are_read_from_the_manifest() {
        let manifest =
            "{\n  \"name\": \"x\",\n  \"boot_args\": \"console=ttyS0 root=/dev/vda\",\n  \"n\": 1\n}\n";
        assert_eq!(manifest_string(manifest, "boot_args").as_deref(), Some("console=ttyS0 root=/dev/vda"));
        assert_eq!(manifest_string(manifest, "missing"), None);
    }

    #[test]
    fn a_taken_port_is_replaced_by_a_free_one() {
        let taken = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let port = taken.local_addr().expect("bound").port();
        assert_ne!(free_port(Some(port)).expect("another port is free"), port);
        drop(taken);
        assert_eq!(free_port(Some(port)).expect("free again"), port);
    }
}
