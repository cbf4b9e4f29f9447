//! CPU templates: what a guest sees of its CPUs.

// Tests build bytes out of numbers whose size they know.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use std::process::Command;

use common::cpus::{INSERTING, PLUGGED, Told, told};
use common::{Code, Machine, hand, refusal, says, wait_for};
use roost_vmm::client::Client;
use roost_vmm::cpu::features::Register;
use roost_vmm::exit::ExitCode;
use serde_json::{Value, json};

// kvm_pvm answers leaves 1, 7 and 0xD with the host's features whatever it was told; these it answers as it was told.
const KVM: Told = Told::Cpuid(0x4000_0001, 0, Register::Eax);
const EXTENDED_ECX: Told = Told::Cpuid(0x8000_0001, 0, Register::Ecx);
const EXTENDED_EDX: Told = Told::Cpuid(0x8000_0001, 0, Register::Edx);
const ADDRESSES: Told = Told::Cpuid(0x8000_0008, 0, Register::Eax);
const VERSION: Told = Told::Cpuid(1, 0, Register::Eax);
const ASYNC_PF: u32 = 1 << 4;
const LAHF: u32 = 1;
const NX: u32 = 1 << 20;
const MISC_ENABLE: u32 = 0x1a0;

/// A guest whose second CPU tells what it has.
fn machine(what: &[Told]) -> Machine {
    let mut machine = Machine::new(&Code::default().other_cpus_that_tell(what).started_cpu(1).power_off());
    machine.config["machine-config"]["vcpu_count"] = json!(2);
    machine
}

/// What it told, behind the number of the CPU.
fn answer(console: &str) -> Vec<u32> {
    told(console.strip_prefix('1').unwrap())
}

/// What a guest with this configuration sees.
fn seen(what: &[Told], config: &[(&str, Value)]) -> Vec<u32> {
    let mut machine = machine(what);
    for (pointer, value) in config {
        let (object, name) = pointer.rsplit_once('/').unwrap();
        machine.config.pointer_mut(object).unwrap()[name] = value.clone();
    }
    let ended = machine.run();
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    answer(&ended.console)
}

fn change(leaf: &str, flags: u32, register: &str, bitmap: &str) -> Value {
    json!({ "leaf": leaf, "subleaf": "0x0", "flags": flags, "modifiers": [{ "register": register, "bitmap": bitmap }] })
}

/// Without asynchronous page faults, and with nothing of leaf 0x80000001 ECX; family, model and stepping of another CPU.
fn template() -> Value {
    json!({ "cpuid_modifiers": [
        change("0x1", 0, "eax", "0b1010_0101_1010"),
        change("0x40000001", 0, "eax", "0b0xxxx"),
        change("0x80000001", 0, "ecx", &format!("0b{}", "0".repeat(32))),
    ]})
}

/// What it makes of what a guest without it sees in VERSION, KVM, EXTENDED_ECX and EXTENDED_EDX.
fn masked(all: &[u32]) -> Vec<u32> {
    // CMP_LEGACY is of the topology: the machine has two CPUs.
    vec![all[0] & !0xfff | 0xa5a, all[1] & !ASYNC_PF, 1 << 1, all[3]]
}

const ALL: [Told; 4] = [VERSION, KVM, EXTENDED_ECX, EXTENDED_EDX];

#[test]
fn a_guest_sees_what_its_template_leaves() {
    let all = seen(&ALL, &[]);
    // Without these here, the test would show nothing.
    assert!(all[1] & ASYNC_PF != 0 && all[2] & LAHF != 0 && all[3] & NX != 0, "{all:x?}");
    assert_eq!(seen(&ALL, &[("/cpu-config", template())]), masked(&all));
    assert_eq!(seen(&ALL, &[("/cpu-config", json!({}))]), all);
    assert_eq!(seen(&ALL, &[("/machine-config/cpu_template", json!("None"))]), all);
}

#[test]
fn a_guest_of_a_level_sees_nothing_above_it() {
    let what = [ALL.as_slice(), &[ADDRESSES]].concat();
    let all = seen(&what, &[]);
    let level = seen(&what, &[("/machine-config/cpu_template", json!("x86-64-v1"))]);
    assert_eq!(level[0], all[0]);
    // kvmclock, steal time, end of interrupt, unhalt.
    assert_eq!(level[1], all[1] & (1 << 24 | 0b1110_1011));
    // LAHF in 64-bit mode is of v2.
    assert_eq!(level[2], 1 << 1);
    // SYSCALL, NX, RDTSCP, long mode, and what repeats leaf 1.
    assert_eq!(level[3], all[3] & (1 << 11 | NX | 1 << 27 | 1 << 29 | 0x0183_f3ff));
    assert_eq!(level[4] & 0xff, (all[4] & 0xff).min(39));
}

#[test]
fn every_cpu_has_the_template_those_that_come_later_too() {
    let code = Code::default().other_cpus_that_tell(&[EXTENDED_ECX]).print("r");
    let code = code.see_cpu(1, PLUGGED | INSERTING).started_cpu(1).power_off();
    for (config, gone) in [(json!({}), false), (template(), true)] {
        let mut machine = Machine::new(&code);
        machine.config["machine-config"]["max_vcpu_count"] = json!(2);
        machine.config["cpu-config"] = config;
        machine.start::<&str>(&[]);
        says(&machine, "r");
        machine.client().put("PATCH", "/machine-config", &json!({ "vcpu_count": 2 })).unwrap();
        let ended = machine.wait();
        assert_eq!(ended.code, 0, "{}", ended.stderr);
        let told = answer(ended.console.strip_prefix('r').unwrap());
        assert_eq!(told[0] & LAHF == 0, gone, "{told:x?}");
    }
}

#[test]
fn an_msr_is_as_its_template_says() {
    let what = [Told::Msr(MISC_ENABLE)];
    let msr = |bitmap: &str| json!({ "msr_modifiers": [{ "addr": "0x1a0", "bitmap": bitmap }] });
    // The monitor itself sets bit 0, fast strings.
    assert_eq!(seen(&what, &[]), [1]);
    assert_eq!(seen(&what, &[("/cpu-config", msr("0b0"))]), [0]);
    assert_eq!(seen(&what, &[("/cpu-config", msr("0b1_xxxx_xxxx_xxxx"))]), [0x1001]);
}

/// From the file that the configuration names, through the API, as what this host lacks is refused, and a machine starts after that.
#[test]
fn what_a_host_cannot_give_is_refused_in_words() {
    let mut machine = machine(&[EXTENDED_ECX]);
    std::fs::write(machine.path("template"), template().to_string()).unwrap();
    machine.config["cpu-config"] = json!(machine.text("template"));
    let ended = machine.run();
    assert_eq!((ended.code, answer(&ended.console)), (0, vec![2]), "{}", ended.stderr);
    std::fs::write(machine.path("template"), "{\"msr_modifiers\": 1}").unwrap();
    let ended = machine.run();
    assert_eq!(ended.code, ExitCode::Config.code());
    assert!(ended.stderr.contains("cpu-config: invalid type"), "{}", ended.stderr);

    let socket = machine.text("api");
    machine.start_with(&["run", "--api-sock", &socket]);
    let client = machine.client();
    let put = |path: &str, body: &Value| client.put("PUT", path, body);
    put("/boot-source", &machine.config["boot-source"].clone()).unwrap();
    put("/serial", &json!({ "output": machine.text("later") })).unwrap();
    for (template, words) in [
        (
            json!({ "cpuid_modifiers": [change("0x1", 0, "ecx", "0b1xxxxx")] }),
            "vmx (CPUID leaf 0x1.0 ecx bit 5)",
        ),
        (
            json!({ "cpuid_modifiers": [change("0x12345", 0, "ecx", "0b0")] }),
            "leaf 0x12345, subleaf 0x0: this host's KVM has no",
        ),
        (
            json!({ "msr_modifiers": [{ "addr": "0x12345", "bitmap": "0b0" }] }),
            "addr 0x12345: this host's KVM has no",
        ),
        (json!({ "kvm_capabilities": ["4000000"] }), "does not have capability 4000000"),
    ] {
        put("/cpu-config", &template).unwrap();
        let why = refusal(client.start());
        assert!(why.contains("cpu-config: ") && why.contains(words), "{why}");
    }
    let machine_config =
        |template: &str| json!({ "vcpu_count": 2, "mem_size_mib": 16, "cpu_template": template });
    let why = refusal(put("/machine-config", &machine_config("T2")));
    assert!(why.contains("\"T2\" is one of Firecracker's"), "{why}");
    // The last one counts.
    put("/machine-config", &machine_config("x86-64-v1")).unwrap();
    let config = |client: &Client| -> Value {
        serde_json::from_slice(&client.request("GET", "/vm/config", b"").unwrap()).unwrap()
    };
    assert_eq!(
        (&config(&client)["cpu-config"], &config(&client)["machine-config"]["cpu_template"]),
        (&Value::Null, &json!("x86-64-v1"))
    );
    put("/cpu-config", &template()).unwrap();
    assert_eq!(config(&client)["machine-config"]["cpu_template"], Value::Null);
    client.start().unwrap();
    let ended = machine.wait();
    assert_eq!(ended.code, 0, "{}", ended.stderr);
}

#[test]
fn a_configuration_has_one_template() {
    let mut machine = Machine::new(&Code::default().power_off());
    machine.config["cpu-config"] = json!({});
    machine.config["machine-config"]["cpu_template"] = json!("x86-64-v1");
    let ended = machine.run();
    assert_eq!(ended.code, ExitCode::Config.code());
    assert!(
        ended.stderr.contains("cpu_template \"x86-64-v1\"; a machine has one template"),
        "{}",
        ended.stderr
    );
}

/// In a clone, after its reset, and in a clone of the clone.
#[test]
fn a_snapshot_keeps_its_template() {
    let what = [ALL.as_slice(), &[Told::Msr(MISC_ENABLE)]].concat();
    let masked = [masked(&seen(&ALL, &[])), vec![0x1001]].concat();
    // again: mov edx, 0x3fd; in al, dx; test al, 1; jz again; mov edx, 0x3f8; in al, dx
    let input = [0xba, 0xfd, 0x03, 0, 0, 0xec, 0xa8, 0x01, 0x74, 0xf6, 0xba, 0xf8, 0x03, 0, 0, 0xec];
    let code = Code::default().other_cpus_that_tell(&what).print("a").started_cpu(1).bytes(&input);
    let mut machine = Machine::new(&code.print("b").started_cpu(1).bytes(&input).reset());
    machine.config["machine-config"]["vcpu_count"] = json!(2);
    machine.config["cpu-config"] = template();
    machine.config["cpu-config"]["msr_modifiers"] =
        json!([{ "addr": "0x1a0", "bitmap": "0b1_xxxx_xxxx_xxxx" }]);
    let (_files, arguments) = hand(&machine, &["state", "memory"]);
    machine.start(&arguments);
    // The last of them is there when its last letter is.
    let tells = |machine: &Machine, begin: char| {
        let all = || {
            let text = machine.console();
            let told = text.rsplit_once(&format!("{begin}1"))?.1.to_owned();
            (told.len() == 8 * what.len()).then_some(told)
        };
        assert_eq!(told(&wait_for("the CPU", all)), masked);
    };
    tells(&machine, 'a');
    let pause_into = |client: &Client, state: &str, memory: &str| {
        client.pause().unwrap();
        let body = json!({ "snapshot_path": state, "mem_file_path": memory });
        client.put("PUT", "/snapshot/create", &body).unwrap();
        client.force_stop().unwrap();
    };
    pause_into(&machine.client(), "state", "memory");

    let load = |state: &str, memory: &str, names: &[&str]| {
        let mut clone = Machine::new(&Code::default());
        let (_files, arguments) = hand(&clone, names);
        let socket = clone.text("api");
        let all = ["run", "--api-sock", &socket].into_iter().chain(arguments.iter().map(String::as_str));
        clone.start_with(&all.collect::<Vec<&str>>());
        let client = clone.client();
        let body = json!({
            "snapshot_path": state, "mem_file_path": memory, "resume_vm": true,
            "serial_override": { "output": clone.text("console") },
        });
        client.put("PUT", "/snapshot/load", &body).unwrap();
        (clone, client)
    };
    let (clone, client) = load(&machine.text("state"), &machine.text("memory"), &["s2", "m2"]);
    pause_into(&client, "s2", "m2");
    for (state, memory) in
        [(machine.text("state"), machine.text("memory")), (clone.text("s2"), clone.text("m2"))]
    {
        let (clone, client) = load(&state, &memory, &[]);
        client.console_input(b"x").unwrap();
        tells(&clone, 'b');
        client.console_input(b"x").unwrap();
        tells(&clone, 'a');
        client.force_stop().unwrap();
    }
}

/// What this host's dump says is what a guest without a template sees; with it as a template nothing changes; and what it has in common
/// with a host that has less is what the guest of either sees.
#[test]
fn hosts_are_made_alike_by_what_they_have_in_common() {
    let mut machine = machine(&ALL);
    let run = |arguments: &[&str]| Command::new(&machine.program).args(arguments).output().unwrap();
    let dump = run(&["cpu-template", "dump"]);
    assert!(dump.status.success(), "{dump:?}");
    std::fs::write(machine.path("here"), &dump.stdout).unwrap();
    let all = seen(&ALL, &[]);
    assert_eq!(seen(&ALL, &[("/cpu-config", json!(machine.text("here")))]), all);

    let mut there: Value = serde_json::from_slice(&dump.stdout).unwrap();
    let leaves = there["cpuid_modifiers"].as_array_mut().unwrap();
    let leaf = leaves.iter_mut().find(|leaf| leaf["leaf"] == "0x40000001").unwrap();
    let bitmap = &mut leaf["modifiers"][0]["bitmap"];
    assert_eq!(bitmap.as_str().unwrap(), format!("0b{:032b}", all[1]));
    *bitmap = json!(format!("0b{:032b}", all[1] & !ASYNC_PF));
    std::fs::write(machine.path("there"), there.to_string()).unwrap();
    let common = run(&["cpu-template", "common", &machine.text("here"), &machine.text("there")]);
    assert!(common.status.success(), "{common:?}");
    std::fs::write(machine.path("common"), &common.stdout).unwrap();
    let wrong = run(&["cpu-template", "common", &machine.text("here"), &machine.text("kernel")]);
    assert_eq!(wrong.status.code(), Some(ExitCode::Config.code()));
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("/kernel: "), "{wrong:?}");

    machine.config["cpu-config"] = json!(machine.text("common"));
    let ended = machine.run();
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    assert_eq!(answer(&ended.console), [all[0], all[1] & !ASYNC_PF, all[2], all[3]]);
}
