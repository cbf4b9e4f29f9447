//! What an instance type promises is what the instance gets, and what one guest does hurts only itself.
#![allow(clippy::unwrap_used, clippy::cast_precision_loss, missing_docs)]

use roost_e2e::session::Session;
use roost_e2e::{Rig, TempFile, Tenant};
use std::time::Duration;

const SOON: Duration = Duration::from_secs(90);
/// A guest with a quarter of an emulated CPU takes its time to boot.
const BOOT: Duration = Duration::from_secs(240);
/// Works when it is let, and keeps count of its work in a file that is never empty, whenever the work is halted. What
/// the shell on its console is told stands in two files: the count is read right at the edges of a window.
const BURN: &str = "#!/bin/sh
(
  n=0
  while :; do
    j=0
    while [ $j -lt 100 ]; do j=$((j+1)); done
    n=$((n+1))
    echo $n 1<> /run/work
  done
) &
echo $! > /run/burner
while [ ! -s /run/work ]; do usleep 10000; done
kill -STOP $!
echo 'read b < /run/burner; read w < /run/work; kill -CONT $b' > /run/go
echo 'read b < /run/burner; kill -STOP $b; read w < /run/work' > /run/halt
echo the burner stands
";
/// Keeps an instance's threads on the host's last CPU. Two CPUs of a virtual host may be two threads of one core outside,
/// and then what a guest gets done in a second depends on what the other CPU does meanwhile: on one CPU nothing is shared
/// but its time, which is what the limit is about.
const PIN: &str = "pin() { for p in $(cat $(find /sys/fs/cgroup -type d -name $1)/cgroup.procs); do
  taskset -acp $(($(nproc) - 1)) $p || return; done; }; pin";
/// Rounds, and the seconds in which both limited guests work: more than 30 s in all.
const ROUNDS: u32 = 2;
const WINDOW: u32 = 16;
/// Seconds in which the unlimited guest works, before and after each of those, and of a control.
const SHORT: u32 = 4;

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

    /// Has the guest's shell read a script; gives the count of work.
    fn tell(&mut self, script: &str) -> f64 {
        self.commands += 1;
        let mark = format!("<{}:", self.commands);
        self.shell.enter(&format!(". /run/{script}; echo \"{mark}\" $w"));
        self.shell.wait("an answer", SOON, |shown| {
            // In the echo of the command there is a quote after the mark.
            let (answer, _) = shown.rsplit_once(&format!("{mark} "))?.1.split_once('\n')?;
            answer.trim().parse().ok()
        })
    }
}

/// What guests did in a window, or in several.
#[derive(Clone, Copy, Default)]
struct Done {
    /// Work, and the CPU time of the vCPUs that it took, both from before the first to after the last of it.
    work: f64,
    cpu: f64,
    /// CPU time of the vCPUs while the guest worked all the time, and that time by the host's clock.
    share_cpu: f64,
    share_time: f64,
}

impl Done {
    fn add(&mut self, other: Done) {
        self.work += other.work;
        self.cpu += other.cpu;
        self.share_cpu += other.share_cpu;
        self.share_time += other.share_time;
    }

    fn share(self) -> f64 {
        self.share_cpu / self.share_time
    }

    fn worth(self) -> f64 {
        self.work / self.cpu
    }
}

/// The host's clock and the CPU time of each instance's vCPUs, in seconds, now, and after a pause if there is one.
fn clocks(rig: &Rig, workers: &[&mut Worker], pause: Option<u32>) -> Vec<Vec<f64>> {
    let ids: Vec<&str> = workers.iter().map(|worker| worker.id.as_str()).collect();
    let look = format!(
        "cut -d' ' -f1 /proc/uptime; for id in {}; do grep usage_usec $(find /sys/fs/cgroup -type d -name $id)/vcpu/cpu.stat; done",
        ids.join(" ")
    );
    let script = match pause {
        None => look,
        Some(seconds) => format!("{look}; sleep {seconds}; {look}"),
    };
    let text = rig.host(&script).ok();
    let number = |line: &str| match line.strip_prefix("usage_usec ") {
        Some(micros) => micros.trim().parse::<f64>().unwrap() / 1e6,
        None => line.trim().parse().unwrap(),
    };
    text.lines().map(number).collect::<Vec<_>>().chunks(ids.len() + 1).map(<[f64]>::to_vec).collect()
}

/// Lets some workers work at once for so long.
fn window(rig: &Rig, workers: &mut [&mut Worker], seconds: u32) -> Vec<Done> {
    let before = clocks(rig, workers, None).remove(0);
    let began: Vec<f64> = workers.iter_mut().map(|worker| worker.tell("go")).collect();
    let within = clocks(rig, workers, Some(seconds));
    let ended: Vec<f64> = workers.iter_mut().map(|worker| worker.tell("halt")).collect();
    let after = clocks(rig, workers, None).remove(0);
    (0..workers.len())
        .map(|n| Done {
            work: ended[n] - began[n],
            cpu: after[n + 1] - before[n + 1],
            share_cpu: within[1][n + 1] - within[0][n + 1],
            share_time: within[1][0] - within[0][0],
        })
        .collect()
}

/// The same without a guest: two plain processes of the host that do the same work on the same CPU, one under a
/// `cpu.max`, the other at the lowest weight. What they lose is lost to the host's CPU, not to anything of ours.
const CONTROL: &str = "
cd /sys/fs/cgroup; c=roost-control; mkdir -p $c/limited $c/rest
echo '+cpu +cpuset' > cgroup.subtree_control; echo '+cpu +cpuset' > $c/cgroup.subtree_control
trap 'echo 1 > $c/cgroup.kill; until rmdir $c/limited $c/rest $c 2> /dev/null || [ ! -d $c ]; do sleep 0.1; done; rm /run/$c.*' EXIT
echo \"$QUOTA 100000\" > $c/limited/cpu.max; echo 1 > $c/rest/cpu.weight
for g in limited rest; do
  echo $(($(nproc) - 1)) > $c/$g/cpuset.cpus
  (sh -c 'echo $$ > '$c/$g/cgroup.procs'; n=0
   while :; do j=0; while [ $j -lt 100 ]; do j=$((j+1)); done; n=$((n+1)); echo $n 1<> /run/'$c.$g'; done' &)
done
while [ ! -s /run/$c.limited ] || [ ! -s /run/$c.rest ]; do sleep 0.1; done
look() {
  cut -d' ' -f1 /proc/uptime
  for g in limited rest; do sed -n 's/^usage_usec //p' $c/$g/cpu.stat; cat /run/$c.$g; done
}
look; sleep $SECONDS_EACH; look
";

/// What a limited process and the one beside it did.
fn control(rig: &Rig, share: f64) -> [Done; 2] {
    let text = rig.host(&format!("QUOTA={:.0}; SECONDS_EACH={SHORT}; {CONTROL}", share * 1e5)).ok();
    let numbers: Vec<f64> = text.lines().map(|line| line.trim().parse().unwrap()).collect();
    let grown = |n: usize| numbers[n + 5] - numbers[n];
    [1, 3].map(|n| Done {
        work: grown(n + 1),
        cpu: grown(n) / 1e6,
        share_cpu: grown(n) / 1e6,
        share_time: grown(0),
    })
}

fn within_five_percent(got: f64, wanted: f64) -> bool {
    (got / wanted - 1.0).abs() <= 0.05
}

/// One measurement: the unlimited guest works in windows between those of the limited ones, which work at once. A control, plain
/// processes of the host under the same limits, says what the host's CPU itself loses. Says what missed its share.
fn measure(rig: &Rig, limited: &mut [Worker; 2], whole: &mut Worker) -> Vec<String> {
    let (mut baseline, mut done) = (Done::default(), [Done::default(); 2]);
    for _ in 0..ROUNDS {
        baseline.add(window(rig, &mut [whole], SHORT)[0]);
        let [half, quarter] = limited;
        let window = window(rig, &mut [half, quarter], WINDOW);
        done.iter_mut().zip(window).for_each(|(sum, one)| sum.add(one));
        baseline.add(self::window(rig, &mut [whole], SHORT)[0]);
    }

    println!(
        "{:<28} {:>8} {:>9} {:>11} {:>26}",
        "guest", "promised", "cpu.stat", "work/cpu-s", "work against a whole CPU"
    );
    let line = |name: &str, promised: f64, done: Done, whole: f64| {
        let (share, worth) = (done.share(), done.worth());
        println!("{name:<28} {promised:>8.2} {share:>9.3} {worth:>11.1} {:>26.3}", share * worth / whole);
    };
    line(whole.name, 1.0, baseline, baseline.worth());
    let mut missed = Vec::new();
    for (worker, done) in limited.iter().zip(done) {
        let (name, promised, share) = (worker.name, worker.promised, done.share());
        line(name, promised, done, baseline.worth());
        assert!(done.share_time >= 30.0, "{name} was measured for {:.1} s only", done.share_time);
        if !within_five_percent(share, promised) {
            missed.push(format!("{name} got {share:.3} of a core's time, promised {promised}"));
        }
    }
    for worker in limited {
        let [limited, rest] = control(rig, worker.promised);
        line("control: a plain process", worker.promised, limited, rest.worth());
    }
    missed
}

/// What is promised is CPU time, and that is asserted. What takes the host's own CPU away meanwhile (another program outside the
/// virtual host) shows in a measurement, not in the limit: one that misses is taken again, twice at most, and all are printed.
///
/// How much a guest gets done in its time is printed beside, against an unlimited guest in windows between; so is a control, plain
/// processes of the host under the same limits. On a quiet virtual host, with `cpu.stat` at 0.500 and 0.250 each time, a half did
/// 0.46 and a quarter 0.14 of an unlimited guest's work, three times alike, and 0.45 and 0.18 in another boot of the host; plain
/// processes did 0.46 to 0.50 and 0.19 to 0.25. Where it goes is not known: the quarter loses more than the half also in all.
#[test]
fn limited_instances_get_their_share_of_a_core_within_five_percent() {
    let rig = Rig::get();
    let tenant = rig.tenant("shares");
    let burn = TempFile::new("burn.sh", BURN);
    let launch = |name, promised| Worker::launch(&tenant, name, promised, burn.path());
    let mut limited = [launch("home1.nano", 0.5), launch("home1.pico", 0.25)];
    let mut whole = launch("home1.micro", 1.0);

    let mut missed = measure(&rig, &mut limited, &mut whole);
    for _ in 0..2 {
        if !missed.is_empty() {
            println!("missed: {missed:?}; once more");
            missed = measure(&rig, &mut limited, &mut whole);
        }
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
    for id in [&neighbour, &hungry] {
        assert_eq!(tenant.describe(id)["state"], "running");
    }
    for id in [neighbour, hungry] {
        tenant.terminate_clean(&id);
    }
}
