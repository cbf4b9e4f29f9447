//! The driver's side of a vsock device.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::virtio::{Device, Ring, WRITE};
use super::{Code, DEADLINE, wait_for};

pub const GUEST_CID: u32 = 7;
/// Bytes of a header, and where fields are in it (virtio 1.2, 5.10.6).
pub const HEADER: u32 = 44;
pub const SRC_PORT: u32 = 16;
pub const DST_PORT: u32 = 20;
pub const LENGTH: u32 = 24;
pub const TYPE_AND_OP: u32 = 28;
pub const FLAGS: u32 = 32;

/// Kinds of packets.
pub const REQUEST: u32 = 1;
pub const RESPONSE: u32 = 2;
pub const RESET: u32 = 3;
pub const SHUTDOWN: u32 = 4;
pub const DATA: u32 = 5;

/// Buffers for received packets: 8 of 256 bytes.
const RECEIVED: u32 = 0x60_0000;
/// The packet that is sent.
pub const PACKET: u32 = 0x70_0000;

pub const RX: Ring = Ring { queue: 0, size: 8, base: 0x20_0000 };
pub const TX: Ring = Ring { queue: 1, size: 8, base: 0x30_0000 };

/// Where received packet number `n` is.
pub fn received(n: u16) -> u32 {
    RECEIVED + 0x1000 * u32::from(n)
}

/// A driver that has buffers for 8 packets.
pub fn set_up(code: Code, device: Device) -> Code {
    let code = [RX, TX].into_iter().fold(device.negotiate(code, 0), |code, ring| {
        let code = code.store(ring.available(), 0).store(ring.used(), 0);
        device.queue(code, ring)
    });
    let code = (0..RX.size).fold(device.go(code), |code, n| {
        RX.offer(RX.descriptor(code, n, received(n).into(), 256, WRITE, 0), n, n)
    });
    device.notify(code, RX.queue)
}

/// Writes the header of a packet of the guest.
pub fn header(code: Code, ports: (u32, u32), length: u32, op: u32, flags: u32) -> Code {
    let words = [GUEST_CID, 0, 2, 0, ports.0, ports.1, length, 1 | op << 16, flags, 4096, 0];
    (0..).zip(words).fold(code, |code, (n, word)| code.store(PACKET + 4 * n, word))
}

/// Sends what is at [`PACKET`], so many bytes, as packet number `index`, and waits until it is taken.
pub fn send(code: Code, device: Device, index: u16, bytes: u32) -> Code {
    let n = index % TX.size;
    let code = TX.descriptor(code, n, PACKET.into(), bytes, 0, 0);
    device.notify(TX.offer(code, index, n), TX.queue).wait16(TX.used_index(), index + 1)
}

/// Waits for received packet number `n`, and prints a `!` unless it is of this kind.
pub fn expect(code: Code, n: u16, op: u32) -> Code {
    code.wait16(RX.used_index(), n + 1).expect32(received(n) + TYPE_AND_OP, 1 | op << 16)
}

/// Copies a word: mov edi, FROM; mov eax, [rdi]; mov edi, TO; mov [rdi], eax
pub fn copy(code: Code, from: u32, to: u32) -> Code {
    code.address(from).bytes(&[0x8b, 0x07]).address(to).bytes(&[0x89, 0x07])
}

/// Connects to port 52 of the host, says `ping`, waits for `pong`, says no more, and waits for the host to do the same.
pub fn ping(code: Code, device: Device) -> Code {
    let code = header(set_up(code, device), (1000, 52), 0, REQUEST, 0);
    let code = expect(send(code, device, 0, HEADER), 0, RESPONSE);
    let code = header(code, (1000, 52), 4, DATA, 0).store(PACKET + HEADER, u32::from_le_bytes(*b"ping"));
    let code = expect(send(code, device, 1, HEADER + 4), 1, DATA).expect32(received(1) + LENGTH, 4);
    let code = code.expect32(received(1) + HEADER, u32::from_le_bytes(*b"pong"));
    let code = send(header(code, (1000, 52), 0, SHUTDOWN, 2), device, 2, HEADER);
    expect(code, 2, SHUTDOWN)
}

/// As a host program does it: connects, says where to, and waits for the answer. A connection that is closed answers nothing, also
/// one that is closed before it was heard.
pub fn connect(socket: &Path, port: u32) -> (BufReader<UnixStream>, String) {
    let stream = wait_for("the socket", || UnixStream::connect(socket).ok());
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    let said = (&stream).write_all(format!("CONNECT {port}\n").as_bytes());
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    if let Err(error) = said.and_then(|()| reader.read_line(&mut line)) {
        assert!(matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe), "{error}");
    }
    (reader, line)
}
