//! What each kind of thread may call: one line per call, with what it is for. Everything else ends the process.
//!
//! No kind of the monitor may open a path, start a program, or map memory executable. The device thread connects unix sockets, from the one
//! folder that it stands in (`docs/decisions/0013-vsock-in-one-folder.md`); no other kind makes sockets.
//!
//! `tests/ledger.rs` watches every call that machines make once they are locked down, and fails when a line here is of no
//! use to any of them. A line that no test is sure to reach says why ([`Allowed::unseen`]).

use crate::devices::virtio::block::uring;
use crate::devices::virtio::net::{tap, vhost};

/// Kind of thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Serves the API, steers the machine, loads the kernel again after a guest's reset.
    Api,
    /// Runs the devices.
    Devices,
    /// Does the work of one disk.
    Disk,
    /// Runs one vCPU.
    Vcpu,
    /// Opens paths for a stand-alone monitor: a process of its own.
    Opener,
}

/// One line: a call, and what it is for.
#[derive(Clone, Copy, Debug)]
pub struct Allowed {
    /// The call's number.
    pub call: i64,
    /// What its arguments must be.
    pub only: Only,
    /// What it is for.
    pub why: &'static str,
    /// Why no test is sure to make it.
    pub unseen: Option<&'static str>,
}

/// What a call's arguments must be (the lower half of each, as all are `int` or small).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Only {
    /// Anything.
    Any,
    /// This argument (counted from 0) has this value.
    Argument(u8, u64),
    /// The protection, argument 2, is not executable.
    NotExecutable,
    /// The process, argument 0, is this one.
    ThisProcess,
}

impl Only {
    /// Whether arguments meet it.
    #[must_use]
    pub fn takes(self, arguments: &[u64; 6], process: u32) -> bool {
        let low = |index: u8| arguments[usize::from(index) % 6] & 0xffff_ffff;
        match self {
            Self::Any => true,
            Self::Argument(index, value) => low(index) == value & 0xffff_ffff,
            Self::NotExecutable => low(2) & PROT_EXEC == 0,
            Self::ThisProcess => low(0) == u64::from(process),
        }
    }
}

const fn any(call: i64, why: &'static str) -> Allowed {
    Allowed { call, only: Only::Any, why, unseen: None }
}

const fn with(call: i64, argument: u8, value: u64, why: &'static str) -> Allowed {
    Allowed { call, only: Only::Argument(argument, value), why, unseen: None }
}

impl Allowed {
    const fn unseen(self, reason: &'static str) -> Self {
        Self { unseen: Some(reason), ..self }
    }
}

const PROT_EXEC: u64 = bits(libc::PROT_EXEC);

const fn bits_of(request: libc::Ioctl) -> u64 {
    request & 0xffff_ffff
}

/// A C constant as the kernel sees it in a register's lower half.
const fn bits(constant: i32) -> u64 {
    constant.cast_unsigned() as u64
}

/// `_IOR(0x12, 114, size_t)`.
const BLKGETSIZE64: u64 = 0x8008_1272;

// KVM's calls on a vCPU: `_IO('…', 0xae, nr)` with direction and size of the argument.
const KVM_RUN: u64 = 0xae80;
const KVM_GET_REGS: u64 = 0x8090_ae81;
const KVM_SET_REGS: u64 = 0x4090_ae82;
const KVM_GET_SREGS: u64 = 0x8138_ae83;
const KVM_SET_SREGS: u64 = 0x4138_ae84;
const KVM_TRANSLATE: u64 = 0xc018_ae85;
const KVM_SET_MSRS: u64 = 0x4008_ae89;
const KVM_SET_FPU: u64 = 0x41a0_ae8d;
const KVM_SET_LAPIC: u64 = 0x4400_ae8f;
const KVM_GET_MP_STATE: u64 = 0x8004_ae98;
const KVM_SET_MP_STATE: u64 = 0x4004_ae99;
const KVM_SET_VCPU_EVENTS: u64 = 0x4040_aea0;
const KVM_SET_DEBUGREGS: u64 = 0x4080_aea2;
const KVM_SET_XSAVE: u64 = 0x5000_aea5;
const KVM_SET_XCRS: u64 = 0x4188_aea7;
const KVM_KVMCLOCK_CTRL: u64 = 0xaead;
// For a snapshot.
const KVM_GET_MSRS: u64 = 0xc008_ae88;
const KVM_GET_FPU: u64 = 0x81a0_ae8c;
const KVM_GET_LAPIC: u64 = 0x8400_ae8e;
const KVM_GET_VCPU_EVENTS: u64 = 0x8040_ae9f;
const KVM_GET_DEBUGREGS: u64 = 0x8080_aea1;
const KVM_GET_XSAVE: u64 = 0x9000_aea4;
const KVM_GET_XCRS: u64 = 0x8188_aea6;
const KVM_SET_TSC_KHZ: u64 = 0xaea2;
const KVM_GET_TSC_KHZ: u64 = 0xaea3;
const TUNSETOFFLOAD: u64 = bits_of(tap::TUNSETOFFLOAD);
const TUNSETQUEUE: u64 = bits_of(tap::TUNSETQUEUE);
const VHOST_SET_FEATURES: u64 = bits_of(vhost::SET_FEATURES);
const VHOST_SET_VRING_NUM: u64 = bits_of(vhost::SET_VRING_NUM);
const VHOST_SET_VRING_ADDR: u64 = bits_of(vhost::SET_VRING_ADDR);
const VHOST_SET_VRING_BASE: u64 = bits_of(vhost::SET_VRING_BASE);
const VHOST_GET_VRING_BASE: u64 = bits_of(vhost::GET_VRING_BASE);
const VHOST_NET_SET_BACKEND: u64 = bits_of(vhost::SET_BACKEND);
// On a machine.
const KVM_SET_IRQCHIP: u64 = 0x8208_ae63;
const KVM_SET_PIT2: u64 = 0x4070_aea0;
const KVM_CHECK_EXTENSION: u64 = 0xae03;
const KVM_GET_SUPPORTED_CPUID: u64 = 0xc008_ae05;
const KVM_GET_IRQCHIP: u64 = 0xc208_ae62;
const KVM_GET_PIT2: u64 = 0x8070_ae9f;
const KVM_GET_CLOCK: u64 = 0x8030_ae7c;
const KVM_GET_DIRTY_LOG: u64 = 0x4010_ae42;

/// Reasons why a call is not sure to be seen.
mod unseen {
    pub const LIBRARY: &str = "the C library's own, depending on its version and on load";
    pub const LARGE: &str = "only for more memory than tests ask for";
    pub const STOPPED: &str = "only when the process is stopped and continued meanwhile";
    pub const FAULT: &str = "only on the way out of a fault in the monitor itself";
    pub const DEBUG: &str = "only debug builds of the standard library check descriptors";
    pub const WATCH: &str = "the tests' own watch is set up with it, and lets it pass";
    pub const FORMAT: &str = "depends on the image's format, size and caches";
    pub const VHOST: &str = "only where the host has vhost-net (tests/e2e/monitor makes it)";
    pub const UNDER_WAY: &str = "only if a disk's work is under way at that moment";
}

/// The C library's and the allocator's own needs, the end of threads and of the process, and messages.
const COMMON: &[Allowed] = &[
    any(libc::SYS_brk, "the allocator's heap grows").unseen(unseen::LARGE),
    Allowed {
        only: Only::NotExecutable,
        ..any(libc::SYS_mmap, "buffers; a kernel's pages after a reset; a balloon's")
    }
    .unseen(unseen::LARGE),
    Allowed { only: Only::NotExecutable, ..any(libc::SYS_mprotect, "the allocator's heap grows") }
        .unseen(unseen::LIBRARY),
    any(libc::SYS_munmap, "buffers go").unseen(unseen::LARGE),
    any(libc::SYS_mremap, "buffers grow").unseen(unseen::LARGE),
    with(libc::SYS_madvise, 2, bits(libc::MADV_DONTNEED), "freed memory goes back").unseen(unseen::LIBRARY),
    with(libc::SYS_madvise, 2, bits(libc::MADV_FREE), "freed memory goes back").unseen(unseen::LIBRARY),
    any(libc::SYS_futex, "locks and channels between threads"),
    any(libc::SYS_sched_yield, "a thread waits for a lock").unseen(unseen::LIBRARY),
    any(libc::SYS_restart_syscall, "a wait goes on after a stop").unseen(unseen::STOPPED),
    any(libc::SYS_nanosleep, "waits").unseen(unseen::LIBRARY),
    any(libc::SYS_clock_nanosleep, "waits").unseen(unseen::LIBRARY),
    any(libc::SYS_clock_gettime, "time, where the vDSO does not have the clock").unseen(unseen::LIBRARY),
    any(libc::SYS_rseq, "threads").unseen(unseen::LIBRARY),
    any(libc::SYS_set_robust_list, "threads").unseen(unseen::LIBRARY),
    any(libc::SYS_sched_getaffinity, "the allocator counts processors").unseen(unseen::LIBRARY),
    any(libc::SYS_rt_sigprocmask, "the end of a thread; abort").unseen(unseen::FAULT),
    any(libc::SYS_getpid, "abort").unseen(unseen::FAULT),
    any(libc::SYS_gettid, "abort").unseen(unseen::FAULT),
    Allowed { only: Only::ThisProcess, ..any(libc::SYS_tgkill, "a vCPU is kicked out of the guest; abort") }
        .unseen(unseen::FAULT),
    any(libc::SYS_sigaltstack, "the end of a thread").unseen(unseen::LIBRARY),
    any(libc::SYS_exit, "the end of a thread").unseen(unseen::LIBRARY),
    any(libc::SYS_exit_group, "the end of the process").unseen(unseen::FAULT),
    any(libc::SYS_close, "descriptors of a thread that ends").unseen(unseen::LIBRARY),
    with(libc::SYS_fcntl, 1, bits(libc::F_GETFD), "descriptors are checked before they are closed")
        .unseen(unseen::DEBUG),
    any(libc::SYS_rt_sigreturn, "the end of a signal's handler").unseen(unseen::FAULT),
    any(libc::SYS_write, "events, messages"),
];

const API: &[Allowed] = &[
    any(libc::SYS_epoll_wait, "waits for requests, vCPUs and signals"),
    any(libc::SYS_epoll_pwait, "the same, as another C library does it").unseen(unseen::LIBRARY),
    any(libc::SYS_epoll_ctl, "connections come"),
    any(libc::SYS_accept4, "a connection comes"),
    with(libc::SYS_ioctl, 1, bits_of(libc::FIONBIO), "a connection does not block"),
    any(libc::SYS_recvmsg, "a request, perhaps with a descriptor"),
    any(libc::SYS_sendto, "a response"),
    any(libc::SYS_shutdown, "a connection goes").unseen(unseen::LIBRARY),
    any(libc::SYS_read, "a vCPU's bell; a kernel's headers after a reset"),
    any(libc::SYS_lseek, "the kernel is loaded again after a reset"),
    any(
        libc::SYS_statx,
        "a snapshot's files are two; the size of a kernel that is loaded again after a reset",
    ),
    any(libc::SYS_fstat, "the same, as another C library does it").unseen(unseen::LIBRARY),
    any(libc::SYS_getrandom, "a snapshot's id; keys of hash tables"),
    with(libc::SYS_madvise, 2, bits(libc::MADV_DONTDUMP), "a kernel's pages after a reset stay out of dumps"),
    with(libc::SYS_madvise, 2, bits(libc::MADV_HUGEPAGE), "a kernel's code moves into huge pages"),
    any(libc::SYS_timerfd_settime, "the balloon's statistics come at another interval"),
    with(libc::SYS_ioctl, 1, KVM_SET_IRQCHIP, "a reset"),
    with(libc::SYS_ioctl, 1, KVM_SET_PIT2, "a reset"),
    with(libc::SYS_ioctl, 1, KVM_CHECK_EXTENSION, "a snapshot"),
    with(libc::SYS_ioctl, 1, KVM_GET_SUPPORTED_CPUID, "a snapshot"),
    with(libc::SYS_ioctl, 1, KVM_GET_IRQCHIP, "a snapshot"),
    with(libc::SYS_ioctl, 1, KVM_GET_PIT2, "a snapshot"),
    with(libc::SYS_ioctl, 1, KVM_GET_CLOCK, "a snapshot"),
    with(libc::SYS_ioctl, 1, KVM_GET_DIRTY_LOG, "a diff snapshot"),
    with(libc::SYS_ioctl, 1, VHOST_GET_VRING_BASE, "where vhost-net is in a ring, for a snapshot")
        .unseen(unseen::VHOST),
    with(libc::SYS_ioctl, 1, VHOST_NET_SET_BACKEND, "vhost-net stops for a reset or a snapshot, and goes on")
        .unseen(unseen::VHOST),
    with(libc::SYS_ioctl, 1, bits_of(libc::TCSETS), "the terminal's mode is put back at the end")
        .unseen("tests have no terminal"),
    with(libc::SYS_fcntl, 1, bits(libc::F_DUPFD_CLOEXEC), "the serial port's interrupt after a reset"),
    with(libc::SYS_fcntl, 1, bits(libc::F_GETFL), "whether a disk's new image can be written"),
    with(libc::SYS_fcntl, 1, bits(libc::F_SETFL), "a connection does not block").unseen(unseen::LIBRARY),
    any(libc::SYS_io_uring_enter, "what is under way is waited for before a snapshot, and at the end")
        .unseen(unseen::UNDER_WAY),
    with(
        libc::SYS_io_uring_register,
        1,
        uring::REGISTER_FILES_UPDATE as u64,
        "a ring gets a disk's new image",
    ),
    any(libc::SYS_fstatfs, "the blocks of a disk's new image"),
    with(libc::SYS_ioctl, 1, BLKGETSIZE64, "the size of a disk's new image")
        .unseen("tests have no block device"),
    // Disks are flushed at the end of a machine; what an overlay's tables still hold is written then.
    any(libc::SYS_fdatasync, "disks are flushed at the end").unseen(unseen::FORMAT),
    any(libc::SYS_fsync, "disks are flushed at the end"),
    any(libc::SYS_pread64, "disks are flushed at the end").unseen(unseen::FORMAT),
    any(libc::SYS_preadv, "disks are flushed at the end").unseen(unseen::FORMAT),
    any(libc::SYS_readv, "disks are flushed at the end").unseen(unseen::FORMAT),
    any(libc::SYS_pwrite64, "a snapshot's memory; disks are flushed at the end"),
    any(libc::SYS_pwritev, "disks are flushed at the end").unseen(unseen::FORMAT),
    any(libc::SYS_writev, "disks are flushed at the end").unseen(unseen::FORMAT),
    any(libc::SYS_ftruncate, "a snapshot's files are emptied; disks are flushed at the end"),
    any(libc::SYS_fallocate, "disks are flushed at the end").unseen(unseen::FORMAT),
];

const DEVICES: &[Allowed] = &[
    any(libc::SYS_epoll_wait, "waits for bells, packets and input"),
    any(libc::SYS_epoll_pwait, "the same, as another C library does it").unseen(unseen::LIBRARY),
    with(libc::SYS_epoll_ctl, 1, bits(libc::EPOLL_CTL_DEL), "console input that has ended"),
    any(libc::SYS_read, "bells, packets, console input"),
    any(libc::SYS_getrandom, "the entropy device"),
    any(libc::SYS_timerfd_settime, "a device waits because of its limits"),
    with(libc::SYS_epoll_ctl, 1, bits(libc::EPOLL_CTL_ADD), "a vsock connection is waited for"),
    any(libc::SYS_accept4, "a host program connects to the guest"),
    with(libc::SYS_socket, 0, bits(libc::AF_UNIX), "the guest connects to a host program"),
    any(libc::SYS_connect, "the guest connects to a host program"),
    any(libc::SYS_recvfrom, "a host program's bytes go to the guest"),
    any(libc::SYS_sendto, "the guest's bytes go to a host program"),
    any(libc::SYS_shutdown, "the guest ends one direction of a connection"),
    with(libc::SYS_madvise, 2, bits(libc::MADV_DONTNEED), "a balloon's pages go back to the host"),
    Allowed {
        only: Only::NotExecutable,
        ..any(libc::SYS_mmap, "fresh pages in place of a kernel's that go back to the host")
    },
    with(libc::SYS_madvise, 2, bits(libc::MADV_DONTDUMP), "those pages stay out of dumps"),
    with(libc::SYS_ioctl, 1, TUNSETQUEUE, "a driver says how many of an interface's queues it uses"),
    with(libc::SYS_ioctl, 1, VHOST_NET_SET_BACKEND, "vhost-net lets go of a ring that the guest broke")
        .unseen(unseen::VHOST),
    any(libc::SYS_io_uring_enter, "the disks' work is given to the kernel"),
    any(libc::SYS_preadv, "a disk is read"),
    any(libc::SYS_pwritev, "a disk is written"),
    any(libc::SYS_fdatasync, "a disk is flushed").unseen(unseen::FORMAT),
    any(libc::SYS_pread64, "an overlay's tables").unseen(unseen::FORMAT),
    any(libc::SYS_pwrite64, "an overlay's tables").unseen(unseen::FORMAT),
    any(libc::SYS_readv, "a disk is read").unseen(unseen::FORMAT),
    any(libc::SYS_writev, "the guest sends packets; a disk is written"),
    any(libc::SYS_fsync, "a disk is flushed"),
    any(libc::SYS_lseek, "an overlay's length").unseen(unseen::FORMAT),
    any(libc::SYS_fstat, "an overlay's length").unseen(unseen::FORMAT),
    any(libc::SYS_ftruncate, "an overlay grows").unseen(unseen::FORMAT),
    any(libc::SYS_fallocate, "the guest discards or zeroes"),
];

const DISK: &[Allowed] = &[
    any(libc::SYS_preadv, "a disk is read"),
    any(libc::SYS_pwritev, "a disk is written"),
    any(libc::SYS_pread64, "an overlay's tables").unseen(unseen::FORMAT),
    any(libc::SYS_pwrite64, "an overlay's tables").unseen(unseen::FORMAT),
    any(libc::SYS_readv, "a disk is read").unseen(unseen::FORMAT),
    any(libc::SYS_writev, "a disk is written").unseen(unseen::FORMAT),
    any(libc::SYS_fsync, "a disk is flushed"),
    any(libc::SYS_fdatasync, "a disk is flushed").unseen(unseen::FORMAT),
    any(libc::SYS_lseek, "an overlay's length").unseen(unseen::FORMAT),
    any(libc::SYS_fstat, "an overlay's length").unseen(unseen::FORMAT),
    any(libc::SYS_statx, "an overlay's length").unseen(unseen::FORMAT),
    any(libc::SYS_ftruncate, "an overlay grows").unseen(unseen::FORMAT),
    any(libc::SYS_fallocate, "the guest discards or zeroes").unseen(unseen::FORMAT),
];

const VCPU: &[Allowed] = &[
    with(libc::SYS_ioctl, 1, KVM_RUN, "runs the guest"),
    with(libc::SYS_ioctl, 1, KVM_KVMCLOCK_CTRL, "tells the guest that it was stopped"),
    with(libc::SYS_ioctl, 1, KVM_GET_REGS, "the report of a crash"),
    with(libc::SYS_ioctl, 1, KVM_GET_SREGS, "the report of a crash"),
    with(libc::SYS_ioctl, 1, KVM_TRANSLATE, "the report of a crash"),
    with(libc::SYS_ioctl, 1, KVM_SET_REGS, "the entry; a reset"),
    with(libc::SYS_ioctl, 1, KVM_SET_SREGS, "the entry; a reset"),
    with(libc::SYS_ioctl, 1, KVM_SET_MSRS, "a reset"),
    with(libc::SYS_ioctl, 1, KVM_SET_FPU, "a reset, where KVM has no XSAVE")
        .unseen("every KVM of today has it"),
    with(libc::SYS_ioctl, 1, KVM_SET_XSAVE, "a reset"),
    with(libc::SYS_ioctl, 1, KVM_SET_XCRS, "a reset"),
    with(libc::SYS_ioctl, 1, KVM_SET_LAPIC, "a reset"),
    with(
        libc::SYS_ioctl,
        1,
        KVM_GET_MP_STATE,
        "a snapshot; a reset: INIT and SIPI that came while it was parked",
    ),
    with(libc::SYS_ioctl, 1, KVM_SET_MP_STATE, "a reset"),
    with(libc::SYS_ioctl, 1, KVM_SET_VCPU_EVENTS, "a reset"),
    with(libc::SYS_ioctl, 1, KVM_SET_DEBUGREGS, "a reset"),
    with(libc::SYS_ioctl, 1, KVM_GET_MSRS, "a snapshot"),
    with(libc::SYS_ioctl, 1, KVM_GET_FPU, "a snapshot"),
    with(libc::SYS_ioctl, 1, KVM_GET_LAPIC, "a snapshot"),
    with(libc::SYS_ioctl, 1, KVM_GET_VCPU_EVENTS, "a snapshot"),
    with(libc::SYS_ioctl, 1, KVM_GET_DEBUGREGS, "a snapshot"),
    with(libc::SYS_ioctl, 1, KVM_GET_XSAVE, "a snapshot"),
    with(libc::SYS_ioctl, 1, KVM_GET_XCRS, "a snapshot"),
    with(libc::SYS_ioctl, 1, KVM_GET_TSC_KHZ, "a snapshot"),
    with(libc::SYS_ioctl, 1, KVM_SET_TSC_KHZ, "a snapshot from a host with another TSC")
        .unseen("there is one host"),
    with(libc::SYS_ioctl, 1, TUNSETOFFLOAD, "a driver activates its interface"),
    with(
        libc::SYS_ioctl,
        1,
        TUNSETQUEUE,
        "a driver activates an interface of several taps, and uses one at first",
    ),
    with(libc::SYS_ioctl, 1, VHOST_SET_FEATURES, "a driver activates an interface of vhost-net")
        .unseen(unseen::VHOST),
    with(libc::SYS_ioctl, 1, VHOST_SET_VRING_NUM, "the same").unseen(unseen::VHOST),
    with(libc::SYS_ioctl, 1, VHOST_SET_VRING_BASE, "the same").unseen(unseen::VHOST),
    with(libc::SYS_ioctl, 1, VHOST_SET_VRING_ADDR, "the same").unseen(unseen::VHOST),
    with(libc::SYS_ioctl, 1, VHOST_NET_SET_BACKEND, "the same, and the driver's reset").unseen(unseen::VHOST),
    with(
        libc::SYS_read,
        2,
        size_of::<u64>() as u64,
        "an eventfd: at the reset it is forgotten what was broken",
    )
    .unseen(unseen::VHOST),
    any(libc::SYS_io_uring_enter, "a disk is reset, and what is under way is waited for")
        .unseen(unseen::UNDER_WAY),
    any(libc::SYS_rt_sigreturn, "the end of a kick"),
];

/// It shares nothing with the others, and has one thread.
const OPENER: &[Allowed] = &[
    any(libc::SYS_brk, "the allocator's heap grows").unseen(unseen::LARGE),
    Allowed { only: Only::NotExecutable, ..any(libc::SYS_mmap, "buffers") }.unseen(unseen::LARGE),
    any(libc::SYS_munmap, "buffers go").unseen(unseen::LARGE),
    any(libc::SYS_close, "what was sent is not kept").unseen(unseen::WATCH),
    with(libc::SYS_fcntl, 1, bits(libc::F_GETFD), "descriptors are checked before they are closed")
        .unseen(unseen::DEBUG),
    any(libc::SYS_exit_group, "the end, with the monitor").unseen(unseen::FAULT),
    any(libc::SYS_write, "messages").unseen(unseen::FAULT),
    any(libc::SYS_rt_sigreturn, "the end of a signal's handler").unseen(unseen::FAULT),
    any(libc::SYS_recvfrom, "the monitor asks"),
    any(libc::SYS_read, "the same, as another C library does it").unseen(unseen::LIBRARY),
    any(libc::SYS_openat, "what it is for"),
    any(libc::SYS_open, "the same, as another C library does it").unseen(unseen::LIBRARY),
    any(libc::SYS_sendmsg, "a descriptor goes to the monitor").unseen(unseen::WATCH),
    any(libc::SYS_sendto, "why there is none"),
];

/// What `kind` may call.
pub fn allowed(kind: Kind) -> impl Iterator<Item = &'static Allowed> {
    let (common, own) = match kind {
        Kind::Api => (COMMON, API),
        Kind::Devices => (COMMON, DEVICES),
        Kind::Disk => (COMMON, DISK),
        Kind::Vcpu => (COMMON, VCPU),
        Kind::Opener => (&[][..], OPENER),
    };
    common.iter().chain(own)
}

/// A line without its texts.
type Bare = (i64, Only);

/// Lines without their texts. Only the ledger reads these: a text is an address, which the program's start writes, so that each
/// process would have pages of its own for the tables.
const fn without_texts<const N: usize>(lines: &[Allowed]) -> [Bare; N] {
    let mut bare = [(0, Only::Any); N];
    let mut n = 0;
    while n < N {
        bare[n] = (lines[n].call, lines[n].only);
        n += 1;
    }
    bare
}

static COMMON_CALLS: [Bare; COMMON.len()] = without_texts(COMMON);
static API_CALLS: [Bare; API.len()] = without_texts(API);
static DEVICES_CALLS: [Bare; DEVICES.len()] = without_texts(DEVICES);
static VCPU_CALLS: [Bare; VCPU.len()] = without_texts(VCPU);
static DISK_CALLS: [Bare; DISK.len()] = without_texts(DISK);
static OPENER_CALLS: [Bare; OPENER.len()] = without_texts(OPENER);

/// The lines of a kind, as the compiler takes them.
pub(super) fn lines(kind: Kind) -> Vec<(i64, Only)> {
    let (common, own): (&[Bare], &[Bare]) = match kind {
        Kind::Api => (&COMMON_CALLS, &API_CALLS),
        Kind::Devices => (&COMMON_CALLS, &DEVICES_CALLS),
        Kind::Vcpu => (&COMMON_CALLS, &VCPU_CALLS),
        Kind::Disk => (&COMMON_CALLS, &DISK_CALLS),
        Kind::Opener => (&[], &OPENER_CALLS),
    };
    common.iter().chain(own).copied().collect()
}
