//! Every point at which something is killed: who, in which operation, where.

use std::fmt;

/// Who is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Victim {
    Agent,
    Controller,
    Monitor,
    /// At once: nobody sees the end.
    AgentAndMonitor,
}

/// What is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    Launch,
    /// Nothing: the instance just runs.
    Run,
    Stop,
    Resize,
    Start,
    Reboot,
    Terminate,
}

use Operation::{Launch, Reboot, Resize, Run, Start, Stop, Terminate};

/// In the order of a life.
pub const LIFE: [Operation; 7] = [Launch, Run, Stop, Resize, Start, Reboot, Terminate];

/// The points that are struck in every run of the tests, not only in full ones. An empty name: at any moment.
const CHOSEN: [(Victim, Operation, &str); 16] = [
    (Victim::Agent, Launch, "agent.fetch.after"),
    (Victim::Agent, Launch, "agent.monitor.after"),
    (Victim::Agent, Stop, "agent.power.after"),
    (Victim::Agent, Start, "agent.run.after"),
    (Victim::Agent, Reboot, "agent.power.after"),
    (Victim::Agent, Terminate, "agent.tear-down.after"),
    (Victim::Controller, Launch, "controller.launch.after"),
    (Victim::Controller, Launch, "controller.to-run.before"),
    (Victim::Controller, Stop, "controller.stop.after"),
    (Victim::Controller, Resize, "controller.modify.before"),
    (Victim::Controller, Start, "controller.start.before"),
    (Victim::Controller, Terminate, "controller.to-gone.before"),
    (Victim::Monitor, Launch, "agent.monitor.after"),
    (Victim::Monitor, Run, ""),
    (Victim::Monitor, Reboot, "agent.power.after"),
    (Victim::AgentAndMonitor, Run, ""),
];

impl fmt::Display for Victim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Victim::Agent => "agent",
            Victim::Controller => "controller",
            Victim::Monitor => "monitor",
            Victim::AgentAndMonitor => "agent+monitor",
        })
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&format!("{self:?}").to_lowercase())
    }
}

/// The points of one victim in one operation, and whether each is struck in every run.
pub fn points(victim: Victim, operation: Operation) -> Vec<(String, bool)> {
    let names = match victim {
        Victim::Agent => both_sides("agent", of_agent(operation)),
        Victim::Controller => both_sides("controller", of_controller(operation)),
        Victim::Monitor => of_monitor(operation).iter().map(|name| (*name).to_owned()).collect(),
        Victim::AgentAndMonitor => vec![],
    };
    let any_moment = (operation == Run).then(String::new);
    let chosen = |name: &str| CHOSEN.contains(&(victim, operation, name));
    names.into_iter().chain(any_moment).map(|name| (name.clone(), chosen(&name))).collect()
}

fn both_sides(part: &str, names: &[&str]) -> Vec<String> {
    names.iter().flat_map(|name| ["before", "after"].map(|side| format!("{part}.{name}.{side}"))).collect()
}

/// Taking in what is wanted, and each of the operations on the host that a life takes.
fn of_agent(operation: Operation) -> &'static [&'static str] {
    match operation {
        Launch => &["accept", "fetch", "disk", "network", "cgroup", "monitor", "run"],
        Run => &[],
        Stop => &["accept", "power", "tear-down"],
        Resize => &["accept"],
        Start => &["accept", "network", "cgroup", "monitor", "run"],
        Reboot => &["accept", "power", "monitor", "run"],
        Terminate => &["accept", "kill", "tear-down", "remove-disk"],
    }
}

/// Each transaction that a life takes.
fn of_controller(operation: Operation) -> &'static [&'static str] {
    match operation {
        Launch => &["launch", "to-launch", "to-run"],
        Run => &[],
        Stop => &["stop", "to-rest"],
        Resize => &["modify"],
        Start => &["start", "to-launch", "to-run"],
        Reboot => &["reboot"],
        Terminate => &["terminate", "to-gone"],
    }
}

/// Where a monitor lives: the agent is halted there, the monitor killed, and the agent goes on. A stopped instance
/// has no monitor, so a resize has no such point.
fn of_monitor(operation: Operation) -> &'static [&'static str] {
    match operation {
        Launch | Start => &["agent.monitor.after", "agent.run.before", "agent.run.after"],
        Run | Resize => &[],
        Stop => &["agent.power.before", "agent.power.after"],
        Reboot => &[
            "agent.power.before",
            "agent.power.after",
            "agent.monitor.after",
            "agent.run.before",
            "agent.run.after",
        ],
        Terminate => &["agent.kill.before"],
    }
}

/// What becomes of the instance: its state, and the code of the reason where it is not the one asked for.
pub fn outcome(victim: Victim, operation: Operation, point: &str) -> (&'static str, Option<&'static str>) {
    const KILLED: (&str, Option<&str>) = ("stopped", Some("Server.MonitorKilled"));
    match (victim, operation, point) {
        (Victim::Monitor | Victim::AgentAndMonitor, Run, _) => KILLED,
        // Before the guest ran, a monitor is simply started again. Afterwards the run is over.
        (Victim::Monitor, Launch | Start, "agent.run.after") => KILLED,
        // It was to end anyway; what comes after it is the guest's next boot in the same run.
        (Victim::Monitor, Reboot, "agent.power.before" | "agent.power.after") => ("running", None),
        (Victim::Monitor, Reboot, _) => KILLED,
        (_, Launch | Run | Start | Reboot, _) => ("running", None),
        (_, Stop | Resize, _) => ("stopped", None),
        (_, Terminate, _) => ("terminated", None),
    }
}
