//! The two servers of one instance: DHCP and metadata. They live in the agent, on sockets that were opened in the
//! instance's namespace; after a restart of the agent they are opened anew.

use super::dhcp::{self, Lease};
use super::imds::{self, Imds};
use super::{METADATA_ADDRESS, netns};
use crate::error::{Error, Result};
use crate::names::TAP;
use nix::libc;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::task::JoinHandle;

/// Running servers; they end with this value.
pub struct Services {
    lease: Arc<Mutex<Lease>>,
    imds: Arc<Imds>,
    tasks: [JoinHandle<()>; 2],
}

impl Services {
    /// Opens the sockets inside the namespace and serves. Blocks shortly; must be called inside a tokio runtime.
    ///
    /// # Errors
    /// The namespace or its tap is not there, or the ports are taken.
    pub fn start(namespace: &Path, lease: Lease, imds: Arc<Imds>) -> Result<Self> {
        let (dhcp, http) = netns::enter(namespace, || Ok((dhcp_socket()?, metadata_socket()?)))?;
        let dhcp = tokio::net::UdpSocket::from_std(dhcp).map_err(Error::io("opening the DHCP socket"))?;
        let http =
            tokio::net::TcpListener::from_std(http).map_err(Error::io("opening the metadata socket"))?;
        let lease = Arc::new(Mutex::new(lease));
        let tasks = [
            tokio::spawn(serve_dhcp(dhcp, Arc::clone(&lease))),
            tokio::spawn(imds::serve(http, Arc::clone(&imds))),
        ];
        Ok(Self { lease, imds, tasks })
    }

    /// Serves something else from now on.
    pub fn replace(&self, lease: Lease, tree: super::metadata::Tree) {
        *self.lease.lock().unwrap_or_else(PoisonError::into_inner) = lease;
        self.imds.replace(tree);
    }

    /// Whether both still serve.
    pub fn alive(&self) -> bool {
        self.tasks.iter().all(|task| !task.is_finished())
    }

    /// Ends both and waits until their sockets are closed, so that they hold no namespace.
    pub async fn stop(mut self) {
        for task in &mut self.tasks {
            task.abort();
            let _ = task.await;
        }
    }
}

impl Drop for Services {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

async fn serve_dhcp(socket: tokio::net::UdpSocket, lease: Arc<Mutex<Lease>>) {
    let mut packet = [0; dhcp::PACKET_MAX];
    loop {
        let length = match socket.recv_from(&mut packet).await {
            Ok((length, _)) => length,
            Err(error) => {
                // Such as ENETDOWN while the tap comes up.
                tracing::debug!(%error, "DHCP: receive");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let answer = {
            let lease = lease.lock().unwrap_or_else(PoisonError::into_inner);
            dhcp::answer(&lease, &packet[..length])
        };
        if let Some(answer) = answer
            && let Err(error) = socket.send_to(&answer.bytes, answer.to).await
        {
            tracing::warn!(%error, to = %answer.to, "DHCP: send");
        }
    }
}

fn open(kind: SocketType) -> Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket =
        socket_with(AddressFamily::INET, kind, flags, None).map_err(Error::sys("opening a socket"))?;
    sockopt::set_socket_reuseaddr(&socket, true).map_err(Error::sys("reusing an address"))?;
    let name = TAP.as_bytes();
    // SAFETY: SO_BINDTODEVICE reads `len` bytes of the name, which lives through the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_BINDTODEVICE,
            name.as_ptr().cast(),
            libc::socklen_t::try_from(name.len()).unwrap_or(0),
        )
    };
    nix::errno::Errno::result(result).map_err(Error::sys("binding a socket to the tap"))?;
    Ok(socket)
}

fn dhcp_socket() -> Result<UdpSocket> {
    let socket = open(SocketType::DGRAM)?;
    sockopt::set_socket_broadcast(&socket, true).map_err(Error::sys("allowing broadcasts"))?;
    // Over a tap with virtio-net headers the kernel leaves checksums to the receiver's device, and DHCP clients on
    // packet sockets see them unfinished. No checksum at all is valid for UDP over IPv4 (RFC 768).
    let on: libc::c_int = 1;
    // SAFETY: SO_NO_CHECK reads an int, which lives through the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NO_CHECK,
            (&raw const on).cast(),
            libc::socklen_t::try_from(size_of::<libc::c_int>()).unwrap_or(0),
        )
    };
    nix::errno::Errno::result(result).map_err(Error::sys("leaving out UDP checksums"))?;
    bind(&socket, &SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 67))
        .map_err(Error::sys("binding the DHCP port"))?;
    Ok(UdpSocket::from(socket))
}

fn metadata_socket() -> Result<TcpListener> {
    let socket = open(SocketType::STREAM)?;
    // Accepted connections inherit it: replies go one hop.
    sockopt::set_ip_ttl(&socket, 1).map_err(Error::sys("limiting replies to one hop"))?;
    bind(&socket, &SocketAddrV4::new(METADATA_ADDRESS, 80))
        .map_err(Error::sys("binding the metadata port"))?;
    listen(&socket, 64).map_err(Error::sys("listening on the metadata port"))?;
    Ok(TcpListener::from(socket))
}

/// Connects to a port of the guest from inside its namespace. Blocks.
///
/// # Errors
/// The namespace is gone, or nobody answers in time.
pub fn connect(namespace: &Path, to: SocketAddrV4, patience: Duration) -> Result<TcpStream> {
    netns::enter(namespace, move || {
        let stream = TcpStream::connect_timeout(&to.into(), patience)
            .map_err(Error::io(format!("connecting to {to} from inside the instance's network")))?;
        stream.set_nonblocking(true).map_err(Error::io("setting up the connection"))?;
        Ok(stream)
    })
}
