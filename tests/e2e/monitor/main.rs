//! The monitor by hand (`docs/monitor.md`), with a Linux guest: what the agent does not use yet.
#![allow(clippy::unwrap_used, clippy::cast_precision_loss, missing_docs)]

mod by_hand;
mod pmem;
mod served;
mod unlike;

use by_hand::{ByHand, MEMORY_MIB, SOON};
use roost_e2e::{Rig, TempFile, wait_for};
use serde_json::{Value, json};
use std::time::Duration;

#[test]
fn a_linux_guest_talks_over_vsock() {
    let rig = Rig::get();
    let monitor = ByHand::start(&rig, "vsock", &json!({}));
    assert_eq!(monitor.ask("upper from the host"), "FROM THE HOST");
    // The driver reads and acknowledges the interrupt status for each of these, and leaves the guest for none of it.
    let counters = || ["mmio_exits", "irq_injections"].map(|name| monitor.counter(name));
    let [exits, interrupts] = counters();
    (0..5).for_each(|_| assert_eq!(monitor.ask("upper again"), "AGAIN"));
    let [exits_then, interrupts_then] = counters();
    assert!(exits_then == exits && interrupts_then > interrupts + 5, "{exits_then} exits, {exits} before");
    // More than the ring and the credit of one connection hold.
    let long = "x".repeat(200_000);
    let file = TempFile::new("long", &format!("CONNECT 52\nupper {long}\n"));
    rig.copy_to_host(&[&file.0], &monitor.dir);
    let name = file.0.file_name().unwrap().to_str().unwrap();
    let talk = format!(
        "socat -t 30 - UNIX-CONNECT:{0}/v.sock < {0}/{name} | tail -n 1 | tr -d '\\n' | md5sum",
        monitor.dir
    );
    let wanted = "printf %0200000d 0 | tr 0 X | md5sum";
    assert_eq!(rig.host(&talk).ok(), rig.host(wanted).ok());

    // The virtual host's TSC is not said to be invariant, so that Linux keeps time by KVM's clock, and need not watch the TSC.
    for (words, said) in [("Command line", "tsc=nowatchdog"), ("Switched to clocksource", "kvm-clock")] {
        let kernel = monitor.ask(&format!("kernel {words}"));
        assert!(kernel.contains(said), "{kernel}");
    }

    // Nobody listens on the host: refused.
    assert!(monitor.ask("call 53 hello").contains("reset"), "{}", monitor.ask("call 53 hello"));
    let listen = format!("socat -u UNIX-LISTEN:{0}/v.sock_53 CREATE:{0}/got", monitor.dir);
    rig.host(&format!(
        "systemd-run --quiet --collect {listen}; until [ -S {}/v.sock_53 ]; do sleep 0.1; done",
        monitor.dir
    ))
    .ok();
    assert_eq!(monitor.ask("call 53 from the guest"), "called");
    wait_for("the guest's words", SOON, || {
        let got = rig.host(&format!("cat {}/got", monitor.dir)).stdout;
        if got == "from the guest\n" { Ok(()) } else { Err(got) }
    });

    assert_eq!(monitor.ask("off"), "");
    let ended = wait_for("the monitor's end", SOON, || {
        let ran = rig.host(&format!("cat {}/code", monitor.dir));
        if ran.stdout.is_empty() { Err(ran.stderr) } else { Ok(ran.stdout) }
    });
    assert_eq!(ended, "0\n");
}

#[test]
fn a_linux_guest_gives_memory_back() {
    let rig = Rig::get();
    let balloon = json!({ "amount_mib": 0, "deflate_on_oom": true, "stats_polling_interval_s": 1, "free_page_reporting": true });
    let monitor = ByHand::start(&rig, "balloon", &json!({ "balloon": balloon }));

    // What a guest happens not to use goes back by itself.
    let idle = monitor.resident_mib();
    assert_eq!(monitor.ask("hold 96"), "held 96");
    let used = monitor.resident_mib();
    assert!(used >= 96.max(idle + 64), "{idle} MiB, {used} MiB with 96 MiB in use");
    assert_eq!(monitor.ask("drop"), "dropped");
    let after = wait_for("the guest's free memory to go back", SOON, || {
        let now = monitor.resident_mib();
        if now + 80 <= used { Ok(now) } else { Err(format!("{now} MiB")) }
    });
    println!("resident: {idle} MiB, {used} MiB with 96 MiB in use, {after} MiB after");

    // What the host asks for, the guest does without; its own count of free memory says so.
    monitor.wait_balloon(0);
    let free = monitor.get("/balloon/statistics")["free_memory"].as_u64().unwrap() >> 20;
    monitor.patch("/balloon", &json!({ "amount_mib": 64 }));
    monitor.wait_balloon(64);
    wait_for("statistics that show it", SOON, || {
        let now = monitor.get("/balloon/statistics")["free_memory"].as_u64().unwrap() >> 20;
        if now + 60 <= free { Ok(()) } else { Err(format!("{now} MiB free, {free} MiB before")) }
    });
    // A guest that needs the memory takes it back rather than kill a program.
    assert_eq!(monitor.ask("hold 120"), "held 120");
    let statistics = monitor.get("/balloon/statistics");
    assert!(statistics["actual_mib"].as_u64().unwrap() < 64, "{statistics}");
    assert_eq!(monitor.ask("drop"), "dropped");
    monitor.patch("/balloon", &json!({ "amount_mib": 0 }));
    monitor.wait_balloon(0);
    assert_eq!(monitor.get("/metrics")["devices"]["balloon"]["refused"], json!(0));
}

/// Nanoseconds that the guest's clocks show: since its boot, and since 1970.
fn clocks(monitor: &ByHand<'_>) -> (u64, u64) {
    let said = monitor.ask("clock");
    let (monotonic, real) = said.split_once(' ').unwrap();
    (monotonic.parse().unwrap(), real.parse().unwrap())
}

/// By how much the guest's idea of the time differs from the host's, seconds.
fn clock_error(monitor: &ByHand<'_>) -> f64 {
    let host: u64 = monitor.rig.host("date +%s%N").ok().trim().parse().unwrap();
    (clocks(monitor).1 as f64 - host as f64) / 1e9
}

#[test]
fn a_linux_guest_goes_on_from_a_snapshot() {
    let rig = Rig::get();
    let balloon = json!({ "amount_mib": 0, "deflate_on_oom": true, "free_page_reporting": true });
    let machine = json!({ "vcpu_count": 2, "mem_size_mib": MEMORY_MIB, "track_dirty_pages": true });
    let devices = json!({ "machine-config": machine, "balloon": balloon, "entropy": {} });
    let (original, cold) = ByHand::boot(&rig, "original", &devices);
    assert_eq!(original.ask("hold 20"), "held 20");
    let before = clocks(&original);
    original.snapshot();
    let taken = std::time::Instant::now();
    // A pause is no leap: the guest's clock stands where the host's does.
    original.patch("/vm", &json!({ "state": "Resumed" }));
    assert!(clock_error(&original).abs() < 2.0, "{}", clock_error(&original));
    assert_eq!(original.ask("hold 1"), "held 21");

    let (clone, lazy) = ByHand::load(&rig, "clone", &original, &json!({ "clock_realtime": true }));
    println!(
        "cold boot to the first reply {cold:?}, from a snapshot {lazy:?}: {:.3}",
        lazy.as_secs_f64() / cold.as_secs_f64()
    );
    // On a machine that has nothing else to do it is a tenth (docs/performance.md).
    assert!(lazy * 3 <= cold * 2, "{lazy:?} of {cold:?}");
    // What it held it holds, and the clocks have gone on.
    assert_eq!(clone.ask("hold 1"), "held 21");
    assert!(clock_error(&clone).abs() < 2.0, "{}", clock_error(&clone));
    let now = clocks(&clone);
    assert!(now.0 > before.0 && now.1 > before.1, "{before:?} {now:?}");
    // Programs of its own that it starts after that see new random numbers.
    let kernel = clone.ask("kernel virtual machine fork");
    assert!(kernel.contains("crng reseeded due to virtual machine fork"), "{kernel}");

    // Without clock_realtime the guest does not know that it was away.
    let (late, _) = ByHand::load(&rig, "late", &original, &json!({}));
    let away = taken.elapsed().as_secs_f64();
    let error = clock_error(&late);
    assert!(error < -1.0 && error > -away - 5.0, "{error} after {away}");
    // Both live, and each has its own memory.
    assert_eq!(
        (late.ask("drop"), clone.ask("hold 1"), late.ask("hold 2")),
        ("dropped".into(), "held 22".into(), "held 2".into())
    );
    for monitor in [&original, &clone, &late] {
        assert_eq!(monitor.ask("off"), "");
    }
}

/// EAX, EBX, ECX and EDX of a leaf, as a program of the guest's sees them.
#[track_caller]
fn cpuid(monitor: &ByHand<'_>, leaf: &str) -> [u32; 4] {
    let said = monitor.ask(&format!("cpuid {leaf}"));
    let words: Vec<u32> = said.split(' ').map(|word| u32::from_str_radix(word, 16).unwrap()).collect();
    words.try_into().unwrap_or_else(|_| panic!("{leaf}: {said}"))
}

/// A guest of a level has its level and nothing above it, and so has what goes on from its snapshot.
#[test]
fn a_linux_guest_sees_the_level_of_its_template() {
    let rig = Rig::get();
    let all = ByHand::start(&rig, "untouched", &json!({}));
    let offered = [cpuid(&all, "1 0"), cpuid(&all, "7 0")];
    assert_eq!(all.ask("off"), "");
    // SSE3, SSSE3, CX16, SSE4.1, SSE4.2, POPCNT; what is left beside them: x2APIC, TSC deadline, hypervisor.
    let (level, beside) = (1 | 1 << 9 | 1 << 13 | 1 << 19 | 1 << 20 | 1 << 23, 1 << 21 | 1 << 24 | 1 << 31);
    assert!(offered[0][2] & level == level && offered[0][2] & !(level | beside) != 0, "{offered:x?}");

    let machine = json!({ "cpu_template": "x86-64-v2" });
    let original = ByHand::start(&rig, "level", &json!({ "machine-config": machine }));
    let is_level = |monitor: &ByHand<'_>| {
        assert_eq!(cpuid(monitor, "1 0")[2], level | offered[0][2] & beside);
        // Of leaf 7 EBX: TSC_ADJUST, SMEP, SMAP; of ECX UMIP.
        let seventh = cpuid(monitor, "7 0");
        assert_eq!(
            [seventh[0], seventh[1], seventh[2]],
            [0, offered[1][1] & (1 << 1 | 1 << 7 | 1 << 20), offered[1][2] & 1 << 2]
        );
        // KVM keeps EBX by itself.
        let [low, _, size, high] = cpuid(monitor, "d 0");
        assert_eq!([low, size, high], [0; 3]);
        assert_eq!(cpuid(monitor, "80000008 0")[0] & 0xff, 39);
    };
    is_level(&original);
    original.snapshot();
    let (clone, _) = ByHand::load(&rig, "moved", &original, &json!({}));
    is_level(&clone);
    original.patch("/vm", &json!({ "state": "Resumed" }));
    for monitor in [&original, &clone] {
        assert_eq!(monitor.ask("off"), "");
    }
}

/// How long a guest may take for CPUs and memory that it is given.
const RESIZED: Duration = Duration::from_secs(2);

/// Resizes the machine and returns how long it took the guest to be so: from before the call, which takes its way to the host, to the
/// answer that says so, which takes it back.
#[track_caller]
fn resized(monitor: &ByHand<'_>, what: &Value, question: &str, is: impl Fn(&str) -> bool) -> Duration {
    let start = std::time::Instant::now();
    monitor.patch("/machine-config", what);
    wait_for(&format!("{what}"), SOON, || {
        let said = monitor.ask(question);
        if is(&said) { Ok(()) } else { Err(said) }
    });
    start.elapsed()
}

#[test]
fn a_linux_guest_is_resized_while_it_runs() {
    let rig = Rig::get();
    let monitor = ByHand::start(
        &rig,
        "resize",
        &json!({
            "machine-config": { "max_vcpu_count": 4 },
            "memory-hotplug": { "total_size_mib": 512 },
        }),
    );
    assert_eq!(monitor.ask("cpus"), "0");
    let memory = || monitor.ask("memory").parse::<u64>().unwrap();
    let before = memory();

    let cpus = resized(&monitor, &json!({ "vcpu_count": 4 }), "cpus", |said| said == "0-3");
    assert_eq!(monitor.get("/metrics")["vcpus"], json!({ "wanted": 4, "plugged": 4, "taken": 4 }));
    let more = json!({ "mem_size_mib": MEMORY_MIB + 256 });
    let added = resized(&monitor, &more, "memory", |said| said == (before + 256).to_string());
    println!("from 1 to 4 CPUs in {cpus:?}; 256 MiB more in {added:?}");
    assert!(cpus <= RESIZED && added <= RESIZED, "{cpus:?}, {added:?}");
    assert_eq!(monitor.get("/hotplug/memory")["plugged_size_mib"], json!(256));
    // They are good for something.
    assert_eq!(monitor.ask("hold 300"), "held 300");
    assert_eq!(monitor.ask("drop"), "dropped");

    let used = monitor.resident_mib();
    let cpus = resized(&monitor, &json!({ "vcpu_count": 2 }), "cpus", |said| said == "0-1");
    let less = json!({ "mem_size_mib": MEMORY_MIB });
    let taken = resized(&monitor, &less, "memory", |said| said == before.to_string());
    let given = wait_for("the guest to let go of all", SOON, || {
        let (vcpus, memory) = (monitor.get("/metrics")["vcpus"].clone(), monitor.get("/hotplug/memory"));
        let done = vcpus["plugged"] == json!(2) && memory["plugged_size_mib"] == json!(0);
        if done { Ok(monitor.resident_mib()) } else { Err(format!("{vcpus} {memory}")) }
    });
    println!(
        "from 4 to 2 CPUs in {cpus:?}; 256 MiB less in {taken:?}; resident: {used} MiB, then {given} MiB"
    );
    assert!(given + 200 <= used, "{used} MiB before, {given} MiB after");
    // Once more, as CPUs that went are used again.
    resized(&monitor, &json!({ "vcpu_count": 3 }), "cpus", |said| said == "0-2");
    let metrics = monitor.get("/metrics");
    assert_eq!(metrics["resets"], json!(0), "{metrics}");
    for fault in ["errors", "refused", "failed"] {
        assert_eq!(metrics["devices"]["mem"][fault], json!(0), "{metrics}");
    }
}

/// Nanoseconds that each of the kernel's workers for this monitor has run.
/// Processors and interrupt lines are in the MP table alone. The lines of the last disks, and of vsock behind them, are none of the
/// sixteen that a PC has without an IOAPIC.
#[test]
fn a_linux_guest_without_acpi_has_all_its_cpus_and_devices() {
    let rig = Rig::get();
    let monitor = ByHand::named(&rig, "no-acpi");
    let disk = format!("{}/disk", monitor.dir);
    rig.host(&format!("mkdir -p {} && truncate --size 1M {disk}", monitor.dir)).ok();
    let drives: Vec<Value> = (0..12)
        .map(|index| json!({ "drive_id": format!("d{index}"), "path_on_host": disk, "is_read_only": true }))
        .collect();
    monitor.boot_with(&json!({
        "machine-config": { "vcpu_count": 4, "acpi": false },
        "drives": drives,
    }));
    assert_eq!(monitor.ask("cpus"), "0-3");
    assert_eq!(monitor.ask("kernel ACPI: RSDP"), "nothing");
    // Its driver has looked for partitions, so its interrupt arrives.
    assert!(monitor.ask("kernel [vdl]").contains("2048 512-byte"), "{}", monitor.ask("kernel [vdl]"));
}

fn vhost_workers(monitor: &ByHand<'_>) -> Vec<u64> {
    let look = format!(
        "pid=$(pgrep -f '^[^ ]*roost-vmm run --config {}/')
         for comm in $(grep -l \"^vhost-$pid$\" /proc/[0-9]*/task/*/comm); do cut -d ' ' -f 1 ${{comm%comm}}schedstat; done",
        monitor.dir
    );
    monitor.rig.host(&look).stdout.lines().map(|line| line.parse().unwrap()).collect()
}

/// Both ways at once, several times, as each connection is another flow.
#[track_caller]
fn streams(monitor: &ByHand<'_>, flows: usize, mib: u64) {
    for _ in 0..flows {
        assert_eq!(monitor.ask(&format!("echo 10.9.0.1:7 {mib}")), format!("echoed {}", mib << 20));
    }
}

#[test]
fn the_hosts_kernel_moves_a_linux_guests_packets() {
    let rig = Rig::get();
    let original = ByHand::networked(&rig, "vhost");
    let interface =
        json!([{ "iface_id": "eth0", "host_dev_name": "tap0", "num_queue_pairs": 2, "vhost": true }]);
    original.boot_with(&json!({ "machine-config": { "vcpu_count": 2 }, "network-interfaces": interface }));
    assert_eq!(original.ask("net eth0 10.9.0.2"), "up");
    let began = std::time::Instant::now();
    streams(&original, 4, 4);
    let took = began.elapsed();
    // No packet passed the monitor.
    assert_eq!(original.get("/metrics")["devices"]["eth0"], json!({ "vhost": true }));
    let workers = vhost_workers(&original);
    println!("4 times 4 MiB there and back: {took:?}; the kernel's workers ran for {workers:?} ns");
    assert_eq!(workers.len(), 2, "{workers:?}");
    assert!(workers.iter().sum::<u64>() > 1_000_000, "{workers:?}");

    // A snapshot holds the rings, and they go on afterwards.
    original.snapshot();
    original.patch("/vm", &json!({ "state": "Resumed" }));
    streams(&original, 2, 1);

    // A clone goes on from there with a worker of its own, and one with the monitor's own data path.
    let clone = ByHand::networked(&rig, "vhost-clone");
    clone.load_with(&original, &json!({}));
    streams(&clone, 2, 1);
    assert_eq!(vhost_workers(&clone).len(), 2);
    let other = ByHand::networked(&rig, "vhost-other");
    let without = json!([{ "iface_id": "eth0", "host_dev_name": "tap0", "vhost": false }]);
    other.load_with(&original, &json!({ "network_overrides": without }));
    streams(&other, 2, 1);
    assert!(vhost_workers(&other).is_empty());
    assert!(other.get("/metrics")["devices"]["eth0"]["tx_packets"].as_u64() > Some(0));

    for monitor in [&original, &clone, &other] {
        assert_eq!(monitor.ask("off"), "");
    }
    wait_for("the kernel's workers to end", SOON, || {
        let left = vhost_workers(&original);
        if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
    });
}
