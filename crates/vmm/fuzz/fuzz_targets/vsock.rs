//! Packets of vsock connections, and what host programs do meanwhile.
#![no_main]

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use roost_vmm::devices::virtio::vsock::packet::{HOST_CID, Header};
use roost_vmm::devices::virtio::vsock::queue::{MAX_PACKET, receive, transmit};
use roost_vmm::devices::virtio::vsock::switch::{Event, MAX_CONNECTIONS, Switch};
use roost_vmm_fuzz::guest::{self, Batch, Place, Ring, Setup};
use roost_vmm_fuzz::host::{Pipe, Programs};
use vm_memory::{Bytes, GuestAddress};

const GUEST_CID: u64 = 7;

#[derive(Arbitrary, Debug)]
enum Step {
    /// A header lies in slot 0, what the batch says is sent.
    Send {
        op: u8,
        kind: bool,
        from: u8,
        to: u8,
        length: u16,
        flags: u8,
        room: u32,
        taken: u32,
        batch: Batch,
    },
    /// A packet that never sees a queue: long sequences of them are cheap.
    Pass {
        op: u8,
        from: u8,
        to: u8,
        length: u8,
        flags: u8,
        room: u32,
        taken: u32,
    },
    Receive(Batch),
    Come(Vec<u8>),
    Say(u8, Vec<u8>),
    Room(u8, u16),
    Silence(u8),
    Leave(u8),
    Event {
        who: u8,
        readable: bool,
        writable: bool,
        gone: bool,
    },
}

fn header(op: u8, kind: bool, from: u8, to: u8, length: u32, flags: u8, credit: (u32, u32)) -> Header {
    Header {
        src_cid: GUEST_CID,
        dst_cid: HOST_CID,
        src_port: from.into(),
        dst_port: to.into(),
        len: length,
        kind: if kind { 1 } else { u16::from(op) },
        op: u16::from(op % 9),
        flags: flags.into(),
        buf_alloc: credit.0,
        fwd_cnt: credit.1,
    }
}

fuzz_target!(|input: (Setup, Setup, Vec<Step>)| {
    let (receiving, sending, steps) = input;
    let memory = guest::memory();
    let mut rx = Ring::new(&memory, receiving, 0);
    let mut tx = Ring::new(&memory, sending, 1);
    let mut scratch = vec![0; MAX_PACKET];
    let mut switch = Switch::<Pipe>::new(GUEST_CID);
    let mut host = Programs::default();
    for step in steps.into_iter().take(64) {
        let program = |host: &Programs, who: u8| host.0.get(usize::from(who)).cloned();
        match step {
            Step::Send { op, kind, from, to, length, flags, room, taken, batch } => {
                tx.write(&memory, &batch);
                let header = header(op, kind, from, to, length.into(), flags, (room, taken));
                memory.write_slice(&header.bytes(), GuestAddress(Place::Slot(0, 0).address())).unwrap();
                let turn = |queue: &mut _| transmit(queue, &memory, &mut switch, &mut host, &mut scratch);
                if tx.turn(&memory, turn).is_err() {
                    return;
                }
            }
            Step::Pass { op, from, to, length, flags, room, taken } => {
                let header = header(op, true, from, to, length.into(), flags, (room, taken));
                switch.from_guest(&header, &vec![3; length.into()], &mut host);
            }
            Step::Receive(batch) => {
                rx.write(&memory, &batch);
                if rx.turn(&memory, |queue| receive(queue, &memory, &mut switch, &mut scratch)).is_err() {
                    return;
                }
            }
            Step::Come(line) => {
                let (token, pipe) = (switch.token(), Pipe::default());
                pipe.0.borrow_mut().says.extend(line);
                pipe.0.borrow_mut().room = 100;
                switch.add(token, pipe.clone());
                host.0.push((token, pipe));
                switch.event(token, Event { readable: true, ..Event::default() });
            }
            Step::Say(who, bytes) => {
                if let Some((_, pipe)) = program(&host, who) {
                    pipe.0.borrow_mut().says.extend(bytes);
                }
            }
            Step::Room(who, room) => {
                if let Some((_, pipe)) = program(&host, who) {
                    pipe.0.borrow_mut().room += usize::from(room);
                }
            }
            Step::Silence(who) => {
                if let Some((_, pipe)) = program(&host, who) {
                    pipe.0.borrow_mut().silent = true;
                }
            }
            Step::Leave(who) => {
                if let Some((_, pipe)) = program(&host, who) {
                    pipe.0.borrow_mut().gone = true;
                }
            }
            Step::Event { who, readable, writable, gone } => {
                if let Some((token, _)) = program(&host, who) {
                    switch.event(token, Event { readable, writable, gone });
                }
            }
        }
        assert!(switch.metrics().open <= MAX_CONNECTIONS as u64);
    }
    // Whatever came before: there is an end of packets, and each is well formed.
    let mut left = 10_000;
    let mut payload = [0; 500];
    for program in &host.0 {
        program.1.0.borrow_mut().says.truncate(1000);
    }
    while let Some((header, count)) = switch.for_guest(&mut payload) {
        assert!(header.len as usize == count && count <= payload.len());
        left -= 1;
        assert!(left > 0, "there is no end of packets");
    }
});
