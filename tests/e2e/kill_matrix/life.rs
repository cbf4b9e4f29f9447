//! One instance's life, with one kill in each operation that has a point left to strike.

use crate::books::{Books, Moment, Record, record};
use crate::points::{Operation, Victim, outcome};
use roost_e2e::{Ran, Rig, Tenant, tail, wait_for};
use serde_json::Value;
use std::time::Duration;

/// From the restart of what was killed to the step's going on.
const RESUME: f64 = 10.0;
/// To the end of an operation, on a host whose CPUs are emulated and may be shared.
const PATIENCE: Duration = Duration::from_secs(60);
/// The agent's word that a run goes on is at most so old, and so is the controller's: microseconds.
const LAST_REPORT: Moment = 6_000_000;

/// What became of one point.
#[derive(Debug)]
pub struct Row {
    pub victim: Victim,
    pub operation: Operation,
    pub point: String,
    pub outcome: String,
    pub took: Duration,
}

pub struct Life<'a> {
    rig: &'a Rig,
    tenant: &'a Tenant<'a>,
    victim: Victim,
    started: Moment,
    id: String,
    large: bool,
    books: Books,
    pub rows: Vec<Row>,
}

/// When things were done, by the host's clock.
#[derive(Clone, Copy)]
struct Times {
    armed: Moment,
    struck: Moment,
}

impl<'a> Life<'a> {
    pub fn new(rig: &'a Rig, tenant: &'a Tenant<'a>, victim: Victim) -> Self {
        calm(rig);
        let started = record(rig, "").now;
        Life {
            rig,
            tenant,
            victim,
            started,
            id: String::new(),
            large: false,
            books: Books::default(),
            rows: vec![],
        }
    }

    fn see(&self) -> Result<Value, String> {
        let ran = self.tenant.roost(&["describe", &self.id, "--output", "json"]);
        match serde_json::from_str::<Value>(&ran.stdout) {
            Ok(seen) if ran.code == Some(0) => Ok(seen["instances"][0].clone()),
            _ => Err(tail(&ran.stderr)),
        }
    }

    fn words(&self, operation: Operation) -> Vec<String> {
        let id = self.id.as_str();
        let words: &[&str] = match operation {
            // An answer that is lost is asked for again under the same token, which no other life has.
            Operation::Launch => {
                return format!(
                    "launch --output json --image tiny-fast --type home1.nano --client-token life-{}",
                    self.started
                )
                .split(' ')
                .map(str::to_owned)
                .collect();
            }
            Operation::Run => &[],
            Operation::Stop => &["stop", id],
            Operation::Resize => {
                &["resize", id, "--type", if self.large { "home1.nano" } else { "home1.micro" }]
            }
            Operation::Start => &["start", id],
            Operation::Reboot => &["reboot", id],
            Operation::Terminate => &["terminate", id],
        };
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    /// One operation, with a kill at `point` if there is one.
    pub fn go(&mut self, operation: Operation, point: Option<&str>) {
        self.prepare(operation);
        let before = if self.id.is_empty() { Record::default() } else { record(self.rig, &self.id) };
        let monitor = self.monitor();
        let words = self.words(operation);
        let (ran, times) = match point {
            None => {
                let armed = record(self.rig, &self.id).now;
                let ran = Some(self.run(&words));
                (ran, Times { armed, struck: record(self.rig, &self.id).now })
            }
            Some(point) => self.strike(operation, point, &words),
        };
        let began = std::time::Instant::now();
        if let Some(ran) = ran {
            self.answered(operation, point, ran, &words);
        }
        let (state, reason) = point.map_or_else(
            || outcome(Victim::Agent, operation, ""),
            |point| outcome(self.victim, operation, point),
        );
        let seen = self.wait_settled(operation, state, before.incarnation, &monitor);
        let took = began.elapsed();
        if point.is_some() && took.as_secs_f64() > RESUME {
            self.check_resumed(times.struck);
        }
        if let Some(code) = reason {
            assert_eq!(seen["state_reason"]["code"], code, "{seen}");
        }
        self.account(operation, point, state, &before, times);
        self.clean(state);
        if operation == Operation::Resize {
            self.large = !self.large;
        }
        if let Some(point) = point {
            let outcome = reason.map_or_else(|| state.to_owned(), |code| format!("{state}, {code}"));
            let point = if point.is_empty() { "any moment" } else { point }.to_owned();
            self.rows.push(Row { victim: self.victim, operation, point, outcome, took });
        }
    }

    /// Brings the instance into the state that the operation begins from, without a kill.
    fn prepare(&mut self, operation: Operation) {
        let wanted = match operation {
            Operation::Launch => {
                // So that there is something to fetch. Only what is small: `debian-12` takes its time.
                let images = self.rig.state.join("agent/images");
                self.rig.host(&format!("find {} -name '*.raw' -size -64M -delete", images.display())).ok();
                return;
            }
            Operation::Resize | Operation::Start => "stopped",
            _ => "running",
        };
        let state = self.wait_lasting()["state"].clone();
        match (wanted, state.as_str()) {
            ("running", Some("stopped")) => self.go(Operation::Start, None),
            ("stopped", Some("running")) => self.go(Operation::Stop, None),
            (wanted, state) => assert_eq!(state, Some(wanted)),
        }
        if operation == Operation::Stop || operation == Operation::Reboot {
            // A guest that has no ear for its power button yet would take the whole grace to stop.
            wait_for("the guest to be ready", PATIENCE, || {
                let seen = self.see()?;
                if seen["guest_ready"] == true { Ok(()) } else { Err(seen.to_string()) }
            });
        }
    }

    fn wait_lasting(&self) -> Value {
        wait_for("a state that lasts", PATIENCE, || {
            let seen = self.see()?;
            let lasts = matches!(seen["state"].as_str(), Some("running" | "stopped" | "terminated"));
            if lasts { Ok(seen) } else { Err(seen.to_string()) }
        })
    }

    fn run(&self, words: &[String]) -> Ran {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        self.tenant.roost(&words)
    }

    /// Halts at the point, kills there. The CLI runs beside: at some points its call is what is halted.
    fn strike(&self, operation: Operation, point: &str, words: &[String]) -> (Option<Ran>, Times) {
        let arm =
            if point.is_empty() { String::new() } else { format!("touch {}/{point};", halts(self.rig)) };
        let armed = moment(&self.rig.host(&format!("{arm} date +%s%N")).ok());
        let kill = self.killer(operation, point);
        std::thread::scope(|scope| {
            let cli = (!words.is_empty()).then(|| scope.spawn(|| self.run(words)));
            let struck = self.rig.host(&kill);
            let ran = cli.map(|cli| cli.join().unwrap());
            assert_eq!(struck.code, Some(0), "the kill at {point}: {struck:?}\nthe command: {ran:?}");
            (ran, Times { armed, struck: moment(&struck.stdout) })
        })
    }

    /// The shell script that kills the victim when the point is reached, and says when.
    fn killer(&self, operation: Operation, point: &str) -> String {
        let (units, halts) = (&self.rig.units, halts(self.rig));
        let part = if point.starts_with("controller") { "controller" } else { "agent" };
        let halted = format!(
            "for n in $(seq 400); do
                 # It may just be on its way back from the kill before.
                 pid=$(systemctl show -p MainPID --value {units}-{part})
                 read -r line 2> /dev/null < /proc/$pid/stat || line=; state=${{line##*) }}
                 case $state in T*) break ;; esac
                 sleep 0.05
             done
             rm -f {halts}/{point}
             case $state in T*) ;; *) echo 'it never came to {point}' >&2; exit 9 ;; esac"
        );
        // The cgroup's name is the instance's; a launch has told nobody its id yet.
        let which = if self.id.is_empty() { "i-*" } else { &self.id };
        let monitor = format!("kill -9 $({})", monitors_of(which));
        let agent = format!("kill -9 $(systemctl show -p MainPID --value {units}-agent)");
        let controller = format!("kill -9 $(systemctl show -p MainPID --value {units}-controller)");
        let now = "now=$(date +%s%N)";
        match (self.victim, operation) {
            (Victim::Agent, Operation::Run) => format!("{now}; {agent}; echo $now"),
            (Victim::Controller, Operation::Run) => format!("{now}; {controller}; echo $now"),
            (Victim::Monitor, Operation::Run) => format!("{now}; {monitor}; echo $now"),
            (Victim::AgentAndMonitor, _) => format!("{now}; {agent}; {monitor}; echo $now"),
            (Victim::Agent | Victim::Controller, _) => format!("{halted}\n{now}; kill -9 $pid; echo $now"),
            (Victim::Monitor, _) => format!("{halted}\n{now}; {monitor}; kill -CONT $pid; echo $now"),
        }
    }

    /// What the owner was told, and what an owner does where the answer was lost.
    fn answered(&mut self, operation: Operation, point: Option<&str>, mut ran: Ran, words: &[String]) {
        if ran.code != Some(0) {
            assert_eq!(self.victim, Victim::Controller, "{ran:?}");
            assert_eq!(ran.code, Some(8), "{ran:?}");
            assert!(point.is_some_and(|point| point.starts_with("controller")), "{ran:?}");
            wait_for("the controller to answer again", PATIENCE, || {
                let hosts = self.rig.admin(&["hosts", "--output", "json"]);
                if hosts.stdout.contains("\"alive\":true") || hosts.stdout.contains("\"alive\": true") {
                    Ok(())
                } else {
                    Err(hosts.stderr + &hosts.stdout)
                }
            });
            // What was accepted goes on by itself; what was not is asked for again.
            let accepted = point.is_some_and(|point| point.ends_with(".after"));
            // A launch has its token, and a start of what starts or runs changes nothing.
            if matches!(operation, Operation::Launch | Operation::Start) || !accepted {
                ran = self.run(words);
                assert_eq!(ran.code, Some(0), "{ran:?}");
            }
        }
        if operation == Operation::Launch {
            let reservation = ran.json();
            self.id = reservation["instances"][0]["instance_id"].as_str().unwrap().to_owned();
        }
    }

    /// Waits for the end of the operation: its state, and for a start or a reboot a monitor that was not there before.
    fn wait_settled(&self, operation: Operation, state: &str, incarnation: u64, monitor: &str) -> Value {
        wait_for(&format!("{} to be {state} after the {operation}", self.id), PATIENCE, || {
            let seen = self.see()?;
            let number = seen["incarnation"].as_u64().unwrap_or(0);
            let new = match operation {
                Operation::Start => number == incarnation + 1,
                // A monitor that a killed agent started and did not write down is not the one yet.
                Operation::Reboot if state == "running" => {
                    let now = self.monitor();
                    let known = record(self.rig, &self.id).monitor;
                    number == incarnation
                        && now != *monitor
                        && known.is_some_and(|pid| now == pid.to_string())
                }
                Operation::Resize => {
                    seen["instance_type"] != if self.large { "home1.micro" } else { "home1.nano" }
                }
                _ => true,
            };
            if seen["state"] == state && new { Ok(seen) } else { Err(seen.to_string()) }
        })
    }

    /// What took longer than that as a whole may have gone on in time all the same: the log knows. The first sign after
    /// the restart is the agent's next action or, where the controller was killed, its new connection.
    fn check_resumed(&self, struck: Moment) {
        let units = &self.rig.units;
        let (unit, sign) = match self.victim {
            Victim::Controller => ("controller", "connected to the controller".to_owned()),
            _ => ("agent", format!("connected to the controller|next instance={}", self.id)),
        };
        let script = format!(
            "date +%s.%N -d \"$(systemctl show -p ExecMainStartTimestamp --value {units}-{unit})\"
             journalctl --no-pager -q -o short-unix --since @{} -u {units}-agent | grep -E '{sign}' | cut -d' ' -f1",
            struck / 1_000_000
        );
        let said = self.rig.host(&script).ok();
        let times: Vec<f64> = said.lines().map(|line| line.trim().parse().unwrap()).collect();
        #[expect(clippy::cast_precision_loss, reason = "microseconds since 1970 fit")]
        let struck = struck as f64 / 1e6;
        let from = if self.victim == Victim::Monitor { struck } else { times[0].max(struck) };
        let first = times[1..].iter().find(|time| **time >= from).expect("it went on");
        assert!(first - from <= RESUME, "it went on {:.1} s after the restart", first - from);
    }

    fn monitor(&self) -> String {
        if self.id.is_empty() {
            return String::new();
        }
        self.rig.host(&monitors_of(&self.id)).stdout.trim().to_owned()
    }

    /// Notes what may be billed.
    fn account(
        &mut self,
        operation: Operation,
        point: Option<&str>,
        state: &str,
        before: &Record,
        times: Times,
    ) {
        let now = record(self.rig, &self.id);
        let Times { armed, struck } = times;
        match operation {
            Operation::Launch | Operation::Start => self.books.begin(&now),
            Operation::Stop | Operation::Terminate => {
                // The end that was asked for: between the command and its acceptance, before the guest's own end.
                let repeated =
                    matches!(point, Some("controller.stop.before" | "controller.terminate.before"));
                let accepted = if repeated { (struck, now.now) } else { (armed, struck) };
                let seen = now.ended.filter(|_| now.incarnation == before.incarnation);
                let latest = seen.map_or(accepted.1, |seen| seen.min(accepted.1));
                self.books.end(before.incarnation, accepted.0.min(latest), latest);
            }
            Operation::Run | Operation::Resize | Operation::Reboot => {}
        }
        let killed = state == "stopped" && !matches!(operation, Operation::Stop | Operation::Resize);
        if killed && self.victim == Victim::AgentAndMonitor {
            assert_eq!(now.ended, None, "nobody saw it end");
            self.books.end(now.incarnation, struck - LAST_REPORT, struck);
        } else if killed {
            let seen = now.ended.expect("the agent saw it end");
            assert!((seen - struck).abs() < 1_000_000, "killed at {struck}, the agent says {seen}");
            self.books.end(now.incarnation, seen, seen);
        }
    }

    /// Nothing is left but what the state needs.
    fn clean(&self, state: &str) {
        let id = &self.id;
        if state == "stopped" {
            let held = self.rig.leftovers(id);
            let files = held.as_array().unwrap().iter().all(|held| held["kind"] == "file");
            assert!(files, "a stopped instance holds nothing but its disk: {held}");
        } else if state == "terminated" {
            assert_eq!(self.rig.leftovers(id), Value::Array(vec![]), "left behind by {id}");
            let hosts = self.rig.admin(&["hosts", "--output", "json"]).json();
            assert_eq!(hosts["hosts"][0]["instances"], 0, "a claim is left: {hosts}");
        } else {
            let monitors = self.rig.host(&monitors_of(id)).stdout;
            assert_eq!(monitors.lines().count(), 1, "one monitor, not {monitors:?}");
        }
    }

    /// Ends a life that went wrong, so that the next one begins on a clean host.
    pub fn give_up(&self) {
        calm(self.rig);
        if !self.id.is_empty() {
            self.tenant.roost(&["terminate", &self.id, "--wait"]);
        }
    }

    /// The bill of the whole life, once it is over.
    pub fn bill(&self) -> String {
        self.books
            .check(self.rig, &self.tenant.describe(&self.id))
            .unwrap_or_else(|wrong| panic!("the bill of {}: {wrong}", self.id))
    }
}

impl Drop for Life<'_> {
    fn drop(&mut self) {
        calm(self.rig);
    }
}

/// Lists the monitors in the cgroup of this name. Beside each is the first process of its pid namespace.
fn monitors_of(name: &str) -> String {
    format!(
        "for pid in $(cat $(find /sys/fs/cgroup -type d -name '{name}')/cgroup.procs 2>/dev/null); do
             case $(cat /proc/$pid/comm) in vmm-*) echo $pid ;; esac
         done"
    )
}

fn halts(rig: &Rig) -> String {
    format!("/run/{}-halt", rig.units)
}

/// No point is armed, and nothing is halted.
fn calm(rig: &Rig) {
    let (halts, units) = (halts(rig), &rig.units);
    rig.host(&format!("rm -f {halts}/*; systemctl kill --signal=CONT {units}-agent {units}-controller"));
}

fn moment(nanos: &str) -> Moment {
    nanos.trim().parse::<i64>().unwrap_or_else(|error| panic!("{nanos:?}: {error}")) / 1000
}
