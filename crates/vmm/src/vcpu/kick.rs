//! Getting a vCPU out of KVM_RUN.

use std::os::fd::AsRawFd;
use std::os::unix::thread::JoinHandleExt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;

use crate::error::{Error, Result};

const PAGE: usize = 4096;

/// A second mapping of the first page of a vCPU's `kvm_run`, which outlives the vCPU's own if it must.
#[derive(Debug)]
pub struct KickPage {
    page: NonNull<u8>,
}

// SAFETY: the mapping is owned by this value, and the one byte that is touched is touched atomically.
unsafe impl Send for KickPage {}

impl KickPage {
    /// Maps the page of this vCPU and makes sure that the signal has a handler.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn new(vcpu: &VcpuFd) -> Result<Self> {
        // SAFETY: a fresh shared mapping of the vCPU's descriptor, whose first page is `struct kvm_run`.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                0,
            )
        };
        if page == libc::MAP_FAILED {
            return Err(Error::io("mapping a vCPU's shared page")(std::io::Error::last_os_error()));
        }
        let page = NonNull::new(page.cast()).ok_or_else(|| Error::State("mmap returned null".into()))?;
        register_handler()?;
        Ok(Self { page })
    }

    /// Makes the vCPU leave KVM_RUN, or not enter it.
    pub fn kick(&self, thread: Option<&JoinHandle<()>>) {
        let offset = std::mem::offset_of!(kvm_run, immediate_exit);
        // SAFETY: the offset lies inside the page.
        let byte = unsafe { self.page.as_ptr().add(offset) };
        // SAFETY: a byte of a mapping that lives as long as self; the kernel and the vCPU thread access it as a byte.
        unsafe { AtomicU8::from_ptr(byte) }.store(1, Ordering::SeqCst);
        if let Some(thread) = thread {
            // SAFETY: the thread has not been joined, so its id is valid; its handler does nothing.
            unsafe { libc::pthread_kill(thread.as_pthread_t(), signal()) };
        }
    }
}

impl Drop for KickPage {
    fn drop(&mut self) {
        // SAFETY: this value made the mapping and nothing else uses it.
        unsafe { libc::munmap(self.page.as_ptr().cast(), PAGE) };
    }
}

fn signal() -> libc::c_int {
    libc::SIGRTMIN()
}

extern "C" fn ignore(_: libc::c_int) {}

/// The signal must have a handler, as an ignored one does not interrupt KVM_RUN.
fn register_handler() -> Result<()> {
    // SAFETY: a zeroed sigaction is a valid value.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = ignore as *const () as libc::sighandler_t;
    // SAFETY: the action is valid and its handler does nothing, so it is safe in any context.
    let result = unsafe { libc::sigaction(signal(), &raw const action, std::ptr::null_mut()) };
    if result < 0 {
        Err(Error::io("installing the vCPU signal")(std::io::Error::last_os_error()))
    } else {
        Ok(())
    }
}

/// vCPU threads take the signal, whatever the thread that started them blocks.
pub fn unblock_signal() {
    // SAFETY: a zeroed sigset is valid, and is filled by the calls below.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set is valid.
    unsafe { libc::sigemptyset(&raw mut set) };
    // SAFETY: the set and the signal number are valid.
    unsafe { libc::sigaddset(&raw mut set, signal()) };
    // SAFETY: the set is valid; only this thread's mask changes.
    unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut()) };
}
