//! Whole lives of instances, against a simulated host.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod world;

use roost_controller::engine::EngineSettings;
use roost_store::Store;
use roost_testbed::sim::Death;
use roost_types::agent::{HelloRequest, HostFacts, PROTOCOL, Report};
use roost_types::api::{
    DescribeInstanceTiming, ModifyInstanceType, RebootInstances, RunInstances, StartInstances, StopInstances,
    TerminateInstances,
};
use roost_types::state::{InstanceState, Step, VolumeState};
use roost_types::{ErrorCode, InstanceId, Micros};
use std::collections::BTreeSet;
use world::{World, caller, request};

#[test]
fn an_instance_is_launched_stopped_resized_started_rebooted_terminated_and_billed_to_the_second() {
    let mut world = World::new();
    let id = world.one();
    assert_eq!(world.state(&id), InstanceState::Pending);
    let shown = world.wait(&id, InstanceState::Running);
    assert_eq!(shown.private_ip.octets()[..2], [172, 31]);
    assert_eq!(shown.public_ip.to_string(), "100.64.0.4");
    let began = shown.running_since.unwrap();
    for _ in 0..20 {
        world.tick();
    }
    let running = world.show(&id);
    assert!(running.guest_ready);
    assert!(running.used_seconds >= 19, "{running:?}");

    let asked = world.now();
    let changes = world.stop(&id).unwrap().changes;
    assert_eq!((changes[0].previous, changes[0].current), (InstanceState::Running, InstanceState::Stopping));
    world.wait(&id, InstanceState::Stopped);
    assert_eq!(
        world.intervals(&id),
        vec![(1, began, Some(asked))],
        "the bill ends when the stop was accepted"
    );
    let stopped = world.show(&id);
    assert_eq!(stopped.state_reason.as_ref().unwrap().code, "Client.UserInitiatedShutdown");
    assert_eq!((stopped.used_seconds, stopped.billed_seconds), (20, 60));
    assert_eq!(world.store().hosts().unwrap()[0].claims, 0, "a stopped instance holds no capacity");
    for _ in 0..30 {
        world.tick();
    }
    assert_eq!(world.show(&id).used_seconds, 20, "nothing while stopped");

    let retype = ModifyInstanceType { instance_id: id.to_string(), instance_type: "home1.large".into() };
    world.engine().modify_instance_type(&caller("alice"), retype.clone()).unwrap();
    world.start(&id).unwrap();
    let started = world.wait(&id, InstanceState::Running);
    assert_eq!((started.vcpus, started.memory_mib, started.incarnation), (2, 2048, 2));
    assert_eq!(started.public_ip, shown.public_ip, "addresses stay");
    let error = world.engine().modify_instance_type(&caller("alice"), retype).unwrap_err();
    assert_eq!(error.code, ErrorCode::IncorrectInstanceState);
    world.reboot(&id).unwrap();
    for _ in 0..100 {
        world.tick();
    }
    assert_eq!(world.intervals(&id).len(), 2, "a reboot opens no new interval");
    world.terminate(&id).unwrap();
    assert_eq!(world.state(&id), InstanceState::ShuttingDown);
    let ended = world.wait(&id, InstanceState::Terminated);
    assert!(ended.billed_seconds >= 60 + 100, "{ended:?}");
    assert_eq!(ended.host_id, None);
    assert_eq!(world.terminate(&id).unwrap().changes[0].current, InstanceState::Terminated, "again is fine");
    world.tick();
    world.check_nothing_left();
    let volume = world.record(&id).volume;
    assert_eq!(volume.state, VolumeState::Deleted);
}

#[test]
fn a_failed_launch_terminates_with_its_reason_and_costs_nothing() {
    let mut world = World::new();
    world.hosts[0].behaviour.starts_fail = true;
    let id = world.one();
    let ended = world.wait(&id, InstanceState::Terminated);
    assert_eq!(ended.state_reason.unwrap().message, "the simulated start fails");
    assert_eq!((ended.used_seconds, ended.billed_seconds), (0, 0));
    world.tick();
    world.check_nothing_left();
}

#[test]
fn a_failed_restart_goes_back_to_stopped_with_its_reason_and_can_be_started_again() {
    let mut world = World::new();
    let id = world.one();
    world.wait(&id, InstanceState::Running);
    world.stop(&id).unwrap();
    world.wait(&id, InstanceState::Stopped);
    world.hosts[0].behaviour.starts_fail = true;
    world.start(&id).unwrap();
    let stopped = world.wait(&id, InstanceState::Stopped);
    assert_eq!(stopped.state_reason.unwrap().message, "the simulated start fails");
    assert_eq!(world.intervals(&id).len(), 1, "the failed start is not billed");
    world.hosts[0].behaviour.starts_fail = false;
    world.start(&id).unwrap();
    world.wait(&id, InstanceState::Running);
    world.check();
}

#[test]
fn a_start_that_takes_too_long_fails_and_says_so() {
    let settings = EngineSettings { launch_deadline: Micros::from_secs(30), ..Default::default() };
    let mut world = World::with(settings, &[(8, 16384)]);
    world.hosts[0].behaviour.prepare = Micros::from_secs(1000);
    let id = world.one();
    let ended = world.wait(&id, InstanceState::Terminated);
    assert!(ended.state_reason.unwrap().message.contains("did not start within 30 s"));
}

#[test]
fn a_guest_that_powers_itself_off_is_stopped_and_billed_to_that_moment() {
    let mut world = World::new();
    let id = world.one();
    let began = world.wait(&id, InstanceState::Running).running_since.unwrap();
    for _ in 0..70 {
        world.tick();
    }
    let off = world.now();
    world.hosts[0].end_monitor(&id, Death::PowerOff);
    let stopped = world.wait(&id, InstanceState::Stopped);
    assert_eq!(stopped.state_reason.unwrap().code, "Client.InstanceInitiatedShutdown");
    assert_eq!(world.intervals(&id), vec![(1, began, Some(off))]);
    world.check();
}

#[test]
fn a_killed_monitor_means_stopped_with_the_reason() {
    let mut world = World::new();
    let id = world.one();
    world.wait(&id, InstanceState::Running);
    world.hosts[0].end_monitor(&id, Death::Killed);
    let stopped = world.wait(&id, InstanceState::Stopped);
    assert!(stopped.state_reason.unwrap().code.starts_with("Server."));
    world.check();
}

#[test]
fn a_silent_agent_is_billed_to_its_last_report_and_goes_on_when_it_is_back() {
    let mut world = World::new();
    let id = world.one();
    world.wait(&id, InstanceState::Running);
    for _ in 0..10 {
        world.tick();
    }
    world.hosts[0].connected = false;
    let last = world.show(&id).used_seconds;
    for _ in 0..50 {
        world.tick();
    }
    let silent = world.show(&id);
    assert_eq!(silent.used_seconds, last);
    assert!(silent.trouble.unwrap().contains("has not reported"), "it says what is wrong");
    world.hosts[0].connected = true;
    world.tick();
    let back = world.show(&id);
    assert!(back.used_seconds >= last + 50, "the same run goes on: {}", back.used_seconds);
    assert_eq!(back.incarnation, 1);
    assert_eq!(world.intervals(&id).len(), 1);
}

#[test]
fn a_monitor_that_died_unseen_is_billed_to_its_last_proof_of_life() {
    let mut world = World::new();
    let id = world.one();
    let began = world.wait(&id, InstanceState::Running).running_since.unwrap();
    for _ in 0..90 {
        world.tick();
    }
    let last = world.now();
    world.hosts[0].kill_agent();
    for _ in 0..10 {
        world.tick();
    }
    world.hosts[0].end_monitor(&id, Death::Killed);
    for _ in 0..10 {
        world.tick();
    }
    world.hosts[0].start_agent();
    world.wait(&id, InstanceState::Stopped);
    assert_eq!(world.intervals(&id), vec![(1, began, Some(last))]);
}

#[test]
fn a_reboot_of_the_host_brings_instances_back_as_a_new_incarnation() {
    let mut world = World::new();
    let id = world.one();
    let began = world.wait(&id, InstanceState::Running).running_since.unwrap();
    for _ in 0..15 {
        world.tick();
    }
    let last = world.now();
    world.hosts[0].reboot();
    for _ in 0..20 {
        world.tick();
    }
    world.hosts[0].start_agent();
    world.until("the next incarnation runs", |world| {
        let row = world.record(&id).row;
        row.incarnation == 2 && row.step == Step::Run
    });
    let intervals = world.intervals(&id);
    assert_eq!(intervals[0], (1, began, Some(last)));
    assert_eq!((intervals.len(), intervals[1].0, intervals[1].2), (2, 2, None));
    world.check();
}

#[test]
fn a_host_that_goes_down_in_order_is_billed_to_its_last_word() {
    let mut world = World::new();
    let id = world.one();
    let began = world.wait(&id, InstanceState::Running).running_since.unwrap();
    // Whenever it happens, between two reports that are made durable: the controller forgets all that is not.
    for incarnation in 1..=12 {
        for _ in 0..3 + incarnation {
            world.tick();
        }
        let last = world.now();
        world.shut_down(0);
        for _ in 0..20 {
            world.tick();
        }
        world.start_controller();
        world.hosts[0].start_agent();
        world.until("the next incarnation runs", |world| {
            let row = world.record(&id).row;
            row.incarnation == incarnation + 1 && row.step == Step::Run
        });
        let (of, _, close) = world.intervals(&id)[usize::try_from(incarnation).unwrap() - 1];
        assert_eq!((of, close), (incarnation, Some(last)));
    }
    assert_eq!(world.intervals(&id)[0].1, began);
    world.check();
}

#[test]
fn a_stopped_instance_stays_stopped_when_its_host_reboots() {
    let mut world = World::new();
    let id = world.one();
    world.wait(&id, InstanceState::Running);
    world.stop(&id).unwrap();
    world.wait(&id, InstanceState::Stopped);
    world.hosts[0].reboot();
    world.hosts[0].start_agent();
    for _ in 0..10 {
        world.tick();
    }
    assert_eq!(world.state(&id), InstanceState::Stopped);
}

#[test]
fn states_forbid_what_ec2_forbids() {
    let mut world = World::new();
    let id = world.one();
    let code =
        |result: Result<roost_types::api::StateChanges, roost_types::ApiError>| result.unwrap_err().code;
    assert_eq!(code(world.stop(&id)), ErrorCode::IncorrectInstanceState, "pending");
    world.wait(&id, InstanceState::Running);
    world.stop(&id).unwrap();
    assert_eq!(code(world.start(&id)), ErrorCode::IncorrectInstanceState, "stopping");
    assert_eq!(world.reboot(&id).unwrap_err().code, ErrorCode::IncorrectInstanceState, "stopping");
    world.stop(&id).unwrap();
    world.wait(&id, InstanceState::Stopped);
    assert_eq!(world.stop(&id).unwrap().changes[0].current, InstanceState::Stopped, "again is fine");
    world.terminate(&id).unwrap();
    assert_eq!(code(world.start(&id)), ErrorCode::IncorrectInstanceState, "shutting down");
    world.wait(&id, InstanceState::Terminated);
    let error = world.start(&id).unwrap_err();
    assert_eq!(error.code, ErrorCode::IncorrectInstanceState, "terminated");
    let allowed = "is terminated: only stopped, pending and running instances can be started";
    assert_eq!(error.message, format!("instance {id} {allowed}"));
}

#[test]
fn a_start_of_what_is_pending_or_runs_succeeds_and_changes_nothing() {
    let mut world = World::new();
    let (id, other) = (world.one(), world.one());
    let again = |world: &World, state| {
        let everything =
            |world: &World| (world.record(&id), world.store().claim(&id).unwrap(), world.intervals(&id));
        let before = everything(world);
        let change = world.start(&id).unwrap().changes.remove(0);
        assert_eq!((change.instance_id, change.previous, change.current), (id.clone(), state, state));
        assert_eq!(everything(world), before, "{state}");
    };
    again(&world, InstanceState::Pending);
    world.wait(&id, InstanceState::Running);
    again(&world, InstanceState::Running);
    // Nor does it need its host.
    world.hosts[0].connected = false;
    for _ in 0..60 {
        world.tick();
    }
    again(&world, InstanceState::Running);
    world.hosts[0].connected = true;
    world.tick();

    world.stop(&other).unwrap();
    let both = [id.clone(), other.clone()];
    let error = world.start_all(&both).unwrap_err();
    assert_eq!(error.code, ErrorCode::IncorrectInstanceState);
    assert!(error.message.starts_with(&format!("instance {other} is stopping")), "{error}");
    world.wait(&other, InstanceState::Stopped);
    let changes = world.start_all(&both).unwrap().changes;
    let changes: Vec<_> = changes.iter().map(|change| (change.previous, change.current)).collect();
    let (pending, running) = (InstanceState::Pending, InstanceState::Running);
    assert_eq!(changes, [(running, running), (InstanceState::Stopped, pending)]);
    again(&world, running);
    world.wait(&other, running);
    assert_eq!((world.show(&id).incarnation, world.show(&other).incarnation), (1, 2));
    assert_eq!((world.intervals(&id).len(), world.intervals(&other).len()), (1, 2));
    world.check();
}

#[test]
fn a_call_over_several_instances_changes_all_or_none() {
    let mut world = World::new();
    let first = world.one();
    world.wait(&first, InstanceState::Running);
    let second = world.one();
    let both = vec![first.to_string(), second.to_string()];
    let request = StopInstances { instance_ids: both, force: false };
    let error = world.engine().stop_instances(&caller("alice"), request).unwrap_err();
    assert_eq!(error.code, ErrorCode::IncorrectInstanceState);
    assert!(error.message.contains(second.as_str()));
    assert_eq!(world.state(&first), InstanceState::Running);
}

#[test]
fn another_accounts_instance_is_not_there() {
    let world = World::new();
    let id = world.one();
    let error = world.describe("bob", &[&id]).unwrap_err();
    assert_eq!(error.code, ErrorCode::InvalidInstanceIdNotFound);
    assert!(error.message.contains(id.as_str()));
    assert!(world.describe("bob", &[]).unwrap().is_empty());
    assert_eq!(world.describe("alice", &[]).unwrap().len(), 1);
    let request = TerminateInstances { instance_ids: vec![id.to_string()] };
    let error = world.engine().terminate_instances(&caller("bob"), request).unwrap_err();
    assert_eq!(error.code, ErrorCode::InvalidInstanceIdNotFound);
}

#[test]
fn a_client_token_makes_a_launch_happen_once() {
    let mut world = World::new();
    let with = |token: &str| {
        let mut request = request(2);
        request.client_token = Some(token.into());
        request
    };
    let first = world.engine().run_instances(&caller("alice"), with("t")).unwrap();
    world.wait(&first.instances[0].instance_id, InstanceState::Running);
    let again = world.engine().run_instances(&caller("alice"), with("t")).unwrap();
    assert_eq!(again.reservation_id, first.reservation_id);
    assert_eq!(again.instances[0].state, InstanceState::Running, "with the state of now");
    assert_eq!(world.records().len(), 2);
    let mut other = with("t");
    other.instance_type = "home1.nano".into();
    let error = world.engine().run_instances(&caller("alice"), other).unwrap_err();
    assert_eq!(error.code, ErrorCode::IdempotentParameterMismatch);
    world.engine().run_instances(&caller("bob"), with("t")).unwrap();
    assert_eq!(world.records().len(), 4, "tokens are per account");
}

#[test]
fn bad_parameters_get_ec2s_code_and_what_is_allowed() {
    type Spoil = fn(&mut RunInstances);
    let world = World::new();
    let table: &[(Spoil, ErrorCode, &[&str])] = &[
        (|r| (r.min_count, r.max_count) = (0, 0), ErrorCode::InvalidParameterValue, &["0", "1 to 1000"]),
        (
            |r| (r.min_count, r.max_count) = (1, 10_000),
            ErrorCode::InvalidParameterValue,
            &["10000", "1 to 1000"],
        ),
        (|r| (r.min_count, r.max_count) = (3, 2), ErrorCode::InvalidParameterValue, &["3", "2"]),
        (|r| r.image = String::new(), ErrorCode::MissingParameter, &["image"]),
        (|r| r.image = "ami-x".into(), ErrorCode::InvalidAmiIdMalformed, &["ami-x", "17 hexadecimal"]),
        (|r| r.image = "ami-0123456789abcdef0".into(), ErrorCode::InvalidAmiIdNotFound, &["ami-0123"]),
        (|r| r.image = "no-such".into(), ErrorCode::InvalidAmiIdNotFound, &["no-such"]),
        (|r| r.instance_type = "t9.huge".into(), ErrorCode::InvalidParameterValue, &["t9.huge"]),
        (|r| r.key_name = Some("nokey".into()), ErrorCode::InvalidKeyPairNotFound, &["nokey"]),
        (|r| r.key_name = Some("bob-key".into()), ErrorCode::InvalidKeyPairNotFound, &["bob-key"]),
        (|r| r.user_data = Some("not base64!".into()), ErrorCode::InvalidParameterValue, &["base64"]),
        (|r| r.user_data = Some("AAAA".repeat(6000)), ErrorCode::InvalidParameterValue, &["16384"]),
        (|r| r.volume_gib = Some(0), ErrorCode::InvalidParameterValue, &["0", "1 to 16384"]),
        (|r| r.client_token = Some("x".repeat(65)), ErrorCode::InvalidParameterValue, &["65", "64"]),
        (|r| drop(r.tags.insert("aws:x".into(), "y".into())), ErrorCode::InvalidParameterValue, &["aws:x"]),
        (
            |r| r.instance_type = "m5.24xlarge".into(),
            ErrorCode::Unsupported,
            &["m5.24xlarge", "too few vCPUs"],
        ),
        (
            |r| (r.min_count, r.max_count) = (900, 900),
            ErrorCode::InsufficientInstanceCapacity,
            &["31 of at least 900"],
        ),
        (|r| r.dry_run = true, ErrorCode::DryRunOperation, &["would have"]),
    ];
    for (spoil, code, said) in table {
        let mut request = request(1);
        spoil(&mut request);
        let error = world.engine().run_instances(&caller("alice"), request).unwrap_err();
        assert_eq!(error.code, *code, "{error}");
        for part in *said {
            assert!(error.message.contains(part), "{part:?} in {error}");
        }
    }
    assert!(world.records().is_empty(), "nothing half made");
    let error = world.stop(&"i-0123456789abcdef0".parse::<InstanceId>().unwrap()).unwrap_err();
    assert_eq!(error.code, ErrorCode::InvalidInstanceIdNotFound);
}

#[test]
fn a_start_claims_its_capacity_again_and_is_refused_if_it_is_taken() {
    let mut world = World::with(EngineSettings::default(), &[(8, 2 * (512 + 16))]);
    let ids = world.launch("alice", 2, |_| {});
    world.wait(&ids[1], InstanceState::Running);
    world.stop(&ids[0]).unwrap();
    world.wait(&ids[0], InstanceState::Stopped);
    let third = world.one();
    let error = world.start(&ids[0]).unwrap_err();
    assert_eq!(error.code, ErrorCode::InsufficientInstanceCapacity);
    assert!(error.message.contains("too little memory free"), "{error}");
    world.terminate(&third).unwrap();
    world.wait(&third, InstanceState::Terminated);
    world.start(&ids[0]).unwrap();
    world.wait(&ids[0], InstanceState::Running);
    world.check();
}

#[test]
fn an_instance_made_from_a_withdrawn_image_goes_on_and_keeps_its_spec() {
    let mut world = World::new();
    let id = world.one();
    world.wait(&id, InstanceState::Running);
    let host = world.hosts[0].id().clone();
    let before = world.engine().desired(&host).unwrap();
    let image = world.show(&id).image_id;
    world.store().deregister_image(&image, Micros(1)).unwrap();
    assert_eq!(world.engine().desired(&host).unwrap(), before);
    assert_eq!(
        world.engine().run_instances(&caller("alice"), request(1)).unwrap_err().code,
        ErrorCode::InvalidAmiIdNotFound
    );
}

#[test]
fn the_timing_of_a_start_has_the_parts_of_every_room() {
    let mut world = World::new();
    let id = world.one();
    world.wait(&id, InstanceState::Running);
    for _ in 0..5 {
        world.tick();
    }
    let request = DescribeInstanceTiming { instance_id: id.to_string() };
    let timing = world.engine().describe_instance_timing(&caller("alice"), request).unwrap();
    let parts: Vec<_> = timing.parts.iter().map(|part| part.part.as_str()).collect();
    assert_eq!(parts, ["api", "placement", "store", "agent.prepare", "guest"]);
    assert_eq!(timing.parts[4].took_us, 3_000_000);
}

#[test]
fn what_desired_says_changes_its_version_and_only_then() {
    let mut world = World::new();
    let host = world.hosts[0].id().clone();
    let empty = world.engine().desired(&host).unwrap().version;
    let id = world.one();
    let pending = world.engine().desired(&host).unwrap().version;
    assert_ne!(pending, empty);
    world.wait(&id, InstanceState::Running);
    assert_eq!(world.engine().desired(&host).unwrap().version, pending, "that it runs is nothing new to do");
    world.kill_controller();
    world.start_controller();
    assert_eq!(world.engine().desired(&host).unwrap().version, pending, "a restart changes nothing");
    world.stop(&id).unwrap();
    assert_ne!(world.engine().desired(&host).unwrap().version, pending);
    world.terminate(&id).unwrap();
    world.wait(&id, InstanceState::Terminated);
    assert_eq!(world.engine().desired(&host).unwrap().version, empty, "what is gone is not wanted any more");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_worker_runs_due_steps_until_it_is_told_to_end() {
    let settings = EngineSettings { place_deadline: Micros(0), ..Default::default() };
    let mut world = World::with(settings, &[(8, 16384)]);
    let id = world.one();
    world.hosts[0].kill_agent();
    world.clock.advance(Micros::from_secs(60));
    let (end, ended) = tokio::sync::watch::channel(false);
    let mut changes = world.engine().subscribe();
    let work = tokio::spawn(world.shared_engine().work(ended));
    let deadline = std::time::Duration::from_secs(20);
    tokio::time::timeout(deadline, changes.wait_for(|_| world.record(&id).row.step == Step::Terminate))
        .await
        .expect("a host that does not answer fails the start")
        .unwrap();
    end.send(true).unwrap();
    tokio::time::timeout(deadline, work).await.expect("it ends").unwrap();
}

#[test]
fn an_unreachable_hosts_generation_that_ran_ahead_is_overtaken() {
    // A database restored from a backup: the agent has seen newer generations than the controller knows.
    let mut world = World::new();
    let id = world.one();
    world.wait(&id, InstanceState::Running);
    let folder = tempfile::tempdir().unwrap();
    let backup = folder.path().join("backup.db");
    world.store().backup(&backup).unwrap();
    world.reboot(&id).unwrap();
    world.reboot(&id).unwrap();
    world.tick();
    let ahead = world.record(&id).row.generation;
    world.restore(&backup);
    world.until("its word counts again", |world| world.record(&id).row.generation > ahead);
    world.terminate(&id).unwrap();
    world.wait(&id, InstanceState::Terminated);
    world.tick();
    world.check_nothing_left();
}

/// A report of one observation, as an agent would send it.
fn word(world: &World, id: &InstanceId, agent_run: &str, edit: impl FnOnce(&mut serde_json::Value)) {
    let host = &world.hosts[0];
    let row = world.record(id).row;
    let mut word = serde_json::json!({
        "instance_id": id, "generation": row.generation, "incarnation": row.incarnation, "state": "running",
        "age_us": 0, "guest_ready": false, "timing": []
    });
    edit(&mut word);
    let report = serde_json::from_value(serde_json::json!({
        "host": host.facts, "boot_id": "boot-1", "agent_run": agent_run, "instances": [word]
    }))
    .unwrap();
    world.engine().report(host.id(), report).unwrap();
}

#[test]
fn an_end_that_is_explained_late_keeps_the_true_reason_and_the_true_end() {
    let mut world = World::new();
    let id = world.one();
    let began = world.wait(&id, InstanceState::Running).running_since.unwrap();
    let seen = world.now();
    world.clock.advance(Micros::from_secs(40));
    // A new agent says what it remembers, before it has looked; then it finds the monitor dead.
    word(&world, &id, "run-2", |word| word["last_seen_age_us"] = (40_000_000).into());
    assert_eq!(world.show(&id).used_seconds, u64::try_from((seen - began).ceil_secs()).unwrap());
    word(&world, &id, "run-2", |word| word["state"] = "stopping".into());
    assert_eq!(world.state(&id), InstanceState::Stopping);
    word(&world, &id, "run-2", |word| {
        word["state"] = "stopped".into();
        word["reason"] = serde_json::json!({"code": "Server.MonitorKilled", "message": "killed"});
    });
    assert_eq!(world.show(&id).state_reason.unwrap().code, "Server.MonitorKilled");
    assert_eq!(world.intervals(&id), vec![(1, began, Some(seen))]);
}

#[test]
fn the_last_starts_end_does_not_fail_the_next_start() {
    let mut world = World::new();
    let id = world.one();
    world.wait(&id, InstanceState::Running);
    world.stop(&id).unwrap();
    world.wait(&id, InstanceState::Stopped);
    world.clock.advance(Micros::from_secs(5));
    world.start(&id).unwrap();
    // The agent has accepted the new start and still says how the one before ended.
    for state in ["stopped", "failed"] {
        word(&world, &id, "run-1", |word| {
            word["state"] = state.into();
            word["age_us"] = 5_000_000.into();
        });
        assert_eq!(world.state(&id), InstanceState::Pending, "{state}");
    }
    world.wait(&id, InstanceState::Running);
}

/// A monitor dates its own end, and may be compromised.
#[test]
fn an_end_dated_before_the_last_proof_of_life_is_that_proof() {
    let mut world = World::new();
    let id = world.one();
    let began = world.wait(&id, InstanceState::Running).running_since.unwrap();
    for _ in 0..70 {
        world.tick();
    }
    let proof = world.now();
    world.clock.advance(Micros::from_secs(5));
    word(&world, &id, "run-1", |word| {
        word["state"] = "stopped".into();
        word["run_ended_age_us"] = 74_000_000.into();
    });
    assert_eq!(world.intervals(&id), vec![(1, began, Some(proof))]);
}

#[test]
fn volumes_are_claimed_from_launch_to_removal_while_their_instances_are_stopped_too() {
    let mut world = World::new();
    let large = |r: &mut RunInstances| r.volume_gib = Some(400);
    let ids = world.launch("alice", 2, large);
    for id in &ids {
        world.wait(id, InstanceState::Running);
        world.stop(id).unwrap();
        world.wait(id, InstanceState::Stopped);
    }
    let third = RunInstances { volume_gib: Some(400), ..request(1) };
    let error = world.engine().run_instances(&caller("bob"), third.clone()).unwrap_err();
    assert_eq!(error.code, ErrorCode::InsufficientInstanceCapacity);
    assert!(error.message.contains("too little disk free on 1 of 1 hosts"), "{}", error.message);
    // A volume on the host needs no more disk.
    world.start(&ids[0]).unwrap();
    world.wait(&ids[0], InstanceState::Running);
    world.terminate(&ids[1]).unwrap();
    world.wait(&ids[1], InstanceState::Terminated);
    world.engine().run_instances(&caller("bob"), third).unwrap();
    let host = world.store().hosts().unwrap().remove(0);
    assert_eq!(host.claimed_disk_gib, 800);
}

#[test]
fn a_released_address_is_nobodys_for_minutes_and_then_the_last_in_turn() {
    let mut world = World::new();
    let mut given = Vec::new();
    for _ in 0..3 {
        let id = world.one();
        world.wait(&id, InstanceState::Running);
        given.push((world.show(&id).public_ip, world.show(&id).private_ip));
        world.terminate(&id).unwrap();
        world.wait(&id, InstanceState::Terminated);
    }
    let (public, private): (BTreeSet<_>, BTreeSet<_>) = given.into_iter().unzip();
    assert_eq!((public.len(), private.len()), (3, 3), "{public:?} {private:?}");
}

#[test]
fn the_first_instances_of_two_accounts_have_different_private_addresses() {
    let world = World::new();
    let first = |name: &str| {
        world.launch(name, 1, |_| {});
        world.describe(name, &[]).unwrap().remove(0).private_ip
    };
    assert_ne!(first("alice"), first("bob"));
}

#[test]
fn an_administrator_acts_on_any_accounts_instance_by_its_id_and_nobody_else_does() {
    let mut world = World::new();
    let id = world.one();
    world.wait(&id, InstanceState::Running);
    let ids = || vec![id.to_string()];
    let modify = || ModifyInstanceType { instance_id: id.to_string(), instance_type: "home1.nano".into() };
    let timing = || DescribeInstanceTiming { instance_id: id.to_string() };
    let engine = world.shared_engine();
    let bob = caller("bob");
    let refusals = [
        engine.describe_instance_timing(&bob, timing()).err(),
        engine.stop_instances(&bob, StopInstances { instance_ids: ids(), force: false }).err(),
        engine.start_instances(&bob, StartInstances { instance_ids: ids() }).err(),
        engine.reboot_instances(&bob, RebootInstances { instance_ids: ids() }).err(),
        engine.modify_instance_type(&bob, modify()).err(),
        engine.terminate_instances(&bob, TerminateInstances { instance_ids: ids() }).err(),
    ];
    for refusal in refusals {
        assert_eq!(refusal.map(|error| error.code), Some(ErrorCode::InvalidInstanceIdNotFound));
    }
    let root = caller("root");
    assert_eq!(world.describe("root", &[&id]).unwrap()[0].account_id, caller("alice").account_id);
    engine.describe_instance_timing(&root, timing()).unwrap();
    engine.reboot_instances(&root, RebootInstances { instance_ids: ids() }).unwrap();
    engine.stop_instances(&root, StopInstances { instance_ids: ids(), force: true }).unwrap();
    world.wait(&id, InstanceState::Stopped);
    engine.modify_instance_type(&root, modify()).unwrap();
    engine.start_instances(&root, StartInstances { instance_ids: ids() }).unwrap();
    world.wait(&id, InstanceState::Running);
    engine.terminate_instances(&root, TerminateInstances { instance_ids: ids() }).unwrap();
    world.wait(&id, InstanceState::Terminated);
    assert!(world.usage(id.as_str()).iter().all(|event| event.account == caller("alice").account_id));
}

#[test]
fn names_that_look_like_ids_or_that_no_terminal_shows_are_refused_with_the_rule() {
    let world = World::new();
    let launch = |key: &str, value: &str| {
        let mut request = request(1);
        request.tags.insert(key.into(), value.into());
        world.engine().run_instances(&caller("alice"), request)
    };
    for (key, value, rule) in [
        ("Name", "i-web", "may not begin with \"i-\""),
        ("Name", "i-0123456789abcdef0", "may not begin with \"i-\""),
        ("Name", "a\u{1b}[2Jb", "no terminal shows"),
        ("Name", "gnp.exe\u{202e}", "no terminal shows"),
        ("role", "web\n", "no terminal shows"),
        ("ro\tle", "web", "no terminal shows"),
    ] {
        let error = launch(key, value).unwrap_err();
        assert_eq!(error.code, ErrorCode::InvalidParameterValue);
        assert!(error.message.contains(rule), "{}", error.message);
        assert!(!error.message.contains(char::is_control), "{}", error.message);
    }
    launch("Name", "web-i-1 grüße").unwrap();
    launch("role", "i-web").unwrap();
}

#[test]
fn a_host_cannot_move_to_another_zone_nor_be_what_no_machine_is() {
    let world = World::new();
    let true_facts = world.hosts[0].facts.clone();
    type Lie = fn(&mut HostFacts);
    let lies: [(Lie, &str); 9] = [
        (|f| f.zone = "home-1b".into(), "home-1b"),
        (|f| f.hostname = "a\nb".into(), "its name"),
        (|f| f.hostname = "x".repeat(65), "1 to 64 characters"),
        (|f| f.cpus = 5000, "cpus is 5000"),
        (|f| f.cpu_milli = u64::MAX, "cpu_milli is"),
        (|f| f.memory_mib = 1 << 40, "memory_mib is"),
        (|f| f.disk_gib = 1 << 40, "disk_gib is"),
        (|f| f.max_vcpus = 1 << 20, "max_vcpus is"),
        (|f| f.gpus = 1000, "gpus is 1000: allowed are 0 to 64"),
    ];
    for (lie, word) in lies {
        let mut host = true_facts.clone();
        lie(&mut host);
        let hello = HelloRequest { protocol: PROTOCOL, version: "test".into(), host: host.clone() };
        let report = Report {
            host,
            boot_id: "boot".into(),
            agent_run: "run".into(),
            instances: vec![],
            trouble: vec![],
            orphans: vec![],
            last: false,
        };
        for error in [
            world.engine().hello(&true_facts.host_id, hello).unwrap_err(),
            world.engine().report(&true_facts.host_id, report).unwrap_err(),
        ] {
            assert_eq!(error.code, ErrorCode::InvalidParameterValue);
            assert!(error.message.contains(word), "{}", error.message);
        }
        assert_eq!(world.store().hosts().unwrap()[0].facts, true_facts, "{word}");
    }
}
