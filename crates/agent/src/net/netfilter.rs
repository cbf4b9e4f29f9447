//! The two netfilter requests without a quick `nft` command: reading the generation of the ruleset,
//! and deleting the tracked connections of an address.

use crate::error::{Error, Result};
use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, setsockopt, socket,
    sockopt::ReceiveTimeout,
};
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};

// linux/netfilter/nfnetlink.h, nf_tables.h, nfnetlink_conntrack.h
const TABLES_GET_GENERATION: u16 = (10 << 8) | 16;
const GENERATION_ID: u16 = 1;
const CONNECTIONS_GET: u16 = (1 << 8) | 1;
const CONNECTIONS_DELETE: u16 = (1 << 8) | 2;
const TUPLE_ORIGINAL: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const TUPLE_IP: u16 = 1;
const CONNECTION_ID: u16 = 12;
const CONNECTION_ZONE: u16 = 18;
/// Flags of an attribute's type (`NLA_F_*`).
const TYPE_MASK: u16 = 0x3fff;
const HEADER: usize = 16;
/// `struct nfgenmsg`.
const GENERIC: usize = 4;

/// A socket to netfilter in the namespace in which it was opened.
#[derive(Debug)]
pub struct Netfilter {
    socket: OwnedFd,
}

impl Netfilter {
    /// Opens a netfilter socket in the calling thread's namespace.
    ///
    /// # Errors
    /// The kernel has no nfnetlink.
    pub fn open() -> Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkNetFilter,
        )
        .map_err(Error::sys("opening a socket to netfilter"))?;
        // The kernel answers at once. The time limit keeps a defect from blocking an instance.
        let patience = nix::sys::time::TimeVal::new(10, 0);
        setsockopt(&socket, ReceiveTimeout, &patience)
            .map_err(Error::sys("limiting a wait for netfilter"))?;
        Ok(Self { socket })
    }

    /// The generation of the namespace's ruleset: every change by any program increments it.
    ///
    /// # Errors
    /// The kernel does not report it.
    pub fn generation(&self) -> Result<u32> {
        let what = "asking for the generation of nftables";
        self.send(TABLES_GET_GENERATION, 0, &[0; GENERIC]).map_err(Error::sys(what))?;
        let mut generation = None;
        self.each(false, |body| {
            generation = attributes(body.get(GENERIC..).unwrap_or_default())
                .find(|(kind, _)| *kind == GENERATION_ID)
                .and_then(|(_, value)| Some(u32::from_be_bytes(value.try_into().ok()?)))
                .or(generation);
        })
        .map_err(Error::sys(what))?;
        generation
            .ok_or_else(|| Error::NotNow("the kernel did not say which generation nftables is of".into()))
    }

    /// Deletes every tracked connection from or to one of the addresses. Returns how many.
    ///
    /// # Errors
    /// The kernel cannot list or delete connections.
    pub fn forget(&self, addresses: &[Ipv4Addr]) -> Result<usize> {
        let what = "forgetting connections (nf_conntrack_netlink)";
        let mut family = [0; GENERIC];
        family[0] = u8::try_from(libc::AF_INET).unwrap_or(2);
        self.send(CONNECTIONS_GET, libc::NLM_F_DUMP, &family).map_err(Error::sys(what))?;
        let mut doomed = Vec::new();
        self.each(true, |body| {
            let connection = body.get(GENERIC..).unwrap_or_default();
            if !attributes(connection).any(|attribute| is_of(attribute, addresses)) {
                return;
            }
            let mut delete = family.to_vec();
            for (kind, value) in attributes(connection) {
                let nested = if kind == TUPLE_ORIGINAL { 0x8000 } else { 0 };
                if matches!(kind, TUPLE_ORIGINAL | CONNECTION_ID | CONNECTION_ZONE) {
                    put(&mut delete, kind | nested, value);
                }
            }
            doomed.push(delete);
        })
        .map_err(Error::sys(what))?;
        for delete in &doomed {
            self.send(CONNECTIONS_DELETE, libc::NLM_F_ACK, delete).map_err(Error::sys(what))?;
            match self.each(false, |_| ()) {
                // The connection ended meanwhile.
                Ok(()) | Err(Errno::ENOENT) => {}
                Err(error) => return Err(Error::sys(what)(error)),
            }
        }
        Ok(doomed.len())
    }

    fn send(&self, kind: u16, flags: libc::c_int, body: &[u8]) -> nix::Result<()> {
        let flags = u16::try_from(flags | libc::NLM_F_REQUEST).unwrap_or(0);
        let length = u32::try_from(HEADER + body.len()).map_err(|_| Errno::EMSGSIZE)?;
        let mut message = length.to_ne_bytes().to_vec();
        message.extend(kind.to_ne_bytes());
        message.extend(flags.to_ne_bytes());
        message.extend([0; 8]);
        message.extend(body);
        sendto(self.socket.as_raw_fd(), &message, &NetlinkAddr::new(0, 0), MsgFlags::empty()).map(drop)
    }

    /// Passes the body of each message of an answer to a function. A dump ends with its own end
    /// message.
    fn each(&self, dump: bool, mut take: impl FnMut(&[u8])) -> nix::Result<()> {
        let mut buffer = vec![0; 1 << 16];
        loop {
            let length = recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
            let mut rest = &buffer[..length];
            while rest.len() >= HEADER {
                let size = u32::from_ne_bytes([rest[0], rest[1], rest[2], rest[3]]);
                let kind = libc::c_int::from(u16::from_ne_bytes([rest[4], rest[5]]));
                let size = usize::try_from(size).unwrap_or(usize::MAX);
                let body = rest.get(HEADER..size).ok_or(Errno::EBADMSG)?;
                if kind == libc::NLMSG_DONE {
                    return Ok(());
                }
                if kind == libc::NLMSG_ERROR {
                    let code = body.first_chunk::<4>().ok_or(Errno::EBADMSG)?;
                    return match i32::from_ne_bytes(*code) {
                        0 => Ok(()),
                        code => Err(Errno::from_raw(-code)),
                    };
                }
                take(body);
                rest = rest.get(size.next_multiple_of(4)..).unwrap_or_default();
            }
            if !dump {
                return Ok(());
            }
        }
    }
}

/// Returns true if an attribute of a connection is a tuple with one of the addresses.
fn is_of((kind, tuple): (u16, &[u8]), addresses: &[Ipv4Addr]) -> bool {
    matches!(kind, TUPLE_ORIGINAL | TUPLE_REPLY)
        && attributes(tuple)
            .filter(|(kind, _)| *kind == TUPLE_IP)
            .flat_map(|(_, ip)| attributes(ip))
            .any(|(_, address)| addresses.iter().any(|one| one.octets() == address))
}

fn attributes(mut rest: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let head = rest.first_chunk::<4>()?;
        let length = usize::from(u16::from_ne_bytes([head[0], head[1]]));
        let kind = u16::from_ne_bytes([head[2], head[3]]) & TYPE_MASK;
        let value = rest.get(4..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

fn put(message: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    message.extend(length.to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(value);
    message.resize(message.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_is_known_by_any_of_its_addresses() {
        let (mut ip, mut tuple) = (Vec::new(), Vec::new());
        put(&mut ip, 1, &[100, 64, 0, 5]);
        put(&mut ip, 2, &[192, 0, 2, 9]);
        put(&mut tuple, TUPLE_IP | 0x8000, &ip);
        let other = Ipv4Addr::new(100, 64, 0, 6);
        assert!(is_of((TUPLE_REPLY, &tuple), &[other, Ipv4Addr::new(192, 0, 2, 9)]));
        assert!(!is_of((TUPLE_REPLY, &tuple), &[other]));
        assert!(!is_of((CONNECTION_ID, &tuple), &[Ipv4Addr::new(192, 0, 2, 9)]));
        // A length that points outside the buffer ends the list.
        assert_eq!(attributes(&[200, 0, 1, 0, 1]).count(), 0);
        assert_eq!(attributes(&[0, 0, 1, 0, 1]).count(), 0);
    }
}
