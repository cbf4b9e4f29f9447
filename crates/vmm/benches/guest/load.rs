//! The guest's side of throughput: does what the virtual host asks for over the guest's interface.
//!
//! | a connection begins with the line | and then |
//! |---|---|
//! | `reply` | each byte comes back |
//! | `take` | everything is taken; at its end eight bytes say how much it was |
//! | `give` | bytes come until the other side closes |
//! | `disk WHAT THREADS MILLISECONDS` | operations per second of the disk, as a line |
//!
//! A guest without an interface replies to bytes over vsock.

use std::alloc::{Layout, alloc_zeroed};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::str::FromStr;
use std::thread;
use std::time::{Duration, Instant};

use crate::guest;
use crate::host::mount;
use crate::link;

/// Where the guest listens.
pub const PORT: u16 = 7000;
/// What streams are cut into.
pub const PIECE: usize = 128 << 10;
/// Where the guest listens for connections over vsock.
pub const VSOCK_PORT: u32 = 52;
const DISK: &str = "/dev/vda";

/// What is done to the disk, by each thread one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    RandomRead,
    RandomWrite,
    Read,
    Write,
}

impl Work {
    pub const ALL: [Self; 4] = [Self::RandomRead, Self::RandomWrite, Self::Read, Self::Write];

    pub const fn name(self) -> &'static str {
        match self {
            Self::RandomRead => "random-read",
            Self::RandomWrite => "random-write",
            Self::Read => "read",
            Self::Write => "write",
        }
    }

    const fn random(self) -> bool {
        matches!(self, Self::RandomRead | Self::RandomWrite)
    }

    const fn writes(self) -> bool {
        matches!(self, Self::RandomWrite | Self::Write)
    }

    /// Bytes of an operation.
    pub const fn size(self) -> usize {
        if self.random() { 4 << 10 } else { 1 << 20 }
    }
}

impl FromStr for Work {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|work| work.name() == text).ok_or_else(|| format!("{text} is no work"))
    }
}

pub fn run() -> ! {
    // Whatever fails here is seen by the line that does not come.
    let _ = fs::create_dir_all("/dev");
    let _ = mount("devtmpfs", "/dev");
    let mut console = OpenOptions::new().write(true).open("/dev/console").unwrap();
    let served = match std::env::var("address") {
        Ok(address) => serve_all(&address, &mut console),
        Err(_) => reply_over_vsock(),
    };
    let _ = writeln!(console, "the guest serves nobody: {served:?}");
    loop {
        thread::park();
    }
}

fn serve_all(address: &str, console: &mut File) -> io::Result<()> {
    link::bring_up("eth0", address.parse().map_err(io::Error::other)?)?;
    let listener = TcpListener::bind(("0.0.0.0", PORT))?;
    writeln!(console, "{}", guest::LINE)?;
    for connection in listener.incoming().flatten() {
        thread::spawn(move || serve(connection));
    }
    Ok(())
}

fn reply_over_vsock() -> io::Result<()> {
    let check = |result: i32| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) };
    // SAFETY: makes a socket.
    let socket = check(unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: a sockaddr_vm is plain data, for which all zeroes is a valid value.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    (address.svm_port, address.svm_cid) = (VSOCK_PORT, libc::VMADDR_CID_ANY);
    let length = size_of_val(&address) as libc::socklen_t;
    // SAFETY: bind reads the address that it is given.
    check(unsafe { libc::bind(socket, (&raw const address).cast(), length) })?;
    // SAFETY: about a socket that is there.
    check(unsafe { libc::listen(socket, 8) })?;
    loop {
        // SAFETY: takes a connection; who it is from is not asked.
        let connection = check(unsafe { libc::accept(socket, std::ptr::null_mut(), std::ptr::null_mut()) })?;
        // SAFETY: accept just made it, and nothing else owns it.
        let mut connection = File::from(unsafe { OwnedFd::from_raw_fd(connection) });
        let mut byte = [0];
        while connection.read_exact(&mut byte).is_ok() && connection.write_all(&byte).is_ok() {}
    }
}

fn serve(connection: TcpStream) -> io::Result<()> {
    connection.set_nodelay(true)?;
    let mut answers = connection.try_clone()?;
    let mut requests = BufReader::with_capacity(PIECE, connection);
    let mut line = String::new();
    requests.read_line(&mut line)?;
    let words: Vec<&str> = line.split_whitespace().collect();
    let mut piece = vec![0; PIECE];
    match words[..] {
        ["reply"] => loop {
            requests.read_exact(&mut piece[..1])?;
            answers.write_all(&piece[..1])?;
        },
        ["take"] => {
            let mut taken = 0_u64;
            loop {
                match requests.read(&mut piece)? {
                    0 => return answers.write_all(&taken.to_le_bytes()),
                    count => taken += count as u64,
                }
            }
        }
        ["give"] => loop {
            answers.write_all(&piece)?;
        },
        ["disk", work, threads, milliseconds] => {
            let rate = disk(
                work.parse().map_err(io::Error::other)?,
                threads.parse().map_err(io::Error::other)?,
                Duration::from_millis(milliseconds.parse().map_err(io::Error::other)?),
            )?;
            writeln!(answers, "{rate}")
        }
        _ => writeln!(answers, "what is {line:?}?"),
    }
}

/// Operations per second of so many threads together.
fn disk(work: Work, threads: u64, time: Duration) -> io::Result<f64> {
    // Not through the guest's page cache.
    let disk = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(DISK)?;
    let sectors: u64 = fs_size(&disk)?;
    let begin = Instant::now();
    let done: u64 = thread::scope(|scope| {
        let disk = &disk;
        let each: Vec<_> = (0..threads)
            .map(|own| scope.spawn(move || one(disk, work, own * sectors / threads, sectors, begin + time)))
            .collect();
        each.into_iter().map(|thread| thread.join().unwrap()).sum::<io::Result<u64>>()
    })?;
    Ok(done as f64 / begin.elapsed().as_secs_f64())
}

fn fs_size(disk: &File) -> io::Result<u64> {
    use std::io::{Seek, SeekFrom};
    (&*disk).seek(SeekFrom::End(0))
}

fn one(disk: &File, work: Work, first: u64, size: u64, end: Instant) -> io::Result<u64> {
    let length = work.size();
    let layout = Layout::from_size_align(length, 4096).unwrap();
    // SAFETY: the layout is not empty.
    let memory = unsafe { alloc_zeroed(layout) };
    assert!(!memory.is_null());
    // SAFETY: just allocated, zeroed, of this length, and freed only at the end.
    let buffer = unsafe { std::slice::from_raw_parts_mut(memory, length) };
    let places = size / length as u64;
    let (mut place, mut done) = (first / length as u64, 0);
    let mut random = first | 1;
    while Instant::now() < end {
        let at = (place % places) * length as u64;
        if work.writes() {
            disk.write_all_at(buffer, at)?;
        } else {
            disk.read_exact_at(buffer, at)?;
        }
        done += 1;
        place = if work.random() {
            // xorshift64 (Marsaglia, 2003).
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random
        } else {
            place + 1
        };
    }
    // SAFETY: allocated above with this layout; the slice is used no more.
    unsafe { std::alloc::dealloc(memory, layout) };
    Ok(done)
}
