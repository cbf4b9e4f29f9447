//! What a machine costs the host beyond its guest's memory: the limits of docs/performance.md, held here.

mod common;

use common::hold::Held;
use common::machines::{self, MEMORY_MIB};
use common::{Code, DEADLINE, Machine, footprint, tap, wait_for};
use serde_json::json;

/// `scripts/test` names the monitor as it is installed here. A debug build has more to relocate at its start.
const INSTALLED: &str = "ROOST_INSTALLED_MONITOR";
const LIMIT_KIB: u64 = 280;
const DEBUG_KIB: u64 = 80;

#[test]
fn up_to_the_first_instruction_a_machine_costs_280_kib() {
    let mut machine = Machine::new(&Code::default().power_off());
    machine.config["machine-config"]["mem_size_mib"] = json!(MEMORY_MIB);
    let installed = std::env::var_os(INSTALLED);
    let limit = if installed.is_some() { LIMIT_KIB } else { LIMIT_KIB + DEBUG_KIB };
    machine.program = installed.map_or(machine.program.clone(), Into::into);
    footprint::settle(&machine.program);
    let held = Held::start(&mut machine.command::<&str>(&[]), DEADLINE).unwrap();
    let cost = footprint::of(held.pid(), MEMORY_MIB).unwrap();
    assert!(cost.private_dirty_kib <= limit, "{}: {cost:?}", machine.program.display());
    // The monitor has put a few pages of tables into the guest, in one huge page or two where the host had them to give, and nothing
    // else has been touched.
    assert!((1..=4096).contains(&cost.guest_rss_kib), "{cost:?}");
}

#[test]
fn with_a_disk_and_an_interface_in_use_it_costs_3_mib() {
    let Some(tap) = tap::create() else { return };
    let mut machine = machines::with_disk_and_interface();
    machine.start(&machines::tap_argument(&tap));
    wait_for("the guest", || machine.console().contains(machines::UP).then_some(()));
    let cost = footprint::of(machine.pid(), MEMORY_MIB).unwrap();
    assert!(cost.private_dirty_kib <= 3 * 1024, "{cost:?}");
    let metrics = machine.client().metrics().unwrap();
    let devices = &metrics["devices"];
    assert_eq!(devices["root"]["reads"], json!(16), "{metrics}");
    assert_eq!(devices["root"]["writes"], json!(16), "{metrics}");
    assert_eq!(devices["eth0"]["tx_packets"], json!(4), "{metrics}");
}

/// What queues, and work that goes on beside, cost a disk that is in use.
#[test]
fn a_disks_queues_and_its_engine_are_cheap() {
    let cost = |drive: serde_json::Value| {
        let mut machine = machines::with_disk();
        machine.config["drives"][0].as_object_mut().unwrap().extend(drive.as_object().unwrap().clone());
        machine.start::<&str>(&[]);
        wait_for("the guest", || machine.console().contains(machines::UP).then_some(()));
        let cost = footprint::of(machine.pid(), MEMORY_MIB).unwrap().private_dirty_kib;
        eprintln!("{drive}: {cost} KiB");
        cost
    };
    let plain = cost(json!({ "io_engine": "Sync" }));
    let beside = cost(json!({ "io_engine": "Async" }));
    let queues = cost(json!({ "io_engine": "Async", "num_queues": 16 }));
    assert!(beside <= plain + 64, "{plain} KiB, with a ring {beside}");
    assert!(queues <= beside + 16, "{beside} KiB, with 16 queues {queues}");
}
