//! The init of a guest that tests talk to over vsock: one line per connection, one line back. CPUs that come are brought online as
//! the images do it.
//!
//! | line | does |
//! |---|---|
//! | `upper TEXT` | answers in capitals |
//! | `hold MIB` | writes to so much memory, and keeps it |
//! | `drop` | gives that memory back to the guest's kernel |
//! | `cpus` | says which CPUs are online, as the kernel lists them |
//! | `cpuid LEAF SUBLEAF` | answers with EAX, EBX, ECX and EDX in hexadecimal digits, as LEAF and SUBLEAF are |
//! | `memory` | says how much memory the kernel has, MiB |
//! | `call PORT TEXT` | connects to that port of the host and sends the text |
//! | `clock` | answers with its clocks, monotonic and real, in nanoseconds |
//! | `net NAME ADDRESS` | gives an interface an address in a network of 256, and brings it up |
//! | `echo ADDRESS:PORT MIB` | streams so much to an echo service and compares what comes back at the same time |
//! | `kernel TEXT` | answers with the kernel's last message that has this text |
//! | `mount DEVICE OPTIONS` | mounts its ext4 file system at `/mnt` |
//! | `read FILE` | answers with a file's first line |
//! | `length FILE` | reads a file to its end, and answers how many bytes that were |
//! | `write FILE TEXT` | writes a file, and waits until it is on stable storage |
//! | `off` | powers the guest off |

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpStream};
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
            ("cpuid", rest) => cpuid(rest),
            ("memory", _) => memory_mib()?.to_string(),
            ("call", rest) => call(rest).map_or_else(|error| error.to_string(), |()| "called".to_owned()),
            ("clock", _) => {
                let now = |clock| clock_gettime(clock).map(|time| time.num_nanoseconds());
                format!("{} {}", now(ClockId::CLOCK_MONOTONIC)?, now(ClockId::CLOCK_REALTIME)?)
            }
            ("net", rest) => net(rest).map_or_else(|error| error.to_string(), |()| "up".to_owned()),
            ("echo", rest) => echo(rest).unwrap_or_else(|error| error.to_string()),
            ("kernel", text) => kernel(text),
            ("mount", rest) => said(mount_at_mnt(rest).map(|()| "mounted".to_owned())),
            ("read", path) => said(first_line(path)),
            ("length", path) => said(length(path).map(|bytes| bytes.to_string())),
            ("write", rest) => said(write_file(rest).map(|()| "written".to_owned())),
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

fn said(answer: std::io::Result<String>) -> String {
    answer.unwrap_or_else(|error| error.to_string())
}

fn mount_at_mnt(rest: &str) -> std::io::Result<()> {
    let (device, options) = rest.split_once(' ').unwrap_or((rest, ""));
    Ok(mount(Some(device), "/mnt", Some("ext4"), MsFlags::empty(), Some(options))?)
}

fn first_line(path: &str) -> std::io::Result<String> {
    let mut line = String::new();
    BufReader::new(File::open(path)?).read_line(&mut line)?;
    Ok(line.trim_end().to_owned())
}

/// Piece by piece, so that the program itself needs no memory for it.
fn length(path: &str) -> std::io::Result<u64> {
    std::io::copy(&mut File::open(path)?, &mut std::io::sink())
}

fn write_file(rest: &str) -> std::io::Result<()> {
    let (path, text) = rest.split_once(' ').unwrap_or((rest, ""));
    let mut file = File::create(path)?;
    writeln!(file, "{text}")?;
    file.sync_all()
}

fn cpuid(rest: &str) -> String {
    let mut numbers = rest.split(' ').map(|number| u32::from_str_radix(number, 16).unwrap_or(0));
    let (leaf, subleaf) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let said = std::arch::x86_64::__cpuid_count(leaf, subleaf);
    format!("{:x} {:x} {:x} {:x}", said.eax, said.ebx, said.ecx, said.edx)
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

/// As `ip address add` and `ip link set up` do it.
fn net(rest: &str) -> std::io::Result<()> {
    let (name, address) = rest.split_once(' ').unwrap_or((rest, ""));
    let address: Ipv4Addr = address.parse().map_err(std::io::Error::other)?;
    let sa_family = u16::try_from(libc::AF_INET).map_err(std::io::Error::other)?;
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::empty(), None)?;
    // SAFETY: an ifreq is plain data, for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (target, byte) in request.ifr_name[..libc::IFNAMSIZ - 1].iter_mut().zip(name.bytes()) {
        *target = byte.cast_signed();
    }
    let call = |number, request: &libc::ifreq| {
        // SAFETY: these calls read the ifreq that they are given.
        let result = unsafe { libc::ioctl(socket.as_raw_fd(), number, request) };
        nix::errno::Errno::result(result).map(drop)
    };
    for (number, value) in
        [(libc::SIOCSIFADDR, address), (libc::SIOCSIFNETMASK, Ipv4Addr::new(255, 255, 255, 0))]
    {
        // A sockaddr_in: its family, no port, the address.
        request.ifr_ifru.ifru_addr = libc::sockaddr { sa_family, sa_data: [0; 14] };
        // SAFETY: the line above filled this member of the union.
        let data = unsafe { &mut request.ifr_ifru.ifru_addr.sa_data };
        for (target, byte) in data[2..].iter_mut().zip(value.octets()) {
            *target = byte.cast_signed();
        }
        call(number, &request)?;
    }
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(libc::IFF_UP).map_err(std::io::Error::other)?;
    Ok(call(libc::SIOCSIFFLAGS, &request)?)
}

/// Sends and receives at the same time; says how many bytes came back as they went.
fn echo(rest: &str) -> std::io::Result<String> {
    let (address, mib) = rest.split_once(' ').unwrap_or((rest, "1"));
    let total = mib.parse::<usize>().unwrap_or(0) << 20;
    // 1 MiB of which no two words are the same.
    let pattern: Vec<u8> = (0..1_u32 << 18).flat_map(u32::to_le_bytes).collect();
    let mut stream = TcpStream::connect(address)?;
    let (mut sender, sent) = (stream.try_clone()?, pattern.clone());
    let sending = std::thread::spawn(move || {
        let mut at = 0;
        while at < total {
            let from = at % sent.len();
            let count = (sent.len() - from).min(total - at);
            sender.write_all(&sent[from..from + count])?;
            at += count;
        }
        sender.shutdown(Shutdown::Write)
    });
    let (mut at, mut buffer) = (0, vec![0; 1 << 16]);
    loop {
        let count = stream.read(&mut buffer)?;
        if count == 0 {
            break;
        }
        for (n, byte) in buffer[..count].iter().enumerate() {
            if *byte != pattern[(at + n) % pattern.len()] {
                return Ok(format!("byte {} came back as {byte:#x}", at + n));
            }
        }
        at += count;
    }
    sending.join().map_err(|_| std::io::Error::other("the sender panicked"))??;
    Ok(format!("echoed {at}"))
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
