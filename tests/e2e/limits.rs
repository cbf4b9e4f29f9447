//! What an instance type promises is what the instance gets, and what one guest does hurts only itself.
#![allow(clippy::unwrap_used, clippy::cast_precision_loss, missing_docs)]

use roost_e2e::session::Session;
use roost_e2e::{Rig, TempFile, Tenant, wait_for};
use std::time::Duration;

const SOON: Duration = Duration::from_secs(90);
/// A guest with a quarter of an emulated CPU takes its time to boot.
const BOOT: Duration = Duration::from_secs(240);
/// Works all the time, if it is let, and says every other second how much it has done and when that was. Nothing is typed to it
/// while it is measured: a line on a console costs a guest a hundred exits.
const BURN: &str = "#!/bin/sh
printf 'SPIN' > /run/spin
chmod +x /run/spin
(
  n=0 next=0
  while :; do
    /run/spin
    n=$((n+1))
    read up idle < /proc/uptime
    [ ${up%.*} -lt $next ] || { echo \"work $n $up\"; next=$((${up%.*}+2)); }
  done > /dev/console
) &
echo $! > /run/burner
kill -STOP $!
echo 'read b < /run/burner; kill -CONT $b' > /run/go
echo 'read b < /run/burner; kill -STOP $b' > /run/halt
echo the burner stands
";
/// Keeps an instance's threads on the host's last CPU. Two CPUs of a virtual host may be two threads of one core outside,
/// and then what a guest gets done in a second depends on what the other CPU does meanwhile: on one CPU nothing is shared
/// but its time, which is what the limit is about.
const PIN: &str = "pin() { for p in $(cat $(find /sys/fs/cgroup -type d -name $1)/cgroup.procs); do
  taskset -acp $(($(nproc) - 1)) $p || return; done; }; pin";
/// Rounds, and the seconds in which a limited guest works alone: more than 30 s in all.
const ROUNDS: u32 = 2;
const WINDOW: u32 = 22;
/// Seconds of an emulated CPU that a guest may lose each time it was held back. One machine measured 1 to 5 ms, another 10 to 18,
/// while `cpu.stat` was within a percent on both.
const LOST: f64 = 0.015;
/// Seconds in which the unlimited guest works, before and after each of those, and both limited ones at once.
const SHORT: u32 = 8;

/// A program of one loop, so many times, as `printf` writes it. It stands in one page and touches no memory: what is measured is
/// the time that a CPU was had, not how well an emulator's caches were kept for who had to wait.
fn spin(times: u32) -> String {
    let mut program = Vec::new();
    let base: u64 = 0x40_0000;
    program.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0"); // 64 bits, little endian
    program.extend(b"\x02\0\x3e\0\x01\0\0\0"); // executable, x86-64
    program.extend((base + 120).to_le_bytes()); // where it starts: behind the headers
    program.extend(64_u64.to_le_bytes()); // where the program headers are
    program.extend([0; 12]);
    program.extend(b"\x40\0\x38\0\x01\0\0\0\0\0\0\0"); // sizes and numbers of headers
    program.extend(b"\x01\0\0\0\x05\0\0\0"); // load, to be read and run,
    program.extend([0_u64, base, base, 148, 148, 4096].map(u64::to_le_bytes).concat()); // all of the file
    program.push(0xb9); // mov ecx, times
    program.extend(times.to_le_bytes());
    program.extend(b"\x48\x69\xc0\x05\x84\x08\x08"); // again: imul rax, rax, 0x8088405
    program.extend(b"\x48\xff\xc0\xff\xc9\x75\xf2"); // inc rax; dec ecx; jnz again
    program.extend(b"\xb8\x3c\0\0\0\x31\xff\x0f\x05"); // mov eax, 60 (exit); xor edi, edi; syscall
    program.iter().map(|byte| format!("\\{byte:03o}")).collect()
}

/// About a sixth of a second of an emulated CPU.
const SPINS: u32 = 100_000_000;

/// A guest that works on command.
struct Worker {
    name: &'static str,
    promised: f64,
    id: String,
    shell: Session,
    commands: u32,
}

impl Worker {
    fn launch(tenant: &Tenant<'_>, name: &'static str, promised: f64, user_data: &str) -> Worker {
        let id = tenant.launch("tiny-fast", name, &["--user-data", user_data]);
        tenant.wait_console(&id, "the burner stands", BOOT);
        tenant.rig.host(&format!("{PIN} {id}")).ok();
        let shell = Session::start(tenant, &["console", &id, "--attach"]);
        Worker { name, promised, id, shell, commands: 0 }
    }

    /// Has the guest's shell read a script.
    fn tell(&mut self, script: &str) {
        self.commands += 1;
        let mark = format!("<{}", self.commands);
        // In the echo of the command there is a quote between the two.
        self.shell.enter(&format!(". /run/{script}; echo \"{mark}\"'>'"));
        self.shell.wait_text(&format!("{mark}>"), SOON);
    }

    /// What it said that it had done, and when by its own clock.
    fn said(&self) -> Vec<(f64, f64)> {
        let shown = self.shell.shown();
        let said = shown.lines().filter_map(|line| {
            let (work, when) = line.trim().strip_prefix("work ")?.split_once(' ')?;
            Some((work.parse().ok()?, when.parse().ok()?))
        });
        said.collect()
    }
}

/// What was done in a window, or in several.
#[derive(Clone, Copy, Default)]
struct Done {
    /// Work, and the time in which it was done by the worker's own clock.
    work: f64,
    time: f64,
    /// CPU time, how often more was wanted than the limit gives, and the time of both by the host's clock.
    cpu: f64,
    holds: f64,
    cpu_time: f64,
}

impl Done {
    fn add(&mut self, other: Done) {
        self.work += other.work;
        self.time += other.time;
        self.cpu += other.cpu;
        self.holds += other.holds;
        self.cpu_time += other.cpu_time;
    }

    /// The share of a CPU's time.
    fn share(self) -> f64 {
        self.cpu / self.cpu_time
    }

    /// Work in a second.
    fn rate(self) -> f64 {
        self.work / self.time
    }
}

/// The host's clock, then the CPU time of each instance's vCPUs in seconds and how often they were held back, before and
/// after a pause.
fn clocks(rig: &Rig, workers: &[&mut Worker], pause: u32) -> [Vec<f64>; 2] {
    let ids: Vec<&str> = workers.iter().map(|worker| worker.id.as_str()).collect();
    let look = format!(
        "cut -d' ' -f1 /proc/uptime; for id in {}; do
           grep -E 'usage_usec|nr_throttled' $(find /sys/fs/cgroup -type d -name $id)/vcpu/cpu.stat; done",
        ids.join(" ")
    );
    let text = rig.host(&format!("{look}; sleep {pause}; {look}")).ok();
    let number = |line: &str| match line.split_once(' ') {
        Some(("usage_usec", micros)) => micros.parse::<f64>().unwrap() / 1e6,
        Some((_, count)) => count.parse().unwrap(),
        None => line.parse().unwrap(),
    };
    let numbers: Vec<f64> = text.lines().map(number).collect();
    let (before, after) = numbers.split_at(2 * ids.len() + 1);
    [before.to_vec(), after.to_vec()]
}

/// Lets some workers work at once for so long.
fn window(rig: &Rig, workers: &mut [&mut Worker], seconds: u32) -> Vec<Done> {
    let said_before: Vec<usize> = workers.iter().map(|worker| worker.said().len()).collect();
    workers.iter_mut().for_each(|worker| worker.tell("go"));
    let [before, after] = clocks(rig, workers, seconds);
    let said: Vec<_> = workers.iter().map(|worker| worker.said()).collect();
    workers.iter_mut().for_each(|worker| worker.tell("halt"));
    (0..workers.len())
        .map(|n| {
            // The first is said when it is let, with the command still under way.
            let said = &said[n][said_before[n] + 1..];
            let (first, last) = (said[0], said[said.len() - 1]);
            Done {
                work: last.0 - first.0,
                time: last.1 - first.1,
                cpu: after[2 * n + 1] - before[2 * n + 1],
                holds: after[2 * n + 2] - before[2 * n + 2],
                cpu_time: after[0] - before[0],
            }
        })
        .collect()
}

/// The same without a guest: a plain process of the host under a `cpu.max`, on the same CPU. What it loses is lost to the
/// host's CPU, not to anything of ours.
const CONTROL: &str = "
taskset -cp $(($(nproc) - 1)) $$ > /dev/null
c=/sys/fs/cgroup/roost-control; mkdir -p $c
printf \"$SPIN\" > /run/roost-spin; chmod +x /run/roost-spin
trap 'rm /run/roost-spin; echo 1 > $c/cgroup.kill; until rmdir $c 2> /dev/null || [ ! -d $c ]; do sleep 0.1; done' EXIT
echo \"$QUOTA $PERIOD\" > $c/cpu.max
look() { cut -d' ' -f1 /proc/uptime; sed -n 's/^usage_usec //p; s/^nr_throttled //p' $c/cpu.stat; }
look
sh -c 'echo $$ > '$c'/cgroup.procs; n=0; read up idle < /proc/uptime; end=$((${up%.*}+'$SECONDS_EACH')); echo $up
  while [ ${up%.*} -lt $end ]; do
    /run/roost-spin; n=$((n+1)); read up idle < /proc/uptime
  done; echo $up $n'
look
";

fn control(rig: &Rig, share: f64, period_us: f64) -> Done {
    let quota = if share < 1.0 { format!("{:.0}", share * period_us) } else { "max".to_owned() };
    let script =
        format!("PERIOD={period_us}; QUOTA={quota}; SPIN='{}'; SECONDS_EACH={SHORT}; {CONTROL}", spin(SPINS));
    let text = rig.host(&script).ok();
    let numbers: Vec<f64> = text.split_whitespace().map(|word| word.parse().unwrap()).collect();
    let [began, cpu_began, held, up, up_ended, work, ended, cpu_ended, held_ended] = numbers[..] else {
        panic!("{text}")
    };
    Done {
        work,
        time: up_ended - up,
        cpu: (cpu_ended - cpu_began) / 1e6,
        holds: held_ended - held,
        cpu_time: ended - began,
    }
}

/// One measurement: the unlimited guest works in windows between those of the limited ones, each alone and then both at once; so do
/// plain processes of the host, limited and not, which have no kernel of their own to catch up. Says what missed its share.
fn measure(rig: &Rig, limited: &mut [Worker; 2], whole: &mut Worker) -> Vec<String> {
    let (mut baseline, mut done, mut together) =
        (Done::default(), [Done::default(); 2], [Done::default(); 2]);
    let look = format!("cut -d' ' -f2 $(find /sys/fs/cgroup -type d -name {})/vcpu/cpu.max", limited[0].id);
    let period: f64 = rig.host(&look).ok().trim().parse().unwrap();
    let (mut plain, mut plain_limited) = (Done::default(), [Done::default(); 2]);
    for _ in 0..ROUNDS {
        baseline.add(window(rig, &mut [whole], SHORT)[0]);
        for (sum, worker) in done.iter_mut().zip(limited.iter_mut()) {
            sum.add(window(rig, &mut [worker], WINDOW)[0]);
        }
        let [half, quarter] = limited;
        let at_once = window(rig, &mut [half, quarter], SHORT);
        together.iter_mut().zip(at_once).for_each(|(sum, one)| sum.add(one));
        baseline.add(window(rig, &mut [whole], SHORT)[0]);
        plain.add(control(rig, 1.0, period));
        for (sum, worker) in plain_limited.iter_mut().zip(limited.iter()) {
            sum.add(control(rig, worker.promised, period));
        }
    }

    println!(
        "{:<20} {:>8} {:>8} {:>6} {:>11} {:>15} {:>17}",
        "", "promised", "cpu.stat", "held/s", "work/second", "of an unlimited", "lost per hold, ms"
    );
    let line = |name: &str, promised: f64, done: Done, whole: Done| {
        let (share, holds, work) = (done.share(), done.holds / done.cpu_time, done.rate() / whole.rate());
        let lost =
            if holds < 1.0 { "-".to_owned() } else { format!("{:.1}", (promised - work) / holds * 1e3) };
        println!(
            "{name:<20} {promised:>8.2} {share:>8.3} {holds:>6.1} {:>11.2} {work:>15.3} {lost:>17}",
            done.rate()
        );
        (share, work)
    };
    line(whole.name, 1.0, baseline, baseline);
    let emulated = if rig.host("systemd-detect-virt").stdout.trim() == "qemu" { LOST } else { 0.0 };
    let mut missed = Vec::new();
    for (worker, done) in limited.iter().zip(done) {
        let (name, promised) = (worker.name, worker.promised);
        assert!(done.time >= 30.0, "{name} was measured for {:.1} s only", done.time);
        let (share, work) = line(name, promised, done, baseline);
        if (share / promised - 1.0).abs() > 0.05 {
            missed.push(format!("{name} got {share:.3} of a core's time, promised {promised}"));
        }
        let (short, by_emulator) = (promised - work, emulated * done.holds / done.cpu_time);
        if work > promised * 1.05 || short > promised * 0.05 + by_emulator {
            missed.push(format!("{name} did {work:.3} of an unlimited one's work, promised {promised}"));
        }
    }
    for (worker, done) in limited.iter().zip(together) {
        let (share, _) = line(&format!("{} at once", worker.name), worker.promised, done, baseline);
        if (share / worker.promised - 1.0).abs() > 0.05 {
            missed.push(format!("{} got {share:.3} of a core's time beside the other", worker.name));
        }
    }
    line("a plain process", 1.0, plain, plain);
    for (worker, done) in limited.iter().zip(plain_limited) {
        line("a plain process", worker.promised, done, plain);
    }
    missed
}

/// Time and work are asserted of each limited guest alone, time also of both at once. Two guests that take turns on one emulated CPU
/// lose by it: both at once did 0.48 and 0.22 of the work, with a period of `cpu.max` of 100 ms as of 400 (half a millisecond per turn, if it is
/// the turns: computed, not seen). A guest that was held back loses 1 to 18 ms of an emulated CPU, plain processes
/// nearly nothing; on hardware nobody has measured it. In the virtual host the agent therefore holds guests back more rarely (`scripts/lib/stack`).
///
/// What takes this machine's CPUs away meanwhile (another program outside the virtual host) shows in a measurement, not in the
/// limit: one that misses is taken again, once, and both are printed. What a hold costs an emulated CPU is not held against the limit ([`LOST`]).
#[test]
fn limited_instances_get_their_share_of_a_core_within_five_percent() {
    let rig = Rig::get();
    let _steady = rig.emulated_cpus_stay();
    let tenant = rig.tenant("shares");
    let burn = TempFile::new("burn.sh", &BURN.replace("SPIN", &spin(SPINS)));
    let launch = |name, promised| Worker::launch(&tenant, name, promised, burn.path());
    let mut limited = [launch("home1.nano", 0.5), launch("home1.pico", 0.25)];
    let mut whole = launch("home1.micro", 1.0);

    let mut missed = measure(&rig, &mut limited, &mut whole);
    if !missed.is_empty() {
        println!("missed: {missed:?}; once more");
        missed = measure(&rig, &mut limited, &mut whole);
    }
    assert!(missed.is_empty(), "{missed:?}");
    let [half, quarter] = limited;
    for worker in [half, quarter, whole] {
        tenant.terminate_clean(&worker.id);
    }
}

#[test]
fn a_guest_that_uses_all_its_memory_hurts_only_itself() {
    let rig = Rig::get();
    let tenant = rig.tenant("memory");
    let hog = TempFile::new("hog.sh", "#!/bin/sh\necho hogging\ntail /dev/zero\necho \"hog ended\"\n");
    let neighbour = tenant.launch("tiny-fast", "home1.nano", &["--wait"]);
    tenant.wait_console(&neighbour, "roost-guest: ready", SOON);
    let before = rig.host("grep ^oom_kill /proc/vmstat").ok();

    let hungry = tenant.launch("tiny-fast", "home1.micro", &["--user-data", hog.path()]);
    // The guest's own kernel ends the hog: the limit around the monitor leaves room for all the guest's memory.
    tenant.wait_console(&hungry, "hog ended", Duration::from_secs(120));
    assert_eq!(rig.host("grep ^oom_kill /proc/vmstat").ok(), before, "the host killed nobody");
    let events = rig.host(&format!("cat $(find /sys/fs/cgroup -type d -name {hungry})/memory.events")).ok();
    assert!(events.contains("oom_kill 0"), "{events}");
    // What the guest freed goes back to the host.
    wait_for("freed memory to go back", SOON, || {
        let look =
            format!("cd $(find /sys/fs/cgroup -type d -name {hungry}); cat memory.peak memory.current");
        let shown = rig.host(&look).ok();
        let numbers: Vec<u64> = shown.lines().map(|line| line.parse().unwrap()).collect();
        if numbers[1] * 2 < numbers[0] { Ok(()) } else { Err(shown) }
    });
    for id in [&neighbour, &hungry] {
        assert_eq!(tenant.describe(id)["state"], "running");
    }
    for id in [neighbour, hungry] {
        tenant.terminate_clean(&id);
    }
}
