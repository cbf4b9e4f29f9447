//! The same with real sockets: what the host's edges say, and when they say it.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use super::super::connection::ROOM;
use super::super::host::{HostSocket, HostSockets};
use super::super::packet::{Header, NO_MORE_RECEIVED, NO_MORE_SENT, Op};
use super::super::switch::Switch;
use super::{GUEST_CID, PORT, header};

const DEADLINE: Duration = Duration::from_secs(20);
/// Bytes in each direction: several times what the kernel's buffers and the connection's hold.
const BULK: usize = 3 << 20;

/// Runs a test on a thread of its own, which will stand in the folder.
fn on_a_thread(test: impl FnOnce(&Path, HostSockets, Switch<HostSocket>) + Send) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let open = std::fs::File::open(path).unwrap();
    let body = move || {
        let mut sockets = HostSockets::new(open.into(), "v".into()).unwrap();
        sockets.listen().unwrap();
        test(path, sockets, Switch::new(GUEST_CID));
    };
    std::thread::scope(|scope| scope.spawn(body).join().unwrap());
}

/// Waits until the device's descriptor says that something happened, as the device thread does, and looks at it.
fn wait(sockets: &HostSockets, switch: &mut Switch<HostSocket>) {
    let mut poll = libc::pollfd { fd: sockets.descriptor(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one valid pollfd.
    let ready = unsafe { libc::poll(&raw mut poll, 1, 20_000) };
    assert_eq!(ready, 1, "nothing happens any more");
    sockets.poll(switch);
}

fn packet(switch: &mut Switch<HostSocket>, payload: &mut [u8]) -> Option<(Op, Header, usize)> {
    let (header, count) = switch.for_guest(payload)?;
    Some((header.op().unwrap(), header, count))
}

/// A guest sends as fast as its credit lets it to a program that sends everything back, slowly.
#[test]
fn a_large_echo_comes_back_whole() {
    on_a_thread(|path, mut sockets, mut switch| {
        let listener = UnixListener::bind(path.join(format!("v_{PORT}"))).unwrap();
        let echo = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let (mut buffer, mut total) = (vec![0; 50_000], 0);
            loop {
                let count = stream.read(&mut buffer).unwrap();
                if count == 0 {
                    return total;
                }
                stream.write_all(&buffer[..count]).unwrap();
                total += count;
            }
        });
        let ask = |op, taken| Header { buf_alloc: 10_000, fwd_cnt: taken, ..header(op, PORT) };
        switch.from_guest(&ask(Op::Request, 0), &[], &mut sockets);
        let nth = |n: usize| (n % 253) as u8;
        let (mut sent, mut room, mut told) = (0_usize, 0_u32, 0_u32);
        let mut got: Vec<u8> = Vec::new();
        let mut payload = vec![0; 4000];
        let start = Instant::now();
        let mut over = false;
        while !over {
            assert!(start.elapsed() < DEADLINE, "{sent} sent, {} back", got.len());
            let free = room.saturating_sub((sent as u32).wrapping_sub(told));
            let count = (free as usize).min(7000).min(BULK - sent);
            if count > 0 {
                let part: Vec<u8> = (sent..sent + count).map(nth).collect();
                let header = Header { len: count as u32, ..ask(Op::Data, got.len() as u32) };
                switch.from_guest(&header, &part, &mut sockets);
                sent += count;
                if sent == BULK {
                    let header = Header { flags: NO_MORE_SENT, ..ask(Op::Shutdown, got.len() as u32) };
                    switch.from_guest(&header, &[], &mut sockets);
                }
            }
            let mut any = count > 0;
            while let Some((op, header, count)) = packet(&mut switch, &mut payload) {
                any = true;
                (room, told) = (header.buf_alloc, header.fwd_cnt);
                got.extend(&payload[..count]);
                match op {
                    Op::Reset => panic!("the connection broke after {sent} bytes"),
                    Op::Shutdown => over |= header.flags & NO_MORE_SENT != 0,
                    _ => {}
                }
                switch.from_guest(&ask(Op::CreditUpdate, got.len() as u32), &[], &mut sockets);
                assert!(switch.waiting().iter().all(|waiting| *waiting <= ROOM as usize));
            }
            if !any {
                wait(&sockets, &mut switch);
            }
        }
        assert_eq!(echo.join().unwrap(), BULK);
        assert!(got == (0..BULK).map(nth).collect::<Vec<_>>(), "{} bytes came back", got.len());
    });
}

/// The guest has said all that there is room for and is silent; only the program's reading makes the rest move.
#[test]
fn what_waits_moves_when_the_program_reads() {
    on_a_thread(|path, mut sockets, mut switch| {
        let listener = UnixListener::bind(path.join(format!("v_{PORT}"))).unwrap();
        switch.from_guest(&header(Op::Request, PORT), &[], &mut sockets);
        let (mut stream, _) = listener.accept().unwrap();
        let mut sent = 0;
        while switch.waiting()[0] < ROOM as usize {
            let count = (ROOM as usize - switch.waiting()[0]).min(8192);
            let packet = Header { len: count as u32, ..header(Op::Data, PORT) };
            switch.from_guest(&packet, &vec![5; count], &mut sockets);
            sent += count;
        }
        sockets.poll(&mut switch);
        let reader = std::thread::spawn(move || {
            let mut all = vec![0; sent];
            stream.read_exact(&mut all).unwrap();
            (stream, all)
        });
        while switch.waiting()[0] > 0 {
            wait(&sockets, &mut switch);
        }
        let (_stream, all) = reader.join().unwrap();
        assert!(all.iter().all(|byte| *byte == 5));
    });
}

#[test]
fn a_program_is_told_of_its_port_and_its_end_is_noticed() {
    on_a_thread(|path, mut sockets, mut switch| {
        let mut stream = UnixStream::connect(path.join("v")).unwrap();
        stream.write_all(b"CONNECT 77\nfirst").unwrap();
        let mut payload = [0; 100];
        let (op, request, _) = loop {
            wait(&sockets, &mut switch);
            if let Some(packet) = packet(&mut switch, &mut payload) {
                break packet;
            }
        };
        assert_eq!((op, request.dst_port), (Op::Request, 77));
        let answer = |op| Header { src_port: 77, ..header(op, request.src_port) };
        switch.from_guest(&answer(Op::Response), &[], &mut sockets);
        let (op, _, count) = packet(&mut switch, &mut payload).unwrap();
        assert_eq!((op, &payload[..count]), (Op::Data, &b"first"[..]));
        let mut line = String::new();
        let mut reader = BufReader::new(stream);
        reader.read_line(&mut line).unwrap();
        assert_eq!(line, format!("OK {}\n", request.src_port));
        assert_eq!(packet(&mut switch, &mut payload), None);
        drop(reader);
        let both = NO_MORE_SENT | NO_MORE_RECEIVED;
        let (op, header, _) = loop {
            wait(&sockets, &mut switch);
            if let Some(packet) = packet(&mut switch, &mut payload) {
                break packet;
            }
        };
        assert_eq!((op, header.flags, switch.metrics().open), (Op::Shutdown, both, 1));
        switch.from_guest(&answer(Op::Reset), &[], &mut sockets);
        assert_eq!(switch.metrics().open, 0);
    });
}

/// A name is one of the folder that the thread stands in, and the process stands where it stood.
#[test]
fn only_the_calling_thread_moves() {
    let before = std::env::current_dir().unwrap();
    on_a_thread(|path, _, _| {
        assert_eq!(std::env::current_dir().unwrap(), path.canonicalize().unwrap());
        assert!(path.join("v").exists());
    });
    assert_eq!(std::env::current_dir().unwrap(), before);
}
