//! How soon a guest replies that goes on from a snapshot, beside its own cold boot: from the fork of the monitor to the reply that a
//! program on the host reads from its vsock socket. The memory comes page by page as the guest touches it, from the file or from
//! `roost-vmm serve-memory`, which brings a second clone at once what the first one touched.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use roost_vmm::client::Client;
use serde_json::json;

use crate::host::figure;
use crate::load::VSOCK_PORT;
use crate::monitors::{Does, LIMIT, Machine, config};
use crate::report::Who;

/// Names of rows.
pub const COLD: &str = "cold boot → first reply";
pub const MAPPED: Row = Row {
    took: "lazy restore → first reply, memory mapped, first clone",
    ratio: "the same, of the cold boot: mapped, first clone",
};
pub const MAPPED_LATER: Row = Row {
    took: "lazy restore → first reply, memory mapped, later clones",
    ratio: "the same, of the cold boot: mapped, later clones",
};
pub const SERVED: Row = Row {
    took: "lazy restore → first reply, memory served, first clone",
    ratio: "the same, of the cold boot: served, first clone",
};
pub const SERVED_LATER: Row = Row {
    took: "lazy restore → first reply, memory served, later clones (working set known)",
    ratio: "the same, of the cold boot: served, later clones",
};

/// A way to go on from a snapshot: milliseconds, and their part of the cold boot of the same run.
pub struct Row {
    pub took: &'static str,
    pub ratio: &'static str,
}

/// Milliseconds until a guest that does not listen is asked again, and until it is looked whether a monitor has failed that makes no socket.
const AGAIN: libc::c_int = 1;
const FAILED: libc::c_int = 100;
/// Clones of each kind after the first of a snapshot.
const LATER: usize = 3;

const API: &str = "/tmp/restore-api";
const VSOCK: &str = "/tmp/restore-vsock";
const SERVER: &str = "/tmp/restore-server";
const WORKING_SET: &str = "/tmp/restore-working-set";
const STATE: &str = "/tmp/restore-state";
const MEMORY: &str = "/tmp/restore-memory";

/// Each run boots, takes a snapshot, and goes on from it again and again.
pub fn measure(runs: u64) {
    for _ in 0..runs {
        let mut cold = config(Machine { cpus: 2, memory_mib: 192, does: Does::Reply, ..Machine::PLAIN });
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
        let clone = |row: &Row, kind, path| {
            let (_clone, served) = Monitor::start(&from(kind, path));
            figure(row.took, Who::Roost, served);
            figure(row.ratio, Who::Roost, served / took);
        };
        clone(&MAPPED, "File", MEMORY);
        for _ in 0..LATER {
            clone(&MAPPED_LATER, "File", MEMORY);
        }
        let _ = fs::remove_file(WORKING_SET);
        let server = Server::start();
        clone(&SERVED, "Uffd", SERVER);
        wait_for(WORKING_SET);
        for _ in 0..LATER {
            clone(&SERVED_LATER, "Uffd", SERVER);
        }
        drop(server);
    }
}

fn wait_for(path: &str) {
    let begin = Instant::now();
    while !Path::new(path).exists() {
        assert!(begin.elapsed() < LIMIT, "{path} does not come");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Brings memory from the file, and learns from the first clone.
struct Server(Child);

impl Server {
    fn start() -> Self {
        let _ = fs::remove_file(SERVER);
        let mut command = Command::new("/bin/roost-vmm");
        command.args(["serve-memory", "--memory", MEMORY, "--socket", SERVER, "--working-set", WORKING_SET]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let server = Self(command.spawn().unwrap());
        wait_for(SERVER);
        server
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
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
        let arrivals = Arrivals::watch("/tmp");
        let begin = Instant::now();
        let monitor = Self(command.spawn().unwrap());
        while ask().is_err() {
            assert!(begin.elapsed() < LIMIT, "{}", fs::read_to_string("/tmp/stderr").unwrap_or_default());
            arrivals.wait();
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

/// What comes into a folder. Who looked again and again would take the CPU that is measured.
struct Arrivals(File);

impl Arrivals {
    fn watch(folder: &str) -> Self {
        let folder = CString::new(folder).unwrap();
        // SAFETY: makes a descriptor.
        let watch = unsafe { libc::inotify_init1(libc::IN_CLOEXEC) };
        assert!(watch >= 0, "inotify: {}", io::Error::last_os_error());
        // SAFETY: the call above made it, and nothing else owns it.
        let watch = unsafe { File::from_raw_fd(watch) };
        // SAFETY: the path ends with a NUL.
        let added = unsafe { libc::inotify_add_watch(watch.as_raw_fd(), folder.as_ptr(), libc::IN_CREATE) };
        assert!(added >= 0, "inotify: {}", io::Error::last_os_error());
        Self(watch)
    }

    /// Waits for the monitor's socket, or for as long as a guest needs that does not listen yet.
    fn wait(&self) {
        let patience = if Path::new(VSOCK).exists() { AGAIN } else { FAILED };
        let mut poll = libc::pollfd { fd: self.0.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd, as is said.
        if unsafe { libc::poll(&raw mut poll, 1, patience) } > 0 {
            let _ = (&self.0).read(&mut [0; 4096]);
        }
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
