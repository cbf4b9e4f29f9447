//! Unpacks a blob of a tenant in a short-lived process without privilege.
//!
//! ```text
//!   roost-agent serve (root)              roost-agent unpack (nobody's user, no files, no network)
//!   blob ── SHA-256 ── pipe ────────────▶ 0   zstd ── holes ──▶ 1 ──▶ images/….part
//!   outcome, at most ANSWER bytes ◀─────── 2
//! ```
//! The process has these three descriptors and can get no other. Its filter allows reading,
//! writing, memory and exit. The process writes at most the image's unpacked size, and leaves the
//! host's disk reserve free.

use crate::disk;
use crate::error::{Error, Result};
use roost_types::ids::BlobId;
use roost_vmm::seccomp::{self, rules::Only};
use rustix::process::{Resource, Rlimit, geteuid, setrlimit};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, FromRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, ChildStdin, Command};
use tokio::time::timeout;

/// Unit of holes.
const BLOCK: usize = 64 * 1024;
/// Bytes that are written between two checks of the free disk.
const LOOK_EVERY: u64 = 16 << 20;
/// Most memory that the process may map, in bytes: a zstd window and the program itself.
const MEMORY: u64 = 1 << 30;
/// Largest window of zstd, as a power of two: 128 MiB, what `zstd --ultra` and `--long` make by
/// default.
const WINDOW_LOG_MAX: u32 = 27;
/// Most bytes of an answer.
const ANSWER: u64 = 1024;
/// Time limit for one piece of a blob, which may unpack to gigabytes.
const STALL: Duration = Duration::from_secs(300);

/// Exit codes of the process beside success; descriptor 2 carries the message.
const NO_IMAGE: i32 = 3;
const NO_ROOM: i32 = 4;

/// Starts unpacking processes.
#[derive(Debug, Clone)]
pub struct Unpacker {
    /// Path of the agent's own program.
    pub program: PathBuf,
    /// User and group id of the process. Only root can set another id than its own.
    pub user: u32,
    /// Bytes of the disk that stay free.
    pub reserve: u64,
}

impl Unpacker {
    /// Hashes and unpacks a blob in one pass, to a file of at most `most` bytes.
    ///
    /// # Errors
    /// The blob is damaged, no zstd file, or unpacks to more than `most`; or the disk has no room.
    pub async fn unpack(
        &self,
        mut bytes: impl AsyncRead + Send + Unpin,
        blob: &BlobId,
        most: u64,
        part: &Path,
    ) -> Result<()> {
        disk::require(part.parent().unwrap_or(part), self.reserve)?;
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(part)
            .map_err(Error::file("create", part))?;
        let mut child = self.start(&file, most)?;
        let mut input = child.stdin.take();
        let mut digest = Sha256::new();
        let mut piece = vec![0; BLOCK];
        loop {
            let receiving = Error::io(format!("receiving blob {blob}"));
            let count = bytes.read(&mut piece).await.map_err(receiving)?;
            if count == 0 {
                break;
            }
            digest.update(&piece[..count]);
            // The rest of a blob that does not unpack is hashed too. The hash tells a damaged blob
            // from a file that is no image.
            if !feed(&mut input, &piece[..count]).await? {
                input = None;
            }
        }
        drop(input);
        let (status, answer) = outcome(&mut child).await?;
        let got = BlobId::from_sha256(digest.finalize().into());
        if got != *blob {
            return Err(Error::NotNow(format!("blob {blob} came damaged: its bytes have the hash {got}")));
        }
        match status.code() {
            Some(0) => {}
            Some(NO_IMAGE) => return Err(Error::Impossible(format!("blob {blob} {answer}"))),
            Some(NO_ROOM) => return Err(Error::NotNow(format!("unpacking blob {blob}: {answer}"))),
            _ => {
                return Err(Error::NotNow(format!("unpacking blob {blob} ended with {status}: {answer}")));
            }
        }
        let part = part.to_owned();
        tokio::task::spawn_blocking(move || file.sync_all().map_err(Error::file("flush", part)))
            .await
            .map_err(|error| Error::NotNow(format!("flushing was cut short: {error}")))?
    }

    fn start(&self, file: &File, most: u64) -> Result<Child> {
        let output = file.try_clone().map_err(Error::io("handing the image's file on"))?;
        Command::new(&self.program)
            .arg("unpack")
            .args(["--most", &most.to_string()])
            .args(["--reserve", &self.reserve.to_string()])
            .args(["--user", &self.user.to_string()])
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(output)
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(Error::file("start", &self.program))
    }
}

/// Returns false if the process reads no more.
async fn feed(input: &mut Option<ChildStdin>, piece: &[u8]) -> Result<bool> {
    let Some(pipe) = input else { return Ok(false) };
    match timeout(STALL, pipe.write_all(piece)).await {
        Ok(written) => Ok(written.is_ok()),
        Err(_) => Err(stalled()),
    }
}

fn stalled() -> Error {
    Error::NotNow(format!("the unpacking process did nothing for {} s", STALL.as_secs()))
}

/// The exit status and the message of the process, in printable characters.
async fn outcome(child: &mut Child) -> Result<(ExitStatus, String)> {
    let mut said = Vec::new();
    if let Some(answer) = child.stderr.take() {
        let read = timeout(STALL, answer.take(ANSWER).read_to_end(&mut said)).await;
        read.map_err(|_| stalled())?.map_err(Error::io("reading the unpacking process's answer"))?;
    }
    let status = timeout(STALL, child.wait()).await.map_err(|_| stalled())?;
    let status = status.map_err(Error::io("waiting for the unpacking process"))?;
    let text = String::from_utf8_lossy(&said);
    Ok((status, text.trim().chars().filter(|letter| !letter.is_control()).collect()))
}

/// Parameters of the process.
#[derive(Debug, Clone, Copy)]
pub struct Order {
    /// Most bytes that the process writes.
    pub most: u64,
    /// Bytes of the disk that stay free.
    pub reserve: u64,
    /// User and group id of the process if it starts as root.
    pub user: u32,
}

/// The process itself: drops its privileges, unpacks descriptor 0 to descriptor 1, and ends.
pub fn run(order: Order) -> ! {
    let code = match lock_down(order).and_then(|()| copy(order)) {
        Ok(()) => 0,
        Err((code, mut sentence)) => {
            sentence.truncate(sentence.floor_char_boundary(500));
            let _ = std::io::stderr().write_all(sentence.as_bytes());
            code
        }
    };
    // SAFETY: ends this process at once; what is registered to run at an exit makes calls that the filter forbids.
    unsafe { libc::_exit(code) }
}

type Outcome<T> = std::result::Result<T, (i32, String)>;

fn lock_down(order: Order) -> Outcome<()> {
    fn failed<E: std::fmt::Display>(what: &str) -> impl FnOnce(E) -> (i32, String) {
        move |error| (1, format!("cannot {what}: {error}"))
    }
    let limits = [
        (Resource::Fsize, order.most),
        (Resource::As, MEMORY),
        (Resource::Core, 0),
        (Resource::Nofile, 0),
        (Resource::Nproc, 0),
    ];
    for (resource, most) in limits {
        let limit = Rlimit { current: Some(most), maximum: Some(most) };
        setrlimit(resource, limit).map_err(failed("limit itself"))?;
    }
    if geteuid().is_root() {
        use nix::sched::CloneFlags;
        use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
        let spaces = CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC;
        nix::sched::unshare(spaces).map_err(failed("leave the host's namespaces"))?;
        let (user, group) = (Uid::from_raw(order.user), Gid::from_raw(order.user));
        setgroups(&[]).map_err(failed("leave its groups"))?;
        setresgid(group, group, group).map_err(failed("give up its group"))?;
        setresuid(user, user, user).map_err(failed("give up its user"))?;
    }
    nix::sys::prctl::set_dumpable(false).map_err(failed("hide its memory"))?;
    let filter = seccomp::of_lines(&calls()).map_err(failed("make its filter"))?;
    seccomp::install(&filter).map_err(failed("lock itself down"))
}

/// Every system call that the process may make from then on. No call takes a path, makes a
/// descriptor or starts a program.
fn calls() -> Vec<(i64, Only)> {
    let any = [
        libc::SYS_lseek,
        libc::SYS_munmap,
        libc::SYS_mremap,
        libc::SYS_madvise,
        libc::SYS_brk,
        libc::SYS_futex,
        libc::SYS_sigaltstack,
        libc::SYS_rt_sigprocmask,
        libc::SYS_rt_sigreturn,
        libc::SYS_restart_syscall,
        libc::SYS_exit,
        libc::SYS_exit_group,
    ];
    let mut calls: Vec<_> = any.map(|call| (call, Only::Any)).into();
    calls.extend([
        (libc::SYS_read, Only::Argument(0, 0)),
        (libc::SYS_write, Only::Argument(0, 1)),
        (libc::SYS_write, Only::Argument(0, 2)),
        (libc::SYS_ftruncate, Only::Argument(0, 1)),
        (libc::SYS_fstatfs, Only::Argument(0, 1)),
        (libc::SYS_mmap, Only::NotExecutable),
        (libc::SYS_mprotect, Only::NotExecutable),
    ]);
    calls
}

/// Unpacks, with holes for zeroes.
fn copy(order: Order) -> Outcome<()> {
    // Never closed, like every other descriptor here.
    // SAFETY: whoever started this process has handed it this descriptor.
    let input = ManuallyDrop::new(unsafe { File::from_raw_fd(0) });
    // SAFETY: and this one.
    let output = ManuallyDrop::new(unsafe { File::from_raw_fd(1) });
    let (mut output, disk) = (&*output, output.as_fd());
    let no_zstd = |error: std::io::Error| (NO_IMAGE, format!("is no zstd file: {error}"));
    let no_room = |error: std::io::Error| (NO_ROOM, format!("cannot write: {error}"));
    let mut packed = zstd::stream::read::Decoder::new(&*input).map_err(no_zstd)?;
    packed.window_log_max(WINDOW_LOG_MAX).map_err(no_zstd)?;
    let mut block = vec![0; BLOCK];
    let (mut length, mut unseen) = (0_u64, 0_u64);
    loop {
        let count = fill(&mut packed, &mut block).map_err(no_zstd)?;
        if count == 0 {
            break;
        }
        length += count as u64;
        if length > order.most {
            let most = order.most;
            return Err((NO_IMAGE, format!("unpacks to more than the {most} bytes that its image says")));
        }
        if block[..count].iter().all(|byte| *byte == 0) {
            output.seek(SeekFrom::Current(i64::try_from(count).unwrap_or(0))).map_err(no_room)?;
            continue;
        }
        output.write_all(&block[..count]).map_err(no_room)?;
        unseen += count as u64;
        if unseen >= LOOK_EVERY {
            unseen = 0;
            let disk = rustix::fs::fstatfs(disk).map_err(|error| no_room(error.into()))?;
            let size = u64::try_from(disk.f_bsize).unwrap_or(0);
            let free = disk.f_bavail.saturating_mul(size);
            if free < order.reserve {
                return Err((NO_ROOM, disk::full(free, order.reserve)));
            }
        }
    }
    output.set_len(length).map_err(no_room)
}

fn fill(reader: &mut impl Read, block: &mut [u8]) -> std::io::Result<usize> {
    let mut filled = 0;
    while filled < block.len() {
        match reader.read(&mut block[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}
