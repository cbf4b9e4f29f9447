//! Links, addresses and routes, by netlink. Everything replaces what is there, so that doing it twice does it once.

use super::{METADATA_ADDRESS, UPLINK_GATEWAY, netns};
use crate::error::{Error, Result};
use crate::names::{self, Folders, TAP, UPLINK};
use futures_util::TryStreamExt;
use nix::libc;
use roost_types::agent::InterfaceSpec;
use roost_types::ids::InstanceId;
use rtnetlink::packet_route::link::{InfoData, InfoKind, InfoVeth};
use rtnetlink::{Handle, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder};
use std::fs::{self, File};
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

/// What the links of one instance are made from.
#[derive(Debug, Clone)]
pub struct Links {
    /// The instance.
    pub id: InstanceId,
    /// Its interface.
    pub interface: InterfaceSpec,
    /// Largest packet on the way out, bytes.
    pub mtu: u16,
}

impl Links {
    /// Whether namespace, links and route stand.
    ///
    /// The host's end has a fixed hardware address, to which the namespace sends. Programs of the
    /// host such as udev see that end only.
    pub fn stand(&self, folders: &Folders) -> bool {
        netns::exists(&folders.netns_file(&self.id))
            && hardware_address(&names::host_veth(&self.id)) == Some(names::veth_mac(&self.id, 0))
    }

    /// Makes or completes everything. Blocks.
    ///
    /// # Errors
    /// The kernel refused something; the message names it.
    pub fn make(&self, folders: &Folders) -> Result<()> {
        let file = folders.netns_file(&self.id);
        netns::make(&file)?;
        let host = File::open("/proc/thread-self/ns/net")
            .map_err(Error::file("open", "/proc/thread-self/ns/net"))?;
        let inside = self.clone();
        netns::enter(&file, move || {
            harden()?;
            make_tap()?;
            // A source address that is not routed to the tap is not the guest's.
            sysctl(&format!("net/ipv4/conf/{TAP}/rp_filter"), "1")?;
            block_on(inside.inside(host))
        })?;
        block_on(self.outside())?;
        forward_from(&names::host_veth(&self.id))
    }

    async fn inside(self, host: File) -> Result<()> {
        let net = connect()?;
        up(&net, "lo").await?;
        let veth = names::host_veth(&self.id);
        if index(&net, UPLINK).await?.is_none() {
            // Hardware addresses are set at creation: udev replaces an address that the kernel
            // generated.
            let peer = LinkMessageBuilder::<LinkUnspec>::new()
                .name(veth)
                .address(names::veth_mac(&self.id, 0).to_vec())
                .setns_by_fd(host.as_raw_fd())
                .build();
            let pair = LinkMessageBuilder::<LinkVeth>::new_with_info_kind(InfoKind::Veth)
                .name(UPLINK.to_owned())
                .address(names::veth_mac(&self.id, 1).to_vec())
                .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)));
            net.link().add(pair.build()).execute().await.map_err(Error::netlink("make the veth pair"))?;
        }
        drop(host);

        let uplink = must(&net, UPLINK).await?;
        self.set(&net, uplink, UPLINK, &names::veth_mac(&self.id, 1)).await?;
        neighbour(&net, uplink, UPLINK_GATEWAY, &names::veth_mac(&self.id, 0)).await?;
        let out =
            RouteMessageBuilder::<Ipv4Addr>::new().gateway(UPLINK_GATEWAY).output_interface(uplink).onlink();
        net.route()
            .add(out.build())
            .replace()
            .execute()
            .await
            .map_err(Error::netlink("set the default route"))?;

        let tap = must(&net, TAP).await?;
        self.set(&net, tap, TAP, &tap_mac(&self.id)).await?;
        for (address, prefix_len) in
            [(self.interface.gateway, self.interface.prefix_len), (METADATA_ADDRESS, 32)]
        {
            net.address()
                .add(tap, IpAddr::V4(address), prefix_len)
                .replace()
                .execute()
                .await
                .map_err(Error::netlink(format!("set address {address}/{prefix_len}")))?;
        }
        // The guest's hardware address is known; it need not say, and cannot lie.
        neighbour(&net, tap, self.interface.private_ip, &mac(&self.interface.mac)?).await
    }

    async fn outside(&self) -> Result<()> {
        let net = connect()?;
        let name = names::host_veth(&self.id);
        let veth = must(&net, &name).await?;
        self.set(&net, veth, &name, &names::veth_mac(&self.id, 0)).await?;
        let public = self.interface.public_ip;
        neighbour(&net, veth, public, &names::veth_mac(&self.id, 1)).await?;
        let route = RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(public, 32)
            .output_interface(veth)
            .scope(rtnetlink::packet_route::route::RouteScope::Link);
        net.route()
            .add(route.build())
            .replace()
            .execute()
            .await
            .map_err(Error::netlink(format!("set the route to {public}")))
    }

    async fn set(&self, net: &Handle, index: u32, name: &str, mac: &[u8]) -> Result<()> {
        let message =
            LinkUnspec::new_with_index(index).address(mac.to_vec()).mtu(u32::from(self.mtu)).up().build();
        net.link().set(message).execute().await.map_err(Error::netlink(format!("set up {name}")))
    }
}

/// The router's end of the guest's wire.
fn tap_mac(id: &InstanceId) -> [u8; 6] {
    names::veth_mac(id, 2)
}

/// Removes the namespace and with it everything inside, and the host's end of the pair.
///
/// # Errors
/// Something is there and cannot be removed.
pub fn remove(folders: &Folders, id: &InstanceId) -> Result<()> {
    let veth = names::host_veth(id);
    if link_exists(&veth) {
        block_on(async {
            let net = connect()?;
            if let Some(index) = index(&net, &veth).await? {
                net.link().del(index).execute().await.map_err(Error::netlink(format!("remove {veth}")))?;
            }
            Ok(())
        })?;
    }
    netns::remove(&folders.netns_file(id))
}

/// Whether the calling process's namespace has a link of this name.
pub fn link_exists(name: &str) -> bool {
    nix::net::if_::if_nametoindex(name).is_ok()
}

/// Opens the tap for the monitor. Its settings outlive the descriptor.
///
/// # Errors
/// The namespace or the tap is gone, or another monitor holds it.
pub fn open_tap(folders: &Folders, id: &InstanceId) -> Result<OwnedFd> {
    netns::enter(&folders.netns_file(id), attach_tap)
}

/// Enables forwarding for packets from this link, and reads the setting back. The host's global
/// setting is not changed.
///
/// # Errors
/// The kernel does not forward.
pub fn forward_from(link: &str) -> Result<()> {
    sysctl(&format!("net/ipv4/conf/{link}/forwarding"), "1")
}

/// Seconds for which the calling thread's namespace tracks an idle TCP connection. The kernel's
/// default is five days.
const IDLE_TCP: &str = "3600";

/// Sets the idle limit of tracked TCP connections. The rules that track connections must exist.
///
/// # Errors
/// The kernel does not take it.
pub fn forget_idle() -> Result<()> {
    sysctl("net/netfilter/nf_conntrack_tcp_timeout_established", IDLE_TCP)
}

fn harden() -> Result<()> {
    sysctl("net/ipv4/ip_forward", "1")?;
    sysctl("net/ipv4/conf/all/send_redirects", "0")?;
    sysctl("net/ipv4/conf/default/send_redirects", "0")?;
    // Guests speak IPv4 only so far. Absent where the host has no IPv6 at all.
    if Path::new("/proc/sys/net/ipv6").exists() {
        sysctl("net/ipv6/conf/all/disable_ipv6", "1")?;
        sysctl("net/ipv6/conf/default/disable_ipv6", "1")?;
    }
    Ok(())
}

/// Writes a setting of the calling thread's namespace and reads it back.
fn sysctl(name: &str, value: &str) -> Result<()> {
    let path = Path::new("/proc/sys").join(name);
    let read = || fs::read_to_string(&path).map_err(Error::file("read", &path));
    if read()?.trim() != value {
        fs::write(&path, value).map_err(Error::file("write", &path))?;
        let got = read()?;
        if got.trim() != value {
            return Err(Error::Impossible(format!(
                "{path:?} is {:?} after {value:?} was written",
                got.trim()
            )));
        }
    }
    Ok(())
}

/// The hardware address of a link in the calling thread's namespace, if it is there and has one.
pub fn hardware_address(name: &str) -> Option<[u8; 6]> {
    let answer = ask(name, libc::SIOCGIFHWADDR)?;
    // SAFETY: SIOCGIFHWADDR fills this member of the union.
    let data = unsafe { answer.ifr_ifru.ifru_hwaddr.sa_data };
    Some(std::array::from_fn(|at| data[at].cast_unsigned()))
}

/// The MTU of a link in the calling thread's namespace, if it is there.
pub fn mtu(name: &str) -> Option<u16> {
    let answer = ask(name, libc::SIOCGIFMTU)?;
    // SAFETY: SIOCGIFMTU fills this member of the union.
    let mtu = unsafe { answer.ifr_ifru.ifru_mtu };
    Some(u16::try_from(mtu).unwrap_or(u16::MAX))
}

/// Makes one ioctl about a link that takes and fills an `ifreq` (netdevice(7)).
fn ask(name: &str, question: libc::Ioctl) -> Option<libc::ifreq> {
    let socket =
        rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None).ok()?;
    // SAFETY: an all-zero ifreq is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return None;
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    // SAFETY: the question reads and writes an ifreq, which lives through the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), question, &raw mut request) };
    (result == 0).then_some(request)
}

/// `gc_thresh2` and `gc_thresh3` of the kernel's one neighbour table. One guest that resolves every
/// address of a large network around the uplink fills the default of 1,024.
const NEIGHBOURS: [(&str, u32); 2] = [("gc_thresh2", 8192), ("gc_thresh3", 16_384)];

/// Folder of these sysctls.
pub const NEIGHBOUR_LIMITS: &str = "/proc/sys/net/ipv4/neigh/default";

/// Raises the neighbour limits, unless the owner has set larger ones.
///
/// # Errors
/// A limit cannot be read or written.
pub fn make_room_for_neighbours(limits: &Path) -> Result<()> {
    for (name, least) in NEIGHBOURS {
        let path = limits.join(name);
        let now = fs::read_to_string(&path).map_err(Error::file("read", &path))?;
        if now.trim().parse::<u32>().is_ok_and(|now| now < least) {
            fs::write(&path, least.to_string()).map_err(Error::file("write", &path))?;
        }
    }
    Ok(())
}

/// Makes the tap, if it is not there: it stays until its namespace goes.
fn make_tap() -> Result<()> {
    if link_exists(TAP) {
        return Ok(());
    }
    let tap = attach_tap()?;
    // SAFETY: TUNSETPERSIST takes an int by value on a tun descriptor.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETPERSIST, 1) };
    nix::errno::Errno::result(result).map(drop).map_err(Error::sys("keeping the tap"))
}

/// Attaches to the tap of the calling thread's namespace, making it if needed: whole frames with a virtio-net header
/// of 12 bytes (virtio 1.2, 5.1.6), no offloads until the monitor asks for them.
fn attach_tap() -> Result<OwnedFd> {
    let path = c"/dev/net/tun";
    // SAFETY: a path literal; the result is checked.
    let raw = unsafe { libc::open(path.as_ptr(), libc::O_RDWR | libc::O_CLOEXEC | libc::O_NONBLOCK) };
    let raw = nix::errno::Errno::result(raw).map_err(Error::sys("opening /dev/net/tun"))?;
    // SAFETY: a fresh descriptor that nothing else owns.
    let tap = unsafe { OwnedFd::from_raw_fd(raw) };
    // SAFETY: an all-zero ifreq is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(TAP.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).unwrap_or(0);
    // SAFETY: TUNSETIFF reads and writes an ifreq, which lives through the call.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    nix::errno::Errno::result(result).map_err(Error::sys("attaching to the tap"))?;
    let size: libc::c_int = 12;
    // SAFETY: TUNSETVNETHDRSZ reads an int, which lives through the call.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const size) };
    nix::errno::Errno::result(result).map_err(Error::sys("setting the tap's header size"))?;
    // SAFETY: TUNSETOFFLOAD takes flags by value.
    let result = unsafe { libc::ioctl(tap.as_fd().as_raw_fd(), libc::TUNSETOFFLOAD, 0) };
    nix::errno::Errno::result(result).map_err(Error::sys("clearing the tap's offloads"))?;
    Ok(tap)
}

/// `06:00:…` as bytes.
///
/// # Errors
/// It is no unicast hardware address: the spec is broken for good.
pub fn mac(text: &str) -> Result<[u8; 6]> {
    roost_vmm::config::parse_mac(text).map_err(|error| Error::Impossible(error.to_string()))
}

/// Runs netlink work on the calling thread, and so in its namespace.
fn block_on<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .map_err(Error::io("starting a runtime"))?
        .block_on(work)
}

fn connect() -> Result<Handle> {
    let (connection, handle, _) = rtnetlink::new_connection().map_err(Error::io("opening netlink"))?;
    tokio::spawn(connection);
    Ok(handle)
}

async fn index(net: &Handle, name: &str) -> Result<Option<u32>> {
    match net.link().get().match_name(name).execute().try_next().await {
        Ok(link) => Ok(link.map(|link| link.header.index)),
        Err(rtnetlink::Error::NetlinkError(message)) if message.raw_code() == -libc::ENODEV => Ok(None),
        Err(error) => Err(Error::netlink(format!("look up {name}"))(error)),
    }
}

async fn must(net: &Handle, name: &str) -> Result<u32> {
    index(net, name).await?.ok_or_else(|| Error::NotNow(format!("the link {name} is missing")))
}

async fn up(net: &Handle, name: &str) -> Result<()> {
    let message = LinkUnspec::new_with_index(must(net, name).await?).up().build();
    net.link().set(message).execute().await.map_err(Error::netlink(format!("set up {name}")))
}

async fn neighbour(net: &Handle, index: u32, address: Ipv4Addr, mac: &[u8]) -> Result<()> {
    net.neighbours()
        .add(index, IpAddr::V4(address))
        .link_layer_address(mac)
        .replace()
        .execute()
        .await
        .map_err(Error::netlink(format!("set the neighbour {address}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_of_neighbours_grow_and_never_shrink() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::write(path("gc_thresh2"), "512\n").unwrap();
        fs::write(path("gc_thresh3"), "65536\n").unwrap();
        make_room_for_neighbours(folder.path()).unwrap();
        assert_eq!(fs::read_to_string(path("gc_thresh2")).unwrap(), "8192");
        assert_eq!(fs::read_to_string(path("gc_thresh3")).unwrap(), "65536\n");
    }
}
