//! An instance's network with real links, rules and sockets, natively, in namespaces that vanish with the test. The
//! guest is a namespace of its own whose network card is a second tap; the test carries frames between the two taps,
//! as a monitor does between a tap and a guest's memory.
//!
//! Needs root, so it is left out unless asked for: `scripts/test` does, or as root
//! `cargo nextest run -p roost-agent --test network --run-ignored only`.

#![allow(clippy::unwrap_used)] // a test may panic, its helpers too

use dhcproto::v4::{DhcpOption, Flags, Message, MessageType, Opcode, OptionCode};
use dhcproto::{Decodable, Decoder, Encodable};
use nix::libc;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use roost_agent::names::Folders;
use roost_agent::net::dhcp::Lease;
use roost_agent::net::imds::{Imds, Tokens};
use roost_agent::net::links::{self, Links};
use roost_agent::net::metadata::Tree;
use roost_agent::net::service::{self, Services};
use roost_agent::net::walls::Walls;
use roost_agent::net::{firewall, netns};
use roost_agent::testing::ensure_of;
use roost_agent::trouble::Troubles;
use roost_types::agent::Ensure;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Does a test in a host's network of its own.
fn in_a_host(test: impl FnOnce(Bench) + Send + 'static) {
    assert!(rustix::process::geteuid().is_root(), "needs root (namespaces, taps, nftables)");
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET).unwrap();
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
        test(Bench::new());
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

struct Bench {
    folders: Folders,
    ensure: Ensure,
    links: Links,
    guest: PathBuf,
    stop: Arc<AtomicBool>,
    pump: Option<std::thread::JoinHandle<()>>,
    services: Option<Services>,
    walls: Arc<Walls>,
    troubles: Troubles,
    runtime: tokio::runtime::Runtime,
    _folder: tempfile::TempDir,
}

fn run(program: &str, arguments: &str) {
    let output = Command::new(program).args(arguments.split_whitespace()).output().unwrap();
    assert!(output.status.success(), "{program} {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let folders = Folders {
            state: folder.path().join("state"),
            run: folder.path().join("run"),
            netns: folder.path().join("netns"),
        };
        // The host: a loopback, and an address that guests must not reach. Its forwarding is off.
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "0").unwrap();
        run("ip", "link set lo up");
        run("ip", "addr add 10.99.0.1/32 dev lo");
        Self::of(folder, folders, ensure_of(5, 1), Arc::new(Walls::new(vec!["uplink".into()])))
    }

    /// Another instance of the same host.
    fn neighbour(bench: &Self) -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self::of(folder, bench.folders.clone(), ensure_of(6, 1), Arc::clone(&bench.walls))
    }

    fn of(folder: tempfile::TempDir, folders: Folders, ensure: Ensure, walls: Arc<Walls>) -> Self {
        let links =
            Links { id: ensure.instance_id.clone(), interface: ensure.spec.interface.clone(), mtu: 1450 };
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let mut bench = Self {
            guest: folder.path().join("guest"),
            folders,
            ensure,
            links,
            stop: Arc::default(),
            pump: None,
            services: None,
            walls,
            troubles: Troubles::default(),
            runtime,
            _folder: folder,
        };
        bench.make();
        bench.start_guest();
        bench
    }

    /// What the agent does for `make_network`.
    fn make(&mut self) {
        self.links.make(&self.folders).unwrap();
        self.walls.set(&self.links.id, &self.links.interface, &self.netns()).unwrap();
        if self.services.is_none() {
            let interface = &self.links.interface;
            let lease = Lease {
                mac: links::mac(&interface.mac).unwrap(),
                address: interface.private_ip,
                prefix_len: interface.prefix_len,
                router: interface.gateway,
                dns: vec![Ipv4Addr::new(9, 9, 9, 9)],
                hostname: "web".into(),
                mtu: 1450,
            };
            let tokens = Tokens::new([1; 32], self.links.id.to_string());
            let imds = Imds::new(tokens, Tree::new(&self.ensure));
            let _inside = self.runtime.enter();
            self.services = Some(Services::start(&self.netns(), lease, imds).unwrap());
        }
    }

    fn netns(&self) -> PathBuf {
        self.folders.netns_file(&self.links.id)
    }

    /// The guest: a namespace with a tap as its card, frames carried to and from the instance's tap.
    fn start_guest(&mut self) {
        let theirs = links::open_tap(&self.folders, &self.links.id).unwrap();
        netns::make(&self.guest).unwrap();
        let mac = self.links.interface.mac.clone();
        let card = netns::enter(&self.guest, move || {
            run("ip", "link set lo up");
            let card = tap("eth0");
            run("ip", &format!("link set eth0 address {mac} up"));
            Ok(card)
        })
        .unwrap();
        let stop = Arc::clone(&self.stop);
        self.pump = Some(std::thread::spawn(move || pump(&theirs, &card, &stop)));
    }

    fn in_guest<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        netns::enter(&self.guest, move || Ok(work())).unwrap()
    }

    /// The host's uplink and a server beyond it, which tell "nothing works" from "the host is
    /// closed".
    fn uplink(&mut self) -> (PathBuf, TcpListener) {
        let beyond = self.beside("uplink", "192.0.2.1/24", "192.0.2.9/24");
        self.walls.tend(&self.troubles);
        let server = netns::enter(&beyond, || Ok(TcpListener::bind("192.0.2.9:443").unwrap())).unwrap();
        (beyond, server)
    }

    /// A namespace at the other end of a link of the host.
    fn beside(&self, link: &str, address: &str, theirs: &str) -> PathBuf {
        let beside = self.folders.netns.join(link);
        netns::make(&beside).unwrap();
        run("ip", &format!("link add {link} type veth peer name far"));
        let inside = File::open(&beside).unwrap();
        run("ip", &format!("link set far netns /proc/{}/fd/{}", std::process::id(), inside.as_raw_fd()));
        run("ip", &format!("addr add {address} dev {link}"));
        run("ip", &format!("link set {link} up"));
        let theirs = theirs.to_owned();
        netns::enter(&beside, move || {
            run("ip", &format!("addr add {theirs} dev far"));
            run("ip", "link set far up");
            Ok(())
        })
        .unwrap();
        beside
    }

    fn configure_guest(&self) {
        let interface = self.links.interface.clone();
        self.in_guest(move || {
            run("ip", &format!("addr add {}/{} dev eth0", interface.private_ip, interface.prefix_len));
            run("ip", &format!("route add default via {}", interface.gateway));
        });
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(pump) = self.pump.take() {
            let _ = pump.join();
        }
        if let Some(services) = self.services.take() {
            self.runtime.block_on(services.stop());
        }
        let _ = links::remove(&self.folders, &self.links.id);
        let _ = netns::remove(&self.guest);
    }
}

/// A tap in the calling thread's namespace, in the monitor's manner.
fn tap(name: &str) -> OwnedFd {
    let file = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
    // SAFETY: an all-zero ifreq is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags =
        libc::c_short::try_from(libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR).unwrap();
    // SAFETY: TUNSETIFF reads and writes an ifreq.
    assert_eq!(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) }, 0);
    let size: libc::c_int = 12;
    // SAFETY: TUNSETVNETHDRSZ reads an int.
    assert_eq!(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const size) }, 0);
    file.into()
}

fn pump(a: &OwnedFd, b: &OwnedFd, stop: &AtomicBool) {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::os::fd::AsFd;
    let mut frame = [0; 65_600];
    while !stop.load(Ordering::SeqCst) {
        let mut ready =
            [PollFd::new(a.as_fd(), PollFlags::POLLIN), PollFd::new(b.as_fd(), PollFlags::POLLIN)];
        poll(&mut ready, PollTimeout::from(20_u8)).unwrap();
        let readable = ready.map(|fd| fd.revents().is_some_and(|events| events.contains(PollFlags::POLLIN)));
        for (from, to, readable) in [(a, b, readable[0]), (b, a, readable[1])] {
            if readable && let Ok(length) = nix::unistd::read(from, &mut frame) {
                // A frame that the other side does not take is lost, as on a wire.
                let _ = nix::unistd::write(to, &frame[..length]);
            }
        }
    }
}

fn get(path: &str, headers: &str, method: &str) -> String {
    let mut stream =
        TcpStream::connect_timeout(&"169.254.169.254:80".parse().unwrap(), Duration::from_secs(5)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    write!(stream, "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

/// Whether a TCP connection comes about.
fn reaches(to: &str) -> bool {
    let to: SocketAddr = to.parse().unwrap();
    TcpStream::connect_timeout(&to, Duration::from_millis(700)).is_ok()
}

/// As [`reaches`], for long lists of closed targets: an answer takes a millisecond here.
fn reaches_soon(to: &str) -> bool {
    TcpStream::connect_timeout(&to.parse().unwrap(), Duration::from_millis(200)).is_ok()
}

#[test]
#[ignore = "needs root: scripts/test runs it as such"]
fn a_guest_gets_its_address_by_dhcp_and_its_metadata_from_its_own_wire() {
    in_a_host(|bench| {
        let mac = links::mac(&bench.links.interface.mac).unwrap();
        let answer = bench.in_guest(move || {
            let socket = UdpSocket::bind("0.0.0.0:68").unwrap();
            socket.set_broadcast(true).unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
            run("ip", "route add 255.255.255.255/32 dev eth0");
            let mut discover = Message::default();
            discover
                .set_opcode(Opcode::BootRequest)
                .set_chaddr(&mac)
                .set_flags(Flags::default().set_broadcast());
            discover.opts_mut().insert(DhcpOption::MessageType(MessageType::Discover));
            let bytes = discover.to_vec().unwrap();
            let mut packet = [0; 1500];
            let deadline = Instant::now() + Duration::from_secs(10);
            loop {
                assert!(Instant::now() < deadline, "no answer to DHCP");
                socket.send_to(&bytes, "255.255.255.255:67").unwrap();
                if let Ok((length, from)) = socket.recv_from(&mut packet) {
                    assert_eq!(from.to_string(), "172.31.0.1:67");
                    return Message::decode(&mut Decoder::new(&packet[..length])).unwrap();
                }
            }
        });
        assert_eq!(answer.yiaddr(), bench.links.interface.private_ip);
        assert_eq!(
            answer.opts().get(OptionCode::InterfaceMtu),
            Some(&DhcpOption::InterfaceMtu(1450)),
            "the uplink's MTU reaches the guest"
        );

        bench.configure_guest();
        let text = bench.in_guest(|| get("/latest/meta-data/public-ipv4", "", "GET"));
        assert!(text.ends_with("100.64.0.5"), "{text}");
        let text = bench
            .in_guest(|| get("/latest/api/token", "X-aws-ec2-metadata-token-ttl-seconds: 60\r\n", "PUT"));
        let token = text.rsplit_once("\r\n\r\n").unwrap().1.to_owned();
        let text = bench.in_guest(move || {
            get("/latest/meta-data/instance-id", &format!("X-aws-ec2-metadata-token: {token}\r\n"), "GET")
        });
        assert!(text.ends_with("i-05050505050505050"), "{text}");
    });
}

#[test]
#[ignore = "needs root: scripts/test runs it as such"]
fn replies_of_the_metadata_service_go_one_hop() {
    in_a_host(|bench| {
        bench.configure_guest();
        // A container's network inside the guest: its packets are forwarded by the guest, replies would need a hop more.
        let container = bench.folders.netns.join("container");
        netns::make(&container).unwrap();
        let inside = File::open(&container).unwrap();
        bench.in_guest(move || {
            std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
            run("ip", "link add c0 type veth peer name c1");
            run("ip", "addr add 10.88.0.1/24 dev c0");
            run("ip", "link set c0 up");
            let fd = inside.as_raw_fd();
            run("ip", &format!("link set c1 netns /proc/{}/fd/{fd}", std::process::id()));
            let rule = "table ip nat { chain post { type nat hook postrouting priority 100; oifname \"eth0\" masquerade; }; }";
            firewall::apply("masquerade", rule).unwrap();
        });
        let reached = netns::enter(&container, || {
            run("ip", "addr add 10.88.0.2/24 dev c1");
            run("ip", "link set c1 up");
            run("ip", "route add default via 10.88.0.1");
            Ok(reaches("169.254.169.254:80"))
        })
        .unwrap();
        assert!(bench.in_guest(|| reaches("169.254.169.254:80")), "the guest itself is served");
        assert!(!reached, "what the guest forwards for is not");
        netns::remove(&container).unwrap();
    });
}

#[test]
#[ignore = "needs root: scripts/test runs it as such"]
fn the_public_address_leads_to_the_guest_where_the_security_group_allows() {
    in_a_host(|mut bench| {
        bench.configure_guest();
        let (ssh, web) = bench.in_guest(|| {
            (TcpListener::bind("0.0.0.0:22").unwrap(), TcpListener::bind("0.0.0.0:80").unwrap())
        });
        assert!(reaches("100.64.0.5:22"), "port 22 is allowed");
        assert!(!reaches("100.64.0.5:80"), "port 80 is not");
        // A tunnel comes from inside the namespace and needs no rule.
        let to = SocketAddrV4::new(bench.links.interface.private_ip, 80);
        service::connect(&bench.netns(), to, Duration::from_secs(2)).unwrap();

        // New rules replace the old ones while connections go on.
        let mut open = TcpStream::connect("100.64.0.5:22").unwrap();
        bench.links.interface.ingress[0].from_port = 80;
        bench.links.interface.ingress[0].to_port = 80;
        bench.make();
        assert!(reaches("100.64.0.5:80"));
        assert!(!reaches("100.64.0.5:22"));
        while let Ok((mut accepted, _)) = ssh.accept() {
            // Connections that the tests above have made and dropped come first.
            if accepted.peer_addr().unwrap().port() == open.local_addr().unwrap().port() {
                accepted.write_all(b"still here").unwrap();
                break;
            }
        }
        let mut text = [0; 10];
        open.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        open.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"still here");
        drop(web);
    });
}

#[test]
#[ignore = "needs root: scripts/test runs it as such"]
fn a_guest_reaches_neither_the_host_nor_anyone_with_a_borrowed_address() {
    in_a_host(|mut bench| {
        bench.configure_guest();
        let _host = TcpListener::bind("0.0.0.0:7444").unwrap();
        let (beyond, server) = bench.uplink();
        assert!(bench.in_guest(|| reaches("192.0.2.9:443")), "the way out works");
        let from = server.accept().unwrap().1.ip();
        assert_eq!(from.to_string(), "192.0.2.1", "hidden behind the host's own address");
        for closed in ["10.99.0.1:7444", "192.0.2.1:7444", "172.31.0.1:7444", "169.254.100.1:7444"] {
            assert!(!bench.in_guest(move || reaches(closed)), "{closed} is the host's");
        }
        bench.in_guest(|| {
            run("ip", "addr add 172.31.0.77/20 dev eth0");
            run("ip", "route add 192.0.2.9/32 via 172.31.0.1 src 172.31.0.77");
        });
        assert!(!bench.in_guest(|| reaches("192.0.2.9:443")), "another source address is dropped");
        bench.in_guest(|| {
            run("ip", "route del 192.0.2.9/32");
        });
        assert!(bench.in_guest(|| reaches("192.0.2.9:443")), "its own still works");
        bench.in_guest(|| run("ip", "link set eth0 address 06:00:00:00:00:99"));
        assert!(!bench.in_guest(|| reaches("192.0.2.9:443")), "another hardware address is dropped");
        netns::remove(&beyond).unwrap();
    });
}

/// Tracked connections of the calling thread's namespace.
fn connections() -> usize {
    let text = std::fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count").unwrap();
    text.trim().parse().unwrap()
}

/// Opens this many connections at once, and keeps them open. Returns how many succeed until none
/// does for a while.
fn open_many(to: &'static str, count: usize) -> (usize, Vec<TcpStream>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let streams: Vec<TcpStream> = runtime.block_on(async {
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..count {
            tasks.spawn(tokio::time::timeout(Duration::from_millis(800), tokio::net::TcpStream::connect(to)));
        }
        let done = tasks.join_all().await;
        done.into_iter().flatten().flatten().map(|stream| stream.into_std().unwrap()).collect()
    });
    (streams.len(), streams)
}

/// Accepts and keeps every connection until the test ends.
fn accept_all(server: TcpListener) {
    std::thread::spawn(move || server.incoming().collect::<Vec<_>>());
}

#[test]
#[ignore = "needs root: scripts/test runs it as such"]
fn a_guest_at_its_limit_of_connections_leaves_the_host_and_its_neighbours_theirs() {
    const LIMIT: u32 = 100;
    in_a_host(|mut bench| {
        bench.configure_guest();
        let (beyond, server) = bench.uplink();
        accept_all(server);
        let around = bench.walls.around();
        let interface = bench.links.interface.clone();
        let inside = firewall::instance_table_of(&interface, &around.closed, LIMIT);
        let again = inside.clone();
        netns::enter(&bench.netns(), move || firewall::apply("a low limit", &inside)).unwrap();
        let (out, _kept_out) = bench.in_guest(|| open_many("192.0.2.9:443", 120));
        assert_eq!(out, 100, "at the limit");
        accept_all(bench.in_guest(|| TcpListener::bind("0.0.0.0:22").unwrap()));
        let (into, _kept_in) = open_many("100.64.0.5:22", 120);
        assert_eq!(into, 100, "the other direction has a limit of its own");
        netns::enter(&bench.netns(), move || firewall::apply("again", &again)).unwrap();
        assert!(!bench.in_guest(|| reaches_soon("192.0.2.9:443")), "new rules count what there is");

        // The second table, by public address, which limits a neighbour.
        let neighbour = Bench::neighbour(&bench);
        neighbour.configure_guest();
        let public = [&bench, &neighbour].map(|one| (one.links.id.clone(), one.links.interface.public_ip));
        firewall::apply("a low limit", &firewall::host_table_of(&around, &public, LIMIT)).unwrap();
        let (theirs, _kept_theirs) = neighbour.in_guest(|| open_many("192.0.2.9:443", 120));
        assert_eq!(theirs, 100, "a neighbour has all of its own");
        assert!(reaches("192.0.2.9:443"), "the host itself still connects");

        // The connections that are left go with the instance.
        let before = connections();
        links::remove(&bench.folders, &neighbour.links.id).unwrap();
        bench.walls.take_down(&neighbour.links.id).unwrap();
        let after = connections();
        assert!(before >= 200 && after <= before - 100, "{after} of {before} are left");
        assert!(after >= 100, "others' connections are let be: {after}");
        netns::remove(&beyond).unwrap();
    });
}

#[test]
#[ignore = "needs root: scripts/test runs it as such"]
fn a_guest_that_opens_connections_without_end_is_slowed_down() {
    in_a_host(|mut bench| {
        bench.configure_guest();
        let (beyond, _server) = bench.uplink();
        let begin = Instant::now();
        bench.in_guest(|| {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            for port in 1000..20_000_u16 {
                // The error of a refused port reaches the socket at its next call.
                while socket.send_to(b"x", ("192.0.2.9", port)).is_err() {}
            }
        });
        let most = 4096 + 500 * usize::try_from(begin.elapsed().as_secs() + 1).unwrap() + 50;
        let host = connections();
        assert!((1000..most).contains(&host), "{host} connections tracked, {most} are allowed");
        let inside = netns::enter(&bench.netns(), || Ok(connections())).unwrap();
        assert!(inside < most, "{inside} in its own namespace");
        netns::remove(&beyond).unwrap();
    });
}

/// Sends frames from the calling thread's `eth0`.
fn send_frames(frames: impl IntoIterator<Item = Vec<u8>>) {
    let protocol = u16::try_from(libc::ETH_P_ALL).unwrap().to_be();
    // SAFETY: no memory is passed.
    let socket = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW, i32::from(protocol)) };
    assert!(socket >= 0);
    // SAFETY: a fresh descriptor that nothing else owns.
    let socket = unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(socket) };
    // SAFETY: an all-zero address is valid.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = u16::try_from(libc::AF_PACKET).unwrap();
    address.sll_ifindex = i32::try_from(nix::net::if_::if_nametoindex("eth0").unwrap()).unwrap();
    for frame in frames {
        // SAFETY: frame and address live through the call.
        let sent = unsafe {
            libc::sendto(
                socket.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                0,
                (&raw const address).cast(),
                libc::socklen_t::try_from(size_of_val(&address)).unwrap(),
            )
        };
        assert_eq!(sent, isize::try_from(frame.len()).unwrap());
    }
}

/// An Ethernet frame to everybody from the guest's own address.
fn frame(from: [u8; 6], kind: u16, body: &[u8]) -> Vec<u8> {
    [&[0xff; 6][..], &from, &kind.to_be_bytes(), body].concat()
}

#[test]
#[ignore = "needs root: scripts/test runs it as such"]
fn arp_of_senders_that_are_not_the_guest_fills_no_table_of_the_kernel() {
    in_a_host(|bench| {
        bench.configure_guest();
        assert!(bench.in_guest(|| reaches("169.254.169.254:80")), "its own ARP is answered");
        let mac = links::mac(&bench.links.interface.mac).unwrap();
        bench.in_guest(move || {
            let senders = (0..300_u16).map(|n| [172, 31, 1 + n.to_be_bytes()[0], n.to_be_bytes()[1]]);
            send_frames(senders.chain([[8, 8, 8, 8], [172, 31, 0, 1], [169, 254, 169, 254]]).map(|sender| {
                let head = [0, 1, 8, 0, 6, 4, 0, 1];
                frame(mac, 0x0806, &[&head[..], &mac, &sender, &[0; 6], &[172, 31, 0, 1]].concat())
            }));
            // This frame follows the others on the same wire.
            get("/latest/meta-data/", "", "GET");
        });
        let known = netns::enter(&bench.netns(), || {
            let output = Command::new("ip").args(["neigh", "show", "dev", "tap0"]).output().unwrap();
            Ok(String::from_utf8(output.stdout).unwrap())
        })
        .unwrap();
        let known: Vec<&str> = known.lines().collect();
        assert_eq!(known.len(), 1, "{known:?}");
        assert!(known[0].starts_with("172.31.0.5 ") && known[0].contains("PERMANENT"), "{known:?}");
    });
}

#[test]
#[ignore = "needs root: scripts/test runs it as such"]
fn a_guest_reaches_the_uplink_and_no_other_network_of_the_host() {
    in_a_host(|mut bench| {
        bench.configure_guest();
        let container = bench.beside("docker0", "172.17.0.1/16", "172.17.0.2/16");
        let (beyond, server) = bench.uplink();
        accept_all(server);
        let _host = TcpListener::bind("0.0.0.0:7444").unwrap();
        let _listeners = netns::enter(&container, || {
            run("ip", "route add default via 172.17.0.1");
            Ok(["0.0.0.0:80", "0.0.0.0:5432"].map(|at| TcpListener::bind(at).unwrap()))
        })
        .unwrap();
        // A published port as Docker makes it.
        let publish = "table ip nat { chain pre { type nat hook prerouting priority dstnat; \
            fib daddr type local tcp dport 8080 dnat to 172.17.0.2:80; }; }";
        firewall::apply("publish a port", publish).unwrap();
        let closed =
            ["192.0.2.1:7444", "172.17.0.1:7444", "192.0.2.1:8080", "172.17.0.2:80", "172.17.0.2:5432"];
        let reached = |bench: &Bench| {
            bench.in_guest(move || closed.into_iter().filter(|to| reaches_soon(to)).collect::<Vec<_>>())
        };
        assert!(bench.in_guest(|| reaches("192.0.2.9:443")), "the way out works");
        assert!(reaches("172.17.0.2:80"), "the host itself reaches its container");
        assert_eq!(reached(&bench), Vec::<&str>::new());

        // Only the host's table.
        let open = firewall::instance_table(&bench.links.interface, &[]);
        netns::enter(&bench.netns(), move || firewall::apply("no wall inside", &open)).unwrap();
        assert_eq!(reached(&bench), Vec::<&str>::new());

        // Only the table in the namespace, as after a reload of the host's firewall.
        bench.make();
        run("nft", "flush ruleset");
        firewall::apply("publish a port", publish).unwrap();
        assert_eq!(reached(&bench), Vec::<&str>::new());
        for beside in [beyond, container] {
            netns::remove(&beside).unwrap();
        }
    });
}

#[test]
#[ignore = "needs root: scripts/test runs it as such"]
fn a_host_with_instances_is_no_router_between_its_other_networks() {
    in_a_host(|mut bench| {
        let container = bench.beside("docker0", "172.17.0.1/16", "172.17.0.2/16");
        let (beyond, server) = bench.uplink();
        accept_all(server);
        accept_all(
            netns::enter(&container, || {
                run("ip", "route add default via 172.17.0.1");
                Ok(TcpListener::bind("0.0.0.0:80").unwrap())
            })
            .unwrap(),
        );
        netns::enter(&beyond, || {
            run("ip", "route add default via 192.0.2.1");
            Ok(())
        })
        .unwrap();
        let (out, into) = (|| Ok(reaches_soon("192.0.2.9:443")), || Ok(reaches_soon("172.17.0.2:80")));
        assert!(!netns::enter(&container, out).unwrap(), "no way from a container");
        assert!(!netns::enter(&beyond, into).unwrap(), "no way to a container");
        // The owner turns forwarding on: the tables follow.
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
        bench.walls.tend(&bench.troubles);
        assert!(netns::enter(&container, out).unwrap() && netns::enter(&beyond, into).unwrap());
        for beside in [beyond, container] {
            netns::remove(&beside).unwrap();
        }
    });
}

#[test]
#[ignore = "needs root: scripts/test runs it as such"]
fn walls_that_another_program_flushes_are_set_again_and_told() {
    in_a_host(|mut bench| {
        bench.configure_guest();
        let (beyond, server) = bench.uplink();
        accept_all(server);
        let _host = TcpListener::bind("0.0.0.0:7444").unwrap();
        let id = bench.links.id.clone();
        bench.walls.tend(&bench.troubles);
        assert_eq!((bench.troubles.sentences(), bench.walls.trouble_of(&id)), (vec![], None));
        // Another program's table is no trouble.
        firewall::apply("another's", "table ip other { chain c { type filter hook input priority 0; }; }")
            .unwrap();
        bench.walls.tend(&bench.troubles);
        assert_eq!(bench.troubles.sentences(), Vec::<String>::new());

        run("nft", "flush ruleset");
        assert!(!bench.in_guest(|| reaches("192.0.2.1:7444")), "the namespace's wall stands alone");
        bench.walls.tend(&bench.troubles);
        assert!(bench.in_guest(|| reaches("192.0.2.9:443")), "guests are back");
        assert_eq!(firewall::public_addresses(&id).unwrap(), vec![bench.links.interface.public_ip]);
        let told = bench.troubles.sentences();
        assert!(told.len() == 1 && told[0].contains("host's firewall"), "{told:?}");
        assert_eq!(bench.walls.trouble_of(&id).as_ref(), told.first());

        // Losing one rule counts as losing all.
        firewall::apply("a rule less", "flush chain inet roost_host input\n").unwrap();
        bench.walls.tend(&bench.troubles);
        let listed = firewall::host_rules(&firewall::ruleset().unwrap());
        assert!(listed.contains("\"chain\":\"input\""), "{listed}");

        // In the instance's namespace too.
        netns::enter(&bench.netns(), || {
            run("nft", "flush ruleset");
            Ok(())
        })
        .unwrap();
        bench.walls.tend(&bench.troubles);
        assert!(!bench.in_guest(|| reaches("192.0.2.1:7444")));
        assert!(bench.in_guest(|| reaches("192.0.2.9:443")));
        assert!(bench.walls.trouble_of(&id).unwrap().contains("namespace"));
        netns::remove(&beyond).unwrap();
    });
}

#[test]
#[ignore = "needs root: scripts/test runs it as such"]
fn a_forward_chain_that_begins_to_drop_lets_instances_pass_or_is_named() {
    in_a_host(|mut bench| {
        bench.configure_guest();
        let (beyond, server) = bench.uplink();
        accept_all(server);
        accept_all(bench.in_guest(|| TcpListener::bind("0.0.0.0:22").unwrap()));
        netns::enter(&beyond, || {
            run("ip", "route add default via 192.0.2.1");
            Ok(())
        })
        .unwrap();
        let both_ways = |bench: &Bench| {
            let into = netns::enter(&beyond, || Ok(reaches_soon("100.64.0.5:22"))).unwrap();
            (bench.in_guest(|| reaches_soon("192.0.2.9:443")), into)
        };
        assert_eq!(both_ways(&bench), (true, true));
        // A chain as Docker leaves it, with the wide rule of an earlier agent.
        let docker = "table ip filter {
            chain DOCKER-USER {
                iifname \"rv*\" counter accept
            }
            chain FORWARD {
                type filter hook forward priority 0; policy drop;
                counter jump DOCKER-USER
            }
        }";
        firewall::apply("Docker", docker).unwrap();
        assert_eq!(both_ways(&bench), (false, false));
        bench.walls.tend(&bench.troubles);
        assert_eq!(both_ways(&bench), (true, true), "it is mended");
        assert_eq!(bench.troubles.sentences(), Vec::<String>::new());
        let rules = firewall::ruleset().unwrap();
        let docker = roost_types::forward::barriers(&rules, "roost_host").remove(0);
        assert!(roost_types::forward::too_wide(&rules, &docker).is_empty(), "the wide rule is gone");

        // Another program's chain is reported with the command that opens it, and left alone.
        let other = "table inet site {
            chain guard {
                type filter hook forward priority 10; policy drop;
            }
        }";
        firewall::apply("a firewall of the owner's", other).unwrap();
        bench.walls.tend(&bench.troubles);
        let told = bench.troubles.sentences();
        assert!(told.len() == 1 && told[0].contains("chain guard of table inet site"), "{told:?}");
        assert_eq!(bench.walls.trouble_of(&bench.links.id).as_ref(), told.first());
        // The reported commands, run as they stand.
        for fix in told[0].split('\'').filter(|part| part.starts_with("insert rule")) {
            firewall::apply("the fix", &format!("{fix}\n")).unwrap();
        }
        bench.walls.tend(&bench.troubles);
        assert_eq!(both_ways(&bench), (true, true));
        assert_eq!(bench.troubles.sentences(), Vec::<String>::new());
        netns::remove(&beyond).unwrap();
    });
}

#[test]
#[ignore = "needs root: scripts/test runs it as such"]
fn links_are_born_with_their_hardware_addresses_and_get_them_back() {
    in_a_host(|mut bench| {
        let id = bench.links.id.clone();
        let veth = roost_agent::names::host_veth(&id);
        let address = roost_agent::names::veth_mac(&id, 0);
        // As udev does to a link whose address the kernel has made up.
        run("ip", &format!("link set {veth} address 02:ff:ff:ff:ff:ff"));
        assert!(!bench.links.stand(&bench.folders), "the reconciler sees it");
        bench.make();
        assert!(bench.links.stand(&bench.folders));
        assert_eq!(links::hardware_address(&veth), Some(address));

        // Many pairs at once: each has its address from birth, whoever else makes links.
        let all: Vec<Links> = (0..60_u8)
            .map(|n| {
                let ensure = ensure_of(10 + n, 1);
                Links { id: ensure.instance_id, interface: ensure.spec.interface, mtu: 1450 }
            })
            .collect();
        std::thread::scope(|scope| {
            for part in all.chunks(10) {
                let folders = &bench.folders;
                scope.spawn(move || part.iter().for_each(|links| links.make(folders).unwrap()));
            }
        });
        for links in &all {
            assert!(links.stand(&bench.folders), "{}", links.id);
            links::remove(&bench.folders, &links.id).unwrap();
        }
    });
}

#[test]
#[ignore = "needs root: scripts/test runs it as such"]
fn the_hosts_uplink_and_its_mtu_are_followed() {
    in_a_host(|mut bench| {
        bench.configure_guest();
        let (beyond, server) = bench.uplink();
        accept_all(server);
        // A second way out: a card that was plugged in.
        let other = bench.beside("wlan0", "198.51.100.1/24", "198.51.100.9/24");
        accept_all(netns::enter(&other, || Ok(TcpListener::bind("198.51.100.9:443").unwrap())).unwrap());
        bench.walls.tend(&bench.troubles);
        assert!(!bench.in_guest(|| reaches_soon("198.51.100.9:443")), "no uplink yet");
        run("ip", "link set wlan0 mtu 1400");
        run("ip", "route add default via 198.51.100.9");
        bench.walls.tend(&bench.troubles);
        assert!(bench.in_guest(|| reaches("198.51.100.9:443")), "the new uplink leads out");
        assert_eq!(bench.walls.around().mtu, 1400);
        run("ip", "route del default");
        bench.walls.tend(&bench.troubles);
        assert!(!bench.in_guest(|| reaches_soon("198.51.100.9:443")), "and no longer");
        for beside in [beyond, other] {
            netns::remove(&beside).unwrap();
        }
    });
}

#[test]
#[ignore = "needs root: scripts/test runs it as such"]
fn nothing_but_ipv4_and_arp_leaves_a_guest() {
    in_a_host(|mut bench| {
        bench.configure_guest();
        let (beyond, _server) = bench.uplink();
        let seen = |device: &'static str| {
            let text = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
            let line = text.lines().find_map(|line| line.trim().strip_prefix(device)).unwrap().to_owned();
            line.trim_start_matches(':').split_ascii_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
        };
        let veth: &'static str = Box::leak(roost_agent::names::host_veth(&bench.links.id).into_boxed_str());
        let before = seen(veth);
        let mac = links::mac(&bench.links.interface.mac).unwrap();
        bench.in_guest(move || {
            let all = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
            // Router advertisement, neighbour solicitation, UDP; then VLAN, QinQ, LLDP, PPPoE and
            // STP.
            let sixes = [(58, 134), (58, 135), (17, 0)].map(|(next, kind)| {
                let head = [0x60, 0, 0, 0, 0, 16, next, 255];
                let own = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 4, 0, 0xa, 0xff, 0xfe, 0, 0, 5];
                frame(mac, 0x86dd, &[&head[..], &own, &all, &[kind; 16]].concat())
            });
            let others = [0x8100, 0x88a8, 0x88cc, 0x8864, 0x0026].map(|kind| frame(mac, kind, &[0; 46]));
            for _ in 0..10 {
                send_frames(sixes.clone().into_iter().chain(others.clone()));
            }
            get("/latest/meta-data/", "", "GET");
        });
        assert_eq!(seen(veth), before, "a packet has left the namespace");
        let neighbours = netns::enter(&bench.netns(), || {
            Ok(Command::new("ip").args(["-6", "neigh"]).output().unwrap().stdout)
        })
        .unwrap();
        assert_eq!(String::from_utf8(neighbours).unwrap(), "");
        netns::remove(&beyond).unwrap();
    });
}

#[test]
#[ignore = "needs root: scripts/test runs it as such"]
fn a_guest_that_floods_dhcp_and_metadata_is_held_to_its_packets_per_second() {
    in_a_host(|bench| {
        bench.configure_guest();
        let begin = Instant::now();
        bench.in_guest(|| {
            let socket = UdpSocket::bind("0.0.0.0:68").unwrap();
            for _ in 0..20_000 {
                while socket.send_to(&[0; 300], "172.31.0.1:67").is_err() {}
            }
        });
        let passed = netns::enter(&bench.netns(), || {
            let text = std::fs::read_to_string("/proc/thread-self/net/snmp").unwrap();
            let line = text.lines().filter(|line| line.starts_with("Udp:")).nth(1).unwrap().to_owned();
            let fields: Vec<u64> = line.split(' ').filter_map(|field| field.parse().ok()).collect();
            // InDatagrams and InErrors: what came up to a socket, whether it had room or not.
            Ok(fields[0] + fields[2])
        })
        .unwrap();
        let most = 1024 * (begin.elapsed().as_secs() + 2) + 10;
        assert!(
            (500..most).contains(&passed),
            "{passed} packets of 20,000 reached the agent, {most} are allowed"
        );
    });
}

#[test]
#[ignore = "needs root: scripts/test runs it as such"]
fn a_guest_reaches_anothers_public_address_by_its_rules_and_never_its_private_one() {
    in_a_host(|bench| {
        bench.configure_guest();
        let neighbour = Bench::neighbour(&bench);
        neighbour.configure_guest();
        accept_all(neighbour.in_guest(|| TcpListener::bind("0.0.0.0:22").unwrap()));
        accept_all(neighbour.in_guest(|| TcpListener::bind("0.0.0.0:80").unwrap()));
        accept_all(bench.in_guest(|| TcpListener::bind("0.0.0.0:22").unwrap()));
        let (public, private) = (neighbour.links.interface.public_ip, neighbour.links.interface.private_ip);
        assert_ne!(private, bench.links.interface.private_ip);
        let reached = move |address: Ipv4Addr, port: u16| {
            TcpStream::connect_timeout(&SocketAddr::from((address, port)), Duration::from_millis(300)).is_ok()
        };
        assert!(bench.in_guest(move || reached(public, 22)), "its security group allows it");
        assert!(!bench.in_guest(move || reached(public, 80)), "and not this");
        for port in [22, 80] {
            assert!(!bench.in_guest(move || reached(private, port)), "no way by the private address");
        }
        let own = bench.links.interface.public_ip;
        assert!(bench.in_guest(move || reached(own, 22)), "one's own public address leads back");
    });
}

#[test]
#[ignore = "needs root: scripts/test runs it as such"]
fn making_twice_makes_once_and_removing_leaves_nothing() {
    in_a_host(|mut bench| {
        let id = bench.links.id.clone();
        bench.make();
        bench.make();
        assert_eq!(firewall::public_addresses(&id).unwrap(), vec![bench.links.interface.public_ip]);
        assert!(bench.links.stand(&bench.folders));
        // The tap outlives its user: a rebooted guest's next monitor finds it.
        bench.stop.store(true, Ordering::SeqCst);
        bench.pump.take().unwrap().join().unwrap();
        drop(links::open_tap(&bench.folders, &id).unwrap());
        let services = bench.services.take().unwrap();
        bench.runtime.block_on(services.stop());
        for _ in 0..2 {
            links::remove(&bench.folders, &id).unwrap();
            bench.walls.take_down(&id).unwrap();
        }
        assert!(!bench.links.stand(&bench.folders));
        assert!(!bench.netns().exists());
        assert!(firewall::public_addresses(&id).unwrap().is_empty());
        let deadline = Instant::now() + Duration::from_secs(5);
        while links::link_exists(&roost_agent::names::host_veth(&id)) {
            assert!(Instant::now() < deadline, "the veth pair stays");
            std::thread::yield_now();
        }
    });
}
