//! Boots in counted time: the virtual host's CPU is emulated so that each instruction takes a nanosecond, whatever else this
//! machine does.

use std::collections::BTreeMap;
use std::fs;

use crate::common::hold::Held;
use crate::host::{about, figure};
use crate::monitors::{LIMIT, Machine, Up, command};
use crate::report::Who;

/// Names of rows.
pub const LINE: &str = "counted: fork → guest's line";
pub const FIRST_RUN: &str = "counted: fork → first KVM_RUN";
pub const EXITS: &str = "exits until the guest's line";

const EVERYONE: [Who; 2] = [Who::Roost, Who::Qemu];
const TRACING: &str = "/sys/kernel/tracing";
const EXIT: &str = "/sys/kernel/tracing/events/kvm/kvm_exit/trigger";
const FAULT: &str = "/sys/kernel/tracing/events/kvm/kvm_page_fault/enable";
/// Names of the commonest exits of an AMD CPU (AMD64 Architecture Programmer's Manual, volume 2, appendix C).
const REASONS: [(u64, &str); 9] = [
    (0x10, "CR0 writes"),
    (0x14, "CR4 writes"),
    (0x60, "interrupts"),
    (0x64, "interrupt windows"),
    (0x72, "CPUID"),
    (0x78, "HLT"),
    (0x7b, "ports"),
    (0x7c, "MSRs"),
    (0x400, "nested page faults"),
];

/// Starts everyone in turn.
pub fn measure(runs: u64) {
    // Once unmeasured: what is paid once per boot of the virtual host, and a look at what the guests do.
    for who in EVERYONE {
        profile(who);
    }
    for _ in 0..runs {
        for who in EVERYONE {
            let held = Held::start(&mut command(who, Machine::PLAIN), LIMIT).unwrap();
            figure(FIRST_RUN, who, held.elapsed.as_secs_f64() * 1e3);
            drop(held);
            let up = Up::start(command(who, Machine::PLAIN));
            figure(LINE, who, up.elapsed.as_secs_f64() * 1e3);
            figure(EXITS, who, up.counter("exits") as f64);
        }
    }
}

/// Begins a line that says where a function of the host's kernel is.
pub const SYMBOL: &str = "SYMBOL ";

/// Says where the functions of the host's kernel are, and boots guests, of which others look at the instructions.
pub fn watched(runs: u64, who: Who) {
    for line in fs::read_to_string("/proc/kallsyms").unwrap().lines() {
        if line.contains(" t ") || line.contains(" T ") {
            println!("{SYMBOL}{line}");
        }
    }
    for _ in 0..runs {
        drop(Up::start(command(who, Machine::PLAIN)));
    }
}

/// Counts the exits of one boot by reason, and its faults by place.
fn profile(who: Who) {
    let counts =
        ["buffer_size_kb"].iter().all(|file| fs::write(format!("{TRACING}/{file}"), "16384").is_ok())
            && fs::write(EXIT, "hist:keys=exit_reason").is_ok()
            && fs::write(FAULT, "1").is_ok();
    let up = Up::start(command(who, Machine::PLAIN));
    let mut text = ["exits", "irq_injections", "halt_exits", "mmio_exits"]
        .map(|name| format!("{name} {}", up.counter(name)))
        .join(", ");
    drop(up);
    if counts {
        let _ = fs::write(FAULT, "0");
        let read = |name: &str| fs::read_to_string(format!("{TRACING}/{name}")).unwrap_or_default();
        text.push_str(&by_reason(&read("events/kvm/kvm_exit/hist")));
        text.push_str(&by_place(&read("trace")));
        let _ = fs::write(EXIT, "!hist:keys=exit_reason");
        let _ = fs::write(format!("{TRACING}/trace"), "");
    }
    about(if who == Who::Roost { "exits of Roost" } else { "exits of QEMU" }, &text);
}

/// Lines like `{ exit_reason: 123 } hitcount: 45`.
fn by_reason(histogram: &str) -> String {
    let number = |line: &str, name: &str| -> Option<u64> {
        line.split_once(name)?.1.split_whitespace().next()?.parse().ok()
    };
    let mut all: Vec<(u64, u64)> = histogram
        .lines()
        .filter_map(|line| Some((number(line, "hitcount:")?, number(line, "exit_reason:")?)))
        .collect();
    all.sort_unstable_by(|one, other| other.cmp(one));
    all.iter().take(7).fold(String::new(), |text, (count, reason)| {
        let known = REASONS.iter().find(|(known, _)| known == reason);
        let name = known.map_or_else(|| format!("reason {reason:#x}"), |(_, name)| (*name).to_owned());
        format!("{text}, {name} {count}")
    })
}

/// Lines like `… kvm_page_fault: vcpu 0 rip 0x1 address 0x2 error_code 0x3`: which 2 MiB were struck most.
fn by_place(trace: &str) -> String {
    let mut places = BTreeMap::new();
    for line in trace.lines().filter(|line| line.contains("kvm_page_fault")) {
        let address = line.split_once("address 0x").and_then(|(_, rest)| rest.split(' ').next());
        let Some(address) = address.and_then(|text| u64::from_str_radix(text, 16).ok()) else { continue };
        *places.entry(address >> 21).or_insert(0_u64) += 1;
    }
    let mut all: Vec<(u64, u64)> = places.into_iter().map(|(place, count)| (count, place)).collect();
    all.sort_unstable_by(|one, other| other.cmp(one));
    let most = all.iter().take(24).map(|(count, place)| format!("{} MiB: {count}", place * 2));
    format!("; faults in {} pieces of 2 MiB, most in {}", all.len(), most.collect::<Vec<_>>().join(", "))
}
