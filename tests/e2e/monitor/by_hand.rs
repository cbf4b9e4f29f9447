//! A monitor on the host and its Linux guest, without agent and controller.

use roost_e2e::{Ran, Rig, TempFile, wait_for};
use serde_json::{Value, json};
use std::process::{Command, Stdio};
use std::time::Duration;

pub const SOON: Duration = Duration::from_secs(60);
pub const MEMORY_MIB: u64 = 192;

/// A monitor on the host, started without agent and controller, and its guest, whose init is `roost-guest`.
pub struct ByHand<'a> {
    pub rig: &'a Rig,
    pub dir: String,
    pub unit: String,
    /// Words before the monitor's own.
    pub within: String,
}

impl<'a> ByHand<'a> {
    /// A guest that boots.
    pub fn start(rig: &'a Rig, name: &str, devices: &Value) -> ByHand<'a> {
        ByHand::boot(rig, name, devices).0
    }

    /// The same, and how long it took from the monitor's start to the guest's first reply.
    pub fn boot(rig: &'a Rig, name: &str, devices: &Value) -> (ByHand<'a>, Duration) {
        let monitor = ByHand::named(rig, name);
        let took = monitor.boot_with(devices);
        (monitor, took)
    }

    pub fn boot_with(&self, devices: &Value) -> Duration {
        let (rig, dir) = (self.rig, &self.dir);
        let initrd = TempFile::new("initrd", "");
        std::fs::write(&initrd.0, initrd_of(&std::fs::read(env!("CARGO_BIN_EXE_roost-guest")).unwrap()))
            .unwrap();
        let mut config = json!({
            "boot-source": {
                "kernel_image_path": format!("{dir}/kernel"),
                "initrd_path": format!("{dir}/{}", initrd.0.file_name().unwrap().to_str().unwrap()),
                "boot_args": "console=ttyS0 quiet panic=1 memhp_default_state=online_movable",
            },
            "machine-config": { "vcpu_count": 1, "mem_size_mib": MEMORY_MIB },
            "vsock": { "guest_cid": 3, "uds_path": format!("{dir}/v.sock") },
        });
        for (name, value) in devices.as_object().unwrap() {
            match (&mut config[name], value) {
                // Fields of what is there already.
                (Value::Object(there), Value::Object(more)) => there.extend(more.clone()),
                (place, value) => *place = value.clone(),
            }
        }
        rig.copy_to_host(&[&rig.images["tiny-fast"].join("kernel"), &initrd.0], dir);
        self.run(&config)
    }

    /// A guest that goes on from the snapshot in another monitor's folder.
    pub fn load(rig: &'a Rig, name: &str, from: &ByHand<'_>, more: &Value) -> (ByHand<'a>, Duration) {
        let monitor = ByHand::named(rig, name);
        let took = monitor.load_with(from, more);
        (monitor, took)
    }

    pub fn load_with(&self, from: &ByHand<'_>, more: &Value) -> Duration {
        self.run(&self.snapshot_of(from, more))
    }

    /// Where a snapshot cannot go on.
    pub fn try_load(&self, from: &ByHand<'_>) -> Ran {
        let file = TempFile::new("config.json", &self.snapshot_of(from, &json!({})).to_string());
        self.rig.copy_to_host(&[&file.0], &self.dir);
        let (name, program) = (file.0.file_name().unwrap().to_str().unwrap(), self.rig.host_bin.display());
        self.rig.host(&format!("timeout 60 {program}/roost-vmm run --config {}/{name}", self.dir))
    }

    fn snapshot_of(&self, from: &ByHand<'_>, more: &Value) -> Value {
        let mut snapshot = json!({
            "snapshot_path": format!("{}/state", from.dir),
            "mem_backend": { "backend_type": "File", "backend_path": format!("{}/memory", from.dir) },
            "vsock_override": { "uds_path": format!("{}/v.sock", self.dir) },
        });
        snapshot.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!({ "snapshot": snapshot })
    }

    /// Puts a snapshot into this machine's folder; it stays paused.
    #[track_caller]
    pub fn snapshot(&self) {
        self.patch("/vm", &json!({ "state": "Paused" }));
        self.call("PUT", "/snapshot/create", &json!({ "snapshot_path": "state", "mem_file_path": "memory" }));
    }

    /// What this machine's snapshot is in, on another host.
    #[track_caller]
    pub fn carry<'b>(&self, to: &'b Rig) -> ByHand<'b> {
        let on = |rig: &Rig, script: String| {
            let mut command = Command::new(&rig.host[0]);
            command.args(&rig.host[1..]).arg(script);
            command
        };
        let mut packs = on(self.rig, format!("tar -C {} -cSf - state memory | gzip -1", self.dir));
        let mut packs = packs.stdout(Stdio::piped()).spawn().unwrap();
        let mut unpacks = on(to, format!("mkdir -p {0} && tar -C {0} -xzf -", self.dir));
        let unpacked = unpacks.stdin(packs.stdout.take().unwrap()).status().unwrap();
        assert!(packs.wait().unwrap().success() && unpacked.success());
        ByHand { rig: to, dir: self.dir.clone(), unit: self.unit.clone(), within: String::new() }
    }

    pub fn named(rig: &'a Rig, name: &str) -> ByHand<'a> {
        let unit = format!("{}-{name}", rig.units);
        ByHand { rig, dir: format!("/run/{unit}"), unit, within: String::new() }
    }

    /// In a network of its own, with a tap of several queues and an echo service at the other end of it.
    pub fn networked(rig: &'a Rig, name: &str) -> ByHand<'a> {
        let mut monitor = ByHand::named(rig, name);
        let unit = &monitor.unit;
        // The end that a guest knows from before a snapshot has the same address.
        rig.host(&format!(
            "modprobe -a tun vhost_net && ip netns add {unit} && ip -n {unit} link set lo up &&
             ip -n {unit} tuntap add tap0 mode tap multi_queue &&
             ip -n {unit} link set tap0 address 02:00:00:00:00:01 up && ip -n {unit} address add 10.9.0.1/24 dev tap0 &&
             systemd-run --quiet --collect --unit {unit}-echo ip netns exec {unit} socat -t 60 TCP-LISTEN:7,fork EXEC:cat"
        ))
        .ok();
        monitor.within = format!("ip netns exec {unit}");
        monitor
    }

    /// Starts a monitor and waits for the guest's first reply; returns how long that took, by the host's clock.
    pub fn run(&self, config: &Value) -> Duration {
        let file = TempFile::new("config.json", &config.to_string());
        let (dir, unit, within) = (&self.dir, &self.unit, &self.within);
        self.rig.copy_to_host(&[&file.0], dir);
        let (name, bin) = (file.0.file_name().unwrap().to_str().unwrap(), self.rig.host_bin.display());
        let script = format!(
            "cat > {dir}/start <<'END'
             exec 8<> {dir}/state 9<> {dir}/memory
             {within} {bin}/roost-vmm run --config {dir}/{name} --api-sock {dir}/api --fd state=8 --fd memory=9 > {dir}/console 2>&1
             echo $? > {dir}/code
END
             systemd-run --quiet --collect --unit {unit} sh {dir}/start
             until [ -S {dir}/api ]; do :; done
             began=$(date +%s%N)
             until printf 'CONNECT 52\\nupper x\\n' | socat -t 20 - UNIX-CONNECT:{dir}/v.sock 2> {dir}/socat | grep -q '^X'; do
               [ $(($(date +%s%N) - began)) -lt {} ] || {{ cat {dir}/console {dir}/socat; exit 1; }}
             done
             echo $(($(date +%s%N) - began))",
            SOON.as_nanos()
        );
        Duration::from_nanos(self.rig.host(&script).ok().trim().parse().unwrap())
    }

    /// What the guest answers to a line.
    #[track_caller]
    pub fn ask(&self, line: &str) -> String {
        let talk =
            format!("printf 'CONNECT 52\\n{line}\\n' | socat -t 20 - UNIX-CONNECT:{}/v.sock", self.dir);
        let said = self.rig.host(&talk).ok();
        let (greeting, answer) = said.split_once('\n').unwrap_or((&said, ""));
        assert!(greeting.starts_with("OK "), "{said}");
        answer.trim_end().to_owned()
    }

    #[track_caller]
    pub fn get(&self, path: &str) -> Value {
        self.rig.host(&format!("curl -sS --unix-socket {}/api http://localhost{path}", self.dir)).json()
    }

    #[track_caller]
    pub fn patch(&self, path: &str, body: &Value) {
        self.call("PATCH", path, body);
    }

    #[track_caller]
    pub fn call(&self, method: &str, path: &str, body: &Value) {
        let curl =
            format!("curl -sS --unix-socket {}/api -X {method} http://localhost{path} -d '{body}'", self.dir);
        assert_eq!(self.rig.host(&curl).ok(), "");
    }

    /// Memory of the host that the monitor has, MiB.
    #[track_caller]
    pub fn resident_mib(&self) -> u64 {
        let look = format!(
            "awk '/^VmRSS/ {{ print $2 }}' /proc/$(pgrep -f '^[^ ]*roost-vmm run --config {}/')/status",
            self.dir
        );
        self.rig.host(&look).ok().trim().parse::<u64>().unwrap() / 1024
    }

    /// What KVM has counted of this machine.
    #[track_caller]
    pub fn counter(&self, name: &str) -> u64 {
        let look = format!(
            "mountpoint -q /sys/kernel/debug || mount -t debugfs none /sys/kernel/debug
             pid=$(pgrep -f '^[^ ]*roost-vmm run --config {}/') && cat /sys/kernel/debug/kvm/$pid-*/{name}",
            self.dir
        );
        self.rig.host(&look).ok().trim().parse().unwrap()
    }

    #[track_caller]
    pub fn wait_balloon(&self, mib: u64) {
        wait_for(&format!("a balloon of {mib} MiB"), SOON, || {
            let statistics = self.get("/balloon/statistics");
            if statistics["actual_mib"] == json!(mib) { Ok(()) } else { Err(statistics.to_string()) }
        });
    }
}

impl Drop for ByHand<'_> {
    fn drop(&mut self) {
        self.rig.host(&format!(
            "systemctl kill -s KILL {unit}; systemctl stop {unit} {unit}-echo; ip netns delete {unit}; rm -rf {}",
            self.dir,
            unit = self.unit
        ));
    }
}

/// An initrd (cpio, newc) with a console and one program as init.
fn initrd_of(program: &[u8]) -> Vec<u8> {
    let mut archive = Vec::new();
    let mut entry = |name: &str, mode: u32, device: (u32, u32), content: &[u8]| {
        let length = |count: usize| u32::try_from(count).unwrap();
        let fields =
            [0, mode, 0, 0, 1, 0, length(content.len()), 0, 0, device.0, device.1, length(name.len() + 1), 0];
        archive.extend(b"070701");
        fields.iter().for_each(|field| archive.extend(format!("{field:08x}").bytes()));
        for part in [format!("{name}\0").as_bytes(), content] {
            archive.extend(part);
            archive.resize(archive.len().next_multiple_of(4), 0);
        }
    };
    entry("dev", 0o04_0755, (0, 0), b"");
    entry("dev/console", 0o02_0600, (5, 1), b"");
    entry("init", 0o10_0755, (0, 0), program);
    entry("TRAILER!!!", 0, (0, 0), b"");
    archive
}
