//! Mishaps around a controller: stepped clocks, rows that cannot be written, databases from a
//! backup. Every run is billed for its length all the same.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod world;

use roost_billing::PriceBook;
use roost_controller::engine::EngineSettings;
use roost_store::{Store, UsageFilter};
use roost_testbed::sim::Death;
use roost_types::api::{BillBy, DescribeHosts, EndOrphan, Hosts};
use roost_types::state::{InstanceState, Step};
use roost_types::{ErrorCode, InstanceId, Micros};
use world::{World, caller, request};

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

#[test]
fn a_row_that_cannot_be_written_holds_up_no_other_on_its_host_and_is_told() {
    let mut world = World::new();
    let bad = world.one();
    // A row as a defect would leave it: an interval of the instance exists already.
    world.tamper(
        "INSERT INTO usage_events
            (account_id, resource, meter, incarnation, sequence, kind, at, sku, quantity, is_open)
         SELECT account_id, instance_id, 'instance-seconds', 99, 0, 'open', 0, 'x', 1, 1 FROM instances",
    );
    let good = world.one();
    world.wait(&good, InstanceState::Running);
    ticks(&mut world, 70);
    assert!(hosts(&world).hosts[0].alive);
    assert_eq!(world.show(&good).used_seconds, 70, "it is seen and billed");
    assert!(world.show(&bad).trouble.unwrap().contains("an interval is open already"));
    let told = hosts(&world).trouble;
    assert!(
        told.len() == 1 && told[0].contains(bad.as_str()) && told[0].contains("an interval is open"),
        "{told:?}"
    );
    let tries: u32 = told[0].split(' ').find_map(|word| word.parse().ok()).unwrap();
    assert!((4..=8).contains(&tries), "it is tried less and less often: {told:?}");
    world.tamper("DELETE FROM usage_events WHERE incarnation = 99");
    world.wait(&bad, InstanceState::Running);
    assert!(hosts(&world).trouble.is_empty());
    assert_eq!(world.show(&bad).trouble, None);
}

#[test]
fn a_row_that_cannot_be_read_holds_up_no_other_on_its_host() {
    let mut world = World::new();
    let bad = world.one();
    world.wait(&bad, InstanceState::Running);
    let good = world.one();
    world.tamper(&format!("UPDATE instances SET tags = 'no JSON' WHERE instance_id = '{bad}'"));
    world.until("the other runs", |world| world.state(&good) == InstanceState::Running);
    ticks(&mut world, 10);
    assert!(hosts(&world).trouble[0].contains(bad.as_str()));
    assert!(world.hosts[0].running().contains(&bad), "its host leaves it as it is");
    world.tamper(&format!("UPDATE instances SET tags = '{{}}' WHERE instance_id = '{bad}'"));
    ticks(&mut world, 70);
    assert!(hosts(&world).trouble.is_empty());
    assert!(world.show(&bad).used_seconds > 80, "it is billed for all that it ran");
}

#[test]
fn rows_that_cannot_be_written_hold_up_no_other_in_the_worker() {
    let settings = EngineSettings { place_deadline: Micros(0), ..Default::default() };
    let mut world = World::with(settings, &[(64, 64 * 1024)]);
    let ids = world.launch("alice", 7, |_| {});
    world.wait(&ids[6], InstanceState::Running);
    world.hosts[0].kill_agent();
    for id in &ids[..6] {
        // The next step closes an interval that the log does not have.
        world.tamper(&format!("DELETE FROM usage_events WHERE resource = '{id}'"));
        world.tamper(&format!(
            "UPDATE instances SET step = 'terminate', state = 'shutting-down', not_before = 0,
                 observed = json_set(observed, '$.state', 'absent') WHERE instance_id = '{id}'"
        ));
    }
    let other = &ids[6];
    world.tamper(&format!("DELETE FROM usage_events WHERE resource = '{other}'"));
    world.tamper(&format!(
        "UPDATE instances SET step = 'place', state = 'pending', not_before = 1, deadline = 1, step_since = 0,
             open_since = NULL, running_since = NULL, observed = NULL WHERE instance_id = '{other}'"
    ));
    world.clock.advance(Micros::from_secs(30));
    assert_eq!(world.engine().sweep().unwrap(), 7);
    assert_eq!(world.record(other).row.step, Step::Terminate, "the overdue start has failed");
    assert_eq!(hosts(&world).trouble.len(), 6);
    assert_eq!(world.engine().sweep().unwrap(), 0, "the others are not tried again at once");
}

#[test]
fn a_dry_run_never_answers_with_what_a_used_client_token_launched() {
    let world = World::new();
    let mut launch = request(1);
    launch.client_token = Some("once".into());
    world.engine().run_instances(&caller("alice"), launch.clone()).unwrap();
    launch.dry_run = true;
    let error = world.engine().run_instances(&caller("alice"), launch).unwrap_err();
    assert_eq!(error.code, ErrorCode::DryRunOperation, "{error}");
}

#[test]
fn a_database_from_before_a_start_takes_the_start_over_and_bills_it() {
    // Time of the backup, and the events between it and its restore.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum Backup {
        Running,
        Stopped,
        StoppedAndEndedSince,
        Stopping,
    }
    use Backup::{Running, Stopped, StoppedAndEndedSince, Stopping};
    for taken in [Running, Stopped, StoppedAndEndedSince, Stopping] {
        for ended_at_once in [false, true] {
            let mut world = World::new();
            let id = world.one();
            world.wait(&id, InstanceState::Running);
            ticks(&mut world, 20);
            let folder = tempfile::tempdir().unwrap();
            let backup = folder.path().join("backup.db");
            let first_end = world.now();
            if taken == Running {
                world.store().backup(&backup).unwrap();
            }
            world.stop(&id).unwrap();
            if taken == Stopping {
                world.store().backup(&backup).unwrap();
            }
            world.wait(&id, InstanceState::Stopped);
            if matches!(taken, Stopped | StoppedAndEndedSince) {
                world.store().backup(&backup).unwrap();
            }
            world.start(&id).unwrap();
            world.wait(&id, InstanceState::Running);
            ticks(&mut world, 30);
            if taken == StoppedAndEndedSince {
                world.hosts[0].end_monitor(&id, Death::PowerOff);
                world.tick();
            }
            world.restore(&backup);
            let what = format!("{taken:?}, ended at once: {ended_at_once}");
            let asked = world.now();
            if ended_at_once {
                world.terminate(&id).unwrap();
            } else {
                ticks(&mut world, 60);
                world.check();
                let ended = taken == StoppedAndEndedSince;
                let expected = if ended { InstanceState::Stopped } else { InstanceState::Running };
                assert_eq!(world.state(&id), expected, "{what}");
                assert_eq!(world.record(&id).row.incarnation, 2, "{what}");
            }
            let asked = if ended_at_once { asked } else { world.now() };
            world.terminate(&id).unwrap();
            world.wait(&id, InstanceState::Terminated);
            world.tick();
            world.check_nothing_left();
            let run = &world.hosts[0].runs[1];
            let intervals = world.intervals(&id);
            let (_, open, close) = intervals[1];
            assert_eq!((open, close.unwrap()), (run.began, run.ended.unwrap().min(asked)), "{what}");
            let first = intervals[0].2.unwrap();
            assert!(first <= first_end && first_end - first <= Micros::from_secs(11), "{what}: {first}");
            assert_eq!(intervals.len(), 2);
        }
    }
}

#[test]
fn a_reboot_of_the_host_opens_no_second_minimum() {
    let mut world = World::new();
    let id = world.one();
    world.wait(&id, InstanceState::Running);
    for started in 2..=4 {
        ticks(&mut world, 5);
        world.shut_down(0);
        world.hosts[0].start_agent();
        world.start_controller();
        world.until("it is started again", |world| {
            let row = world.record(&id).row;
            row.incarnation == started && row.step == Step::Run
        });
    }
    let shown = world.show(&id);
    assert!(shown.used_seconds < 30 && shown.billed_seconds == 60, "{shown:?}");
    world.stop(&id).unwrap();
    world.wait(&id, InstanceState::Stopped);
    world.start(&id).unwrap();
    world.wait(&id, InstanceState::Running);
    assert_eq!(world.show(&id).billed_seconds, 120, "a start that its owner asked for has its own");
}

fn bill_until(world: &World, until: Micros) -> String {
    let events = world.store().usage_events(&UsageFilter::default()).unwrap();
    let proofs = world.engine().proofs().unwrap();
    let now = world.now();
    let book = PriceBook::builtin();
    let bill = roost_billing::bill(&events, &proofs, &book, (Micros(0), until), BillBy::Instance, now);
    serde_json::to_string(&bill).unwrap()
}

#[test]
fn a_month_that_is_sealed_does_not_change_when_an_agent_comes_back() {
    for ends_unseen in [false, true] {
        let mut world = World::new();
        let end = Micros::from_secs(1_701_388_800);
        assert_eq!(roost_billing::month_start(end), end);
        world.clock.advance(end - world.now() - Micros::from_secs(1000));
        world.tick();
        let (away, here) = (world.one(), world.one());
        world.wait(&here, InstanceState::Running);
        ticks(&mut world, 100);
        let last = world.now();
        world.hosts[0].connected = false;
        world.clock.advance(end - world.now() + HOUR);
        world.tick();
        assert!(world.store().sealed().unwrap() < end, "somebody may still say more of the month");
        world.clock.advance(world.settings.seal_after);
        world.tick();
        assert_eq!(world.store().sealed().unwrap(), end);
        let sealed = bill_until(&world, end);
        if ends_unseen {
            world.hosts[0].end_monitors(Death::PowerOff);
        }
        let back = world.now();
        world.hosts[0].connected = true;
        ticks(&mut world, 10);
        assert_eq!(bill_until(&world, end), sealed);
        restart(&mut world);
        ticks(&mut world, 10);
        world.terminate(&away).unwrap();
        world.wait(&away, InstanceState::Terminated);
        assert_eq!(bill_until(&world, end), sealed);
        let parts = world.intervals(&away);
        assert_eq!(parts.len(), 2, "{parts:?}");
        assert_eq!((parts[0].2.unwrap(), parts[1].1), (last, end), "what nobody saw in time is free");
        assert!(parts[1].2.unwrap() >= back, "and what was seen later is billed later");
        assert_eq!(world.starts(&away).len(), 1, "one start, one minimum");
        world.check();
    }
}

#[test]
fn a_month_is_sealed_at_once_when_everybody_was_heard() {
    let mut world = World::new();
    let id = world.one();
    world.wait(&id, InstanceState::Running);
    let end = Micros::from_secs(1_701_388_800);
    world.clock.advance(end - world.now() - Micros::from_secs(2));
    ticks(&mut world, 10);
    assert_eq!(world.store().sealed().unwrap(), end);
    let sealed = bill_until(&world, end);
    ticks(&mut world, 10);
    world.stop(&id).unwrap();
    world.wait(&id, InstanceState::Stopped);
    assert_eq!(world.intervals(&id).len(), 1, "it is not cut");
    assert_eq!(bill_until(&world, end), sealed);
}

#[test]
fn an_instance_that_a_restored_database_does_not_know_keeps_its_room_and_is_shown_and_ended() {
    let mut world = World::with(EngineSettings::default(), &[(8, 2 * (512 + 16))]);
    let folder = tempfile::tempdir().unwrap();
    let backup = folder.path().join("backup.db");
    world.store().backup(&backup).unwrap();
    let ids = world.launch("alice", 2, |_| {});
    world.wait(&ids[1], InstanceState::Running);
    world.restore(&backup);
    ticks(&mut world, 3);
    assert_eq!(world.hosts[0].running().len(), 2, "they are left as they are");
    let shown = hosts(&world).hosts.remove(0).orphans;
    let mut known: Vec<_> = shown.iter().map(|orphan| orphan.instance_id.clone()).collect();
    known.sort();
    let mut expected = ids.clone();
    expected.sort();
    assert_eq!(known, expected);
    assert_eq!((shown[0].memory_mib, shown[0].instance_type.as_str()), (512, "home1.small"));
    let error = world.engine().run_instances(&caller("alice"), request(1)).unwrap_err();
    assert_eq!(error.code, ErrorCode::InsufficientInstanceCapacity, "{error}");
    let end = |world: &World, name: &str, id: &str| {
        world
            .engine()
            .end_orphan(&caller(name), &EndOrphan { instance_id: id.to_owned() })
            .map_err(|e| e.code)
    };
    assert_eq!(end(&world, "alice", ids[0].as_str()).unwrap_err(), ErrorCode::UnauthorizedOperation);
    assert_eq!(end(&world, "root", "i-00000000000000000").unwrap_err(), ErrorCode::InvalidInstanceIdNotFound);
    for id in &ids {
        end(&world, "root", id.as_str()).unwrap();
    }
    ticks(&mut world, 5);
    assert_eq!(world.hosts[0].running(), vec![]);
    assert!(hosts(&world).hosts[0].orphans.is_empty());
    let again = world.launch("alice", 2, |_| {});
    world.wait(&again[1], InstanceState::Running);
    world.check();
}
