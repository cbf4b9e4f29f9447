//! Landlock: the kernel refuses the jailed process every new use of a file system and of TCP, whatever paths it may find one day.
//! What it was handed stays as it was. Without landlock in the kernel the empty root, which has nothing to open, stands alone.
//!
//! Allowed are two things: executing the monitor's own program, by its descriptor, and sockets in the folders that were handed for them.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use super::check;

// linux/landlock.h.
const CREATE_RULESET_VERSION: u32 = 1;
const RULE_PATH_BENEATH: i32 = 1;
const EXECUTE: u64 = 1 << 0;
const READ_FILE: u64 = 1 << 2;
const REMOVE_FILE: u64 = 1 << 5;
const MAKE_SOCK: u64 = 1 << 9;
const RESOLVE_UNIX: u64 = 1 << 16;

/// What is refused, each with the ABI that knows it first: rights on files, on TCP, and reaching out to processes beyond.
const FILES: [(u32, u64); 5] = [
    (1, (1 << 13) - 1), // from EXECUTE to MAKE_SYM
    (2, 1 << 13),       // REFER: moving and linking between folders
    (3, 1 << 14),       // TRUNCATE
    (5, 1 << 15),       // IOCTL_DEV
    (9, RESOLVE_UNIX),  // connecting to unix sockets by path
];
const TCP: [(u32, u64); 1] = [(4, 1 << 0 | 1 << 1)]; // BIND_TCP, CONNECT_TCP
const SCOPES: [(u32, u64); 1] = [(6, 1 << 0 | 1 << 1)]; // ABSTRACT_UNIX_SOCKET, SIGNAL

#[repr(C)]
#[derive(Debug, PartialEq, Eq)]
struct Ruleset {
    files: u64,
    tcp: u64,
    scopes: u64,
}

#[repr(C, packed)]
struct PathBeneath {
    allowed: u64,
    parent: i32,
}

impl Ruleset {
    /// All that a kernel of this ABI can refuse.
    fn of(abi: u32) -> Self {
        let known = |all: &[(u32, u64)]| {
            all.iter().filter(|(from, _)| *from <= abi).fold(0, |set, (_, bits)| set | bits)
        };
        Self { files: known(&FILES), tcp: known(&TCP), scopes: known(&SCOPES) }
    }
}

/// The kernel's version of landlock; none if it has none or it is switched off.
///
/// # Errors
/// Another error than that.
fn abi() -> io::Result<Option<u32>> {
    let (none, size) = (std::ptr::null::<Ruleset>(), 0_usize);
    // SAFETY: with this flag there is no struct to read.
    let version =
        unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, none, size, CREATE_RULESET_VERSION) };
    match u32::try_from(version) {
        Ok(abi) => Ok(Some(abi)),
        Err(_) => match io::Error::last_os_error() {
            error if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EOPNOTSUPP)) => Ok(None),
            error => Err(error),
        },
    }
}

/// Restricts this process for good, and says by which ABI. It must have given up new privileges.
///
/// # Errors
/// The kernel has landlock and refuses.
pub(super) fn restrict(program: RawFd, folders: &[RawFd]) -> io::Result<Option<u32>> {
    let Some(abi) = abi()? else { return Ok(None) };
    let rules = Ruleset::of(abi);
    // SAFETY: reads the struct that it is given. Older kernels know a shorter one, and want the rest to be 0, which it is.
    let made = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, &raw const rules, size_of::<Ruleset>(), 0_u32)
    };
    check(made)?;
    let made = RawFd::try_from(made).map_err(io::Error::other)?;
    // SAFETY: the call has just made it.
    let ruleset = unsafe { OwnedFd::from_raw_fd(made) };
    allow(&ruleset, program, EXECUTE | READ_FILE)?;
    for folder in folders {
        allow(&ruleset, *folder, (MAKE_SOCK | REMOVE_FILE | RESOLVE_UNIX) & rules.files)?;
    }
    // SAFETY: plain call on an open descriptor.
    check(unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0_u32) })?;
    Ok(Some(abi))
}

fn allow(ruleset: &OwnedFd, parent: RawFd, allowed: u64) -> io::Result<()> {
    let rule = PathBeneath { allowed, parent };
    let number = ruleset.as_raw_fd();
    // SAFETY: reads the struct that it is given.
    check(unsafe {
        libc::syscall(libc::SYS_landlock_add_rule, number, RULE_PATH_BENEATH, &raw const rule, 0_u32)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A kernel refuses the whole set if it holds a right that it does not know.
    #[test]
    fn each_kernel_is_asked_for_what_it_knows() {
        let masks = |abi| {
            let Ruleset { files, tcp, scopes } = Ruleset::of(abi);
            (files, tcp, scopes)
        };
        assert_eq!(masks(1), (0x1fff, 0, 0));
        assert_eq!(masks(2), (0x3fff, 0, 0));
        assert_eq!(masks(3), (0x7fff, 0, 0));
        assert_eq!(masks(4), (0x7fff, 3, 0));
        assert_eq!(masks(5), (0xffff, 3, 0));
        assert_eq!(masks(6), (0xffff, 3, 3));
        assert_eq!(masks(8), masks(6));
        assert_eq!(masks(9), (0x1_ffff, 3, 3));
        assert_eq!(masks(99), masks(9));
    }
}
