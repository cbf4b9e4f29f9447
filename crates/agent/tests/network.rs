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
use roost_agent::net::{firewall, netns};
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
        // The host: a loopback, and an address of its own that guests must not reach.
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
        links::forward_on_host().unwrap();
        self.links.make(&self.folders).unwrap();
        let rules = firewall::instance_table(&self.links.interface);
        netns::enter(&self.netns(), move || firewall::apply("rules", &rules)).unwrap();
        let host = firewall::host_table(&self.links.id, self.links.interface.public_ip);
        firewall::apply("host rules", &host).unwrap();
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
    in_a_host(|bench| {
        bench.configure_guest();
        let _host = TcpListener::bind("0.0.0.0:7444").unwrap();
        // A server beyond the host, to tell "nothing works" from "the host is closed".
        let beyond = bench.folders.netns.join("beyond");
        netns::make(&beyond).unwrap();
        run("ip", "link add uplink type veth peer name far");
        let inside = File::open(&beyond).unwrap();
        run("ip", &format!("link set far netns /proc/{}/fd/{}", std::process::id(), inside.as_raw_fd()));
        run("ip", "addr add 192.0.2.1/24 dev uplink");
        run("ip", "link set uplink up");
        let server = netns::enter(&beyond, || {
            run("ip", "addr add 192.0.2.9/24 dev far");
            run("ip", "link set far up");
            Ok(TcpListener::bind("192.0.2.9:443").unwrap())
        })
        .unwrap();
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
        firewall::apply("without", &firewall::without(&firewall::public_addresses(&id).unwrap())).unwrap();
        links::remove(&bench.folders, &id).unwrap();
        links::remove(&bench.folders, &id).unwrap();
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
