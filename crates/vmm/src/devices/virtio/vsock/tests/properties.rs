//! Whatever both sides do: bytes arrive whole, and nothing grows beyond its bounds.

use proptest::prelude::*;

use super::super::connection::{Connection, Phase, ROOM, Taken};
use super::super::packet::{HEADER, Header, Op};
use super::super::queue::{MAX_PACKET, receive, transmit};
use super::super::switch::{Event, MAX_CONNECTIONS};
use super::{GUEST_ROOM, PORT, READABLE, WRITABLE, World, bytes, header};
use crate::devices::virtio::testing::{Driver, hostile, pieces};

/// What happens in a world where both sides keep the rules.
#[derive(Clone, Debug)]
enum Step {
    GuestSends(u32),
    GuestTakes(u32),
    ProgramSays(usize),
    ProgramTakes(usize),
    Deliver(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (1..40_000_u32).prop_map(Step::GuestSends),
        (1..300_u32).prop_map(Step::GuestTakes),
        (1..400_usize).prop_map(Step::ProgramSays),
        (1..50_000_usize).prop_map(Step::ProgramTakes),
        (0..200_usize).prop_map(Step::Deliver),
    ]
}

/// A guest's end of a connection, which keeps the rules.
#[derive(Default)]
struct Guest {
    sent: u32,
    peer_room: u32,
    peer_forwarded: u32,
    got: Vec<u8>,
    taken: u32,
}

fn nth(n: usize) -> u8 {
    (n % 251) as u8
}

impl Guest {
    fn header(&self, op: Op) -> Header {
        Header { fwd_cnt: self.taken, ..header(op, PORT) }
    }

    fn send(&mut self, world: &mut World, wanted: u32) {
        let room = self.peer_room - self.sent.wrapping_sub(self.peer_forwarded);
        let from = self.sent as usize;
        let payload: Vec<u8> = (from..from + wanted.min(room) as usize).map(nth).collect();
        self.sent += payload.len() as u32;
        world.send_with(self.header(Op::Data), &payload);
    }

    fn take(&mut self, world: &mut World, wanted: u32) {
        self.taken += wanted.min(self.got.len() as u32 - self.taken);
        world.send(self.header(Op::CreditUpdate));
    }

    fn deliver(&mut self, world: &mut World, room: usize) {
        let mut payload = vec![0; room];
        let Some((header, count)) = world.switch.for_guest(&mut payload) else { return };
        assert_ne!(header.op(), Some(Op::Reset), "both sides kept the rules");
        self.got.extend(&payload[..count]);
        assert!(self.got.len() as u32 - self.taken <= GUEST_ROOM, "more than there is room for");
        (self.peer_room, self.peer_forwarded) = (header.buf_alloc, header.fwd_cnt);
    }
}

proptest! {
    /// Bytes arrive in order, each once, in both directions, and nobody is sent more than it has room for.
    #[test]
    fn streams_arrive_whole(steps in proptest::collection::vec(step(), 1..120)) {
        let (mut world, token, pipe) = World::connected();
        let mut guest = Guest { peer_room: ROOM, ..Guest::default() };
        let mut said = 0;
        for step in steps {
            match step {
                Step::GuestSends(count) => guest.send(&mut world, count),
                Step::GuestTakes(count) => guest.take(&mut world, count),
                Step::ProgramSays(count) => {
                    pipe.say(&(said..said + count).map(nth).collect::<Vec<_>>());
                    said += count;
                    world.switch.event(token, READABLE);
                }
                Step::ProgramTakes(count) => {
                    pipe.0.borrow_mut().room += count;
                    world.switch.event(token, WRITABLE);
                }
                Step::Deliver(room) => guest.deliver(&mut world, room),
            }
            prop_assert!(world.switch.waiting()[0] <= ROOM as usize);
        }
        pipe.0.borrow_mut().room = usize::MAX;
        world.switch.event(token, WRITABLE);
        while guest.got.len() < said {
            let before = guest.got.len();
            guest.take(&mut world, u32::MAX);
            guest.deliver(&mut world, 200);
            guest.deliver(&mut world, 200);
            prop_assert!(guest.got.len() > before, "it stands still at {} of {}", before, said);
        }
        // And the guest can go on sending: it has been told of room.
        guest.deliver(&mut world, 0);
        let before = guest.sent;
        guest.send(&mut world, 1);
        prop_assert_eq!(guest.sent, before + 1);
        prop_assert_eq!(&guest.got, &(0..said).map(nth).collect::<Vec<_>>());
        prop_assert_eq!(&pipe.0.borrow().hears, &(0..guest.sent as usize).map(nth).collect::<Vec<_>>());
    }

    /// What a guest has been told it may send is taken, and a byte more than there is room for is not.
    #[test]
    fn room_is_kept_to_the_byte(
        steps in proptest::collection::vec((0..ROOM, 0..ROOM, any::<bool>()), 1..60), start in any::<u32>(),
    ) {
        let request = Header { fwd_cnt: start, ..header(Op::Request, PORT) };
        let mut connection = Connection::accepted(&request);
        connection.greeting();
        let (mut room, mut told) = connection.credit();
        let mut sent = 0_u32;
        for (send, forward, hear) in steps {
            let may = room - sent.wrapping_sub(told);
            let length = send.min(may);
            let data = |len| Header { len, ..header(Op::Data, PORT) };
            let over = ROOM - connection.unforwarded() + 1;
            prop_assert_eq!(connection.clone().take(&data(over)), Taken::Broken);
            prop_assert_eq!(connection.take(&data(length)), Taken::Data);
            sent = sent.wrapping_add(length);
            connection.forwarded(forward.min(connection.unforwarded()));
            // A guest that cannot send is told as soon as it can.
            if room == sent.wrapping_sub(told) && connection.unforwarded() < ROOM {
                prop_assert!(connection.owes());
            }
            if hear {
                (room, told) = connection.credit();
            }
        }
    }

    /// Whatever the guest claims about its room: it is not sent more than it says, and nothing overflows.
    #[test]
    fn a_guest_that_lies_about_its_room_is_sent_no_more_than_it_says(
        claims in proptest::collection::vec((any::<u32>(), any::<u32>(), any::<u16>()), 1..40),
    ) {
        let mut connection = Connection::accepted(&header(Op::Request, PORT));
        for (buf_alloc, fwd_cnt, count) in claims {
            connection.take(&Header { buf_alloc, fwd_cnt, ..header(Op::CreditUpdate, PORT) });
            prop_assert!(connection.room() <= buf_alloc);
            connection.want_room();
            connection.sent(u32::from(count).min(connection.room()));
        }
        prop_assert_eq!(connection.phase(), Phase::Open);
    }

    /// Any packets and any events of sockets: the bounds hold, and every packet for the guest is well formed.
    #[test]
    fn a_hostile_guest_gets_no_more_than_its_share(
        steps in proptest::collection::vec(
            (0..10_u16, 0..3_u16, 0..6_u32, 0..4_u32, any::<(u32, u32)>(), 0..70_000_usize, any::<(bool, bool, bool)>()),
            1..300,
        ),
    ) {
        let mut world = World::new();
        for (op, kind, port, flags, (buf_alloc, fwd_cnt), length, (readable, writable, gone)) in steps {
            let packet = Header { op, kind, flags, buf_alloc, fwd_cnt, src_port: port, ..header(Op::Data, PORT + port / 4) };
            world.send_with(packet, &vec![0; length]);
            if let Some((token, pipe)) = world.host.0.get(port as usize) {
                pipe.say(&[7; 10]);
                pipe.0.borrow_mut().gone |= gone;
                world.switch.event(*token, Event { readable, writable, gone });
            }
            if readable {
                world.next();
            }
            prop_assert!(world.open() <= MAX_CONNECTIONS as u64);
            prop_assert!(world.switch.waiting().iter().all(|waiting| *waiting <= ROOM as usize));
        }
        let mut left = 10_000;
        while world.next().is_some() {
            left -= 1;
            prop_assert!(left > 0, "there is no end of packets");
        }
    }

    #[test]
    fn a_packet_arrives_however_it_is_cut(cuts in pieces(HEADER + 60)) {
        let (mut world, _, pipe) = World::connected();
        let packet = bytes(Header { len: 60, ..header(Op::Data, PORT) }, &(0..60).map(nth).collect::<Vec<_>>());
        let mut driver = Driver::new(16);
        let mut at = 0;
        let chain: Vec<_> = cuts.iter().map(|cut| { at += cut; driver.give(&packet[at - cut..at]) }).collect();
        driver.add(&chain);
        let mut scratch = vec![0; MAX_PACKET];
        transmit(&mut driver.queue(), &driver.memory, &mut world.switch, &mut world.host, &mut scratch).unwrap();
        prop_assert_eq!(&pipe.0.borrow().hears, &(0..60).map(nth).collect::<Vec<_>>());
    }

    #[test]
    fn hostile_queues_are_survived(sent in hostile(), wanted in hostile()) {
        let (mut world, token, pipe) = World::connected();
        let mut scratch = vec![0; MAX_PACKET];
        let driver = Driver::new(16);
        sent.write(&driver);
        let _ = transmit(&mut driver.queue(), &driver.memory, &mut world.switch, &mut world.host, &mut scratch);
        pipe.say(&[1; 500]);
        world.switch.event(token, READABLE);
        let driver = Driver::new(16);
        wanted.write(&driver);
        let _ = receive(&mut driver.queue(), &driver.memory, &mut world.switch, &mut scratch);
    }
}
