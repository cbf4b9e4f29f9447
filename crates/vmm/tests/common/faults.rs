//! A page-fault handler as others write them: it gets what is mapped where, and brings pages from a memory file, as many at a time as it is
//! told: those around the one that is missing will be wanted too.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use roost_vmm::snapshot::lazy::Mapping;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::DEADLINE;

const PAGE: u64 = 4096;
const UFFDIO_COPY: libc::Ioctl = 0xc028_aa03;
const UFFDIO_WAKE: libc::Ioctl = 0x8010_aa02;
const UFFDIO_ZEROPAGE: libc::Ioctl = 0xc020_aa04;
const PAGEFAULT: u8 = 0x12;
const REMOVE: u8 = 0x15;

/// A handler that runs.
pub struct Faults {
    /// Faults that it has answered.
    pub answered: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Faults {
    /// Waits at this socket for a monitor, and serves it; `at_a_time` pages, a power of two.
    pub fn serve(listener: UnixListener, memory: File, at_a_time: u64) -> Self {
        let (answered, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (count, ended) = (Arc::clone(&answered), Arc::clone(&stop));
        let thread = std::thread::spawn(move || run(&listener, &memory, at_a_time * PAGE, &count, &ended));
        Self { answered, stop, thread: Some(thread) }
    }

    /// Ends it: its connection closes.
    pub fn end(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.take().unwrap().join().unwrap();
    }
}

fn run(listener: &UnixListener, memory: &File, block: u64, count: &AtomicU64, stop: &AtomicBool) {
    let (stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    let mut text = vec![0; 4096];
    let (length, faults) = stream.recv_with_fd(&mut text).unwrap();
    let mappings: Vec<Mapping> = serde_json::from_slice(&text[..length]).unwrap();
    let faults = faults.unwrap();
    let mut removed: Vec<std::ops::Range<u64>> = Vec::new();
    while !stop.load(Ordering::SeqCst) {
        let mut poll = libc::pollfd { fd: faults.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd, which is valid.
        if unsafe { libc::poll(&raw mut poll, 1, 20) } < 1 {
            continue;
        }
        let mut message = [0_u8; 32];
        if std::io::Read::read(&mut &faults, &mut message).ok() != Some(32) {
            continue;
        }
        let word = |at: usize| u64::from_le_bytes(message[at..at + 8].try_into().unwrap());
        match message[0] {
            REMOVE => removed.push(word(8)..word(16)),
            PAGEFAULT => {
                let page = word(16) & !(PAGE - 1);
                let mapping = mappings
                    .iter()
                    .find(|m| (m.base_host_virt_addr..m.base_host_virt_addr + m.size).contains(&page));
                let Mapping { base_host_virt_addr: base, size, offset, .. } = *mapping.unwrap();
                let bring = |from: u64, to: u64| {
                    let mut content = vec![0_u8; usize::try_from(to - from).unwrap()];
                    memory.read_exact_at(&mut content, offset + from - base).unwrap();
                    let mut copy = [from, content.as_ptr() as u64, to - from, 0, 0];
                    // SAFETY: UFFDIO_COPY reads and fills the struct that it is given; the source is memory of this process.
                    unsafe { libc::ioctl(faults.as_raw_fd(), UFFDIO_COPY, copy.as_mut_ptr()) == 0 }
                };
                let from = (page & !(block - 1)).max(base);
                let to = ((page & !(block - 1)) + block).min(base + size);
                let gone = |from, to| removed.iter().any(|range| range.start < to && from < range.end);
                if gone(page, page + PAGE) {
                    let mut zero = [page, PAGE, 0, 0_u64];
                    // SAFETY: UFFDIO_ZEROPAGE reads and fills the struct that it is given; the range is the other process's.
                    unsafe { libc::ioctl(faults.as_raw_fd(), UFFDIO_ZEROPAGE, zero.as_mut_ptr()) };
                // Not whole where some of it is there already, or was given back.
                } else if (gone(from, to) || !bring(from, to)) && !bring(page, page + PAGE) {
                    let mut there = [page, PAGE];
                    // SAFETY: as above.
                    unsafe { libc::ioctl(faults.as_raw_fd(), UFFDIO_WAKE, there.as_mut_ptr()) };
                }
                count.fetch_add(1, Ordering::SeqCst);
            }
            other => panic!("event {other:#x}"),
        }
    }
}
