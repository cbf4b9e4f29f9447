//! How soon a guest replies that goes on from a snapshot, beside its own cold boot: from the fork of the monitor to the reply that a
//! program on the host reads from its vsock socket. The memory comes page by page as the guest touches it, from the file or from a
//! page-fault handler.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use roost_vmm::client::Client;
use serde_json::json;

use crate::common::faults::Faults;
use crate::host::figure;
use crate::load::VSOCK_PORT;
use crate::monitors::{Does, LIMIT, Machine, config};
use crate::report::Who;

/// Names of rows.
pub const COLD: &str = "cold boot → first reply";
pub const MAPPED: &str = "lazy restore → first reply, memory mapped";
pub const HANDLED: &str = "lazy restore → first reply, memory from a handler";
pub const MAPPED_RATIO: &str = "the same, mapped, of the cold boot";
pub const HANDLED_RATIO: &str = "the same, from a handler, of the cold boot";

/// Pages that the handler brings at each fault. More are not better here: 4 made no difference, 32 took twice as long (0.20 to 0.44 of a boot).
const AT_A_TIME: u64 = 1;
const API: &str = "/tmp/restore-api";
const VSOCK: &str = "/tmp/restore-vsock";
const HANDLER: &str = "/tmp/restore-handler";
const STATE: &str = "/tmp/restore-state";
const MEMORY: &str = "/tmp/restore-memory";

/// Each run boots, takes a snapshot, and goes on from it twice.
pub fn measure(runs: u64) {
    for _ in 0..runs {
        let mut cold = config(Machine { cpus: 2, memory_mib: 192, does: Does::Reply, devices: None });
        cold["vsock"] = json!({ "guest_cid": 3, "uds_path": VSOCK });
        let (booted, took) = Monitor::start(&cold);
        let client = Client::new(API);
        client.pause().unwrap();
        for (name, place) in [("state", STATE), ("memory", MEMORY)] {
            let file =
                File::options().read(true).write(true).create(true).truncate(true).open(place).unwrap();
            client.hand_over(name, &file).unwrap();
        }
        let files = json!({ "snapshot_path": "state", "mem_file_path": "memory" });
        client.put("PUT", "/snapshot/create", &files).unwrap();
        drop(booted);
        figure(COLD, Who::Roost, took);

        let from = |kind: &str, path: &str| {
            json!({ "snapshot": {
                "snapshot_path": STATE, "mem_backend": { "backend_type": kind, "backend_path": path }, "resume_vm": true,
            } })
        };
        let (_, mapped) = Monitor::start(&from("File", MEMORY));
        figure(MAPPED, Who::Roost, mapped);
        figure(MAPPED_RATIO, Who::Roost, mapped / took);

        let _ = fs::remove_file(HANDLER);
        let listener = UnixListener::bind(HANDLER).unwrap();
        let mut faults = Faults::serve(listener, File::open(MEMORY).unwrap(), AT_A_TIME);
        let (clone, handled) = Monitor::start(&from("Uffd", HANDLER));
        drop(clone);
        faults.end();
        figure(HANDLED, Who::Roost, handled);
        figure(HANDLED_RATIO, Who::Roost, handled / took);
    }
}

struct Monitor(Child);

impl Monitor {
    /// Starts a monitor and waits for its guest's reply; milliseconds from the fork to it.
    fn start(config: &serde_json::Value) -> (Self, f64) {
        for old in [API, VSOCK] {
            let _ = fs::remove_file(old);
        }
        fs::write("/tmp/config", config.to_string()).unwrap();
        let mut command = Command::new("/bin/roost-vmm");
        command.args(["run", "--config", "/tmp/config", "--api-sock", API]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create("/tmp/stderr").unwrap());
        let begin = Instant::now();
        let monitor = Self(command.spawn().unwrap());
        while ask().is_err() {
            assert!(begin.elapsed() < LIMIT, "{}", fs::read_to_string("/tmp/stderr").unwrap_or_default());
            std::thread::sleep(Duration::from_micros(500));
        }
        let took = begin.elapsed().as_secs_f64() * 1e3;
        (monitor, took)
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A byte there and back. An error: there is no monitor yet, or the guest does not listen yet.
fn ask() -> io::Result<()> {
    if !Path::new(VSOCK).exists() {
        return Err(io::ErrorKind::NotFound.into());
    }
    let mut stream = UnixStream::connect(VSOCK)?;
    stream.set_read_timeout(Some(LIMIT))?;
    writeln!(stream, "CONNECT {VSOCK_PORT}")?;
    let mut answers = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    if answers.read_line(&mut line)? == 0 {
        return Err(io::ErrorKind::ConnectionRefused.into());
    }
    stream.write_all(b"x")?;
    let mut byte = [0];
    answers.read_exact(&mut byte)?;
    if byte == *b"x" { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
}
