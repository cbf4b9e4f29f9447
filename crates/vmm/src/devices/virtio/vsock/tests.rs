//! Connections between a guest and host programs that are made of vectors.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::net::Shutdown;
use std::rc::Rc;

use super::connection::ROOM;
use super::packet::{HEADER, HOST_CID, Header, NO_MORE_RECEIVED, NO_MORE_SENT, Op, STREAM};
use super::queue::{MAX_PACKET, receive, transmit};
use super::switch::{Event, Host, MAX_CONNECTIONS, MAX_RESETS, Socket, Switch};
use crate::devices::virtio::testing::Driver;

mod properties;
mod sockets;

const GUEST_CID: u64 = 7;
const GUEST_PORT: u32 = 1000;
/// The port that somebody listens on.
const PORT: u32 = 52;
/// What the guest has room for in most tests.
const GUEST_ROOM: u32 = 300;

/// A host program.
#[derive(Default)]
struct Program {
    says: VecDeque<u8>,
    says_no_more: bool,
    hears: Vec<u8>,
    /// How many bytes it takes before it reads on.
    room: usize,
    gone: bool,
    shut: Vec<Shutdown>,
}

#[derive(Clone, Default)]
struct Pipe(Rc<RefCell<Program>>);

impl Pipe {
    fn new(says: &str) -> Self {
        let pipe = Self::default();
        pipe.say(says.as_bytes());
        pipe.0.borrow_mut().room = 1000;
        pipe
    }

    fn say(&self, bytes: &[u8]) {
        self.0.borrow_mut().says.extend(bytes);
    }

    fn heard(&self) -> String {
        String::from_utf8_lossy(&self.0.borrow().hears).into_owned()
    }
}

impl Socket for Pipe {
    fn read(&mut self, target: &mut [u8]) -> io::Result<usize> {
        let mut program = self.0.borrow_mut();
        if program.says.is_empty() && !program.says_no_more && !program.gone {
            return Err(ErrorKind::WouldBlock.into());
        }
        let count = target.len().min(program.says.len());
        for (target, byte) in target.iter_mut().zip(program.says.drain(..count)) {
            *target = byte;
        }
        Ok(count)
    }

    fn write(&mut self, source: &[u8]) -> io::Result<usize> {
        let mut program = self.0.borrow_mut();
        if program.gone {
            return Err(ErrorKind::BrokenPipe.into());
        }
        let count = source.len().min(program.room);
        if count == 0 {
            return Err(ErrorKind::WouldBlock.into());
        }
        program.room -= count;
        program.hears.extend(&source[..count]);
        Ok(count)
    }

    fn shut(&mut self, how: Shutdown) {
        self.0.borrow_mut().shut.push(how);
    }
}

/// Programs that listen on [`PORT`] and nowhere else.
#[derive(Default)]
struct Programs(Vec<(u64, Pipe)>);

impl Host for Programs {
    type Socket = Pipe;

    fn connect(&mut self, port: u32, token: u64) -> io::Result<Pipe> {
        if port != PORT {
            return Err(ErrorKind::NotFound.into());
        }
        self.0.push((token, Pipe::new("")));
        Ok(self.0.last().unwrap().1.clone())
    }
}

/// A device, its guest, and the host.
struct World {
    switch: Switch<Pipe>,
    host: Programs,
}

const READABLE: Event = Event { readable: true, writable: false, gone: false };
const WRITABLE: Event = Event { readable: false, writable: true, gone: false };
const GONE: Event = Event { readable: true, writable: true, gone: true };

/// A packet of the guest to a port of the host.
fn header(op: Op, host_port: u32) -> Header {
    Header {
        src_cid: GUEST_CID,
        dst_cid: HOST_CID,
        src_port: GUEST_PORT,
        dst_port: host_port,
        kind: STREAM,
        op: op as u16,
        buf_alloc: GUEST_ROOM,
        ..Header::default()
    }
}

impl World {
    fn new() -> Self {
        Self { switch: Switch::new(GUEST_CID), host: Programs::default() }
    }

    /// The guest has connected.
    fn connected() -> (Self, u64, Pipe) {
        let mut world = Self::new();
        world.send(header(Op::Request, PORT));
        assert_eq!(world.next().map(|(header, _)| header.op()), Some(Some(Op::Response)));
        let (token, pipe) = world.host.0[0].clone();
        (world, token, pipe)
    }

    fn send(&mut self, header: Header) {
        self.send_with(header, &[]);
    }

    fn send_with(&mut self, header: Header, payload: &[u8]) {
        let header = Header { len: payload.len() as u32, ..header };
        self.switch.from_guest(&header, payload, &mut self.host);
    }

    /// The next packet for the guest.
    fn next(&mut self) -> Option<(Header, Vec<u8>)> {
        let mut payload = [0; 100];
        let (header, count) = self.switch.for_guest(&mut payload)?;
        assert_eq!((header.src_cid, header.dst_cid, header.kind), (HOST_CID, GUEST_CID, STREAM));
        assert_eq!(header.len as usize, count);
        Some((header, payload[..count].to_vec()))
    }

    /// Kinds and flags of all packets for the guest.
    fn all(&mut self) -> Vec<(Op, u32)> {
        std::iter::from_fn(|| self.next()).map(|(header, _)| (header.op().unwrap(), header.flags)).collect()
    }

    fn open(&self) -> u64 {
        self.switch.metrics().open
    }
}

#[test]
fn a_guest_reaches_who_listens_and_is_refused_elsewhere() {
    let mut world = World::new();
    world.send(header(Op::Request, PORT + 1));
    let (refused, _) = world.next().unwrap();
    assert_eq!((refused.op(), refused.src_port, refused.dst_port), (Some(Op::Reset), PORT + 1, GUEST_PORT));
    let (mut world, token, pipe) = World::connected();
    world.send_with(header(Op::Data, PORT), b"ping");
    assert_eq!(pipe.heard(), "ping");
    pipe.say(b"pong");
    assert_eq!(world.next(), None, "nobody has said that there is something to read");
    world.switch.event(token, READABLE);
    let (answer, bytes) = world.next().unwrap();
    assert_eq!((answer.op(), bytes.as_slice()), (Some(Op::Data), &b"pong"[..]));
    assert_eq!((answer.buf_alloc, answer.fwd_cnt), (ROOM, 4));
    assert_eq!(world.next(), None);
    assert!(!world.switch.busy(), "until something happens, the guest's buffers are left alone");
    world.send(header(Op::Reset, PORT));
    assert_eq!((world.open(), world.all()), (0, vec![]));
    assert_eq!(Rc::strong_count(&pipe.0), 2, "the device has let the socket go");
}

#[test]
fn a_host_program_says_where_it_wants_to_and_hears_that_it_is_there() {
    let mut world = World::new();
    let pipe = Pipe::new("CONNE");
    let token = world.switch.token();
    world.switch.add(token, pipe.clone());
    world.switch.event(token, READABLE);
    assert_eq!(world.next(), None);
    // The line comes in pieces, and the first bytes for the guest behind it.
    pipe.say(b"CT 4000\nhello");
    world.switch.event(token, READABLE);
    let (request, _) = world.next().unwrap();
    assert_eq!((request.op(), request.src_port, request.dst_port), (Some(Op::Request), 1 << 30, 4000));
    assert_eq!((world.next(), pipe.heard()), (None, String::new()));
    world.send(Header { src_port: 4000, ..header(Op::Response, 1 << 30) });
    assert_eq!(pipe.heard(), "OK 1073741824\n");
    let (data, bytes) = world.next().unwrap();
    assert_eq!((data.op(), bytes.as_slice()), (Some(Op::Data), &b"hello"[..]));
    // Another one to the same port has another of its own.
    let token = world.switch.token();
    world.switch.add(token, Pipe::new("CONNECT 4000\n"));
    world.switch.event(token, READABLE);
    assert_eq!(world.next().unwrap().0.src_port, (1 << 30) + 1);
}

#[test]
fn a_host_program_that_says_anything_else_is_sent_away() {
    let long = "CONNECT ".to_owned() + &"0".repeat(100);
    for line in [
        "\n",
        "CONNECT\n",
        "CONNECT \n",
        "connect 1\n",
        "CONNECT -1\n",
        "CONNECT +1\n",
        "CONNECT 1 \n",
        "CONNECT 4294967296\n",
        "CONNECT 0x10\n",
        "GET / HTTP/1.1\r\n",
        &long,
    ] {
        let mut world = World::new();
        let (token, pipe) = (world.switch.token(), Pipe::new(line));
        world.switch.add(token, pipe.clone());
        world.switch.event(token, READABLE);
        assert_eq!((world.open(), world.all()), (0, vec![]), "{line:?}");
        assert_eq!(Rc::strong_count(&pipe.0), 1);
    }
}

#[test]
fn a_connection_that_the_guest_refuses_ends() {
    let mut world = World::new();
    let (token, pipe) = (world.switch.token(), Pipe::new("CONNECT 9\n"));
    world.switch.add(token, pipe.clone());
    world.switch.event(token, READABLE);
    assert_eq!(world.all(), [(Op::Request, 0)]);
    world.send(Header { src_port: 9, ..header(Op::Reset, 1 << 30) });
    assert_eq!((world.open(), world.all(), pipe.heard()), (0, vec![], String::new()));
}

#[test]
fn a_host_program_that_does_not_wait_for_the_answer_takes_its_request_back() {
    let mut world = World::new();
    let (token, pipe) = (world.switch.token(), Pipe::new("CONNECT 9\n"));
    world.switch.add(token, pipe.clone());
    world.switch.event(token, READABLE);
    assert_eq!(world.all(), [(Op::Request, 0)]);
    pipe.0.borrow_mut().gone = true;
    world.switch.event(token, GONE);
    assert_eq!((world.all(), world.open()), (vec![(Op::Reset, 0)], 0));
}

#[test]
fn each_half_ends_by_itself() {
    let (mut world, token, pipe) = World::connected();
    // The guest has said all, and the program has not taken it yet.
    pipe.0.borrow_mut().room = 2;
    world.send_with(header(Op::Data, PORT), b"abc");
    world.send(Header { flags: NO_MORE_SENT, ..header(Op::Shutdown, PORT) });
    assert_eq!((pipe.heard().as_str(), pipe.0.borrow().shut.len()), ("ab", 0));
    pipe.0.borrow_mut().room = 100;
    world.switch.event(token, WRITABLE);
    assert_eq!((pipe.heard().as_str(), pipe.0.borrow().shut.clone()), ("abc", vec![Shutdown::Write]));
    // The other direction goes on, until the program ends it too.
    pipe.say(b"still here");
    pipe.0.borrow_mut().says_no_more = true;
    world.switch.event(token, READABLE);
    assert_eq!(world.next().unwrap().1, b"still here");
    assert_eq!(world.all(), [(Op::Shutdown, NO_MORE_SENT)]);
    assert_eq!(world.open(), 1);
    world.send(Header { flags: NO_MORE_RECEIVED | NO_MORE_SENT, ..header(Op::Shutdown, PORT) });
    assert_eq!((world.all(), world.open()), (vec![(Op::Reset, 0)], 0));
}

#[test]
fn a_guest_that_hears_no_more_is_sent_no_more() {
    let (mut world, token, pipe) = World::connected();
    world.send(Header { flags: NO_MORE_RECEIVED, ..header(Op::Shutdown, PORT) });
    assert_eq!(pipe.0.borrow().shut, [Shutdown::Read]);
    pipe.say(b"too late");
    world.switch.event(token, READABLE);
    assert_eq!(world.all(), [(Op::Shutdown, NO_MORE_SENT)]);
    world.send_with(header(Op::Data, PORT), b"but I speak");
    assert_eq!(pipe.heard(), "but I speak");
}

#[test]
fn what_a_program_said_before_it_went_still_arrives() {
    let (mut world, token, pipe) = World::connected();
    pipe.say(&[b'x'; GUEST_ROOM as usize + 50]);
    pipe.0.borrow_mut().gone = true;
    world.switch.event(token, GONE);
    let data = (Op::Data, 0);
    let expected = [data, data, data, (Op::Shutdown, NO_MORE_RECEIVED), (Op::CreditRequest, 0)];
    assert_eq!(world.all(), expected);
    assert_eq!(world.next(), None, "the guest is asked for room once");
    // What the guest says meanwhile goes nowhere, and its room comes back.
    world.send_with(header(Op::Data, PORT), &[0; 40]);
    world.send(Header { fwd_cnt: GUEST_ROOM, ..header(Op::CreditUpdate, PORT) });
    assert_eq!(world.next().unwrap().1.len(), 50);
    assert_eq!(world.all(), [(Op::Shutdown, NO_MORE_SENT | NO_MORE_RECEIVED)]);
    world.send(header(Op::Reset, PORT));
    assert_eq!(world.open(), 0);
}

#[test]
fn bytes_that_nobody_will_take_do_not_keep_a_connection() {
    let (mut world, token, pipe) = World::connected();
    pipe.0.borrow_mut().room = 0;
    world.send_with(header(Op::Data, PORT), &[1; 100]);
    world.send(Header { flags: NO_MORE_RECEIVED | NO_MORE_SENT, ..header(Op::Shutdown, PORT) });
    assert_eq!((world.open(), world.switch.waiting()), (1, vec![100]), "the program may still take them");
    pipe.0.borrow_mut().gone = true;
    world.switch.event(token, GONE);
    assert_eq!((world.all(), world.open()), (vec![(Op::Reset, 0)], 0));
}

#[test]
fn the_guest_hears_of_room_when_the_program_has_taken_its_bytes() {
    let (mut world, token, pipe) = World::connected();
    pipe.0.borrow_mut().room = 0;
    let half = vec![1; ROOM as usize / 2];
    world.send_with(header(Op::Data, PORT), &half);
    world.send_with(header(Op::Data, PORT), &half);
    assert_eq!((world.all(), world.switch.waiting()), (vec![], vec![ROOM as usize]));
    pipe.0.borrow_mut().room = ROOM as usize;
    world.switch.event(token, WRITABLE);
    let (update, _) = world.next().unwrap();
    assert_eq!((update.op(), update.buf_alloc, update.fwd_cnt), (Some(Op::CreditUpdate), ROOM, ROOM));
    world.send(header(Op::CreditRequest, PORT));
    assert_eq!(world.all(), [(Op::CreditUpdate, 0)]);
    // A byte more than there is room for ends the connection.
    pipe.0.borrow_mut().room = 0;
    world.send_with(header(Op::Data, PORT), &half);
    world.send_with(header(Op::Data, PORT), &[&half[..], &[1]].concat());
    assert_eq!((world.all(), world.open()), (vec![(Op::Reset, 0)], 0));
    assert_eq!(world.switch.metrics().broken, 1);
}

#[test]
fn what_may_not_come_ends_its_connection_and_no_other() {
    for op in [Op::Request, Op::Response] {
        let (mut world, ..) = World::connected();
        world.send(header(op, PORT));
        assert_eq!((world.all(), world.open()), (vec![(Op::Reset, 0)], 0), "{op:?}");
    }
    for (op, kind) in
        [(0, STREAM), (8, STREAM), (u16::MAX, STREAM), (Op::Data as u16, 2), (Op::Reset as u16, 0)]
    {
        let (mut world, ..) = World::connected();
        world.send(Header { op, kind, ..header(Op::Data, PORT) });
        assert_eq!((world.all(), world.open()), (vec![(Op::Reset, 0)], 0), "{op} {kind}");
        world.send(Header { op, kind, ..header(Op::Data, PORT + 1) });
        assert_eq!(world.all(), [(Op::Reset, 0)], "{op} {kind} to nobody");
    }
    let (mut world, ..) = World::connected();
    for op in Op::ALL {
        world.send(header(op, PORT + 1));
        let expected = if op == Op::Reset { vec![] } else { vec![(Op::Reset, 0)] };
        assert_eq!((world.all(), world.open()), (expected, 1), "{op:?} to nobody");
    }
    // Not this guest's, or not for this host.
    for (src_cid, dst_cid) in [(GUEST_CID + 1, HOST_CID), (GUEST_CID, 3), (0, 0)] {
        world.send(Header { src_cid, dst_cid, ..header(Op::Request, PORT) });
        assert_eq!((world.all(), world.open()), (vec![], 1));
    }
    assert_eq!(world.switch.metrics().refused, 3);
    // After its SHUTDOWN a guest sends nothing.
    world.send(Header { flags: NO_MORE_SENT, ..header(Op::Shutdown, PORT) });
    world.send_with(header(Op::Data, PORT), b"x");
    assert_eq!((world.all(), world.open()), (vec![(Op::Reset, 0)], 0));
}

#[test]
fn there_are_only_so_many_connections_and_answers() {
    let mut world = World::new();
    let count = MAX_CONNECTIONS as u32 + 10;
    for port in 0..count {
        world.send(Header { src_port: port, ..header(Op::Request, PORT) });
    }
    assert_eq!((world.open(), world.host.0.len()), (MAX_CONNECTIONS as u64, MAX_CONNECTIONS));
    assert_eq!(world.switch.metrics().unanswered, 10);
    let token = world.switch.token();
    world.switch.add(token, Pipe::new("CONNECT 1\n"));
    assert_eq!(world.open(), MAX_CONNECTIONS as u64);
    let all = world.all();
    assert_eq!(all.iter().filter(|(op, _)| *op == Op::Reset).count(), 10);
    assert_eq!(all.iter().filter(|(op, _)| *op == Op::Response).count(), MAX_CONNECTIONS);
    for port in 0..MAX_RESETS as u32 + 5 {
        world.send(Header { src_port: count + port, ..header(Op::Data, PORT) });
    }
    assert_eq!((world.all().len(), world.switch.metrics().lost), (MAX_RESETS, 5));
}

#[test]
fn every_connection_gets_its_turn() {
    let mut world = World::new();
    for port in 0..3 {
        world.send(Header { src_port: port, ..header(Op::Request, PORT) });
    }
    world.all();
    for (token, pipe) in world.host.0.clone() {
        pipe.say(&[1; 250]);
        world.switch.event(token, READABLE);
    }
    let mut ports: Vec<u32> =
        (0..3).filter_map(|_| world.next()).map(|(header, _)| header.dst_port).collect();
    ports.sort_unstable();
    assert_eq!(ports, [0, 1, 2]);
}

/// A packet as the guest writes it.
fn bytes(header: Header, payload: &[u8]) -> Vec<u8> {
    [&header.bytes()[..], payload].concat()
}

#[test]
fn packets_without_their_bytes_end_their_connection_and_pieces_are_none() {
    let (mut world, _, pipe) = World::connected();
    let mut driver = Driver::new(16);
    let piece = driver.give(&bytes(header(Op::Data, PORT), &[])[..HEADER - 1]);
    let short = driver.give(&bytes(Header { len: 5, ..header(Op::Data, PORT) }, b"four"));
    let wrong_way = driver.want(100);
    for buffer in [piece, short, wrong_way] {
        driver.add(&[buffer]);
    }
    let mut scratch = vec![0; MAX_PACKET];
    transmit(&mut driver.queue(), &driver.memory, &mut world.switch, &mut world.host, &mut scratch).unwrap();
    assert_eq!((world.switch.metrics().refused, pipe.heard(), world.open()), (2, String::new(), 0));
    assert_eq!((world.all(), driver.used().len()), (vec![(Op::Reset, 0)], 3));
}

#[test]
fn packets_wait_for_buffers_and_those_without_room_come_back_empty() {
    let (mut world, token, pipe) = World::connected();
    pipe.say(b"hello");
    world.switch.event(token, READABLE);
    let mut driver = Driver::new(16);
    let mut queue = driver.queue();
    let memory = driver.memory.clone();
    let mut scratch = vec![0; MAX_PACKET];
    let turn = receive(&mut queue, &memory, &mut world.switch, &mut scratch).unwrap();
    assert!(!turn.interrupt && !turn.more);
    let (tiny, good, unused) =
        (driver.want(HEADER as u32 - 1), driver.want(HEADER as u32 + 3), driver.want(100));
    let (spare, last) = (driver.want(64), driver.want(64));
    for buffer in [tiny, good, unused, spare, last] {
        driver.add(&[buffer]);
    }
    let turn = receive(&mut queue, &memory, &mut world.switch, &mut scratch).unwrap();
    assert!(turn.interrupt && !turn.more);
    let header = HEADER as u32;
    assert_eq!(driver.used(), [(0, 0), (1, header + 3), (2, header + 2)]);
    assert_eq!(&driver.read(good)[HEADER..], b"hel");
    // The next ones were not taken, so they are there for what comes next.
    pipe.say(b"!");
    world.switch.event(token, READABLE);
    receive(&mut queue, &memory, &mut world.switch, &mut scratch).unwrap();
    assert_eq!(driver.used()[3..], [(3, header + 1)]);
}
