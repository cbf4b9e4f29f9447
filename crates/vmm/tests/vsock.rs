//! A vsock device, from a bare-metal driver to programs on the host and back.

// Tests build bytes out of numbers whose size they know.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use common::virtio::{Device, register};
use common::vsock::{
    DATA, DST_PORT, FLAGS, GUEST_CID, HEADER, LENGTH, PACKET, REQUEST, RESET, RESPONSE, SHUTDOWN, SRC_PORT,
    connect, copy, expect, header, ping, received, send, set_up,
};
use common::{Code, DEADLINE, Machine, wait_for};
use roost_vmm::client::ClientError;
use roost_vmm::exit::ExitCode;
use serde_json::{Value, json};

const VSOCK: Device = Device(0);

fn machine(code: &Code) -> Machine {
    let mut machine = Machine::new(code);
    machine.config["vsock"] = json!({ "guest_cid": GUEST_CID, "uds_path": machine.text("v.sock") });
    machine
}

/// Takes the next connection.
fn accept(listener: &UnixListener) -> UnixStream {
    listener.set_nonblocking(true).unwrap();
    let (stream, _) = wait_for("the guest", || listener.accept().ok());
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream
}

/// Answers the guest's ping and reads on to the end.
fn pong(mut stream: UnixStream) {
    let mut word = [0; 4];
    stream.read_exact(&mut word).unwrap();
    assert_eq!(&word, b"ping");
    stream.write_all(b"pong").unwrap();
    assert_eq!(stream.read(&mut word).unwrap(), 0, "the guest has said all");
}

#[test]
fn a_guest_reaches_a_program_on_the_host_and_nobody_where_nobody_listens() {
    // The program has gone without a word more, so it is all over on its side.
    let code = ping(Code::default(), VSOCK).expect32(received(2) + FLAGS, 3);
    let code = send(header(code, (1000, 52), 0, RESET, 0), VSOCK, 3, HEADER);
    let code = expect(send(header(code, (1001, 53), 0, REQUEST, 0), VSOCK, 4, HEADER), 3, RESET);
    let code = code.expect32(received(3) + DST_PORT, 1001).print("done").power_off();
    let mut machine = machine(&code);
    let listener = UnixListener::bind(machine.path("v.sock_52")).unwrap();
    machine.start::<&str>(&[]);
    let stream = accept(&listener);
    let client = machine.client();
    assert_eq!(client.metrics().unwrap()["devices"]["vsock"]["from_guest"], json!(1));
    pong(stream);
    let ended = machine.wait();
    assert_eq!((ended.code, ended.console.as_str()), (0, "done"), "{}", ended.stderr);
}

#[test]
fn a_program_on_the_host_reaches_the_guest() {
    let answer = |code: Code, n: u16, length, op| {
        // To the port that the request came from.
        copy(header(code, (4000, 0), length, op, 0), received(n) + SRC_PORT, PACKET + DST_PORT)
    };
    let code = expect(set_up(Code::default(), VSOCK), 0, REQUEST).expect32(received(0) + DST_PORT, 4000);
    let code = send(answer(code, 0, 0, RESPONSE), VSOCK, 0, HEADER);
    let code = expect(code, 1, DATA).expect32(received(1) + LENGTH, 4);
    let code = copy(answer(code, 0, 4, DATA), received(1) + HEADER, PACKET + HEADER);
    let code = send(code, VSOCK, 1, HEADER + 4);
    let code = expect(code, 2, SHUTDOWN).expect32(received(2) + FLAGS, 2);
    let code =
        send(copy(answer(code, 0, 4, DATA), received(1) + HEADER, PACKET + HEADER), VSOCK, 2, HEADER + 4);
    let code = send(answer(code, 0, 0, RESET), VSOCK, 3, HEADER);
    // The next one is refused.
    let code = expect(code, 3, REQUEST).expect32(received(3) + DST_PORT, 4001);
    let code = copy(header(code, (4001, 0), 0, RESET, 0), received(3) + SRC_PORT, PACKET + DST_PORT);
    let code = send(code, VSOCK, 4, HEADER).print("done").power_off();
    let mut machine = machine(&code);
    machine.start::<&str>(&[]);
    let (mut reader, line) = connect(&machine.path("v.sock"), 4000);
    assert_eq!(line, "OK 1073741824\n");
    reader.get_mut().write_all(b"echo").unwrap();
    let mut word = [0; 4];
    reader.read_exact(&mut word).unwrap();
    assert_eq!(&word, b"echo");
    // The program says no more, and still hears.
    reader.get_mut().shutdown(std::net::Shutdown::Write).unwrap();
    let mut rest = Vec::new();
    reader.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"echo");
    let (_, line) = connect(&machine.path("v.sock"), 4001);
    assert_eq!(line, "", "refused");
    let ended = machine.wait();
    assert_eq!((ended.code, ended.console.as_str()), (0, "done"), "{}", ended.stderr);
}

/// A driver that is gone has no connections any more; the next one finds a device as new.
#[test]
fn a_reset_of_the_device_ends_its_connections() {
    let code = send(header(set_up(Code::default(), VSOCK), (1000, 52), 0, REQUEST, 0), VSOCK, 0, HEADER);
    let code = expect(code, 0, RESPONSE).store(VSOCK.register(register::STATUS), 0);
    let code = ping(code.print("reset"), VSOCK).print("done").power_off();
    let mut machine = machine(&code);
    let listener = UnixListener::bind(machine.path("v.sock_52")).unwrap();
    machine.start::<&str>(&[]);
    let mut first = accept(&listener);
    assert_eq!(first.read(&mut [0; 4]).unwrap(), 0);
    pong(accept(&listener));
    let ended = machine.wait();
    assert_eq!((ended.code, ended.console.as_str()), (0, "resetdone"), "{}", ended.stderr);
}

/// A program that connects before the guest has a driver waits for it; a restarted guest keeps the socket.
#[test]
fn a_restarted_guest_is_reached_by_the_same_socket() {
    let code = expect(set_up(Code::default(), VSOCK), 0, REQUEST);
    let code = copy(header(code, (4000, 0), 0, RESPONSE, 0), received(0) + SRC_PORT, PACKET + DST_PORT);
    let mut machine = machine(&send(code, VSOCK, 0, HEADER).print(".").reset());
    machine.start(&["--hold"]);
    let socket = machine.path("v.sock");
    let waiting = std::thread::spawn({
        let socket = socket.clone();
        move || connect(&socket, 4000).1
    });
    machine.client().start().unwrap();
    assert!(waiting.join().unwrap().starts_with("OK "));
    for _ in 0..3 {
        // The guest may be on its way down when it is asked; then nobody answers.
        wait_for("the guest", || connect(&socket, 4000).1.starts_with("OK ").then_some(()));
    }
    machine.client().force_stop().unwrap();
    machine.wait();
}

/// As the agent would: an empty root without `/proc`, no path of the host, the folder a descriptor.
#[test]
fn a_folder_that_is_handed_over_is_enough_in_an_empty_root() {
    // SAFETY: asks for a number.
    if unsafe { libc::geteuid() } != 0 {
        eprintln!("NOT RUN: another root folder needs root");
        return;
    }
    let mut machine = Machine::new(&ping(Code::default(), VSOCK).print("done").power_off());
    machine.config = json!({
        "boot-source": { "kernel_image_path": "kernel", "boot_args": "" },
        "machine-config": { "vcpu_count": 1, "mem_size_mib": 16 },
        "serial": { "output": "console" },
        "vsock": { "guest_cid": GUEST_CID, "uds_path": "sockets/v.sock" },
    });
    std::fs::write(machine.path("config"), machine.config.to_string()).unwrap();
    let (root, sockets) = (machine.path("root"), machine.path("sockets"));
    std::fs::create_dir(&root).unwrap();
    std::fs::create_dir(&sockets).unwrap();
    std::fs::copy(&machine.program, root.join("vmm")).unwrap();
    let listener = UnixListener::bind(sockets.join("v.sock_52")).unwrap();
    let open = |path: std::path::PathBuf| File::open(path).unwrap();
    let write = |path: std::path::PathBuf| {
        File::options().read(true).write(true).create(true).truncate(false).open(path).unwrap()
    };
    let handed = [
        ("config", open(machine.path("config"))),
        ("kernel", open(machine.path("kernel"))),
        ("console", write(machine.path("console"))),
        ("kvm", write("/dev/kvm".into())),
        ("sockets", open(sockets.clone())),
    ];
    let mut command = Command::new("/vmm");
    command.arg("run");
    for (name, file) in &handed {
        let number = file.as_raw_fd();
        // SAFETY: clears the close-on-exec flag of an open descriptor, so that the monitor inherits it.
        unsafe { libc::fcntl(number, libc::F_SETFD, 0) };
        match *name {
            "config" => command.args(["--config-fd", &number.to_string()]),
            name => command.args(["--fd", &format!("{name}={number}")]),
        };
    }
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(machine.path("stderr")).unwrap());
    let path = std::ffi::CString::new(root.as_os_str().as_bytes()).unwrap();
    let enter = move || {
        // SAFETY: the path is valid.
        let changed = unsafe { libc::chroot(path.as_ptr()) };
        // SAFETY: the path is valid.
        if changed < 0 || unsafe { libc::chdir(c"/".as_ptr()) } < 0 {
            return Err(std::io::Error::last_os_error());
        }
        Ok(())
    };
    // SAFETY: between fork and exec only two system calls are made.
    unsafe { command.pre_exec(enter) };
    machine.adopt(command.spawn().unwrap());
    pong(accept(&listener));
    let ended = machine.wait();
    assert_eq!((ended.code, ended.console.as_str()), (0, "done"), "{}", ended.stderr);
    let names = |folder: &std::path::Path| {
        let mut names: Vec<_> =
            std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(names(&root), ["vmm"]);
    assert_eq!(names(&sockets), ["v.sock", "v.sock_52"]);
}

fn refusal(result: Result<(), ClientError>) -> String {
    match result {
        Err(ClientError::Refused(why)) => why,
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn the_device_is_configured_before_the_start_and_a_wrong_folder_can_be_corrected() {
    let mut machine = Machine::new(&Code::default().stop());
    let socket = machine.text("api");
    machine.start_with(&["run", "--api-sock", &socket]);
    let client = machine.client();
    let put =
        |cid: u64, path: &str| client.put("PUT", "/vsock", &json!({ "guest_cid": cid, "uds_path": path }));
    assert!(refusal(put(2, "v")).contains("guest_cid 2 is outside 3–4294967294"));
    assert!(refusal(put(3, "v/")).contains("uds_path \"v/\""));
    assert!(refusal(client.put("PUT", "/vsock", &json!({ "uds_path": "v" }))).contains("guest_cid"));
    put(3, "/no/such/folder/v.sock").unwrap();
    client.put("PUT", "/boot-source", &machine.config["boot-source"].clone()).unwrap();
    client.put("PUT", "/serial", &json!({})).unwrap();
    assert!(refusal(client.start()).contains("/no/such/folder"));
    put(9, &machine.text("v.sock")).unwrap();
    client.start().unwrap();
    assert!(refusal(put(9, "v")).contains("built already"));
    let config: Value = serde_json::from_slice(&client.request("GET", "/vm/config", b"").unwrap()).unwrap();
    assert_eq!(config["vsock"], json!({ "guest_cid": 9, "uds_path": machine.text("v.sock") }));
    client.force_stop().unwrap();
    machine.wait();
}

#[test]
fn a_socket_of_a_dead_monitor_is_replaced_and_one_of_a_living_is_not() {
    let mut first = machine(&Code::default().stop());
    first.start::<&str>(&[]);
    first.client().force_stop().unwrap();
    first.wait();
    assert!(first.path("v.sock").exists());
    first.start::<&str>(&[]);
    let client = first.client();
    let mut second = machine(&Code::default().stop());
    second.config["vsock"]["uds_path"] = json!(first.text("v.sock"));
    let ended = second.run();
    assert_eq!(ended.code, ExitCode::HostIo.code(), "{}", ended.stderr);
    assert!(ended.stderr.contains("preparing vsock"), "{}", ended.stderr);
    client.force_stop().unwrap();
    first.wait();
}
