//! Random sequences of calls and events: whatever the order, the invariants hold.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod world;

use proptest::prelude::*;
use roost_controller::engine::EngineSettings;
use roost_store::Store;
use roost_testbed::sim::Death;
use roost_types::api::ModifyInstanceType;
use roost_types::state::InstanceState;
use roost_types::{ErrorCode, InstanceId, Micros};
use std::collections::{BTreeMap, BTreeSet};
use world::{World, caller};

#[derive(Debug, Clone)]
enum Event {
    Launch(u32),
    Stop(usize, bool),
    Start(Vec<usize>),
    Reboot(usize),
    Terminate(usize),
    Retype(usize, bool),
    Tick(u8),
    KillController,
    StartController,
    KillAgent(usize),
    StartAgent(usize),
    EndMonitor(usize, bool),
    RebootHost(usize),
    Disconnect(usize),
    Connect(usize),
    LoseAnswer,
    StartsFail(usize, bool),
    StepClock(i16),
}

fn event() -> impl Strategy<Value = Event> {
    let which = 0_usize..6;
    let host = 0_usize..2;
    prop_oneof![
        3 => (1_u32..4).prop_map(Event::Launch),
        3 => (which.clone(), any::<bool>()).prop_map(|(n, force)| Event::Stop(n, force)),
        3 => prop::collection::vec(which.clone(), 1..4).prop_map(Event::Start),
        2 => which.clone().prop_map(Event::Reboot),
        2 => which.clone().prop_map(Event::Terminate),
        1 => (which.clone(), any::<bool>()).prop_map(|(n, large)| Event::Retype(n, large)),
        12 => (1_u8..6).prop_map(Event::Tick),
        1 => Just(Event::KillController),
        2 => Just(Event::StartController),
        1 => host.clone().prop_map(Event::KillAgent),
        2 => host.clone().prop_map(Event::StartAgent),
        2 => (which, any::<bool>()).prop_map(|(n, off)| Event::EndMonitor(n, off)),
        1 => host.clone().prop_map(Event::RebootHost),
        1 => host.clone().prop_map(Event::Disconnect),
        2 => host.clone().prop_map(Event::Connect),
        1 => Just(Event::LoseAnswer),
        1 => (host, any::<bool>()).prop_map(|(n, fail)| Event::StartsFail(n, fail)),
        1 => any::<i16>().prop_map(Event::StepClock),
    ]
}

struct Player {
    world: World,
    ids: Vec<InstanceId>,
    states: BTreeMap<InstanceId, InstanceState>,
    used: BTreeMap<InstanceId, u64>,
    /// The controller was killed: its freshest proofs of what runs are gone, and shown seconds may step back to
    /// the durable ones until the next report.
    lost_proofs: bool,
    /// The controller's clock was set: dates are off, lengths are not.
    stepped: bool,
}

/// Whether a state can be reached from another in some steps, as several may pass within one second.
fn reachable(from: InstanceState, to: InstanceState) -> bool {
    let mut seen = vec![from];
    let mut at = 0;
    while at < seen.len() {
        let here = seen[at];
        for next in InstanceState::ALL {
            if here.may_become(*next) && !seen.contains(next) {
                seen.push(*next);
            }
        }
        at += 1;
    }
    seen.contains(&to)
}

/// Starts them, and checks that each changed as its state allows: all or none.
fn start(world: &World, ids: &[InstanceId]) {
    use InstanceState::{Pending, Running, Stopped};
    let everything =
        |id: &InstanceId| (world.record(id), world.store().claim(id).unwrap(), world.usage(id.as_str()));
    let before: Vec<_> = ids.iter().map(everything).collect();
    let states: Vec<_> = before.iter().map(|(record, ..)| record.row.state()).collect();
    let answer = world.start_all(ids);
    let forbidden = states.iter().any(|state| !matches!(state, Pending | Running | Stopped));
    let none_to_start = !states.contains(&Stopped);
    match &answer {
        Ok(_) => assert!(!forbidden, "started from {states:?}"),
        Err(error) if forbidden => assert_eq!(error.code, ErrorCode::IncorrectInstanceState, "{error}"),
        // A host may be full or away; what is pending or runs asks nothing of it.
        Err(error) => assert!(!none_to_start, "{states:?}: {error}"),
    }
    for (n, id) in ids.iter().enumerate() {
        let starts = answer.is_ok() && states[n] == Stopped;
        if let Ok(answer) = &answer {
            let change = &answer.changes[n];
            assert_eq!((&change.instance_id, change.previous), (id, states[n]));
            assert_eq!(change.current, if starts { Pending } else { states[n] });
        }
        let after = everything(id);
        if starts {
            assert_eq!(after.0.row.incarnation, before[n].0.row.incarnation + 1);
        } else {
            assert_eq!(after, before[n], "{id}: nothing changes");
        }
    }
}

impl Player {
    fn play(&mut self, event: &Event) {
        let world = &mut self.world;
        let runs = world.controller_runs();
        let id = |n: &usize| self.ids.get(*n).cloned();
        match event {
            Event::Tick(seconds) => {
                for _ in 0..*seconds {
                    world.tick();
                }
            }
            Event::KillController => {
                world.kill_controller();
                self.lost_proofs = true;
            }
            Event::StartController => world.start_controller(),
            Event::KillAgent(n) => world.hosts[*n].kill_agent(),
            Event::StartAgent(n) => world.hosts[*n].start_agent(),
            Event::EndMonitor(n, off) => {
                let death = if *off { Death::PowerOff } else { Death::Killed };
                if let Some(id) = id(n) {
                    world.hosts.iter_mut().for_each(|host| host.end_monitor(&id, death));
                }
            }
            Event::RebootHost(n) => {
                world.hosts[*n].reboot();
                world.hosts[*n].start_agent();
            }
            Event::Disconnect(n) => world.hosts[*n].connected = false,
            Event::Connect(n) => world.hosts[*n].connected = true,
            Event::StepClock(seconds) => {
                world.clock.step(Micros::from_secs((*seconds).into()));
                self.stepped = true;
            }
            Event::LoseAnswer => world.lose_answer = true,
            Event::StartsFail(n, fail) => world.hosts[*n].behaviour.starts_fail = *fail,
            // Calls may be refused; that is as good as any answer, as long as nothing is half done.
            Event::Launch(count) if runs => {
                let request = world::request(*count);
                if let Ok(made) = world.engine().run_instances(&caller("alice"), request) {
                    self.ids.extend(made.instances.into_iter().map(|instance| instance.instance_id));
                }
            }
            Event::Stop(n, force) if runs => {
                if let Some(id) = id(n) {
                    let instance_ids = vec![id.to_string()];
                    let request = roost_types::api::StopInstances { instance_ids, force: *force };
                    let _ = world.engine().stop_instances(&caller("alice"), request);
                }
            }
            Event::Start(some) if runs => {
                let ids: BTreeSet<_> = some.iter().filter_map(id).collect();
                if !ids.is_empty() {
                    start(world, &Vec::from_iter(ids));
                }
            }
            Event::Reboot(n) if runs => drop(id(n).map(|id| world.reboot(&id))),
            Event::Terminate(n) if runs => drop(id(n).map(|id| world.terminate(&id).unwrap())),
            Event::Retype(n, large) if runs => {
                if let Some(id) = id(n) {
                    let instance_type = if *large { "home1.large" } else { "home1.nano" }.to_owned();
                    let request = ModifyInstanceType { instance_id: id.to_string(), instance_type };
                    let _ = world.engine().modify_instance_type(&caller("alice"), request);
                }
            }
            _ => {}
        }
        self.check();
    }

    fn check(&mut self) {
        if !self.world.controller_runs() {
            return;
        }
        self.world.check();
        for id in &self.ids {
            let shown = self.world.show(id);
            let before = self.states.insert(id.clone(), shown.state).unwrap_or(InstanceState::Pending);
            assert!(reachable(before, shown.state), "{id}: {before} -> {}", shown.state);
            let open = self.world.intervals(id).iter().filter(|(.., end)| end.is_none()).count();
            assert!(open <= 1, "{id} has {open} open intervals");
            if shown.state == InstanceState::Stopped || shown.state == InstanceState::Terminated {
                assert_eq!(open, 0, "{id} is {} and billed", shown.state);
            }
            let used = self.used.insert(id.clone(), shown.used_seconds).unwrap_or(0);
            if !self.lost_proofs {
                assert!(
                    shown.used_seconds >= used,
                    "{id}: used seconds fell from {used} to {}",
                    shown.used_seconds
                );
            }
        }
        // No run is billed longer than it was, nor twice.
        for host in &self.world.hosts {
            for run in &host.runs {
                for (incarnation, open, close) in self.world.intervals(&run.instance_id) {
                    if incarnation == run.incarnation {
                        assert!(self.stepped || open == run.began, "{open} is not {}", run.began);
                        if let (Some(close), Some(ended)) = (close, run.ended) {
                            assert!(close - open <= ended - run.began, "billed longer than it ran");
                        }
                    }
                }
            }
        }
    }

    /// Everything comes back, everything is terminated: nothing may be left.
    fn end(&mut self) {
        self.world.start_controller();
        for host in &mut self.world.hosts {
            host.connected = true;
            host.behaviour.starts_fail = false;
            host.start_agent();
        }
        for id in &self.ids {
            self.world.terminate(id).unwrap();
        }
        let ids = self.ids.clone();
        self.world.until("everything is gone", |world| {
            ids.iter().all(|id| world.state(id) == InstanceState::Terminated)
        });
        self.world.tick();
        self.world.check_nothing_left();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, max_shrink_iters: 400, ..ProptestConfig::default() })]

    #[test]
    fn any_sequence_of_calls_and_events_keeps_every_promise(events in prop::collection::vec(event(), 1..60)) {
        // A clock that is ahead must not hide ended instances: every instance is checked to its
        // end.
        let settings = EngineSettings { show_terminated: Micros::from_secs(10_000_000), ..Default::default() };
        let world = World::with(settings, &[(2, 1200), (4, 2500)]);
        let mut player = Player {
            world,
            ids: Vec::new(),
            states: BTreeMap::new(),
            used: BTreeMap::new(),
            lost_proofs: false,
            stepped: false,
        };
        for event in &events {
            player.play(event);
        }
        player.end();
    }
}
