//! User, group and capabilities: given up, and read back.

use std::io;
use std::ptr::{null, null_mut};

use super::check;
use crate::error::{Error, Result};

/// Version 3 of the kernel's structs: 64 capabilities in two halves (capget(2)).
const VERSION: u32 = 0x2008_0522;
/// Each bit that changes what root can do, and its lock (linux/securebits.h): being id 0 means nothing here, and no set is filled
/// again by a change of ids or by the ambient set.
const SECURE_BITS: libc::c_ulong = 0xef;

#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Half {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Belongs to no group but its own. In a user namespace it cannot be said any more.
pub(super) fn leave_groups() -> Result<()> {
    // SAFETY: asks for the number of groups only.
    if unsafe { libc::getgroups(0, null_mut()) } == 0 {
        return Ok(());
    }
    // SAFETY: a list of no groups is not read.
    check(unsafe { libc::setgroups(0, null()) }).map_err(Error::io("leaving all groups"))
}

/// Becomes this user without any capability, for good.
pub(super) fn drop_all(uid: u32, gid: u32) -> Result<()> {
    prctl(libc::PR_SET_SECUREBITS, SECURE_BITS, 0).map_err(Error::io("locking the secure bits"))?;
    for capability in capabilities() {
        prctl(libc::PR_CAPBSET_DROP, capability, 0).map_err(Error::io("emptying the bounding set"))?;
    }
    // SAFETY: takes numbers.
    check(unsafe { libc::setresgid(gid, gid, gid) }).map_err(Error::io(format!("becoming group {gid}")))?;
    // SAFETY: takes numbers.
    check(unsafe { libc::setresuid(uid, uid, uid) }).map_err(Error::io(format!("becoming user {uid}")))?;
    prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL as libc::c_ulong, 0)
        .map_err(Error::io("emptying the ambient set"))?;
    capset().map_err(Error::io("dropping capabilities"))?;
    prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0).map_err(Error::io("giving up new privileges"))?;
    read_back(uid, gid)
}

/// The numbers that this kernel knows.
fn capabilities() -> impl Iterator<Item = libc::c_ulong> {
    (0..64).take_while(|capability| prctl(libc::PR_CAPBSET_READ, *capability, 0).is_ok())
}

fn capset() -> io::Result<()> {
    let (header, none) = (Header { version: VERSION, pid: 0 }, [Half::default(); 2]);
    // SAFETY: reads the header and the two halves that it is given.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw const header, &raw const none) })
}

fn capget() -> io::Result<[Half; 2]> {
    let (mut header, mut halves) = (Header { version: VERSION, pid: 0 }, [Half::default(); 2]);
    // SAFETY: fills the two halves that it is given, and the header's version.
    check(unsafe { libc::syscall(libc::SYS_capget, &raw mut header, &raw mut halves) })?;
    Ok(halves)
}

/// What was given up is looked for: a step that was wrong must not end in a monitor with more than it should have.
fn read_back(uid: u32, gid: u32) -> Result<()> {
    let left = |what: &str| Err(Error::Jail(format!("{what} is left although it was given up")));
    if capget().map_err(Error::io("reading capabilities"))? != [Half::default(); 2] {
        return left("a capability");
    }
    for capability in capabilities() {
        if prctl(libc::PR_CAPBSET_READ, capability, 0).is_ok_and(|there| there != 0) {
            return left(&format!("capability {capability} of the bounding set"));
        }
        let ambient = prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_IS_SET as libc::c_ulong, capability);
        if ambient.is_ok_and(|there| there != 0) {
            return left(&format!("capability {capability} of the ambient set"));
        }
    }
    let (mut users, mut groups) = ([0; 3], [0; 3]);
    let [real, effective, saved] = &mut users;
    // SAFETY: fills the three numbers that it is given.
    check(unsafe { libc::getresuid(real, effective, saved) }).map_err(Error::io("reading the user"))?;
    let [real, effective, saved] = &mut groups;
    // SAFETY: as above.
    check(unsafe { libc::getresgid(real, effective, saved) }).map_err(Error::io("reading the group"))?;
    if users != [uid; 3] || groups != [gid; 3] {
        return left("another user or group");
    }
    // SAFETY: asks for the number of groups only.
    if unsafe { libc::getgroups(0, null_mut()) } != 0 {
        return left("a group");
    }
    match prctl(libc::PR_GET_NO_NEW_PRIVS, 0, 0) {
        Ok(1) => Ok(()),
        _ => left("the way to new privileges"),
    }
}

fn prctl(what: libc::c_int, first: libc::c_ulong, second: libc::c_ulong) -> io::Result<i32> {
    // SAFETY: all of these take numbers; those that are not used must be 0.
    let result = unsafe { libc::prctl(what, first, second, 0, 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
