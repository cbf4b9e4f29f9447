//! `roost-vmm serve-memory`: memory of clones that comes page by page, and at once where it is known what they touch.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use common::balloon::give;
use common::virtio::{Device, Ring};
use common::{Code, Machine, hand, refusal, wait_for};
use roost_vmm::client::Client;
use roost_vmm::exit::ExitCode;
use serde_json::json;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Where the guest has pages that it looks at when it is told to, and how many.
const LOOKED_AT: u32 = 0x48_0000;
const LOOKS: u32 = 40;

/// A snapshot of a guest that has written 256 pages, and at a byte of input looks at some, gives one back, and looks at it again.
struct Snapshot(Machine);

impl Snapshot {
    fn new() -> Self {
        let queue = Ring { queue: 0, size: 8, base: 0x20_0000 };
        let mut code = Device(0).go(Device(0).queue(Device(0).negotiate(Code::default(), 0), queue));
        code = code.fill_pages(0x40_0000, 256, 7).print("1");
        // again: mov edx, 0x3fd; in al, dx; test al, 1; jz again; mov edx, 0x3f8; in al, dx
        code =
            code.bytes(&[0xba, 0xfd, 0x03, 0, 0, 0xec, 0xa8, 0x01, 0x74, 0xf6, 0xba, 0xf8, 0x03, 0, 0, 0xec]);
        for page in 0..LOOKS {
            code = code.expect32(LOOKED_AT + page * 4096, 7);
        }
        code = code.expect32(0x40_0000, 7).print("2");
        code = give(code, Device(0), queue, 0, (0x400, 1)).expect_zero_pages(0x40_0000, 1).print("3");
        let mut machine = Machine::new(&code.stop());
        machine.config["balloon"] = json!({ "amount_mib": 1 });
        let (_files, arguments) = hand(&machine, &["state", "memory"]);
        machine.start(&arguments);
        wait_for("the guest", || (machine.console() == "1").then_some(()));
        let client = machine.client();
        client.pause().unwrap();
        let files = json!({ "snapshot_path": "state", "mem_file_path": "memory" });
        client.put("PUT", "/snapshot/create", &files).unwrap();
        client.force_stop().unwrap();
        machine.wait();
        Self(machine)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path(name)
    }

    fn command(&self, memory: &str, more: &[&str]) -> Command {
        let mut command = Command::new(&self.0.program);
        command.arg("serve-memory").arg("--memory").arg(self.path(memory));
        command.arg("--socket").arg(self.path("faults")).args(more);
        command
    }

    fn serve(&self, more: &[&str]) -> Server {
        let said = self.path("said");
        let mut command = self.command("memory", more);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(&said).unwrap());
        let server = Server { child: command.spawn().unwrap(), said };
        wait_for("the server", || UnixStream::connect(self.path("faults")).ok());
        server
    }

    /// A monitor of a clone, loaded or refused.
    fn clone(&self) -> (Machine, Client, Result<(), roost_vmm::client::ClientError>) {
        let mut clone = Machine::new(&Code::default());
        let socket = clone.text("api");
        clone.start_with(&["run", "--api-sock", &socket]);
        let client = clone.client();
        let body = json!({
            "snapshot_path": self.path("state"), "resume_vm": true,
            "mem_backend": { "backend_type": "Uffd", "backend_path": self.path("faults") },
            "serial_override": { "output": clone.text("console") },
        });
        let loaded = client.put("PUT", "/snapshot/load", &body);
        (clone, client, loaded)
    }
}

struct Server {
    child: Child,
    said: PathBuf,
}

impl Server {
    fn said(&self) -> String {
        std::fs::read_to_string(&self.said).unwrap()
    }

    /// Pages that clone `number` had ahead, and those that it asked for, once it has ended. The first connection is the test's own.
    fn brought(&self, number: u32) -> (u64, u64) {
        let name = format!("clone {}: ", number + 1);
        let line = wait_for(&name, || {
            let said = self.said();
            said.lines().find_map(|line| Some(line.split_once(&name)?.1.to_owned()))
        });
        let numbers: Vec<u64> = line.split(' ').filter_map(|word| word.parse().ok()).collect();
        (numbers[0], numbers[1])
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn goes_on(clone: &Machine, client: &Client) {
    client.console_input(b"x").unwrap();
    wait_for("the guest", || clone.console().ends_with('3').then_some(()));
    assert_eq!(clone.console(), "23");
}

#[test]
fn what_the_first_clone_touches_the_next_ones_have_at_once() {
    let snapshot = Snapshot::new();
    let set = snapshot.path("set");
    let more = ["--working-set", set.to_str().unwrap()];
    let server = snapshot.serve(&more);
    let (first, client, loaded) = snapshot.clone();
    loaded.unwrap();
    goes_on(&first, &client);
    assert!(!set.exists(), "the first clone has not ended, and its ten seconds are not over");
    client.force_stop().unwrap();
    let (ahead, asked) = server.brought(1);
    assert!(ahead == 0 && asked > u64::from(LOOKS), "{ahead} pages ahead, {asked} asked for");

    // Two at once, of a server that knows the set, and one of a server that reads it.
    let clones = [snapshot.clone(), snapshot.clone()];
    for (clone, client, loaded) in clones {
        loaded.unwrap();
        goes_on(&clone, &client);
        client.force_stop().unwrap();
    }
    let last = {
        let before = [server.brought(2), server.brought(3)];
        assert!(
            before.iter().all(|(ahead, again)| ahead + again >= asked && *again < 10),
            "{before:?}, then {asked}"
        );
        drop(server);
        let server = snapshot.serve(&more);
        let (clone, client, loaded) = snapshot.clone();
        loaded.unwrap();
        goes_on(&clone, &client);
        client.force_stop().unwrap();
        server.brought(1)
    };
    assert!(last.0 > u64::from(LOOKS) && last.1 < 10, "{last:?}");
}

#[test]
fn a_set_is_kept_when_its_time_is_over() {
    let snapshot = Snapshot::new();
    let set = snapshot.path("set");
    let server = snapshot.serve(&["--working-set", set.to_str().unwrap(), "--seconds", "1"]);
    let (clone, client, loaded) = snapshot.clone();
    loaded.unwrap();
    wait_for("the set", || set.exists().then_some(()));
    let before = std::fs::read(&set).unwrap();
    goes_on(&clone, &client);
    client.force_stop().unwrap();
    server.brought(1);
    // What came later is none of it.
    assert_eq!(std::fs::read(&set).unwrap(), before);
}

#[test]
fn a_server_that_is_told_to_end_leaves_no_socket_and_its_clones_end() {
    let snapshot = Snapshot::new();
    let mut server = snapshot.serve(&[]);
    let (mut clone, client, loaded) = snapshot.clone();
    loaded.unwrap();
    goes_on(&clone, &client);
    let killed = Command::new("kill").arg(server.child.id().to_string()).status().unwrap();
    assert!(killed.success());
    let ended = wait_for("the server's end", || server.child.try_wait().unwrap());
    assert_eq!((ended.code(), snapshot.path("faults").exists()), (Some(0), false), "{}", server.said());
    let ended = clone.wait();
    assert_eq!(ended.code, ExitCode::HostIo.code());
    assert!(ended.stderr.contains("page-fault handler"), "{}", ended.stderr);
    assert!(refusal(snapshot.clone().2).contains("page-fault handler"));
}

#[test]
fn what_cannot_be_served_is_refused_in_words() {
    let snapshot = Snapshot::new();
    let refused = |memory: &str, more: &[&str]| {
        let ran = snapshot.command(memory, more).output().unwrap();
        assert!(!snapshot.path("faults").exists());
        (ran.status.code().unwrap(), String::from_utf8(ran.stderr).unwrap())
    };
    for (memory, code, why) in [("nothing", 5, "memory file"), ("state", 2, "this is no memory file")] {
        let (ended, said) = refused(memory, &[]);
        assert!(ended == code && said.contains(why) && !said.contains("handed"), "{memory}: {ended}, {said}");
    }
    let set = snapshot.path("set");
    std::fs::write(&set, "{}").unwrap();
    let (ended, said) = refused("memory", &["--working-set", set.to_str().unwrap()]);
    assert!(ended == 2 && said.contains("without the file"), "{ended}, {said}");

    // Whoever talks nonsense, or nothing and goes, ends nothing but the connection.
    let server = snapshot.serve(&[]);
    std::io::Write::write_all(&mut UnixStream::connect(snapshot.path("faults")).unwrap(), b"[]").unwrap();
    wait_for("its complaint", || server.said().contains("sent no userfaultfd descriptor").then_some(()));
    let regions = json!([{ "base_host_virt_addr": 4096, "size": 4096, "offset": 0, "page_size": 4096, "page_size_kib": 4096 }]);
    let stream = UnixStream::connect(snapshot.path("faults")).unwrap();
    let nothing = File::open("/dev/null").unwrap();
    stream.send_with_fd(regions.to_string().as_bytes(), nothing.as_raw_fd()).unwrap();
    wait_for("its complaint", || server.said().contains("no userfaultfd descriptor: it ends").then_some(()));
    // A server beside it would take its place.
    let second = snapshot.command("memory", &[]).output().unwrap();
    assert_eq!(second.status.code(), Some(5), "{}", String::from_utf8_lossy(&second.stderr));
    let (clone, client, loaded) = snapshot.clone();
    loaded.unwrap();
    goes_on(&clone, &client);
}
