//! What the virtual host and its guests can reach of the machine outside.
#![allow(clippy::unwrap_used, missing_docs)]

use roost_e2e::{Rig, TempFile};
use std::io::ErrorKind;
use std::net::{TcpListener, UdpSocket};
use std::process::Command;
use std::time::Duration;

const SOON: Duration = Duration::from_secs(90);

/// Queries the name server and the package archive, which stay reachable.
const WAY_OUT: &str = "getent hosts deb.debian.org > /dev/null && echo named
    curl -sI --max-time 20 http://deb.debian.org/ > /dev/null && echo answered
    true";

#[test]
fn nobody_in_the_virtual_host_reaches_the_loopback_of_the_machine_outside() {
    let rig = Rig::get();
    if !rig.is_emulated() {
        println!("guests run on this machine itself: the tests of the agent's network hold its walls");
        return;
    }
    let tenant = rig.tenant("outside");
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = tcp.local_addr().unwrap().port();
    let udp = UdpSocket::bind(("127.0.0.1", port)).unwrap();
    tcp.set_nonblocking(true).unwrap();
    udp.set_nonblocking(true).unwrap();

    // QEMU's own address, and every port of the name server but DNS.
    let host = format!(
        "for address in 192.0.2.2 192.0.2.3; do
           timeout 5 bash -c \"echo x > /dev/tcp/$address/{port}\"
           echo x > /dev/udp/$address/{port}
         done
         echo all was tried"
    );
    assert_eq!(rig.host(&host).stdout.trim(), "all was tried");
    let outside = Command::new("sh").args(["-c", WAY_OUT]).output().unwrap();
    assert_eq!(
        rig.host(WAY_OUT).stdout,
        String::from_utf8_lossy(&outside.stdout),
        "the way out is as it was"
    );
    let guest = format!(
        "#!/bin/sh
for address in 192.0.2.2 192.0.2.3; do
  echo x | nc -w 4 $address {port}
  echo x | nc -u -w 1 $address {port}
done
echo 'all was tried'
"
    );
    let script = TempFile::new("probe.sh", &guest);
    let id = tenant.launch("tiny-fast", "home1.nano", &["--user-data", script.path()]);
    tenant.wait_console(&id, "all was tried", SOON);

    assert_eq!(tcp.accept().map(|_| ()).unwrap_err().kind(), ErrorKind::WouldBlock, "nobody came by TCP");
    assert_eq!(udp.recv(&mut [0; 8]).unwrap_err().kind(), ErrorKind::WouldBlock, "nobody came by UDP");
    tenant.terminate_clean(&id);
}
