//! A kernel's code moves into huge pages once its guest runs, and the guest does not notice.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use common::machines::code::{self, EARLY, PIECES_KIB, REST_KIB, START};
use common::{Machine, wait_for};
use serde_json::json;

/// KiB of the kernel's file that the monitor has mapped.
fn mapped_kib(machine: &Machine) -> usize {
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", machine.pid())).unwrap();
    let kernel = machine.text("kernel");
    let of_kernel = maps.lines().filter(|line| line.ends_with(&kernel));
    of_kernel
        .map(|line| {
            let (start, end) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
            let number = |digits| usize::from_str_radix(digits, 16).unwrap();
            (number(end) - number(start)) / 1024
        })
        .sum()
}

fn goes_on(machine: &mut Machine) {
    for (sent, said) in [("x", "ab"), ("y", "abc")] {
        machine.client().console_input(sent.as_bytes()).unwrap();
        wait_for(said, || (machine.console() == said).then_some(()));
    }
    let kernel = std::fs::read(machine.path("kernel")).unwrap();
    let early = 4096 + (EARLY - START) as usize;
    assert_eq!(kernel[early..early + 4], code::pattern(EARLY).to_le_bytes());
}

#[test]
fn code_moves_into_huge_pages_once_the_guest_runs() {
    let mut machine = code::machine();
    machine.start_with(&["run", "--api-sock", &machine.text("api")]);
    code::start(&machine);
    let client = machine.client();
    wait_for("the guest", || (machine.console() == "a").then_some(()));
    // The rest is no huge page.
    wait_for("the move", || (mapped_kib(&machine) == REST_KIB).then_some(()));
    client.pause().unwrap();
    client.resume().unwrap();
    goes_on(&mut machine);
}

#[test]
fn code_stays_shared_where_huge_pages_are_not_wanted() {
    for field in ["huge_pages", "track_dirty_pages"] {
        let mut machine = code::machine();
        machine.config["machine-config"][field] = json!(field == "track_dirty_pages");
        machine.start::<&str>(&[]);
        wait_for("the guest", || (machine.console() == "a").then_some(()));
        goes_on(&mut machine);
        assert_eq!(mapped_kib(&machine), PIECES_KIB + REST_KIB, "{field}");
    }
}
