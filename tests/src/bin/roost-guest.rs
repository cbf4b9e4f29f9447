//! The init of a guest that tests talk to over vsock: one line per connection, one line back. CPUs that come are brought online as
//! the images do it.
//!
//! | line | does |
//! |---|---|
//! | `upper TEXT` | answers in capitals |
//! | `hold MIB` | writes to so much memory, and keeps it |
//! | `drop` | gives that memory back to the guest's kernel |
//! | `cpus` | says which CPUs are online, as the kernel lists them |
//! | `memory` | says how much memory the kernel has, MiB |
//! | `call PORT TEXT` | connects to that port of the host and sends the text |
//! | `clock` | answers with its clocks, monotonic and real, in nanoseconds |
//! | `kernel TEXT` | answers with the kernel's last message that has this text |
//! | `off` | powers the guest off |

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::libc;
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::socket::{
    AddressFamily, Backlog, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, VsockAddr, accept, bind,
    connect, listen, recv, socket,
};
use nix::sys::time::TimeValLike;
use nix::time::{ClockId, clock_gettime};

/// The port that the guest listens at.
const PORT: u32 = 52;
/// The host (virtio 1.2, 5.10.4).
const HOST: u32 = 2;
const ANY: u32 = u32::MAX;

fn main() {
    let watched = std::fs::create_dir_all("/sys")
        .and_then(|()| Ok(mount(Some("sys"), "/sys", Some("sysfs"), MsFlags::empty(), None::<&str>)?))
        .and_then(|()| watch_cpus());
    if let Err(error) = watched {
        println!("guest: {error}");
    }
    if let Err(error) = serve() {
        println!("guest: {error}");
    }
    let Err(error) = reboot(RebootMode::RB_POWER_OFF);
    println!("guest: {error}");
}

fn serve() -> std::io::Result<()> {
    let listener = vsock()?;
    bind(listener.as_raw_fd(), &VsockAddr::new(ANY, PORT))?;
    listen(&listener, Backlog::new(8)?)?;
    println!("guest: listening");
    let mut held = Vec::new();
    loop {
        let descriptor = accept(listener.as_raw_fd())?;
        // SAFETY: accept just made this descriptor, and nothing else owns it.
        let connection = File::from(unsafe { OwnedFd::from_raw_fd(descriptor) });
        let mut line = String::new();
        BufReader::new(&connection).read_line(&mut line)?;
        let line = line.trim_end();
        let answer = match line.split_once(' ').unwrap_or((line, "")) {
            ("upper", text) => text.to_uppercase(),
            ("hold", mib) => {
                held.push(vec![1_u8; mib.parse::<usize>().unwrap_or(0) << 20]);
                format!("held {}", std::hint::black_box(&held).iter().map(Vec::len).sum::<usize>() >> 20)
            }
            ("drop", _) => {
                held.clear();
                "dropped".to_owned()
            }
            ("cpus", _) => std::fs::read_to_string("/sys/devices/system/cpu/online")?.trim_end().to_owned(),
            ("memory", _) => memory_mib()?.to_string(),
            ("call", rest) => call(rest).map_or_else(|error| error.to_string(), |()| "called".to_owned()),
            ("clock", _) => {
                let now = |clock| clock_gettime(clock).map(|time| time.num_nanoseconds());
                format!("{} {}", now(ClockId::CLOCK_MONOTONIC)?, now(ClockId::CLOCK_REALTIME)?)
            }
            ("kernel", text) => kernel(text),
            ("off", _) => return Ok(()),
            _ => format!("no such line: {line}"),
        };
        writeln!(&connection, "{answer}")?;
    }
}

/// The kernel's events (`NETLINK_KOBJECT_UEVENT`): a CPU that came is brought online.
fn watch_cpus() -> std::io::Result<()> {
    let kernel = SockProtocol::NetlinkKObjectUEvent;
    let events = socket(AddressFamily::Netlink, SockType::Datagram, SockFlag::empty(), kernel)?;
    bind(events.as_raw_fd(), &NetlinkAddr::new(0, 1))?;
    std::thread::spawn(move || {
        let mut event = [0; 8192];
        while let Ok(count) = recv(events.as_raw_fd(), &mut event, MsgFlags::empty()) {
            let head = event[..count].split(|byte| *byte == 0).next().unwrap_or_default();
            let cpu =
                str::from_utf8(head).ok().and_then(|head| head.strip_prefix("add@/devices/system/cpu/cpu"));
            // Not what is below a CPU, nor what is beside it.
            let Some(number) = cpu.and_then(|number| number.parse::<u32>().ok()) else { continue };
            if let Err(error) = std::fs::write(format!("/sys/devices/system/cpu/cpu{number}/online"), "1") {
                println!("guest: CPU {number}: {error}");
            }
        }
    });
    Ok(())
}

fn memory_mib() -> nix::Result<u64> {
    Ok(nix::sys::sysinfo::sysinfo()?.ram_total() >> 20)
}

fn vsock() -> nix::Result<OwnedFd> {
    socket(AddressFamily::Vsock, SockType::Stream, SockFlag::empty(), None)
}

fn call(rest: &str) -> std::io::Result<()> {
    let (port, text) = rest.split_once(' ').unwrap_or((rest, ""));
    let socket = vsock()?;
    connect(socket.as_raw_fd(), &VsockAddr::new(HOST, port.parse().unwrap_or(0)))?;
    writeln!(File::from(socket), "{text}")
}

/// The last of the kernel's messages that has this text.
fn kernel(text: &str) -> String {
    let mut messages = vec![0_u8; 256 * 1024];
    let length = libc::c_int::try_from(messages.len()).unwrap_or(0);
    // SAFETY: SYSLOG_ACTION_READ_ALL (3) fills the buffer, whose length it is told.
    let count = unsafe { libc::klogctl(3, messages.as_mut_ptr().cast(), length) };
    messages.truncate(usize::try_from(count).unwrap_or(0));
    let messages = String::from_utf8_lossy(&messages).into_owned();
    messages.lines().rev().find(|line| line.contains(text)).unwrap_or("nothing").to_owned()
}
