//! Bare-metal guests (a few bytes of 64-bit code each) and the monitor as a process, as the agent runs it.

// Each test file uses some of this.
#![allow(dead_code, clippy::unwrap_used)]

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use roost_vmm::client::Client;
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
        let address = 0x10_0000_u64;
        let mut image = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
        image.extend(2_u16.to_le_bytes());
        image.extend(62_u16.to_le_bytes());
        image.extend(1_u32.to_le_bytes());
        for word in [address, 64, 0] {
            image.extend(word.to_le_bytes());
        }
        image.extend(0_u32.to_le_bytes());
        for half in [64_u16, 56, 1, 0, 0, 0] {
            image.extend(half.to_le_bytes());
        }
        image.extend(1_u32.to_le_bytes());
        image.extend(7_u32.to_le_bytes());
        let size = self.0.len() as u64;
        for word in [120, address, address, size, size, 1] {
            image.extend(word.to_le_bytes());
        }
        image.extend(&self.0);
        image
    }
}

/// A folder with a kernel and a configuration, and the monitor that runs them.
pub struct Machine {
    pub dir: TempDir,
    pub config: Value,
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
        Self { dir, config, child: None }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// Starts the monitor with this configuration, its API and these further arguments.
    pub fn start(&mut self, arguments: &[&str]) {
        std::fs::write(self.path("config"), self.config.to_string()).unwrap();
        let (config, socket) = (self.text("config"), self.text("api"));
        let mut all = vec!["run", "--config", &config, "--api-sock", &socket, "--id", "test"];
        all.extend(arguments);
        self.start_with(&all);
    }

    pub fn start_with(&mut self, arguments: &[&str]) {
        let child = Command::new(env!("CARGO_BIN_EXE_roost-vmm"))
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(self.path("stderr")).unwrap())
            .spawn()
            .unwrap();
        self.child = Some(child);
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
        let mut child = self.child.take().unwrap();
        let status = wait_for("the monitor's end", || child.try_wait().unwrap());
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
        self.start(&[]);
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

/// A sparse file of this size.
pub fn disk(path: &Path, bytes: u64) {
    File::create(path).unwrap().set_len(bytes).unwrap();
}
