//! Bare-metal guests (a few bytes of 64-bit code each) and the monitor as a process, as the agent runs it.

// Each test file uses some of this. Tests build bytes out of numbers whose size they know.
#![allow(dead_code, clippy::unwrap_used, clippy::cast_possible_truncation)]

pub mod balloon;
pub mod birth;
pub mod calls;
pub mod cpus;
pub mod elf;
pub mod faults;
pub mod footprint;
pub mod hold;
pub mod hostile;
pub mod machines;
pub mod mem;
pub mod notify;
pub mod pmem;
pub mod tap;
pub mod virtio;
pub mod vsock;
pub mod watch;

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use roost_vmm::client::{Client, ClientError};
use roost_vmm::console::ConsoleReader;
use roost_vmm::status::{self, Event};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Everything here ends within this, or the test fails.
pub const DEADLINE: Duration = Duration::from_secs(20);

pub const SERIAL: u16 = 0x3f8;
pub const SLEEP_CONTROL: u16 = 0x600;
pub const RESET: u16 = 0x602;

/// Puts 64-bit code together, byte by byte.
#[derive(Clone, Default)]
pub struct Code(pub Vec<u8>);

impl Code {
    /// mov edx, PORT; mov al, VALUE; out dx, al
    pub fn out(mut self, port: u16, value: u8) -> Self {
        self.0.push(0xba);
        self.0.extend(u32::from(port).to_le_bytes());
        self.0.extend([0xb0, value, 0xee]);
        self
    }

    pub fn print(self, text: &str) -> Self {
        text.bytes().fold(self, |code, byte| code.out(SERIAL, byte))
    }

    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    /// Powers off, as `_S5` says.
    pub fn power_off(self) -> Self {
        self.out(SLEEP_CONTROL, 5 << 2 | 1 << 5).stop()
    }

    pub fn reset(self) -> Self {
        self.out(RESET, 1).stop()
    }

    /// jmp self
    pub fn stop(self) -> Self {
        self.bytes(&[0xeb, 0xfe])
    }

    /// An ELF kernel of this code, loaded and entered at 1 MiB.
    pub fn kernel(&self) -> Vec<u8> {
        let segments = vec![elf::Segment { file_offset: 120, ..elf::Segment::at(0x10_0000, self.0.clone()) }];
        elf::Kernel { entry: 0x10_0000, segments, pvh_entry: None }.image()
    }
}

/// A folder with a kernel and a configuration, and the monitor that runs them.
pub struct Machine {
    pub dir: TempDir,
    pub config: Value,
    /// The monitor.
    pub program: PathBuf,
    child: Option<Child>,
}

/// How a monitor ended.
#[derive(Debug)]
pub struct Ended {
    pub code: i32,
    pub stderr: String,
    pub events: Vec<Event>,
    pub console: String,
}

impl Machine {
    pub fn new(code: &Code) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("kernel"), code.kernel()).unwrap();
        let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        let config = json!({
            "boot-source": { "kernel_image_path": path("kernel"), "boot_args": "" },
            "machine-config": { "vcpu_count": 1, "mem_size_mib": 16 },
            "serial": { "output": path("console") },
            "status": path("status"),
        });
        Self { dir, config, program: env!("CARGO_BIN_EXE_roost-vmm").into(), child: None }
    }

    /// Puts a kernel of 1 MiB in place of the small one: its pages are mapped, not copied. Behind the code it is all 0x90.
    pub fn write_large_kernel(&self, code: Code) -> Vec<u8> {
        let mut bytes = code.0;
        bytes.resize(1 << 20, 0x90);
        let segments = vec![elf::Segment::at(0x10_0000, bytes)];
        let image = elf::Kernel { entry: 0x10_0000, segments, pvh_entry: None }.image();
        std::fs::write(self.path("kernel"), &image).unwrap();
        image
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// Starts the monitor with this configuration, its API and these further arguments.
    pub fn start<T: AsRef<OsStr>>(&mut self, arguments: &[T]) {
        let config = birth::config(self, arguments).unwrap_or_else(|| self.config.clone());
        let own = std::mem::replace(&mut self.config, config);
        let mut command = self.command(arguments);
        self.config = own;
        self.child = Some(command.spawn().unwrap());
    }

    /// The command that does so.
    pub fn command<T: AsRef<OsStr>>(&self, arguments: &[T]) -> Command {
        std::fs::write(self.path("config"), self.config.to_string()).unwrap();
        let (config, socket) = (self.text("config"), self.text("api"));
        let mut command =
            self.command_with(&["run", "--config", &config, "--api-sock", &socket, "--id", "test"]);
        command.args(arguments);
        command
    }

    /// Takes over a child that was started with [`Machine::command`].
    pub fn adopt(&mut self, child: Child) {
        self.child = Some(child);
    }

    /// Writes to the monitor's stdin, which must be a pipe, and closes it.
    pub fn type_and_close(&mut self, bytes: &[u8]) {
        self.child.as_mut().unwrap().stdin.take().unwrap().write_all(bytes).unwrap();
    }

    pub fn start_with(&mut self, arguments: &[&str]) {
        self.child = Some(self.command_with(arguments).spawn().unwrap());
    }

    /// The command with these arguments alone.
    pub fn command_with(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        let stderr = File::create(self.path("stderr")).unwrap();
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr);
        command
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    /// The API, once it answers.
    pub fn client(&self) -> Client {
        let client = Client::new(self.path("api"));
        wait_for("the API", || client.info().ok());
        client
    }

    pub fn console(&self) -> String {
        let Ok(file) = File::open(self.path("console")) else { return String::new() };
        let Ok(reader) = ConsoleReader::new(file) else { return String::new() };
        String::from_utf8_lossy(&reader.read_from(0).unwrap().bytes).into_owned()
    }

    /// Waits for the process to end.
    pub fn wait(&mut self) -> Ended {
        let child = self.child.as_mut().unwrap();
        let status = wait_for("the monitor's end", || child.try_wait().unwrap());
        self.child = None;
        let mut stderr = String::new();
        File::open(self.path("stderr")).unwrap().read_to_string(&mut stderr).unwrap();
        let events = std::fs::read_to_string(self.path("status")).unwrap_or_default();
        Ended {
            code: status.code().unwrap_or(-1),
            stderr,
            events: status::parse(&events).unwrap(),
            console: self.console(),
        }
    }

    /// Starts it and waits for its end.
    pub fn run(&mut self) -> Ended {
        self.start::<&str>(&[]);
        self.wait()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Waits until something is there.
pub fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(start.elapsed() < DEADLINE, "{what} did not come within {DEADLINE:?}");
        std::thread::yield_now();
    }
}

pub fn event_names(events: &[Event]) -> Vec<&'static str> {
    events
        .iter()
        .map(|event| match event {
            Event::Built { .. } => "built",
            Event::VcpusRunning { .. } => "vcpus_running",
            Event::GuestReset { .. } => "guest_reset",
            Event::Exited { .. } => "exited",
        })
        .collect()
}

/// Waits until the guest has printed a word.
pub fn says(machine: &Machine, word: &str) {
    wait_for(word, || machine.console().contains(word).then_some(()));
}

/// Why a request was refused.
#[track_caller]
pub fn refusal<T: std::fmt::Debug>(result: Result<T, ClientError>) -> String {
    match result {
        Err(ClientError::Refused(why)) => why,
        other => panic!("not refused: {other:?}"),
    }
}

/// The arguments that hand a descriptor over under a name.
pub fn hand_over(name: &str, descriptor: &impl AsRawFd) -> [String; 2] {
    let number = descriptor.as_raw_fd();
    // SAFETY: clears the close-on-exec flag of an open descriptor, so that the monitor inherits it.
    unsafe { libc::fcntl(number, libc::F_SETFD, 0) };
    ["--fd".to_owned(), format!("{name}={number}")]
}

/// Makes or opens files of a machine's folder and hands them over under their names; they live as long as the first result.
pub fn hand(machine: &Machine, names: &[&str]) -> (Vec<File>, Vec<String>) {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false);
    let files: Vec<File> = names.iter().map(|name| options.open(machine.path(name)).unwrap()).collect();
    let arguments = names.iter().zip(&files).flat_map(|(name, file)| hand_over(name, file)).collect();
    (files, arguments)
}

/// A sparse file of this size.
pub fn disk(path: &Path, bytes: u64) {
    File::create(path).unwrap().set_len(bytes).unwrap();
}
