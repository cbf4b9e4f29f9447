//! Raw images by io_uring: reads, writes, flushes, discards and zeroes go on in the kernel while the device thread serves others.
//!
//! The ring is made on the device thread before that is locked down, one for a disk, as all its queues are served by that thread.
//! Before it is enabled it is restricted for good: it reads, writes, flushes and clears the one file that is registered with it, and nothing
//! else; of registrations only that of another file is left, for a disk's other image.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use io_uring::register::Restriction;
use io_uring::types::Fixed;
use io_uring::{IoUring, opcode, squeue};

use super::clear::{Call, Clear};
use super::engine::{Engine, ROOM, Work};
use crate::devices::virtio::pieces::Pieces;
use crate::memory::{Memory, Slice};

/// Threads that the kernel may take for what cannot be done without waiting: for files, for everything else.
const KERNEL_THREADS: [u32; 2] = [4, 1];
/// `IORING_REGISTER_FILES_UPDATE` and `IOSQE_FIXED_FILE` (linux/io_uring.h).
pub const REGISTER_FILES_UPDATE: u8 = 6;
const FIXED_FILE: u8 = 1;
/// The registered file.
const FILE: Fixed = Fixed(0);

/// What is under way under one token.
enum Job {
    None,
    Move { write: bool, stable: bool, offset: u64, pieces: Pieces },
    Clear(Clear),
    Flush,
}

/// The ring, with its memory.
pub struct Ring {
    ring: IoUring,
    jobs: Vec<Job>,
    /// How many there are, without those that are `done`.
    flying: usize,
    done: VecDeque<(u16, io::Result<()>)>,
    memory: Option<Memory>,
}

impl Ring {
    /// A ring for a raw file. Its descriptor is readable while something is finished that nobody looked at.
    ///
    /// # Errors
    /// The host has no io_uring, or not for us.
    pub fn new(file: &File) -> io::Result<Self> {
        let entries = u32::try_from(ROOM).unwrap_or(u32::MAX);
        let ring = IoUring::builder().setup_r_disabled().dontfork().build(entries)?;
        let submitter = ring.submitter();
        submitter.register_files(&[file.as_raw_fd()])?;
        submitter.register_iowq_max_workers(&mut KERNEL_THREADS.clone())?;
        let mut restrictions = [
            Restriction::sqe_op(opcode::Read::CODE),
            Restriction::sqe_op(opcode::Readv::CODE),
            Restriction::sqe_op(opcode::Write::CODE),
            Restriction::sqe_op(opcode::Writev::CODE),
            Restriction::sqe_op(opcode::Fsync::CODE),
            Restriction::sqe_op(opcode::Fallocate::CODE),
            Restriction::sqe_flags_required(FIXED_FILE),
            Restriction::register_op(REGISTER_FILES_UPDATE),
        ];
        submitter.register_restrictions(&mut restrictions)?;
        submitter.register_enable_rings()?;
        Ok(Self { ring, jobs: Vec::new(), flying: 0, done: VecDeque::new(), memory: None })
    }

    /// Works on another file from here on. Nothing is under way.
    ///
    /// # Errors
    /// The host's error; the file is the one that it was.
    pub fn set_file(&mut self, file: &File) -> io::Result<()> {
        self.ring.submitter().register_files_update(0, &[file.as_raw_fd()]).map(drop)
    }

    /// Puts a job into the submission queue.
    fn push(&mut self, token: u16) {
        let Some(job) = self.jobs.get(usize::from(token)) else { return };
        let Some(entry) = entry(job) else { return };
        let entry = entry.user_data(u64::from(token));
        // Twice: when the queue is full, the kernel takes what is in it.
        for _ in 0..2 {
            // SAFETY: the entry's memory is the guest's, which is kept until the job is done, or a job's own zeroes; its list of pieces
            // stands in `jobs` until then, and the kernel reads that while it takes the entry.
            if unsafe { self.ring.submission().push(&entry) }.is_ok() {
                return;
            }
            self.enter(0);
        }
        self.finish(token, Err(io::ErrorKind::ResourceBusy.into()));
    }

    /// Gives the kernel what is in the queue, and waits for so many to be finished.
    fn enter(&mut self, wait: usize) {
        loop {
            match self.ring.submit_and_wait(wait) {
                Ok(_) => return,
                // Interrupted, or short of memory for the moment.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) => {}
                Err(error) => {
                    static LOG: crate::log::Limited = crate::log::Limited::new();
                    LOG.line(|| format!("io_uring takes no work: {error}"));
                    return;
                }
            }
        }
    }

    /// Looks at what the kernel has finished.
    fn reap(&mut self) {
        loop {
            // Synchronised with the kernel once, then what is there.
            let found: Vec<(u64, i32)> =
                self.ring.completion().map(|entry| (entry.user_data(), entry.result())).collect();
            if found.is_empty() {
                return;
            }
            for (token, result) in found {
                self.completed(u16::try_from(token).unwrap_or(u16::MAX), result);
            }
        }
    }

    fn completed(&mut self, token: u16, result: i32) {
        let Some(job) = self.jobs.get_mut(usize::from(token)) else { return };
        let again = matches!(result.checked_neg(), Some(libc::EINTR | libc::EAGAIN));
        let outcome = match job {
            Job::None => return,
            _ if again => None,
            Job::Clear(clear) => match clear.done(result) {
                Ok(()) if clear.call().is_some() => None,
                result => Some(result),
            },
            _ if result < 0 => Some(Err(io::Error::from_raw_os_error(-result))),
            Job::Flush => Some(Ok(())),
            Job::Move { offset, pieces, .. } => {
                let moved = usize::try_from(result).unwrap_or(0);
                pieces.advance(moved);
                *offset += moved as u64;
                match (pieces.length(), moved) {
                    (0, _) => Some(Ok(())),
                    // Nothing more comes: the file has become shorter than the disk.
                    (_, 0) => Some(Err(io::ErrorKind::UnexpectedEof.into())),
                    _ => None,
                }
            }
        };
        match outcome {
            Some(result) => self.finish(token, result),
            None => {
                self.push(token);
                self.enter(0);
            }
        }
    }

    fn finish(&mut self, token: u16, result: io::Result<()>) {
        if let Some(job) = self.jobs.get_mut(usize::from(token)) {
            *job = Job::None;
        }
        self.flying -= 1;
        self.done.push_back((token, result));
    }
}

fn entry(job: &Job) -> Option<squeue::Entry> {
    match job {
        Job::None => None,
        Job::Flush => Some(opcode::Fsync::new(FILE).build()),
        Job::Clear(clear) => Some(match clear.call()? {
            Call::Allocate { mode, offset, length } => {
                opcode::Fallocate::new(FILE, length).offset(offset).mode(mode).build()
            }
            Call::Write { offset, zeroes } => {
                let length = u32::try_from(zeroes.len()).unwrap_or(u32::MAX);
                opcode::Write::new(FILE, zeroes.as_ptr(), length).offset(offset).build()
            }
            Call::Flush => opcode::Fsync::new(FILE).build(),
        }),
        Job::Move { write, stable, offset, pieces } => {
            let flags = if *stable { libc::RWF_DSYNC } else { 0 };
            let ((list, count), single) = (pieces.vector(), pieces.single());
            Some(match (write, single) {
                (false, Some((at, length))) => opcode::Read::new(FILE, at, length).offset(*offset).build(),
                (false, None) => opcode::Readv::new(FILE, list, count).offset(*offset).build(),
                (true, Some((at, length))) => {
                    opcode::Write::new(FILE, at, length).offset(*offset).rw_flags(flags).build()
                }
                (true, None) => {
                    opcode::Writev::new(FILE, list, count).offset(*offset).rw_flags(flags).build()
                }
            })
        }
    }
}

impl Engine for Ring {
    fn attach(&mut self, memory: &Memory) {
        self.wait_all();
        self.memory = Some(memory.clone());
    }

    fn submit(&mut self, token: u16, work: Work<Vec<Slice<'_>>>) {
        let job = match work {
            Work::Read { offset, data } => {
                Job::Move { write: false, stable: false, offset, pieces: Pieces::to_write(&data) }
            }
            Work::Write { offset, data, stable } => {
                Job::Move { write: true, stable, offset, pieces: Pieces::to_read(&data) }
            }
            Work::Flush => Job::Flush,
            Work::Clear { kind, ranges, stable } => Job::Clear(Clear::new(kind, ranges, stable)),
        };
        let empty = match &job {
            Job::Move { pieces, .. } => pieces.length() == 0,
            Job::Clear(clear) => clear.call().is_none(),
            Job::Flush | Job::None => false,
        };
        let at = usize::from(token);
        while self.jobs.len() <= at {
            self.jobs.push(Job::None);
        }
        self.jobs[at] = job;
        self.flying += 1;
        if empty {
            self.finish(token, Ok(()));
        } else {
            self.push(token);
        }
    }

    fn start(&mut self) {
        if !self.ring.submission().is_empty() {
            self.enter(0);
        }
    }

    fn finished(&mut self) -> Option<(u16, io::Result<()>)> {
        if self.done.is_empty() {
            self.reap();
        }
        self.done.pop_front()
    }

    /// The ring itself, and no eventfd that it rings: whoever takes what is finished while it is handed over (what the host has in memory) is
    /// not woken for it a second time. An eventfd that is switched off meanwhile would do that too, but nothing promises in which order the
    /// kernel makes an entry and looks at the switch.
    fn descriptor(&self) -> Option<RawFd> {
        Some(self.ring.as_raw_fd())
    }

    fn wait_all(&mut self) {
        self.start();
        self.reap();
        while self.flying > 0 {
            self.enter(1);
            self.reap();
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.wait_all();
    }
}

/// What tests try beside the work of a disk.
#[cfg(test)]
impl Ring {
    /// Gives the kernel an entry as it is, and returns its result.
    pub fn try_entry(&mut self, entry: &squeue::Entry) -> i32 {
        // SAFETY: the test keeps what the entry names until the result is there.
        unsafe { self.ring.submission().push(entry) }.unwrap();
        self.ring.submit_and_wait(1).unwrap();
        self.ring.completion().next().unwrap().result()
    }

    /// Registers something that is not the file.
    pub fn try_registration(&self) -> io::Result<()> {
        let bell = vmm_sys_util::eventfd::EventFd::new(0)?;
        self.ring.submitter().register_eventfd(bell.as_raw_fd())
    }
}
