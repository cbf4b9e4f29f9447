//! Guests that attack an interface of two pairs of queues and its control queue, as `hostile.rs` attacks the others; where the host
//! has vhost-net, the kernel that serves the pairs too.

// Tests build bytes out of numbers whose size they know.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use std::fs::File;

use common::hostile::{BUFFER, CANARY, LOOKS, canary, queue};
use common::machines::{SEVERAL_PAIRS, use_pairs};
use common::virtio::{Device, INDIRECT, NEXT, Ring, WINDOW, WRITE, register};
use common::{Code, Machine, hand_over, tap};
use serde_json::json;

const MEMORY_END: u64 = 16 << 20;
const NET: Device = Device(0);
const CONTROL: u32 = 4;
const QUEUES: u32 = 5;
const FEATURES: u32 = SEVERAL_PAIRS | 1 << 28;
/// Where commands are, and what the device answers to them.
const COMMAND: u32 = 0x90_0000;
const ANSWER: u32 = COMMAND + 0x1000;
const UNANSWERED: u32 = 0xa5;
const REFUSED: u32 = 1;

/// Sets these queues up, empty.
fn set_up(code: Code, features: u32, queues: impl Iterator<Item = u32>) -> Code {
    let code = queues.fold(NET.negotiate(code, features), |code, n| {
        let ring = queue(n);
        let code = code.store(ring.available(), 0).store(ring.used(), 0).store(canary(ring), CANARY);
        NET.queue(code, ring)
    });
    NET.go(code)
}

fn packet(code: Code, ring: Ring) -> Code {
    let code = ring.descriptor(code, 0, BUFFER.into(), 72, 0, 0);
    NET.notify(ring.offer(code, 0, 0), ring.queue).wait16(ring.used_index(), 1)
}

/// Runs an attack, then a good driver that uses both pairs; with the monitor's own data path, and with the kernel's.
fn attack(name: &str, taps: &[File], attack: impl Fn(Code) -> Code) {
    let code = attack(set_up(Code::default(), FEATURES, 0..QUEUES));
    let code = (0..QUEUES).fold(code, |code, n| code.expect32(canary(queue(n)), CANARY));
    let code = use_pairs(set_up(code, FEATURES, 0..QUEUES), NET, queue(CONTROL), 0, 2, 0);
    let code = packet(packet(code, queue(1)), queue(3)).print("alive").power_off();
    for vhost in [false, true] {
        if vhost && !std::path::Path::new("/dev/vhost-net").exists() {
            eprintln!("NOT RUN: the kernel's data path needs /dev/vhost-net");
            continue;
        }
        // The last line says where a guest hangs.
        eprintln!("{name}, vhost {vhost}");
        let mut machine = Machine::new(&code);
        machine.config["machine-config"]["on_reset"] = json!("exit");
        machine.config["network-interfaces"] =
            json!([{ "iface_id": "eth0", "host_dev_name": "tap", "num_queue_pairs": 2, "vhost": vhost }]);
        machine.start(&[hand_over("tap", &taps[0]), hand_over("tap.1", &taps[1])].concat());
        let ended = machine.wait();
        let is = (ended.code, ended.console.as_str());
        assert_eq!(is, (0, "alive"), "{name}, vhost {vhost}: {}", ended.stderr);
        assert!(!ended.stderr.contains("internal fault"), "{name}, vhost {vhost}: {}", ended.stderr);
    }
}

/// Makes one chain available, rings, and gives the device a while.
fn submit(code: Code, ring: Ring, head: u16) -> Code {
    NET.notify(ring.offer(code, 0, head), ring.queue).look16(ring.used_index(), 1, LOOKS)
}

/// A command, and where the answer goes: address, length and flags of both.
type Piece = (u64, u32, u16);

/// Gives the device a command of these bytes in these pieces, which come back; the answer must be this.
fn command(code: Code, bytes: u32, pieces: &[Piece], answer: u32) -> Code {
    let ring = queue(CONTROL);
    let code = code.store(COMMAND, bytes).store(ANSWER, UNANSWERED);
    let last = pieces.len() as u16 - 1;
    let code = pieces.iter().zip(0..).fold(code, |code, ((address, length, flags), n)| {
        let next = if n == last { 0 } else { NEXT };
        ring.descriptor(code, n, *address, *length, flags | next, n + 1)
    });
    let code = NET.notify(ring.offer(code, 0, 0), CONTROL).wait16(ring.used_index(), 1);
    code.expect32(ANSWER, answer)
}

/// The command that makes so many pairs work.
const fn pairs(count: u32) -> u32 {
    4 | count << 16
}

#[test]
fn commands_that_are_none() {
    let Some((taps, _wire)) = tap::create_several(2) else { return };
    let asked: Piece = (COMMAND.into(), 4, 0);
    let answered: Piece = (ANSWER.into(), 1, WRITE);
    let ask = |name: &str, bytes: u32, pieces: &[Piece], answer: u32| {
        attack(name, &taps, |code| command(code, bytes, pieces, answer));
    };
    for count in [0, 3, 8, 0x8000, 0xffff] {
        ask(&format!("{count} pairs"), pairs(count), &[asked, answered], REFUSED);
    }
    // Every class that the standard has and two that it has not; every other command of this class.
    for kind in (0..8).filter(|kind| *kind != 4).chain([0xff]).chain([0x104, 0x204, 0xff04]) {
        ask(&format!("command {kind:#x}"), kind | 1 << 16, &[asked, answered], REFUSED);
    }
    for length in 1..4 {
        let piece = (COMMAND.into(), length, 0);
        ask(&format!("{length} bytes"), pairs(1), &[piece, answered], REFUSED);
    }
    // As long as a page, which is as long as can be, is a command with more behind it.
    ask("4095 bytes", pairs(2), &[(COMMAND.into(), 4095, 0), answered], 0);
    for (name, pieces, answer) in [
        ("no bytes", &[(COMMAND.into(), 0, 0), answered][..], REFUSED),
        ("too many bytes", &[(COMMAND.into(), 1 << 20, 0), answered], UNANSWERED),
        ("nowhere to answer", &[asked], UNANSWERED),
        ("no room to answer", &[asked, (ANSWER.into(), 0, WRITE)], UNANSWERED),
        ("an answer that is no command", &[answered], REFUSED),
        ("the answer first", &[answered, asked], UNANSWERED),
        ("from outside of memory", &[(MEMORY_END, 4, 0), answered], UNANSWERED),
        ("from the device's registers", &[(WINDOW.into(), 4, 0), answered], UNANSWERED),
        ("to outside of memory", &[asked, (MEMORY_END, 1, WRITE)], UNANSWERED),
        ("across the end of memory", &[asked, (MEMORY_END - 1, 2, WRITE)], UNANSWERED),
        ("in pieces", &[(COMMAND.into(), 1, 0), (u64::from(COMMAND) + 1, 3, 0), answered], 0),
        ("over itself", &[asked, (COMMAND.into(), 1, WRITE)], UNANSWERED),
        ("over its own used ring", &[asked, (queue(CONTROL).used().into(), 1, WRITE)], UNANSWERED),
    ] {
        ask(name, pairs(2), pieces, answer);
    }
}

#[test]
fn chains_that_loop_on_every_queue() {
    let Some((taps, _wire)) = tap::create_several(2) else { return };
    let flags = |n: u32| if n.is_multiple_of(2) && n != CONTROL { WRITE } else { 0 };
    let both = |code| use_pairs(code, NET, queue(CONTROL), 0, 2, 0);
    // One queue after the other, and all at once; a driver whose command came through uses both pairs.
    for queues in (0..QUEUES).map(|n| n..n + 1).chain([0..CONTROL, 0..QUEUES]) {
        let name = |what: &str| format!("{what} in {queues:?}");
        let start = |code| if queues.contains(&CONTROL) { code } else { both(code) };
        let all = |code: Code, chain: &dyn Fn(Code, Ring, u16) -> Code| {
            queues.clone().fold(start(code), |code, n| submit(chain(code, queue(n), flags(n)), queue(n), 0))
        };
        attack(&name("to itself"), &taps, |code| {
            all(code, &|code, ring, flags| ring.descriptor(code, 0, BUFFER.into(), 16, NEXT | flags, 0))
        });
        attack(&name("round and round"), &taps, |code| {
            all(code, &|code, ring, flags| {
                (0..8).fold(code, |code, n| {
                    ring.descriptor(code, n, BUFFER.into(), 16, NEXT | flags, (n + 1) % 8)
                })
            })
        });
        attack(&name("an indirect table that loops"), &taps, |code| {
            all(code, &|code, ring, flags| {
                let table = Ring { base: ring.base + 0x8_0000, ..ring };
                let code = table.descriptor(code, 0, BUFFER.into(), 16, NEXT | flags, 1);
                let code = table.descriptor(code, 1, BUFFER.into(), 16, NEXT | flags, 0);
                ring.descriptor(code, 0, table.base.into(), 32, INDIRECT, 0)
            })
        });
    }
}

/// Pairs come and go while packets are under way in both, and bells ring for queues that are not in use.
#[test]
fn pairs_that_come_and_go() {
    let Some((taps, _wire)) = tap::create_several(2) else { return };
    attack("a storm of commands", &taps, |code| {
        let ring = queue(CONTROL);
        let code = code.store(COMMAND, pairs(1)).store(COMMAND + 8, pairs(2)).store(COMMAND + 16, pairs(3));
        let code = (0..3).fold(code, |code, n| {
            let at = u64::from(COMMAND) + 8 * u64::from(n);
            let code = ring.descriptor(code, 2 * n, at, 4, NEXT, 2 * n + 1);
            ring.descriptor(code, 2 * n + 1, ANSWER.into(), 1, WRITE, 0)
        });
        let code = [1, 3].iter().fold(code, |code, n| queue(*n).descriptor(code, 0, BUFFER.into(), 72, 0, 0));
        // Eight commands and eight packets of each pair at a time, in no order that a good driver has.
        let body = (0..8).fold(Code::default(), |code, n| {
            let code = ring.offer(code, n, 2 * (n % 3));
            [1, 3].iter().fold(code, |code, pair| queue(*pair).offer(code, n, 0))
        });
        let body = [3, CONTROL, 1, 2, 0, 5, CONTROL].iter().fold(body, |code, n| NET.notify(code, *n));
        code.times(100, &body)
    });
    attack("a pair that is not set up", &taps, |code| {
        let code = set_up(code, FEATURES, [0, 1, CONTROL].into_iter());
        let code = use_pairs(code, NET, queue(CONTROL), 0, 2, 0);
        packet(NET.notify(NET.notify(code, 2), 3), queue(1))
    });
    attack("half of each pair", &taps, |code| {
        let code = set_up(code, FEATURES, [1, 2, CONTROL].into_iter());
        let code = use_pairs(code, NET, queue(CONTROL), 0, 2, 0);
        packet(NET.notify(NET.notify(code, 0), 3), queue(1))
    });
    // A driver of one pair has its control queue behind that; no number of pairs but one is right for it.
    attack("commands of a driver of one pair", &taps, |code| {
        let control = Ring { queue: 2, ..queue(CONTROL) };
        let code = NET.negotiate(code, 1 << 17).store(control.available(), 0).store(control.used(), 0);
        let code = NET.go(NET.queue(code, control));
        let code = use_pairs(code, NET, control, 0, 2, REFUSED);
        use_pairs(NET.notify(code, CONTROL), NET, control, 1, 1, 0)
    });
    attack("resets while pairs come and go", &taps, |code| {
        let body = set_up(Code::default(), FEATURES, 0..QUEUES).store(COMMAND, pairs(2));
        let body = queue(CONTROL).descriptor(body, 0, COMMAND.into(), 4, NEXT, 1);
        let body = queue(CONTROL).descriptor(body, 1, ANSWER.into(), 1, WRITE, 0);
        let body = queue(3).descriptor(body, 0, BUFFER.into(), 72, 0, 0);
        let body = queue(3).offer(queue(CONTROL).offer(body, 0, 0), 0, 0);
        let body = NET.notify(NET.notify(body, CONTROL), 3);
        code.times(30, &body.store(NET.register(register::STATUS), 0))
    });
}
