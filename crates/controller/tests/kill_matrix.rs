//! Everything is killed at every moment of a life: controller, agent, monitor, host, connection, alone and together.
//! Whatever it was, the life goes on to its end or to a stated reason, nothing is left, and every bill is the truth
//! as far as anybody saw it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod world;

use roost_controller::engine::EngineSettings;
use roost_testbed::sim::{Death, TrueRun};
use roost_types::state::InstanceState;
use roost_types::{ErrorCode, InstanceId, Micros};
use std::collections::BTreeMap;
use world::{World, caller, request};

/// What is killed. It comes back after [`AWAY`] seconds, where it comes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Nothing,
    Controller,
    Agent,
    Monitor,
    GuestPowerOff,
    ControllerAndAgent,
    AgentAndMonitor,
    ControllerAndMonitor,
    Everything,
    HostReboot,
    HostRebootAndController,
    Connection,
    ConnectionAndMonitor,
    LostAnswer,
    AgentFlaps,
}

const FAULTS: [Fault; 15] = [
    Fault::Nothing,
    Fault::Controller,
    Fault::Agent,
    Fault::Monitor,
    Fault::GuestPowerOff,
    Fault::ControllerAndAgent,
    Fault::AgentAndMonitor,
    Fault::ControllerAndMonitor,
    Fault::Everything,
    Fault::HostReboot,
    Fault::HostRebootAndController,
    Fault::Connection,
    Fault::ConnectionAndMonitor,
    Fault::LostAnswer,
    Fault::AgentFlaps,
];

/// Seconds that something killed stays away.
const AWAY: u64 = 7;

impl Fault {
    fn controller(self) -> bool {
        use Fault::{
            Controller, ControllerAndAgent, ControllerAndMonitor, Everything, HostRebootAndController,
        };
        matches!(
            self,
            Controller | ControllerAndAgent | ControllerAndMonitor | Everything | HostRebootAndController
        )
    }

    fn strike(self, world: &mut World) {
        let host = &mut world.hosts[0];
        match self {
            Fault::Nothing | Fault::Controller => {}
            Fault::Agent | Fault::ControllerAndAgent => host.kill_agent(),
            Fault::Monitor | Fault::ControllerAndMonitor => host.end_monitors(Death::Killed),
            Fault::GuestPowerOff => host.end_monitors(Death::PowerOff),
            Fault::AgentAndMonitor | Fault::Everything => {
                host.kill_agent();
                host.end_monitors(Death::Killed);
            }
            Fault::HostReboot | Fault::HostRebootAndController => host.reboot(),
            Fault::Connection => host.connected = false,
            Fault::ConnectionAndMonitor => {
                host.connected = false;
                host.end_monitors(Death::Killed);
            }
            Fault::LostAnswer => world.lose_answer = true,
            Fault::AgentFlaps => {
                host.kill_agent();
                host.start_agent();
            }
        }
        if self.controller() {
            world.kill_controller();
        }
    }

    fn heal(world: &mut World) {
        world.hosts[0].connected = true;
        world.hosts[0].start_agent();
        world.start_controller();
    }
}

/// What the owner does, one after the other, each as soon as it is possible.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Deed {
    Launch,
    WaitRunning,
    Rest(u64),
    Stop,
    WaitStopped,
    Start,
    Reboot,
    Terminate,
    WaitTerminated,
}

/// A whole life with every step in it.
const LIFE: [Deed; 13] = [
    Deed::Launch,
    Deed::WaitRunning,
    Deed::Rest(3),
    Deed::Stop,
    Deed::WaitStopped,
    Deed::Rest(2),
    Deed::Start,
    Deed::WaitRunning,
    Deed::Reboot,
    Deed::Rest(3),
    Deed::Terminate,
    Deed::WaitTerminated,
    Deed::Rest(2),
];

struct Owner {
    id: Option<InstanceId>,
    deeds: Vec<Deed>,
    rested: u64,
    /// When the end of each incarnation was asked for and accepted.
    asked: BTreeMap<u64, Micros>,
}

impl Owner {
    fn new() -> Self {
        Self { id: None, deeds: LIFE.iter().rev().copied().collect(), rested: 0, asked: BTreeMap::new() }
    }

    fn note_end(&mut self, world: &World) {
        let incarnation = world.record(self.id.as_ref().unwrap()).row.incarnation;
        self.asked.entry(incarnation).or_insert_with(|| world.now());
    }

    /// Does what can be done now; whether there is nothing more to do.
    fn act(&mut self, world: &World) -> bool {
        while let Some(deed) = self.deeds.last().copied() {
            if !self.attempt(world, deed) {
                return false;
            }
            self.deeds.pop();
            self.rested = 0;
        }
        true
    }

    fn attempt(&mut self, world: &World, deed: Deed) -> bool {
        if let Deed::Rest(seconds) = deed {
            self.rested += 1;
            return self.rested > seconds;
        }
        if !world.controller_runs() {
            return false;
        }
        let Some(id) = self.id.clone() else {
            let mut launch = request(1);
            launch.client_token = Some("life".into());
            let made = world.engine().run_instances(&caller("alice"), launch);
            return match made {
                Ok(made) => {
                    self.id = Some(made.instances[0].instance_id.clone());
                    true
                }
                // A host that is away: tried again, with the same token.
                Err(error) => {
                    assert_eq!(error.code, ErrorCode::InsufficientInstanceCapacity, "{error}");
                    false
                }
            };
        };
        let state = world.state(&id);
        let over = matches!(state, InstanceState::ShuttingDown | InstanceState::Terminated);
        match deed {
            // A start that failed by the fault is over with its reason, and so is a run that was cut off.
            Deed::WaitRunning => {
                let ended = over || state == InstanceState::Stopped;
                if ended {
                    assert!(world.show(&id).state_reason.is_some(), "it says why: {:?}", world.show(&id));
                }
                ended || state == InstanceState::Running
            }
            Deed::WaitStopped => over || state == InstanceState::Stopped,
            Deed::WaitTerminated => state == InstanceState::Terminated,
            Deed::Stop if over || state == InstanceState::Stopped => true,
            Deed::Stop => {
                let before = state == InstanceState::Running;
                let done = world.stop(&id).is_ok();
                if done && before {
                    self.note_end(world);
                }
                done
            }
            Deed::Start => over || world.start(&id).is_ok(),
            Deed::Reboot => over || state == InstanceState::Stopped || world.reboot(&id).is_ok(),
            Deed::Terminate => {
                self.note_end(world);
                world.terminate(&id).unwrap();
                true
            }
            Deed::Launch | Deed::Rest(_) => true,
        }
    }
}

/// The end that a run must be billed to, from the truth and from who saw it: earliest and latest allowed.
fn expected_end(run: &TrueRun, asked: Option<Micros>, controller_lost: bool) -> (Micros, Micros) {
    let truth = run.ended.expect("it is over");
    let seen = if run.end_known {
        truth
    } else {
        [run.last_seen, run.last_told].into_iter().flatten().max().unwrap_or(run.began)
    };
    let end = asked.map_or(seen, |asked| seen.min(asked)).max(run.began);
    // Where nobody saw the end and the controller lost its freshest proof, the last durable one counts.
    let slack = if !run.end_known && controller_lost { Micros::from_secs(11) } else { Micros(0) };
    ((end - slack).max(run.began), end)
}

fn check_bill(world: &World, id: &InstanceId, owner: &Owner, controller_lost: bool, what: &str) {
    let intervals = world.intervals(id);
    let truth: Vec<_> = world.hosts[0].runs.iter().filter(|run| run.instance_id == *id).collect();
    for (incarnation, open, close) in &intervals {
        let run = truth
            .iter()
            .find(|run| run.incarnation == *incarnation)
            .unwrap_or_else(|| panic!("{what}: billed incarnation {incarnation} never ran"));
        assert_eq!(*open, run.began, "{what}: incarnation {incarnation} begins as it began");
        let close = close.unwrap_or_else(|| panic!("{what}: incarnation {incarnation} is open"));
        let (least, most) = expected_end(run, owner.asked.get(incarnation).copied(), controller_lost);
        assert!(
            (least..=most).contains(&close),
            "{what}: incarnation {incarnation} billed to {close}, allowed {least} to {most}: {run:?}"
        );
        assert!(close <= run.ended.unwrap(), "{what}: never past the real end");
    }
    // Nothing that was reported running is free.
    for run in truth.iter().filter(|run| run.last_told.is_some()) {
        assert!(intervals.iter().any(|(n, ..)| *n == run.incarnation), "{what}: {run:?} was not billed");
    }
    let shown = world.show(id);
    // Each start that the owner asked for has one minimum. A part that a host's reboot added has
    // none.
    let starts: Vec<_> =
        world.starts(id).iter().map(|start| u64::try_from(start.ceil_secs()).unwrap()).collect();
    let used: u64 = starts.iter().sum();
    let billed: u64 = starts.iter().map(|start| *start.max(&60)).sum();
    assert!(starts.len() <= 2, "{what}: a launch and a start were asked for: {starts:?}");
    assert_eq!((shown.used_seconds, shown.billed_seconds), (used, billed), "{what}");
}

/// One life with one fault at one second.
fn live(fault: Fault, at: u64) -> u64 {
    let what = format!("{fault:?} at second {at}");
    let mut world = World::with(EngineSettings::default(), &[(2, 4096)]);
    let mut owner = Owner::new();
    let mut second = 0;
    loop {
        if second == at {
            fault.strike(&mut world);
        }
        if second == at + AWAY {
            Fault::heal(&mut world);
        }
        let done = owner.act(&world);
        if done && second > at + AWAY {
            break;
        }
        world.tick();
        second += 1;
        if world.controller_runs() {
            world.check();
        }
        assert!(second < 300, "{what}: not over after 300 s; {:?} left, {:#?}", owner.deeds, world.records());
    }
    world.check_nothing_left();
    let id = owner.id.clone().expect("it was launched");
    check_bill(&world, &id, &owner, fault.controller(), &what);
    second
}

/// Seconds of a life without a fault: the matrix strikes at each, and a few after.
fn length_of_life() -> u64 {
    let length = live(Fault::Nothing, 0);
    assert!((20..60).contains(&length), "the life has all its steps: {length} s");
    length
}

#[test]
fn at_every_second_every_fault_ends_well() {
    let length = length_of_life();
    for fault in FAULTS {
        for at in 0..=length {
            live(fault, at);
        }
    }
}

#[test]
fn after_a_restart_a_step_resumes_within_ten_seconds_even_if_it_was_leased() {
    use roost_store::Store;
    let mut world = World::new();
    let id = world.one();
    // A worker took the lease and died with it.
    let now = world.now();
    let until = now + world.settings.lease;
    assert!(world.store().lease(&id, "the dead", now, until).unwrap().is_some());
    world.kill_controller();
    world.start_controller();
    let before = world.now();
    world.wait(&id, InstanceState::Running);
    assert!(world.now() - before <= Micros::from_secs(10));
}
