//! A thread of a disk's own: for images that only a program of ours can read (qcow2), and for hosts without io_uring. Requests are
//! done one after the other, in their order.

use std::collections::VecDeque;
use std::io;
use std::sync::mpsc::channel;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::EventFd;

use super::SharedImage;
use super::engine::{Engine, Work};
use crate::devices::virtio::pieces::Pieces;
use crate::memory::{Memory, Slice};
use crate::{seccomp, threads};

/// What the two threads share.
struct Desk {
    jobs: Mutex<Jobs>,
    /// There is work, or the end.
    wake: Condvar,
    /// There is no work any more.
    idle: Condvar,
    bell: EventFd,
}

#[derive(Default)]
struct Jobs {
    waiting: VecDeque<(u16, Work<Pieces>)>,
    /// One is at work.
    busy: bool,
    done: VecDeque<(u16, io::Result<()>)>,
    stop: bool,
}

impl Desk {
    fn jobs(&self) -> MutexGuard<'_, Jobs> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The device thread's side.
pub struct Worker {
    desk: Arc<Desk>,
    thread: Option<JoinHandle<()>>,
    /// Submitted, but not handed over yet.
    fresh: Vec<(u16, Work<Pieces>)>,
    /// What work is about: the thread has addresses of it.
    memory: Option<Memory>,
}

impl Worker {
    /// Starts the thread, behind its filter. `bell` rings when something is finished.
    ///
    /// # Errors
    /// The host gives no thread, or does not lock it down.
    pub fn new(image: SharedImage, bell: EventFd) -> io::Result<Self> {
        let filter = seccomp::compile(seccomp::Kind::Disk).map_err(io::Error::other)?;
        let desk = Desk { jobs: Mutex::default(), wake: Condvar::new(), idle: Condvar::new(), bell };
        let desk = Arc::new(desk);
        let (sender, receiver) = channel();
        let theirs = Arc::clone(&desk);
        let thread = threads::spawn(threads::DISK.to_owned(), move || {
            let locked = seccomp::install(&filter);
            let go = locked.is_ok();
            let _ = sender.send(locked);
            if go {
                work(&theirs, &image);
            }
        });
        let thread = thread.map_err(io::Error::other)?;
        receiver.recv().map_err(io::Error::other)?.map_err(io::Error::other)?;
        Ok(Self { desk, thread: Some(thread), fresh: Vec::new(), memory: None })
    }
}

fn work(desk: &Desk, image: &SharedImage) {
    let mut jobs = desk.jobs();
    loop {
        let Some((token, work)) = jobs.waiting.pop_front() else {
            if jobs.stop {
                return;
            }
            desk.idle.notify_all();
            jobs = desk.wake.wait(jobs).unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        jobs.busy = true;
        drop(jobs);
        // SAFETY: whoever gave the work keeps the guest's memory until this is done.
        let work = work.map(|pieces| unsafe { pieces.slices() });
        let result = work.perform(image.lock().unwrap_or_else(PoisonError::into_inner).as_mut());
        jobs = desk.jobs();
        jobs.busy = false;
        jobs.done.push_back((token, result));
        if jobs.done.len() == 1 {
            // Fails only when its counter is full, and then it rings already.
            let _ = desk.bell.write(1);
        }
    }
}

impl Engine for Worker {
    fn attach(&mut self, memory: &Memory) {
        self.wait_all();
        self.memory = Some(memory.clone());
    }

    fn submit(&mut self, token: u16, work: Work<Vec<Slice<'_>>>) {
        let reads = matches!(work, Work::Read { .. });
        let work = work.map(|data| if reads { Pieces::to_write(&data) } else { Pieces::to_read(&data) });
        self.fresh.push((token, work));
    }

    fn start(&mut self) {
        if !self.fresh.is_empty() {
            self.desk.jobs().waiting.extend(self.fresh.drain(..));
            self.desk.wake.notify_one();
        }
    }

    fn finished(&mut self) -> Option<(u16, io::Result<()>)> {
        self.desk.jobs().done.pop_front()
    }

    fn wait_all(&mut self) {
        self.start();
        let mut jobs = self.desk.jobs();
        while jobs.busy || !jobs.waiting.is_empty() {
            jobs = self.desk.idle.wait(jobs).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.wait_all();
        self.desk.jobs().stop = true;
        self.desk.wake.notify_one();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
