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
use roost_agent::net::surroundings::Surroundings;
use roost_agent::net::{firewall, netns, walls};
use roost_agent::testing::ensure_of;
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
        let ensure = ensure_of(5, 1);
        let links =
            Links { id: ensure.instance_id.clone(), interface: ensure.spec.interface.clone(), mtu: 1450 };
        // The host: a loopback, and an address of its own that guests must not reach. It is no router.
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "0").unwrap();
        run("ip", "link set lo up");
        run("ip", "addr add 10.99.0.1/32 dev lo");
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
        let around = Surroundings::look(&["uplink".into()]);
        walls::set_inside(&self.netns(), &self.links.interface, &around).unwrap();
        walls::set_host(&around, &[(self.links.id.clone(), self.links.interface.public_ip)]).unwrap();
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

    /// The host's uplink and a server beyond it, to tell "nothing works" from "the host is closed".
    fn uplink(&mut self) -> (PathBuf, TcpListener) {
        let beyond = self.beside("uplink", "192.0.2.1/24", "192.0.2.9/24");
        self.make();
        let server = netns::enter(&beyond, || Ok(TcpListener::bind("192.0.2.9:443").unwrap())).unwrap();
        (beyond, server)
    }

    /// A namespace beside the host, at the other end of a link of it.
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

/// [`reaches`], for walls that are many: on a wire of this machine an answer takes a millisecond.
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

/// Opens as many connections at once, and keeps them; gives how many come about until none does for a while.
fn open_many(to: &'static str, count: usize) -> (usize, Vec<std::net::TcpStream>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let streams: Vec<TcpStream> = runtime.block_on(async {
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..count {
            tasks.spawn(tokio::time::timeout(Duration::from_millis(900), tokio::net::TcpStream::connect(to)));
        }
        let done = tasks.join_all().await;
        done.into_iter().flatten().flatten().map(|stream| stream.into_std().unwrap()).collect()
    });
    (streams.len(), streams)
}

/// Accepts and keeps whatever comes, for as long as the test runs.
fn accept_all(server: TcpListener) {
    std::thread::spawn(move || server.incoming().collect::<Vec<_>>());
}

#[test]
#[ignore = "needs root: scripts/test runs it as such"]
fn a_guest_at_its_limit_of_connections_leaves_the_host_and_its_neighbours_theirs() {
    const LIMIT: u32 = 200;
    in_a_host(|mut bench| {
        bench.configure_guest();
        let (beyond, server) = bench.uplink();
        accept_all(server);
        let around = Surroundings::look(&["uplink".into()]);
        let public = [(bench.links.id.clone(), bench.links.interface.public_ip)];
        // Out, by the instance's own table.
        let interface = bench.links.interface.clone();
        let inside = firewall::instance_table_of(&interface, &around.closed, LIMIT);
        netns::enter(&bench.netns(), move || firewall::apply("a low limit", &inside)).unwrap();
        let (came, kept) = bench.in_guest(|| open_many("192.0.2.9:443", 300));
        assert_eq!(came, 200, "at the limit");
        // In: what the host opens.
        accept_all(bench.in_guest(|| TcpListener::bind("0.0.0.0:22").unwrap()));
        assert_eq!(open_many("100.64.0.5:22", 300).0, 200, "the other direction has a limit of its own");
        // Replacing the rules forgets no connection.
        let inside = firewall::instance_table_of(&interface, &around.closed, LIMIT);
        netns::enter(&bench.netns(), move || firewall::apply("again", &inside)).unwrap();
        assert!(!bench.in_guest(|| reaches("192.0.2.9:443")), "new rules count what there is");
        // The second wall, with the first one gone.
        drop(kept);
        let inside = firewall::instance_table(&interface, &around.closed);
        netns::enter(&bench.netns(), move || firewall::apply("as it is", &inside)).unwrap();
        firewall::apply("a low limit", &firewall::host_table_of(&around, &public, LIMIT)).unwrap();
        let (came, kept) = bench.in_guest(|| open_many("192.0.2.9:443", 300));
        assert_eq!(came, 200, "the host's table counts by public address");
        assert!(reaches("192.0.2.9:443"), "the host itself still connects");
        // What is left of it goes with the instance.
        let before = connections();
        assert!(before >= 200, "{before}");
        links::remove(&bench.folders, &bench.links.id).unwrap();
        walls::release(&bench.links.id).unwrap();
        let after = connections();
        assert!(after <= before - 200, "{after} of {before} are left");
        assert!(reaches("192.0.2.9:443"), "others' connections are let be");
        drop(kept);
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
                // A port that refuses is said to the socket at the next call.
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
            // Comes after them on the same wire.
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
        // As Docker publishes a port.
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

        // The host's table alone.
        let open = firewall::instance_table(&bench.links.interface, &[]);
        netns::enter(&bench.netns(), move || firewall::apply("no wall inside", &open)).unwrap();
        assert_eq!(reached(&bench), Vec::<&str>::new());

        // And the table inside alone, as it is after a firewall of the host was loaded anew.
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
        // Its owner makes it one: the walls follow.
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
        bench.make();
        assert!(netns::enter(&container, out).unwrap() && netns::enter(&beyond, into).unwrap());
        for beside in [beyond, container] {
            netns::remove(&beside).unwrap();
        }
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
            walls::release(&id).unwrap();
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
