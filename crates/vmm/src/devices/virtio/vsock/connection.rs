//! One connection, as a state machine without sockets, queues or bytes: what arrived and what happened go in, what is owed
//! to the guest comes out.
//!
//! ```text
//!   host program: CONNECT ──▶ Asked ──RESPONSE──▶ Open ◀── REQUEST, and a host program listens
//!                              │ RST               │ RST · a broken rule · both ends of the guest shut, all forwarded
//!                              ▼                   ▼
//!                             gone                gone
//! ```
//! Each direction has credit (virtio 1.2, 5.10.6.3): a side sends only what the other has said it has room for. Counters run
//! on for ever and wrap.

use super::packet::{Header, NO_MORE_RECEIVED, NO_MORE_SENT, Op};

/// Room for what the guest sends on one connection and the host program has not taken yet, bytes.
pub const ROOM: u32 = 64 * 1024;

/// Where a connection stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// A host program wants it; the guest has not answered.
    Asked,
    /// Bytes may flow.
    Open,
}

/// What a packet of the guest means for its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// It was noted.
    Noted,
    /// The guest has accepted.
    Accepted,
    /// Its bytes go to the host program.
    Data,
    /// The guest ended the connection.
    Gone,
    /// It may not come now, or not at all: the connection ends with a RST.
    Broken,
}

/// A packet without bytes that the guest is owed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owed {
    /// Its kind.
    pub op: Op,
    /// Its flags.
    pub flags: u32,
}

/// What one side still does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Side {
    sends: bool,
    receives: bool,
}

const BOTH: Side = Side { sends: true, receives: true };

/// One connection.
#[derive(Clone, Debug)]
pub struct Connection {
    phase: Phase,
    guest: Side,
    host: Side,
    /// REQUEST or RESPONSE.
    greeting: Option<Op>,
    /// The guest does not know how much room it has.
    credit_owed: bool,
    /// The guest was asked for room and has not said anything since.
    credit_asked: bool,
    credit_wanted: bool,
    /// Flags of the last SHUTDOWN that the guest was sent.
    shut: u32,
    /// Bytes from the guest: arrived, passed on, and passed on as far as the guest has been told.
    received: u32,
    forwarded: u32,
    told: u32,
    /// Bytes to the guest: sent, taken by its program, and the room that it has for both.
    sent: u32,
    peer_forwarded: u32,
    peer_room: u32,
}

impl Connection {
    fn new(phase: Phase, greeting: Op) -> Self {
        Self {
            phase,
            guest: BOTH,
            host: BOTH,
            greeting: Some(greeting),
            credit_owed: false,
            credit_asked: false,
            credit_wanted: false,
            shut: 0,
            received: 0,
            forwarded: 0,
            told: 0,
            sent: 0,
            peer_forwarded: 0,
            peer_room: 0,
        }
    }

    /// A host program wants it.
    #[must_use]
    pub fn asked() -> Self {
        Self::new(Phase::Asked, Op::Request)
    }

    /// The guest asked with this REQUEST, and a host program has taken it.
    #[must_use]
    pub fn accepted(request: &Header) -> Self {
        let mut this = Self::new(Phase::Open, Op::Response);
        this.note_credit(request);
        this
    }

    /// Where it stands.
    #[must_use]
    pub const fn phase(&self) -> Phase {
        self.phase
    }

    /// Every packet says how much room its sender has.
    fn note_credit(&mut self, header: &Header) {
        (self.peer_room, self.peer_forwarded) = (header.buf_alloc, header.fwd_cnt);
        self.credit_asked = false;
    }

    /// Takes a packet of the guest.
    pub fn take(&mut self, header: &Header) -> Taken {
        let Some(op) = header.op() else { return Taken::Broken };
        self.note_credit(header);
        match (self.phase, op) {
            (_, Op::Reset) => Taken::Gone,
            (Phase::Asked, Op::Response) => {
                self.phase = Phase::Open;
                Taken::Accepted
            }
            (Phase::Open, Op::Data) if self.guest.sends && header.len <= self.room_for_guest() => {
                self.received = self.received.wrapping_add(header.len);
                Taken::Data
            }
            (Phase::Open, Op::Shutdown) => {
                self.guest.sends &= header.flags & NO_MORE_SENT == 0;
                self.guest.receives &= header.flags & NO_MORE_RECEIVED == 0;
                Taken::Noted
            }
            (Phase::Open, Op::CreditUpdate) => Taken::Noted,
            (Phase::Open, Op::CreditRequest) => {
                self.credit_owed = true;
                Taken::Noted
            }
            _ => Taken::Broken,
        }
    }

    /// Room that is not taken by bytes of the guest.
    fn room_for_guest(&self) -> u32 {
        ROOM.saturating_sub(self.unforwarded())
    }

    /// So many bytes of the guest have been passed on.
    pub fn forwarded(&mut self, count: u32) {
        self.forwarded = self.forwarded.wrapping_add(count);
        // The guest counts what it sent and what it was told; below half of the room it hears that there is more.
        let known = ROOM.saturating_sub(self.received.wrapping_sub(self.told));
        self.credit_owed |= known < ROOM / 2 && self.told != self.forwarded;
    }

    /// Bytes of the guest that have not been passed on.
    #[must_use]
    pub const fn unforwarded(&self) -> u32 {
        self.received.wrapping_sub(self.forwarded)
    }

    /// How many bytes the guest takes now.
    #[must_use]
    pub fn room(&self) -> u32 {
        let flows = self.phase == Phase::Open && self.host.sends && self.guest.receives;
        let waiting = self.sent.wrapping_sub(self.peer_forwarded);
        if flows { self.peer_room.saturating_sub(waiting) } else { 0 }
    }

    /// So many bytes have been sent to the guest.
    pub fn sent(&mut self, count: u32) {
        self.sent = self.sent.wrapping_add(count);
    }

    /// There are bytes for the guest, and it has no room.
    pub fn want_room(&mut self) {
        let flows = self.phase == Phase::Open && self.host.sends && self.guest.receives;
        self.credit_wanted |= flows && self.room() == 0 && !self.credit_asked;
    }

    /// The host program sends no more, and all that it sent has been read.
    pub fn host_stops_sending(&mut self) {
        self.host.sends = false;
    }

    /// The host program takes no more.
    pub fn host_stops_receiving(&mut self) {
        self.host.receives = false;
    }

    /// Whether the host program takes bytes.
    #[must_use]
    pub const fn host_receives(&self) -> bool {
        self.host.receives
    }

    /// Whether the guest sends bytes.
    #[must_use]
    pub const fn guest_sends(&self) -> bool {
        self.guest.sends
    }

    /// Whether the guest takes bytes.
    #[must_use]
    pub const fn guest_receives(&self) -> bool {
        self.guest.receives
    }

    /// Whether all that is left is a RST: the guest has shut both directions, and what it sent has been passed on.
    #[must_use]
    pub fn over(&self) -> bool {
        !self.guest.sends && !self.guest.receives && self.received == self.forwarded
    }

    /// The flags of the SHUTDOWN that says what the host program does no more.
    const fn shut_now(&self) -> u32 {
        let sent = if self.host.sends { 0 } else { NO_MORE_SENT };
        sent | if self.host.receives { 0 } else { NO_MORE_RECEIVED }
    }

    /// Whether the guest is owed something.
    #[must_use]
    pub fn owes(&self) -> bool {
        let later = self.shut_now() != self.shut || self.credit_owed || self.credit_wanted;
        self.greeting.is_some() || (self.phase == Phase::Open && later)
    }

    /// The REQUEST or RESPONSE, which goes before everything. It counts as sent.
    pub fn greeting(&mut self) -> Option<Owed> {
        self.greeting.take().map(|op| Owed { op, flags: 0 })
    }

    /// What the guest is owed when there are no bytes for it, which say the same of credit. It counts as sent.
    pub fn next_owed(&mut self) -> Option<Owed> {
        let owed = |op, flags| Some(Owed { op, flags });
        if self.phase == Phase::Asked {
            return None;
        }
        let shut = self.shut_now();
        if shut != self.shut {
            self.shut = shut;
            return owed(Op::Shutdown, shut);
        }
        if std::mem::take(&mut self.credit_owed) {
            return owed(Op::CreditUpdate, 0);
        }
        if std::mem::take(&mut self.credit_wanted) {
            self.credit_asked = true;
            return owed(Op::CreditRequest, 0);
        }
        None
    }

    /// Room and count for a packet that goes to the guest now; it is told by that.
    pub fn credit(&mut self) -> (u32, u32) {
        self.told = self.forwarded;
        self.credit_owed = false;
        (ROOM, self.forwarded)
    }
}
