//! What each kind of thread may call. Everything else ends the process.
//!
//! No kind may open a path, start a program, make a socket, or map memory executable.

use std::collections::BTreeMap;

use seccompiler::{BackendError, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompRule};

use crate::devices::virtio::net::tap;

/// Kind of thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Serves the API, steers the machine, loads the kernel again after a guest's reset.
    Api,
    /// Runs the devices.
    Devices,
    /// Runs one vCPU.
    Vcpu,
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// The C library's and the allocator's own needs, the end of threads and of the process, and messages.
const COMMON: &[i64] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_read,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    libc::SYS_write,
];

/// Files that are open, at given places: disks (imago), kernels.
const FILES: &[i64] = &[
    libc::SYS_fdatasync,
    libc::SYS_fstat,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_lseek,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_readv,
    libc::SYS_writev,
];

const PROT_EXEC: u64 = bits(libc::PROT_EXEC);
const F_GETFD: u64 = bits(libc::F_GETFD);
const EPOLL_CTL_DEL: u64 = bits(libc::EPOLL_CTL_DEL);

/// A C constant as the kernel sees it in a register's lower half.
const fn bits(constant: i32) -> u64 {
    constant.cast_unsigned() as u64
}

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
const KVM_SET_MP_STATE: u64 = 0x4004_ae99;
const KVM_SET_VCPU_EVENTS: u64 = 0x4040_aea0;
const KVM_SET_DEBUGREGS: u64 = 0x4080_aea2;
const KVM_SET_XSAVE: u64 = 0x5000_aea5;
const KVM_SET_XCRS: u64 = 0x4188_aea7;
const KVM_KVMCLOCK_CTRL: u64 = 0xaead;
// On a machine.
const KVM_SET_IRQCHIP: u64 = 0x8208_ae63;
const KVM_SET_PIT2: u64 = 0x4070_aea0;

/// The rules of a kind.
///
/// # Errors
/// A condition that the compiler does not take.
pub fn rules(kind: Kind) -> Result<Rules, BackendError> {
    let mut rules = Rules::new();
    allow(&mut rules, COMMON);
    // Memory for the allocator and for buffers: never executable.
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(call, vec![rule(2, SeccompCmpOp::MaskedEq(PROT_EXEC), 0)?]);
    }
    let advice = [libc::MADV_DONTNEED, libc::MADV_HUGEPAGE, libc::MADV_DONTDUMP, libc::MADV_FREE];
    rules.insert(libc::SYS_madvise, any_of(2, &advice.map(bits))?);
    // A thread may signal only threads of its own process (KVM kicks, abort).
    rules.insert(libc::SYS_tgkill, vec![rule(0, SeccompCmpOp::Eq, u64::from(std::process::id()))?]);
    // Debug builds of the standard library check descriptors before they close them.
    rules.insert(libc::SYS_fcntl, any_of(1, &[F_GETFD])?);
    match kind {
        Kind::Vcpu => {
            let calls = [
                KVM_RUN,
                KVM_GET_REGS,
                KVM_SET_REGS,
                KVM_GET_SREGS,
                KVM_SET_SREGS,
                KVM_TRANSLATE,
                KVM_SET_MSRS,
                KVM_SET_FPU,
                KVM_SET_LAPIC,
                KVM_SET_MP_STATE,
                KVM_SET_VCPU_EVENTS,
                KVM_SET_DEBUGREGS,
                KVM_SET_XSAVE,
                KVM_SET_XCRS,
                KVM_KVMCLOCK_CTRL,
                // A driver that activates its interface sets the tap's offload from here.
                u64::from(u32::try_from(tap::TUNSETOFFLOAD).unwrap_or(0)),
            ];
            rules.insert(libc::SYS_ioctl, any_of(1, &calls)?);
        }
        Kind::Devices => {
            allow(&mut rules, FILES);
            allow(&mut rules, &[libc::SYS_epoll_wait, libc::SYS_epoll_pwait, libc::SYS_getrandom]);
            rules.insert(libc::SYS_epoll_ctl, vec![rule(1, SeccompCmpOp::Eq, EPOLL_CTL_DEL)?]);
            allow(&mut rules, &[libc::SYS_fallocate]);
        }
        Kind::Api => {
            allow(&mut rules, FILES);
            allow(
                &mut rules,
                &[
                    libc::SYS_accept4,
                    libc::SYS_epoll_ctl,
                    libc::SYS_epoll_pwait,
                    libc::SYS_epoll_wait,
                    libc::SYS_fallocate,
                    libc::SYS_getrandom,
                    libc::SYS_recvfrom,
                    libc::SYS_sendto,
                    libc::SYS_shutdown,
                ],
            );
            let flags = [libc::F_GETFL, libc::F_SETFL, libc::F_DUPFD_CLOEXEC, libc::F_GETFD];
            rules.insert(libc::SYS_fcntl, any_of(1, &flags.map(bits))?);
            // The terminal's mode is put back at the end.
            let calls = [KVM_SET_IRQCHIP, KVM_SET_PIT2, libc::TCSETS, libc::FIONBIO];
            rules.insert(libc::SYS_ioctl, any_of(1, &calls)?);
        }
    }
    Ok(rules)
}

fn allow(rules: &mut Rules, calls: &[i64]) {
    for call in calls {
        rules.insert(*call, Vec::new());
    }
}

fn rule(argument: u8, operator: SeccompCmpOp, value: u64) -> Result<SeccompRule, BackendError> {
    SeccompRule::new(vec![SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)?])
}

fn any_of(argument: u8, values: &[u64]) -> Result<Vec<SeccompRule>, BackendError> {
    values.iter().map(|value| rule(argument, SeccompCmpOp::Eq, *value)).collect()
}
