//! What goes wrong around a controller: clocks that somebody sets, rows that cannot be written, databases from a
//! backup. Every run is billed for what it ran all the same.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod world;

use roost_testbed::sim::Death;
use roost_types::api::{DescribeHosts, Hosts};
use roost_types::state::InstanceState;
use roost_types::{InstanceId, Micros};
use world::{World, caller};

const HOUR: Micros = Micros::from_secs(3600);

fn hosts(world: &World) -> Hosts {
    world.engine().describe_hosts(&caller("root"), DescribeHosts {}).unwrap()
}

fn ticks(world: &mut World, seconds: u32) {
    (0..seconds).for_each(|_| world.tick());
}

fn restart(world: &mut World) {
    world.kill_controller();
    world.start_controller();
}

/// How long each run of an instance is billed for, in microseconds.
fn lengths(world: &World, id: &InstanceId) -> Vec<Micros> {
    world.intervals(id).iter().map(|(_, open, close)| close.unwrap() - *open).collect()
}

#[test]
fn a_run_is_billed_for_what_it_ran_whatever_the_controllers_clock_is_set_to() {
    for by in [HOUR, Micros(-HOUR.0), Micros(-30 * 24 * HOUR.0), Micros(30 * 24 * HOUR.0)] {
        for restarts in [false, true] {
            let mut world = World::new();
            let id = world.one();
            world.wait(&id, InstanceState::Running);
            let began = world.hosts[0].runs[0].began;
            ticks(&mut world, 10);
            world.clock.step(by);
            if restarts {
                restart(&mut world);
            }
            ticks(&mut world, 21);
            let ran = world.now() - began;
            let what = format!("{by} s, restarts: {restarts}");
            assert_eq!(world.show(&id).used_seconds, u64::try_from(ran.ceil_secs()).unwrap(), "{what}");
            assert!(hosts(&world).hosts[0].alive, "{what}");
            world.stop(&id).unwrap();
            world.wait(&id, InstanceState::Stopped);
            assert_eq!(lengths(&world, &id), [ran], "{what}");
            assert_eq!(world.show(&id).used_seconds, u64::try_from(ran.ceil_secs()).unwrap(), "{what}");
            world.clock.step(Micros(-by.0));
            ticks(&mut world, 5);
            world.start(&id).unwrap();
            world.wait(&id, InstanceState::Running);
            let again = world.hosts[0].runs[1].began;
            ticks(&mut world, 40);
            let off = world.now();
            world.hosts[0].end_monitor(&id, Death::PowerOff);
            world.wait(&id, InstanceState::Stopped);
            assert_eq!(lengths(&world, &id), [ran, off - again], "{what}, and the clock set right");
            world.check();
        }
    }
}

#[test]
fn a_host_that_dies_after_a_step_of_the_clock_is_silent_and_bills_nothing_that_nobody_saw() {
    let mut world = World::new();
    let id = world.one();
    world.wait(&id, InstanceState::Running);
    let began = world.hosts[0].runs[0].began;
    ticks(&mut world, 70);
    world.clock.step(Micros(24 * HOUR.0));
    ticks(&mut world, 5);
    world.clock.step(Micros(-24 * HOUR.0));
    ticks(&mut world, 5);
    let last = world.now();
    world.hosts[0].kill_agent();
    world.hosts[0].end_monitor(&id, Death::Killed);
    ticks(&mut world, 60);
    assert!(!hosts(&world).hosts[0].alive);
    world.hosts[0].start_agent();
    world.wait(&id, InstanceState::Stopped);
    assert_eq!(lengths(&world, &id), [last - began]);
}

#[test]
fn no_deadline_notices_a_step_of_the_clock() {
    for by in [HOUR, Micros(-HOUR.0)] {
        for restarts in [false, true] {
            let mut world = World::new();
            world.hosts[0].behaviour.prepare = Micros::from_secs(20);
            let id = world.one();
            ticks(&mut world, 2);
            world.clock.step(by);
            if restarts {
                restart(&mut world);
            }
            let shown = world.wait(&id, InstanceState::Running);
            assert_eq!(shown.incarnation, 1);
            world.terminate(&id).unwrap();
            assert!(world.wait(&id, InstanceState::Terminated).trouble.is_none());
        }
    }
}

#[test]
fn administrators_are_told_of_a_clock_that_was_set() {
    let mut world = World::new();
    assert!(hosts(&world).trouble.is_empty());
    world.clock.step(HOUR);
    assert!(hosts(&world).trouble[0].contains("3600 s ahead of the controller's time"));
    restart(&mut world);
    assert!(hosts(&world).trouble.is_empty(), "a restart takes the wall clock over");
    world.tick();
    world.clock.step(Micros(-HOUR.0));
    restart(&mut world);
    assert!(hosts(&world).trouble[0].contains("behind"), "but dates nothing before what is written");
}
