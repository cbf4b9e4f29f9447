//! A balloon, from the API to the guest and back: a bare-metal driver gives pages, and the host has them.

// Tests build bytes out of numbers whose size they know.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use common::balloon::{ACTUAL, DEFLATE, INFLATE, REPORTING, STATISTICS, TARGET, give, send};
use common::virtio::{Device, Ring, WRITE, register};
use common::{Code, Machine, footprint, refusal, says, wait_for};
use roost_vmm::client::Client;
use serde_json::{Value, json};

const BALLOON: Device = Device(0);
const MEMORY_MIB: u64 = 64;
/// What the guest writes to and then does without: 8 MiB from 16 MiB on.
const START: u32 = 0x100_0000;
const PAGES: u32 = 2048;
const PAGES_KIB: u64 = PAGES as u64 * 4;
/// By how much the rest of the guest's memory may grow meanwhile: a few pages, which may be huge ones.
const SLACK_KIB: [(bool, u64); 2] = [(false, 256), (true, 4096)];

fn ring(queue: u32) -> Ring {
    Ring { queue, size: 8, base: 0x20_0000 + 0x10_0000 * queue }
}

/// A driver of these queues.
fn set_up(features: u32, queues: &[u32]) -> Code {
    let code = BALLOON.negotiate(Code::default(), features);
    let code = queues.iter().fold(code, |code, queue| BALLOON.queue(code, ring(*queue)));
    BALLOON.go(code)
}

fn machine(code: &Code, balloon: Value) -> Machine {
    let mut machine = Machine::new(code);
    machine.config["machine-config"]["mem_size_mib"] = json!(MEMORY_MIB);
    machine.config["balloon"] = balloon;
    machine
}

fn resident(machine: &Machine) -> u64 {
    footprint::of(machine.pid(), MEMORY_MIB).unwrap().guest_rss_kib
}

fn get(client: &Client, path: &str) -> Value {
    serde_json::from_slice(&client.request("GET", path, b"").unwrap()).unwrap()
}

#[test]
fn memory_that_the_guest_gives_goes_back_to_the_host_and_is_zero_when_it_returns() {
    for (huge_pages, slack) in SLACK_KIB {
        give_and_take_back(huge_pages, slack);
    }
}

fn give_and_take_back(huge_pages: bool, slack: u64) {
    let code = set_up(0, &[INFLATE, DEFLATE]).fill_pages(START, PAGES, 0x600d_600d).print("full");
    let code = code.wait32(BALLOON.register(TARGET), PAGES);
    let code = give(code, BALLOON, ring(INFLATE), 0, (START >> 12, PAGES));
    let code = code.store(BALLOON.register(ACTUAL), PAGES).print("given");
    let code = code.wait32(BALLOON.register(TARGET), 0);
    let code = give(code, BALLOON, ring(DEFLATE), 0, (START >> 12, PAGES));
    let code = code.expect_zero_pages(START, PAGES).fill_pages(START, PAGES, 7);
    let code =
        code.expect32(START + 4096 * (PAGES - 1), 7).print("back").wait32(BALLOON.register(TARGET), 256);
    let mut machine = machine(&code.power_off(), json!({ "amount_mib": 0, "deflate_on_oom": true }));
    machine.config["machine-config"]["huge_pages"] = json!(huge_pages);
    machine.start::<&str>(&[]);
    let client = machine.client();
    let target = |mib: u64| client.put("PATCH", "/balloon", &json!({ "amount_mib": mib })).unwrap();

    says(&machine, "full");
    let full = resident(&machine);
    assert!(full >= PAGES_KIB, "{full} KiB");
    target(8);
    says(&machine, "given");
    let given = resident(&machine);
    assert!(given + PAGES_KIB <= full + slack, "{full} KiB before, {given} KiB after");
    let metrics = client.metrics().unwrap()["devices"]["balloon"].clone();
    assert_eq!(metrics["inflated_pages"], json!(PAGES), "{metrics}");
    assert_eq!(metrics["given_back_bytes"], json!(PAGES_KIB * 1024), "{metrics}");
    target(0);
    says(&machine, "back");
    assert!(resident(&machine) + slack >= full);
    assert_eq!(client.metrics().unwrap()["devices"]["balloon"]["deflated_pages"], json!(PAGES));
    target(1);
    let ended = machine.wait();
    assert_eq!((ended.code, ended.console.as_str()), (0, "fullgivenback"), "{}", ended.stderr);
}

/// The interrupt controller itself is asked: its request register shows that the device's line rose, without a handler.
#[test]
fn a_new_target_raises_an_interrupt_and_is_read_under_a_new_generation() {
    let interrupted = |code: Code| {
        // again: mov al, 0x0a; out 0x20, al; in al, 0x20; test al, 1 << 6; jz again
        code.bytes(&[0xb0, 0x0a, 0xe6, 0x20, 0xe4, 0x20, 0xa8, 0x40, 0x74, 0xf6])
    };
    let (status, generation) =
        (BALLOON.register(register::INTERRUPT_STATUS), BALLOON.register(register::CONFIG_GENERATION));
    let code = set_up(0, &[INFLATE, DEFLATE]).wait32(status, 1).wait32(generation, 0);
    let code = code.wait32(BALLOON.register(TARGET), 3 * 256).print("ready");
    let code = interrupted(code).wait_bits(status, 2).print("!");
    let code = code.wait32(generation, 1).wait32(BALLOON.register(TARGET), 5 * 256);
    let code = code.store(BALLOON.register(register::INTERRUPT_ACKNOWLEDGE), 2).wait32(status, 1);
    let mut machine = machine(&code.print("told").power_off(), json!({ "amount_mib": 3 }));
    machine.start::<&str>(&[]);
    let client = machine.client();
    says(&machine, "ready");
    client.put("PATCH", "/balloon", &json!({ "amount_mib": 5 })).unwrap();
    let ended = machine.wait();
    assert_eq!((ended.code, ended.console.as_str()), (0, "ready!told"), "{}", ended.stderr);
}

/// Pages that the guest has from the kernel's file must not show the file again, and a reset must bring them back.
#[test]
fn pages_of_the_kernel_are_zero_too_until_the_next_start() {
    let page = 0x18_0000;
    let code = set_up(0, &[INFLATE]).expect32(page, 0x9090_9090);
    let code = give(code, BALLOON, ring(INFLATE), 0, (page >> 12, 16));
    let code = code.expect_zero_pages(page, 16).expect32(page + 16 * 4096, 0x9090_9090);
    let code = code.expect32(page - 4096, 0x9090_9090).print("z").reset();
    let mut machine = machine(&Code::default(), json!({ "amount_mib": 1 }));
    let kernel = machine.write_large_kernel(code);
    machine.start::<&str>(&[]);
    wait_for("three starts", || (machine.console().len() >= 3).then_some(()));
    machine.client().force_stop().unwrap();
    let ended = machine.wait();
    assert!(ended.console.bytes().all(|byte| byte == b'z'), "{}", ended.console);
    let file = std::fs::read(machine.path("kernel")).unwrap();
    assert!(file == kernel, "the kernel's file was changed");
}

/// As the specification counts queues, as Linux counted them, and as Linux counted them without statistics.
#[test]
fn what_the_guest_reports_as_free_goes_back() {
    for (features, queue) in [(REPORTING | STATISTICS, 4), (REPORTING | STATISTICS, 3), (REPORTING, 2)] {
        let code = set_up(features, &[INFLATE, DEFLATE, queue]).fill_pages(START, PAGES, 0x600d_600d);
        // The last page is given as a part only.
        let code = code.print("full").wait32(BALLOON.register(TARGET), 256);
        let code = send(code, BALLOON, ring(queue), 0, (START, PAGES * 4096 - 1), WRITE);
        let code = code.wait16(ring(queue).used_index(), 1).expect_zero_pages(START, PAGES - 1);
        let code = code.expect32(START + (PAGES - 1) * 4096, 0x600d_600d);
        let code = code.print("free").wait32(BALLOON.register(TARGET), 0);
        let balloon = json!({ "amount_mib": 0, "stats_polling_interval_s": 1, "free_page_reporting": true });
        let mut machine = machine(&code.power_off(), balloon);
        machine.start::<&str>(&[]);
        let client = machine.client();
        says(&machine, "full");
        let full = resident(&machine);
        client.put("PATCH", "/balloon", &json!({ "amount_mib": 1 })).unwrap();
        says(&machine, "free");
        let metrics = client.metrics().unwrap()["devices"]["balloon"].clone();
        assert_eq!(metrics["reported_bytes"], json!(PAGES_KIB * 1024 - 4096), "{metrics}");
        client.put("PATCH", "/balloon", &json!({ "amount_mib": 0 })).unwrap();
        let ended = machine.wait();
        assert_eq!((ended.code, ended.console.as_str()), (0, "fullfree"), "queue {queue}: {}", ended.stderr);
        assert!(full >= PAGES_KIB, "{full} KiB");
    }
}

/// Writes entries of statistics: a tag and a value below 2^32 each.
fn entries(code: Code, address: u32, entries: &[(u16, u32)]) -> Code {
    (0..).zip(entries).fold(code, |code, (n, (tag, value))| {
        let at = address + 10 * n;
        code.store16(at, *tag).store(at + 2, *value).store(at + 6, 0)
    })
}

#[test]
fn the_guest_is_asked_for_statistics_again_and_again() {
    let (queue, buffer) = (ring(2), 0x60_0000);
    let say = |code, index, list: &[(u16, u32)], length| {
        send(entries(code, buffer, list), BALLOON, queue, index, (buffer, length), 0)
    };
    let code = set_up(STATISTICS, &[INFLATE, DEFLATE, 2]);
    // Tags that nobody knows, a piece of an entry behind them, and a length that is not what is there.
    let code = say(code, 0, &[(4, 1000), (7777, 5), (5, 2000)], 35).wait16(queue.used_index(), 1);
    let code = say(code, 1, &[(4, 900)], 10).wait16(queue.used_index(), 2);
    let code = say(code, 2, &[(0xffff, 1)], 1).wait16(queue.used_index(), 3);
    let code = say(code, 3, &[(15, 6)], u32::MAX).wait16(queue.used_index(), 4);
    let code = say(code, 4, &[(15, 7)], 10).store(BALLOON.register(ACTUAL), 513).print("said");
    let mut machine = machine(
        &code.stop(),
        json!({ "amount_mib": 3, "stats_polling_interval_s": 1, "deflate_on_oom": false }),
    );
    machine.start::<&str>(&[]);
    let client = machine.client();
    says(&machine, "said");
    let statistics = wait_for("the last value", || {
        let statistics = get(&client, "/balloon/statistics");
        (statistics["direct_reclaim"] == json!(7)).then_some(statistics)
    });
    let expected = json!({
        "target_pages": 768, "target_mib": 3, "actual_pages": 513, "actual_mib": 2,
        "free_memory": 900, "total_memory": 2000, "direct_reclaim": 7,
    });
    assert_eq!(statistics, expected);
    let interval = |seconds: u64| {
        client.put("PATCH", "/balloon/statistics", &json!({ "stats_polling_interval_s": seconds }))
    };
    interval(60).unwrap();
    assert_eq!(get(&client, "/balloon")["stats_polling_interval_s"], json!(60));
    assert!(
        refusal(interval(0)).contains("stats_polling_interval_s 0: the machine was started with statistics")
    );
    assert!(refusal(interval(65536)).contains("stats_polling_interval_s 65536 is outside 0–65535"));
    assert_eq!(get(&client, "/balloon")["stats_polling_interval_s"], json!(60));
    client.force_stop().unwrap();
    machine.wait();
}

#[test]
fn the_api_says_what_is_illegal_when() {
    let mut machine = Machine::new(&Code::default().stop());
    let socket = machine.text("api");
    machine.start_with(&["run", "--api-sock", &socket]);
    let client = machine.client();
    let put = |body: Value| client.put("PUT", "/balloon", &body);
    let target = |mib: u64| client.put("PATCH", "/balloon", &json!({ "amount_mib": mib }));
    assert!(refusal(client.request("GET", "/balloon", b"")).contains("no balloon"));
    assert!(refusal(put(json!({ "amount_mib": 129 }))).contains("amount_mib 129 is outside 0–128"));
    assert!(refusal(put(json!({ "amount_mib": 1, "colour": "red" }))).contains("colour"));
    assert!(refusal(target(1)).contains("has not been started"));
    let statistics = client.request("GET", "/balloon/statistics", b"");
    assert!(refusal(statistics).contains("has not been started"));
    put(json!({ "amount_mib": 100 })).unwrap();
    // The machine may not become smaller than its balloon.
    let machine_config = json!({ "vcpu_count": 1, "mem_size_mib": 64 });
    assert!(refusal(client.put("PUT", "/machine-config", &machine_config)).contains("amount_mib 100"));
    put(json!({ "amount_mib": 2, "deflate_on_oom": true })).unwrap();
    client.put("PUT", "/machine-config", &machine_config).unwrap();
    client.put("PUT", "/boot-source", &machine.config["boot-source"].clone()).unwrap();
    client.put("PUT", "/serial", &json!({})).unwrap();
    client.start().unwrap();

    assert!(refusal(put(json!({ "amount_mib": 3 }))).contains("built already"));
    assert!(refusal(target(65)).contains("amount_mib 65 is outside 0–64"));
    target(64).unwrap();
    let config = json!({
        "amount_mib": 64, "deflate_on_oom": true, "stats_polling_interval_s": 0, "free_page_reporting": false,
    });
    assert_eq!(get(&client, "/balloon"), config);
    assert_eq!(get(&client, "/vm/config")["balloon"], config);
    let statistics = client.request("GET", "/balloon/statistics", b"");
    assert!(refusal(statistics).contains("stats_polling_interval_s was 0"));
    let interval = client.put("PATCH", "/balloon/statistics", &json!({ "stats_polling_interval_s": 1 }));
    assert!(refusal(interval).contains("stats_polling_interval_s 1: the machine was started with 0"));
    assert!(refusal(client.put("PATCH", "/balloon/colour", &json!({}))).contains("/balloon/colour"));
    client.force_stop().unwrap();
    machine.wait();
}

#[test]
fn a_machine_without_a_balloon_says_so() {
    let mut machine = Machine::new(&Code::default().stop());
    machine.start::<&str>(&[]);
    let client = machine.client();
    wait_for("the start", || (client.info().unwrap().state == "Running").then_some(()));
    for (path, body) in [
        ("/balloon", json!({ "amount_mib": 1 })),
        ("/balloon/statistics", json!({ "stats_polling_interval_s": 1 })),
    ] {
        assert!(refusal(client.put("PATCH", path, &body)).contains("has no balloon"));
        assert!(refusal(client.request("GET", path, b"")).contains("no balloon"));
    }
    client.force_stop().unwrap();
    machine.wait();
}
