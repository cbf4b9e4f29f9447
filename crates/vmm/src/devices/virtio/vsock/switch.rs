//! All connections of one device: packets of the guest and events of sockets in, packets for the guest and bytes for sockets
//! out. Knows sockets by what they do ([`Socket`]), so that tests bring their own.
//!
//! Whatever the guest does, there are at most [`MAX_CONNECTIONS`] connections, each with at most [`ROOM`] bytes that wait, and
//! [`MAX_RESETS`] answers.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::net::Shutdown;

use super::connection::{Connection, Owed, Phase, ROOM, Taken};
use super::metrics::Metrics;
use super::packet::{HOST_CID, Header, Op, STREAM};

/// Most connections at a time, those included that are being made.
pub const MAX_CONNECTIONS: usize = 256;
/// Most RSTs that wait for buffers of the guest.
pub const MAX_RESETS: usize = 256;
/// Longest line that a host program begins with: `CONNECT 4294967295`, and room to spare.
const MAX_LINE: usize = 32;
/// First port that a host program's side is given.
const FIRST_PORT: u32 = 1 << 30;

/// A host program's socket. Nothing here waits.
pub trait Socket {
    /// Takes bytes; 0: the other side sends no more.
    ///
    /// # Errors
    /// `WouldBlock`, or the connection is gone.
    fn read(&mut self, target: &mut [u8]) -> io::Result<usize>;
    /// Passes bytes on.
    ///
    /// # Errors
    /// `WouldBlock`, or the connection is gone.
    fn write(&mut self, source: &[u8]) -> io::Result<usize>;
    /// Ends one direction.
    fn shut(&mut self, how: Shutdown);
}

/// The host's programs.
pub trait Host {
    /// Their sockets.
    type Socket: Socket;
    /// Connects to the program that listens on a port. Events of the socket carry this token.
    ///
    /// # Errors
    /// Nobody listens.
    fn connect(&mut self, port: u32, token: u64) -> io::Result<Self::Socket>;
}

/// What happened to a socket. Each stays true until a read or write says `WouldBlock`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Event {
    /// There are bytes, or their end.
    pub readable: bool,
    /// There is room.
    pub writable: bool,
    /// The other side is gone altogether; what it sent can still be read.
    pub gone: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Key {
    host_port: u32,
    guest_port: u32,
}

enum State {
    /// A host program has not said yet what it wants.
    Greeting(Vec<u8>),
    Linked(Key, Connection),
}

struct Link<S> {
    token: u64,
    socket: S,
    state: State,
    /// Bytes of the guest that the host program has not taken yet.
    waiting: VecDeque<u8>,
    readable: bool,
    gone: bool,
    /// The host program has been told that the guest sends no more.
    write_shut: bool,
}

/// What becomes of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Stays,
    /// It goes, and the guest knows.
    Goes,
    /// It goes, and the guest gets a RST.
    Reset,
}

/// The connections.
pub struct Switch<S> {
    guest_cid: u64,
    links: Vec<Link<S>>,
    /// Where the next look for a packet begins.
    turn: usize,
    resets: VecDeque<Key>,
    next_port: u32,
    next_token: u64,
    metrics: Metrics,
}

impl<S: Socket> Switch<S> {
    /// No connections yet. Tokens of sockets begin with 1.
    #[must_use]
    pub fn new(guest_cid: u64) -> Self {
        Self {
            guest_cid,
            links: Vec::new(),
            turn: 0,
            resets: VecDeque::new(),
            next_port: FIRST_PORT,
            next_token: 1,
            metrics: Metrics::default(),
        }
    }

    /// Ends everything at once: the guest has forgotten it, too.
    pub fn clear(&mut self) {
        self.links.clear();
        self.resets.clear();
    }

    /// Counters.
    #[must_use]
    pub fn metrics(&self) -> Metrics {
        Metrics { open: self.links.len() as u64, ..self.metrics }
    }

    /// Bytes of the guest that wait for host programs.
    #[cfg(test)]
    pub fn waiting(&self) -> Vec<usize> {
        self.links.iter().map(|link| link.waiting.len()).collect()
    }

    /// For what is noticed of packets before they come here.
    pub fn count_refused(&mut self) {
        self.metrics.refused += 1;
    }

    /// Whether there may be a packet for the guest, so that its buffers are needed.
    #[must_use]
    pub fn busy(&self) -> bool {
        let busy = |link: &Link<S>| match &link.state {
            State::Linked(_, connection) => link.readable || connection.owes(),
            State::Greeting(_) => false,
        };
        !self.resets.is_empty() || self.links.iter().any(busy)
    }

    /// Whether another connection has room.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.links.len() < MAX_CONNECTIONS
    }

    /// The token of the next socket.
    pub fn token(&mut self) -> u64 {
        self.next_token += 1;
        self.next_token - 1
    }

    /// A host program has come; it says next what it wants.
    pub fn add(&mut self, token: u64, socket: S) {
        if self.has_room() {
            self.push(token, socket, State::Greeting(Vec::new()));
        }
    }

    fn push(&mut self, token: u64, socket: S, state: State) {
        let waiting = VecDeque::new();
        self.links.push(Link {
            token,
            socket,
            state,
            waiting,
            readable: false,
            gone: false,
            write_shut: false,
        });
    }

    fn find(&self, key: Key) -> Option<usize> {
        self.links.iter().position(|link| matches!(link.state, State::Linked(other, _) if other == key))
    }

    /// Lets a link go, as its fate says.
    fn settle(&mut self, index: usize, fate: Fate) {
        if fate == Fate::Stays {
            return;
        }
        let link = self.links.swap_remove(index);
        if let (Fate::Reset, State::Linked(key, _)) = (fate, link.state) {
            self.reset(key);
        }
    }

    fn reset(&mut self, key: Key) {
        if self.resets.len() < MAX_RESETS {
            self.resets.push_back(key);
        } else {
            self.metrics.lost += 1;
        }
    }

    /// Something happened to a socket.
    pub fn event(&mut self, token: u64, event: Event) {
        let Some(index) = self.links.iter().position(|link| link.token == token) else { return };
        let link = &mut self.links[index];
        link.readable |= event.readable || event.gone;
        link.gone |= event.gone;
        let fate = match &mut link.state {
            State::Greeting(_) => self.greet(index),
            State::Linked(_, connection) => {
                if link.gone {
                    link.waiting.clear();
                    connection.host_stops_receiving();
                    connection.forwarded(connection.unforwarded());
                }
                match connection.phase() {
                    Phase::Asked if link.gone => Fate::Reset,
                    Phase::Asked => Fate::Stays,
                    Phase::Open if event.writable => link.flush(&mut self.metrics),
                    Phase::Open => link.fate(),
                }
            }
        };
        self.settle(index, fate);
    }

    /// Reads the line that a host program begins with, and not a byte more: what follows is for the guest.
    fn greet(&mut self, index: usize) -> Fate {
        let link = &mut self.links[index];
        let State::Greeting(line) = &mut link.state else { return Fate::Stays };
        loop {
            let mut byte = [0];
            match link.socket.read(&mut byte) {
                Ok(1) if byte[0] == b'\n' => break,
                Ok(1) if line.len() < MAX_LINE => line.push(byte[0]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    link.readable = false;
                    return if link.gone { Fate::Goes } else { Fate::Stays };
                }
                _ => return Fate::Goes,
            }
        }
        let Some(guest_port) = wanted_port(line) else { return Fate::Goes };
        if link.gone {
            return Fate::Goes;
        }
        let key = self.free_key(guest_port);
        self.links[index].state = State::Linked(key, Connection::asked());
        self.metrics.from_host += 1;
        Fate::Stays
    }

    /// A port for a host program's side. There are more ports than connections.
    fn free_key(&mut self, guest_port: u32) -> Key {
        loop {
            let key = Key { host_port: self.next_port, guest_port };
            self.next_port =
                self.next_port.checked_add(1).filter(|port| *port < u32::MAX).unwrap_or(FIRST_PORT);
            if self.find(key).is_none() {
                return key;
            }
        }
    }

    /// Takes a packet of the guest; `payload` is as long as its header says.
    pub fn from_guest<H: Host<Socket = S>>(&mut self, header: &Header, payload: &[u8], host: &mut H) {
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID {
            self.metrics.refused += 1;
            return;
        }
        let key = Key { host_port: header.dst_port, guest_port: header.src_port };
        match (self.find(key), header.op()) {
            (None, Some(Op::Reset)) => {}
            (None, Some(Op::Request)) => self.connect(key, header, host),
            (None, _) => self.reset(key),
            (Some(index), _) => {
                let fate = self.links[index].take(header, payload, &mut self.metrics);
                self.settle(index, fate);
            }
        }
    }

    fn connect<H: Host<Socket = S>>(&mut self, key: Key, request: &Header, host: &mut H) {
        let token = self.token();
        let socket = if self.has_room() { host.connect(key.host_port, token).ok() } else { None };
        match socket {
            Some(socket) => {
                self.push(token, socket, State::Linked(key, Connection::accepted(request)));
                self.metrics.from_guest += 1;
            }
            None => {
                self.metrics.unanswered += 1;
                self.reset(key);
            }
        }
    }

    /// The next packet for the guest, if there is one: its header, and how many bytes of `payload` go with it.
    pub fn for_guest(&mut self, payload: &mut [u8]) -> Option<(Header, usize)> {
        if let Some(key) = self.resets.pop_front() {
            return Some((self.header(key, Owed { op: Op::Reset, flags: 0 }, (0, 0), 0), 0));
        }
        for _ in 0..self.links.len() {
            self.turn = if self.turn + 1 < self.links.len() { self.turn + 1 } else { 0 };
            let link = &mut self.links[self.turn];
            let Some((key, owed, credit, count)) = link.for_guest(payload) else { continue };
            self.metrics.bytes_to_guest += count as u64;
            return Some((self.header(key, owed, credit, count), count));
        }
        None
    }

    fn header(&self, key: Key, owed: Owed, (buf_alloc, fwd_cnt): (u32, u32), count: usize) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: key.host_port,
            dst_port: key.guest_port,
            len: u32::try_from(count).unwrap_or(0),
            kind: STREAM,
            op: owed.op as u16,
            flags: owed.flags,
            buf_alloc,
            fwd_cnt,
        }
    }
}

/// The port of `CONNECT PORT`.
fn wanted_port(line: &[u8]) -> Option<u32> {
    let port = std::str::from_utf8(line).ok()?.strip_prefix("CONNECT ")?;
    port.bytes().all(|byte| byte.is_ascii_digit()).then(|| port.parse().ok())?
}

impl<S: Socket> Link<S> {
    /// A packet of the guest for this connection.
    fn take(&mut self, header: &Header, payload: &[u8], metrics: &mut Metrics) -> Fate {
        let State::Linked(key, connection) = &mut self.state else { return Fate::Stays };
        let receives = connection.guest_receives();
        match connection.take(header) {
            Taken::Gone => return Fate::Goes,
            Taken::Broken => {
                metrics.broken += 1;
                return Fate::Reset;
            }
            Taken::Accepted => {
                let line = format!("OK {}\n", key.host_port);
                // Nothing has been written to this socket before, so there is room; a program that is gone is noticed.
                if self.socket.write(line.as_bytes()).ok() != Some(line.len()) {
                    return Fate::Reset;
                }
            }
            Taken::Data => self.waiting.extend(payload),
            Taken::Noted => {}
        }
        if receives && !connection.guest_receives() {
            self.socket.shut(Shutdown::Read);
        }
        self.flush(metrics)
    }

    /// Passes on what waits, as far as the host program takes it.
    fn flush(&mut self, metrics: &mut Metrics) -> Fate {
        let State::Linked(_, connection) = &mut self.state else { return Fate::Stays };
        while !self.waiting.is_empty() {
            let result = if connection.host_receives() {
                self.socket.write(self.waiting.as_slices().0)
            } else {
                Err(ErrorKind::BrokenPipe.into())
            };
            let count = match result {
                Ok(count) if count > 0 => {
                    metrics.bytes_to_host += count as u64;
                    count
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => 0,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Fate::Stays,
                // Nobody will take it.
                _ => {
                    connection.host_stops_receiving();
                    self.waiting.len()
                }
            };
            self.waiting.drain(..count);
            connection.forwarded(u32::try_from(count).unwrap_or(u32::MAX));
        }
        // What an idle connection costs is its entry.
        self.waiting = VecDeque::new();
        if !connection.guest_sends() && !self.write_shut {
            self.write_shut = true;
            self.socket.shut(Shutdown::Write);
        }
        self.fate()
    }

    fn fate(&self) -> Fate {
        match &self.state {
            State::Linked(_, connection) if connection.over() => Fate::Reset,
            _ => Fate::Stays,
        }
    }

    /// A packet for the guest.
    fn for_guest(&mut self, payload: &mut [u8]) -> Option<(Key, Owed, (u32, u32), usize)> {
        let State::Linked(key, connection) = &mut self.state else { return None };
        let (owed, count) = match connection.greeting() {
            Some(greeting) => (greeting, 0),
            None => match read(&mut self.socket, &mut self.readable, connection, payload) {
                0 => (connection.next_owed()?, 0),
                count => (Owed { op: Op::Data, flags: 0 }, count),
            },
        };
        Some((*key, owed, connection.credit(), count))
    }
}

/// Reads what the guest has room for.
fn read<S: Socket>(
    socket: &mut S,
    readable: &mut bool,
    connection: &mut Connection,
    payload: &mut [u8],
) -> usize {
    if !*readable {
        return 0;
    }
    if !connection.guest_receives() {
        // Whatever the program still says, nobody hears it.
        connection.host_stops_sending();
        *readable = false;
        return 0;
    }
    let room = payload.len().min(connection.room() as usize);
    if room == 0 {
        connection.want_room();
        return 0;
    }
    loop {
        match socket.read(&mut payload[..room]) {
            Ok(0) => connection.host_stops_sending(),
            Ok(count) => {
                connection.sent(u32::try_from(count).unwrap_or(0));
                return count;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => {
                connection.host_stops_sending();
                connection.host_stops_receiving();
            }
        }
        *readable = false;
        return 0;
    }
}

const _: () = assert!(MAX_CONNECTIONS * ROOM as usize <= 16 << 20, "what a guest can make the monitor hold");
