//! The reconciler on a host in memory: a whole life, refusals, adoption, failures, and an agent that dies at every
//! single operation of that life.

mod support;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use roost_agent::agent::StateLock;
use roost_agent::names::Folders;
use roost_agent::record::{self, Accepted, Records, Run, Verdict};
use roost_agent::task::Pace;
use roost_agent::testing::{ensure, ensure_of};
use roost_types::agent::{Ensure, Observation, Observed};
use roost_types::state::DesiredState;
use roost_vmm::status::ExitReason;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};
use support::Bench;

fn next(ensure: &Ensure, change: impl FnOnce(&mut Ensure)) -> Ensure {
    let mut next = ensure.clone();
    next.generation += 1;
    change(&mut next);
    next
}

/// Launch, reboot, stop, start again, terminate.
async fn whole_life(bench: &mut Bench) {
    let launch = ensure(1);
    let id = launch.instance_id.clone();
    bench.want(launch.clone());
    bench.until(&id, "running", |seen| seen.state == Observed::Running).await;

    let reboot = next(&launch, |e| e.spec.reboots = 1);
    bench.want(reboot.clone());
    let shared = bench.shared.clone();
    bench
        .until(&id, "running after a reboot", |seen| {
            seen.generation == 2
                && seen.state == Observed::Running
                && shared.world().machines[&seen.instance_id].runs == 2
        })
        .await;

    let stop = next(&reboot, |e| e.spec.desired = DesiredState::Stopped);
    bench.want(stop.clone());
    let stopped =
        bench.until(&id, "stopped", |seen| seen.state == Observed::Stopped && seen.generation == 3).await;
    assert!(stopped.run_began_age_us >= stopped.run_ended_age_us, "{stopped:?}");
    assert!(stopped.run_ended_age_us.is_some());
    assert_eq!(stopped.reason, None, "a stop that was asked for needs no reason");
    {
        let world = bench.shared.world();
        let machine = &world.machines[&id];
        assert!(machine.disk, "the disk stays");
        assert!(!machine.cgroup && machine.network.is_none() && !machine.monitor_alive, "{machine:?}");
    }

    let start = next(&stop, |e| {
        e.spec.desired = DesiredState::Running;
        e.spec.incarnation = 2;
    });
    bench.want(start.clone());
    let again = bench
        .until(&id, "running again", |seen| seen.state == Observed::Running && seen.incarnation == 2)
        .await;
    assert_eq!(again.run_ended_age_us, None);

    bench.want(next(&start, |e| e.spec.desired = DesiredState::Terminated));
    bench.until(&id, "absent", |seen| seen.state == Observed::Absent).await;
    let world = bench.shared.world();
    let machine = &world.machines[&id];
    assert!(
        !machine.disk && !machine.cgroup && machine.network.is_none() && !machine.monitor_alive,
        "{machine:?}"
    );
    assert_eq!(machine.runs, 3, "vCPUs were let run once per start and reboot");
    drop(world);
    assert!(!bench.folders.instance(&id).exists(), "records are left");
}

#[tokio::test]
async fn a_whole_life() {
    let mut bench = Bench::new();
    whole_life(&mut bench).await;
    let log = bench.shared.world().log.clone();
    let names: Vec<&str> = log.iter().filter_map(|line| line.split_once(' ').map(|(_, name)| name)).collect();
    assert_eq!(
        names,
        [
            "fetch",
            "disk",
            "network",
            "cgroup",
            "start",
            "let run", // launch
            "power",
            "start",
            "let run", // reboot
            "power",
            "tear down", // stop
            "network",
            "cgroup",
            "start",
            "let run", // start
            "kill",
            "tear down",
            "remove disk", // terminate
        ]
    );
}

#[tokio::test]
async fn an_agent_may_die_at_every_operation_before_or_after_it_took_effect() {
    for number in 0..18 {
        for after in [false, true] {
            let mut bench = Bench::new();
            bench.shared.world().crash_at = Some((number, after));
            whole_life(&mut bench).await;
            assert_eq!(bench.shared.world().deaths, 1, "the agent did not die at operation {number}");
        }
    }
}

#[tokio::test]
async fn what_cannot_be_written_down_is_told_and_taken_in_later_and_holds_up_no_other() {
    let mut bench = Bench::new();
    let (first, second) = (ensure(1), ensure_of(9, 1));
    let id = first.instance_id.clone();
    // As on a full disk, writing fails: something stands in the way.
    let obstacle = bench.folders.instance(&id).join("spec.new");
    std::fs::create_dir_all(&obstacle).unwrap();
    bench.desired.instances = vec![first, second.clone()];
    let error = bench.agent.as_ref().unwrap().apply(&bench.desired).unwrap_err();
    assert!(error.chain().contains("spec.new"), "{}", error.chain());
    let seen = bench.observation(&id).unwrap();
    assert_eq!((seen.state, seen.generation), (Observed::Absent, 0));
    assert!(seen.trouble.unwrap().contains("spec.new"));
    bench.until(&second.instance_id, "running", |seen| seen.state == Observed::Running).await;
    std::fs::remove_dir(&obstacle).unwrap();
    bench.agent.as_ref().unwrap().apply(&bench.desired).unwrap();
    bench.until(&id, "running", |seen| seen.state == Observed::Running && seen.trouble.is_none()).await;
}

#[tokio::test]
async fn a_restarted_agent_adopts_its_monitors_and_they_do_not_notice() {
    let mut bench = Bench::new();
    let launch = ensure(1);
    let id = launch.instance_id.clone();
    bench.want(launch);
    let before = bench.until(&id, "running", |seen| seen.state == Observed::Running).await;
    for _ in 0..3 {
        bench.restart_agent().await;
        let after = bench.until(&id, "running", |seen| seen.state == Observed::Running).await;
        assert!(after.run_began_age_us > before.run_began_age_us, "the same run goes on");
    }
    let world = bench.shared.world();
    assert_eq!((world.machines[&id].runs, world.machines[&id].power_presses), (1, 0));
    drop(world);
    assert_eq!(bench.observation(&id).unwrap().state, Observed::Running);
}

#[tokio::test]
async fn one_record_that_cannot_be_read_is_quarantined_and_its_guest_runs_on_as_do_all_others() {
    for (file, content) in [
        ("spec.json", "{"),
        ("spec.json", ""),
        ("run.json", "[]"),
        ("spec.json", "{\"v\": 99}"),
        ("run.json", "{\"v\": 2, \"incarnation\": \"one\"}"),
    ] {
        let mut bench = Bench::new();
        let (bad, good) = (ensure(1), ensure_of(9, 1));
        let id = bad.instance_id.clone();
        for one in [&bad, &good] {
            bench.want(one.clone());
            bench.until(&one.instance_id, "running", |seen| seen.state == Observed::Running).await;
        }
        bench.crash_agent().await;
        std::fs::write(bench.folders.file(&id, file), content).unwrap();
        bench.shared.world().slots = [0, 1].into();
        // One more start, with the record in quarantine already, changes nothing.
        for _ in 0..2 {
            bench.start_agent();
            let seen = bench.until(&id, "trouble", |seen| seen.trouble.is_some()).await;
            assert_eq!((seen.state, seen.generation, seen.incarnation), (Observed::Preparing, 0, 1));
            assert!(seen.trouble.unwrap().contains(file));
            let trouble = bench.agent.as_ref().unwrap().report().trouble;
            let folder = bench.folders.quarantine().display().to_string();
            let told = trouble.len() == 1 && trouble[0].contains(id.as_str()) && trouble[0].contains(&folder);
            assert!(told, "{trouble:?}");
            bench
                .until(&good.instance_id, "running", |seen| {
                    seen.state == Observed::Running && seen.run_began_age_us.is_some()
                })
                .await;
            assert!(bench.shared.world().machines[&id].monitor_alive, "it was killed as a stray");
            bench.crash_agent().await;
        }
        // A new instance does not get the user id of the quarantined guest.
        bench.start_agent();
        let new = ensure_of(8, 1);
        bench.want(new.clone());
        assert_eq!(bench.agent.as_ref().unwrap().accepted(&new.instance_id).unwrap().slot, 2);
        // A repaired folder is moved back, and the guest has not noticed.
        bench.crash_agent().await;
        let kept = bench.folders.quarantine().join(id.as_str());
        if file == "run.json" {
            continue;
        }
        let spec = record::spec_hash(&bad.spec);
        let whole = serde_json::json!({ "ensure": bad, "spec_hash": spec, "slot": 0 });
        std::fs::write(kept.join(file), whole.to_string()).unwrap();
        std::fs::rename(&kept, bench.folders.instance(&id)).unwrap();
        bench.start_agent();
        bench.until(&id, "running", |seen| seen.state == Observed::Running && seen.generation == 1).await;
        assert_eq!(bench.shared.world().machines[&id].runs, 1);
        assert!(bench.agent.as_ref().unwrap().report().trouble.is_empty());
    }
}

#[tokio::test]
async fn an_instance_that_comes_back_from_quarantine_shares_its_user_id_with_no_other() {
    let mut bench = Bench::new();
    bench.crash_agent().await;
    let records = Records::new(bench.folders.clone());
    let both = [ensure_of(5, 1), ensure_of(6, 1)];
    for ensure in &both {
        let spec_hash = record::spec_hash(&ensure.spec);
        records.save_spec(&Accepted { ensure: ensure.clone(), spec_hash, slot: 0 }).unwrap();
    }
    let slots = |bench: &Bench| {
        both.each_ref().map(|one| bench.agent.as_ref().unwrap().accepted(&one.instance_id).unwrap().slot)
    };
    bench.start_agent();
    assert_eq!(slots(&bench), [0, 1]);
    bench.restart_agent().await;
    assert_eq!(slots(&bench), [0, 1], "that is written down");
}

/// `tests/data/records-v1` holds the records of version 1, one folder per instance. Each later
/// version gets a folder of its own.
#[test]
fn records_of_every_older_version_are_read() {
    let data = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/records-v1");
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().to_owned();
    for instance in std::fs::read_dir(data).unwrap().flatten() {
        let to = state.join("instances").join(instance.file_name());
        std::fs::create_dir_all(&to).unwrap();
        for file in std::fs::read_dir(instance.path()).unwrap().flatten() {
            std::fs::copy(file.path(), to.join(file.file_name())).unwrap();
        }
    }
    let records = Records::new(Folders { state, run: "/nowhere".into(), netns: "/nowhere".into() });
    let loaded = records.load_all().unwrap();
    assert!(loaded.quarantined.is_empty(), "{:?}", loaded.quarantined);
    let seen: Vec<_> = loaded
        .instances
        .iter()
        .map(|(accepted, run)| {
            assert_eq!(
                record::verdict(Some(accepted), &accepted.ensure),
                Verdict::Same,
                "what was accepted would be refused"
            );
            (accepted.slot, run.incarnation, run.volume_made, run.restart_ns)
        })
        .collect();
    let (running, rebooting, stopped, taken_in) = (
        (0, 1, true, None),
        (1, 1, true, Some(1_000_009_000)),
        (2, 3, true, None),
        // The volume may still be made.
        (3, 0, false, None),
    );
    assert_eq!(seen, [running, rebooting, stopped, taken_in]);
    // Records that were read and written have the current version.
    for (accepted, run) in &loaded.instances {
        records.save_spec(accepted).unwrap();
        records.save_run(accepted.id(), run).unwrap();
    }
    assert_eq!(records.load_all().unwrap().instances, loaded.instances);
}

#[tokio::test]
async fn a_restarted_agent_goes_on_without_its_controller() {
    let mut bench = Bench::new();
    let launch = ensure(1);
    let id = launch.instance_id.clone();
    bench.want(launch);
    bench.until(&id, "running", |seen| seen.state == Observed::Running).await;
    bench.crash_agent().await;
    bench.desired.instances.clear();
    bench.start_agent();
    bench
        .until(&id, "running", |seen| seen.state == Observed::Running && seen.run_began_age_us.is_some())
        .await;
}

#[tokio::test]
async fn older_generations_and_changed_specs_are_refused_and_change_nothing() {
    let mut bench = Bench::new();
    let launch = ensure(5);
    let id = launch.instance_id.clone();
    bench.want(launch.clone());
    bench.until(&id, "running", |seen| seen.state == Observed::Running).await;

    let mut old = launch.clone();
    old.generation = 4;
    old.spec.desired = DesiredState::Terminated;
    bench.want(old);
    let seen = bench.until(&id, "a refusal", |seen| seen.refused.is_some()).await;
    assert_eq!((seen.state, seen.generation), (Observed::Running, 5));

    let mut other = launch.clone();
    other.spec.desired = DesiredState::Stopped;
    bench.want(other);
    let seen = bench
        .until(&id, "a refusal", |s| s.refused.as_ref().is_some_and(|r| r.contains("another spec")))
        .await;
    assert_eq!(seen.state, Observed::Running);

    // The refusals live through a restart of the agent, because what was accepted does.
    bench.restart_agent().await;
    bench.until(&id, "a refusal", |s| s.refused.as_ref().is_some_and(|r| r.contains("another spec"))).await;
    bench.want(launch);
    let seen = bench.until(&id, "no refusal", |seen| seen.refused.is_none()).await;
    assert_eq!(seen.state, Observed::Running);
}

#[tokio::test]
async fn how_a_guest_ended_is_told() {
    for (word, code, ended_seen) in [
        (Some(ExitReason::PowerOff), "Client.InstanceInitiatedShutdown", true),
        (Some(ExitReason::Crash), "Client.GuestCrash", true),
        (Some(ExitReason::Error), "Server.InternalError", true),
        (Some(ExitReason::Seccomp), "Server.MonitorViolation", true),
        (None, "Server.MonitorKilled", true),
    ] {
        let mut bench = Bench::new();
        let launch = ensure(1);
        let id = launch.instance_id.clone();
        bench.want(launch.clone());
        bench.until(&id, "running", |seen| seen.state == Observed::Running).await;
        bench.shared.end(&id, word);
        let seen = bench.until(&id, "stopped", |seen| seen.state == Observed::Stopped).await;
        assert_eq!(seen.reason.unwrap().code, code);
        assert_eq!(seen.run_ended_age_us.is_some(), ended_seen);
        assert!(!bench.shared.world().machines[&id].cgroup);
        // It stays so until a new incarnation is asked for.
        bench.restart_agent().await;
        let seen = bench.until(&id, "stopped", |seen| seen.state == Observed::Stopped).await;
        assert_eq!(seen.reason.unwrap().code, code);
        bench.want(next(&launch, |e| e.spec.incarnation = 2));
        bench.until(&id, "running", |seen| seen.state == Observed::Running && seen.incarnation == 2).await;
    }
}

/// One such guest has a root that is no file system: its kernel panics and restarts every second.
#[tokio::test]
async fn a_guest_that_restarts_itself_over_and_over_and_was_never_ready_is_stopped_with_the_reason() {
    const SECOND: u64 = 1_000_000_000;
    for (resets, ready, stops) in [(5, false, true), (4, false, false), (9, true, false)] {
        let mut bench = Bench::new();
        let launch = ensure(1);
        let id = launch.instance_id.clone();
        bench.want(launch);
        bench.until(&id, "running", |seen| seen.state == Observed::Running).await;
        if ready {
            bench.shared.poke(&id, |machine| machine.console.extend(b"roost-guest: ready\n"));
            bench.until(&id, "ready", |seen| seen.guest_ready).await;
        }
        bench.shared.poke(&id, |machine| machine.resets_ns = (1..=resets).map(|n| n * 2 * SECOND).collect());
        if stops {
            let seen = bench.until(&id, "stopped", |seen| seen.state == Observed::Stopped).await;
            let reason = seen.reason.unwrap();
            assert_eq!(reason.code, "Client.GuestCannotBoot");
            assert!(reason.message.contains("5 times within 8 s") && reason.message.contains("console"));
            assert!(seen.run_ended_age_us.is_some() && !bench.shared.world().machines[&id].monitor_alive);
        } else {
            let looks = bench.shared.world().looks;
            let shared = bench.shared.clone();
            bench.until(&id, "two more looks", |_| shared.world().looks > looks + 2).await;
            assert_eq!(bench.observation(&id).unwrap().state, Observed::Running);
        }
    }
}

#[tokio::test]
async fn five_resets_over_a_day_are_an_owners_own() {
    const HOUR: u64 = 3_600_000_000_000;
    let mut bench = Bench::new();
    let launch = ensure(1);
    let id = launch.instance_id.clone();
    bench.want(launch);
    bench.until(&id, "running", |seen| seen.state == Observed::Running).await;
    bench.shared.poke(&id, |machine| machine.resets_ns = (1..=9).map(|n| n * HOUR).collect());
    let looks = bench.shared.world().looks;
    let shared = bench.shared.clone();
    bench.until(&id, "two more looks", |_| shared.world().looks > looks + 2).await;
    assert_eq!(bench.observation(&id).unwrap().state, Observed::Running);
}

/// The controller reads an end without a reason as the guest's own.
#[tokio::test]
async fn a_killed_monitor_is_told_as_killed_from_the_first_moment_on() {
    let mut bench = Bench::new();
    let launch = ensure(1);
    let id = launch.instance_id.clone();
    bench.want(launch);
    bench.until(&id, "running", |seen| seen.state == Observed::Running).await;
    // Taking the objects down takes time.
    bench.shared.world().fails = Some(("tear down", false));
    let killed = |seen: &Observation| {
        let reason = seen.reason.as_ref().map(|reason| reason.code.as_str());
        if seen.run_ended_age_us.is_some() {
            assert_eq!((seen.state, reason), (Observed::Stopping, Some("Server.MonitorKilled")), "{seen:?}");
        }
        seen.trouble.is_some()
    };
    bench.shared.end(&id, None);
    bench.until(&id, "being taken down", killed).await;
    bench.restart_agent().await;
    killed(&bench.observation(&id).unwrap());
    bench.until(&id, "being taken down", killed).await;
    bench.shared.world().fails = None;
    let seen = bench.until(&id, "stopped", |seen| seen.state == Observed::Stopped).await;
    assert_eq!(seen.reason.unwrap().code, "Server.MonitorKilled");
}

#[tokio::test]
async fn a_monitor_killed_while_no_agent_lived_has_no_known_end_but_a_last_sign() {
    let mut bench = Bench::new();
    let launch = ensure(1);
    let id = launch.instance_id.clone();
    bench.want(launch);
    bench.until(&id, "running", |seen| seen.state == Observed::Running).await;
    bench.crash_agent().await;
    bench.shared.end(&id, None);
    bench.start_agent();
    let seen = bench.until(&id, "stopped", |seen| seen.state == Observed::Stopped).await;
    assert_eq!(seen.run_ended_age_us, None);
    assert!(seen.last_seen_age_us.is_some() && seen.run_began_age_us >= seen.last_seen_age_us);
    assert_eq!(seen.reason.unwrap().code, "Server.MonitorKilled");
}

/// Before the agent has looked at it once: it started it, so it knows when it ended.
#[tokio::test]
async fn a_monitor_killed_as_soon_as_a_reboot_has_started_it_has_a_known_end() {
    let mut bench = Bench::new();
    let launch = ensure(1);
    let id = launch.instance_id.clone();
    bench.want(launch.clone());
    bench.until(&id, "running", |seen| seen.state == Observed::Running).await;
    bench.shared.poke(&id, |machine| machine.is_killed_at_start = true);
    bench.want(next(&launch, |e| e.spec.reboots = 1));
    let seen = bench.until(&id, "stopped", |seen| seen.state == Observed::Stopped).await;
    assert!(seen.run_ended_age_us.is_some(), "{seen:?}");
    assert_eq!(seen.reason.unwrap().code, "Server.MonitorKilled");
}

#[tokio::test]
async fn a_monitor_that_ended_while_no_agent_lived_is_dated_by_its_own_word() {
    let mut bench = Bench::new();
    let launch = ensure(1);
    let id = launch.instance_id.clone();
    bench.want(launch);
    bench.until(&id, "running", |seen| seen.state == Observed::Running).await;
    bench.crash_agent().await;
    bench.shared.end(&id, Some(ExitReason::PowerOff));
    bench.start_agent();
    let seen = bench.until(&id, "stopped", |seen| seen.state == Observed::Stopped).await;
    assert!(seen.run_ended_age_us.is_some());
}

#[tokio::test]
async fn after_a_reboot_of_the_host_a_run_is_over_and_no_age_crosses_boots() {
    let mut bench = Bench::new();
    let launch = ensure(1);
    let id = launch.instance_id.clone();
    bench.want(launch.clone());
    bench.until(&id, "running", |seen| seen.state == Observed::Running).await;
    bench.crash_agent().await;
    {
        let mut world = bench.shared.world();
        world.boot += 1;
        let machine = world.machines.get_mut(&id).unwrap();
        machine.monitor_alive = false;
        machine.cgroup = false;
        machine.network = None;
    }
    bench.start_agent();
    let seen = bench.until(&id, "stopped", |seen| seen.state == Observed::Stopped).await;
    assert_eq!(seen.reason.as_ref().unwrap().code, "Server.HostReboot");
    assert_eq!((seen.run_began_age_us, seen.run_ended_age_us, seen.last_seen_age_us), (None, None, None));
    bench.want(next(&launch, |e| e.spec.incarnation = 2));
    let seen = bench.until(&id, "running", |seen| seen.state == Observed::Running).await;
    assert!(seen.run_began_age_us.is_some());
}

#[tokio::test]
async fn a_guest_that_ignores_its_power_button_is_killed_after_the_grace() {
    let mut bench = Bench::new();
    let launch = ensure(1);
    let id = launch.instance_id.clone();
    bench.want(launch.clone());
    bench.until(&id, "running", |seen| seen.state == Observed::Running).await;
    bench.shared.poke(&id, |machine| machine.deaf_to = u32::MAX);
    bench.want(next(&launch, |e| e.spec.desired = DesiredState::Stopped));
    let seen = bench.until(&id, "stopped", |seen| seen.state == Observed::Stopped).await;
    assert!(seen.run_ended_age_us.is_some());
    let presses = bench.shared.world().machines[&id].power_presses;
    // 400 ms of grace, pressed every 40 ms if nothing is late.
    assert!((1..=10).contains(&presses), "pressed now and then, not all the time: {presses}");
    assert!(bench.shared.world().log.iter().any(|line| line.ends_with(" kill")));
}

#[tokio::test]
async fn a_power_button_that_was_pressed_too_early_is_pressed_again() {
    let mut bench = Bench::new();
    let launch = ensure(1);
    let id = launch.instance_id.clone();
    bench.want(launch.clone());
    bench.until(&id, "running", |seen| seen.state == Observed::Running).await;
    bench.shared.poke(&id, |machine| machine.deaf_to = 1);
    bench.want(next(&launch, |e| e.spec.desired = DesiredState::Stopped));
    bench.until(&id, "stopped", |seen| seen.state == Observed::Stopped).await;
    let world = bench.shared.world();
    assert_eq!(world.machines[&id].power_presses, 2);
    assert!(!world.log.iter().any(|line| line.ends_with(" kill")), "it powered itself off: {:?}", world.log);
}

#[tokio::test]
async fn a_monitor_that_never_answers_is_killed_when_the_grace_is_over() {
    let mut bench = Bench::new();
    let launch = ensure(1);
    let id = launch.instance_id.clone();
    bench.want(launch.clone());
    bench.until(&id, "running", |seen| seen.state == Observed::Running).await;
    bench.shared.poke(&id, |machine| machine.is_mute = true);
    bench.want(next(&launch, |e| e.spec.desired = DesiredState::Stopped));
    bench.until(&id, "stopped", |seen| seen.state == Observed::Stopped).await;
    assert!(bench.shared.world().log.iter().any(|line| line.ends_with(" kill")));
}

/// Neither the press of the power button nor a start delays it.
#[tokio::test]
async fn a_terminate_overtakes_a_monitor_that_never_answers() {
    for hangs_at_start in [false, true] {
        let mut bench = Bench::with_pace(Pace {
            stop_grace: Duration::from_secs(3600),
            answer: Duration::from_secs(3600),
            ..Bench::pace()
        });
        let launch = ensure(1);
        let id = launch.instance_id.clone();
        bench.shared.poke(&id, |machine| machine.is_mute = hangs_at_start);
        bench.want(launch.clone());
        let shared = bench.shared.clone();
        let stop = if hangs_at_start {
            bench.until(&id, "started", |_| shared.world().machines[&id].monitor_alive).await;
            launch
        } else {
            bench.until(&id, "running", |seen| seen.state == Observed::Running).await;
            bench.shared.poke(&id, |machine| machine.is_mute = true);
            let stop = next(&launch, |e| e.spec.desired = DesiredState::Stopped);
            bench.want(stop.clone());
            bench.until(&id, "stopping", |seen| seen.state == Observed::Stopping).await;
            stop
        };
        bench.want(next(&stop, |e| e.spec.desired = DesiredState::Terminated));
        bench.until(&id, "absent", |seen| seen.state == Observed::Absent).await;
    }
}

/// A monitor writes its own status file, and may be compromised.
#[tokio::test]
async fn a_monitors_own_date_of_its_end_counts_only_where_it_can_be_true() {
    for forged in [0, 1, u64::MAX] {
        for agent_is_away in [false, true] {
            let mut bench = Bench::new();
            let launch = ensure(1);
            let id = launch.instance_id.clone();
            bench.want(launch);
            bench.until(&id, "running", |seen| seen.state == Observed::Running).await;
            let (seen_alive, looks) = (bench.shared.now(), bench.shared.world().looks);
            let shared = bench.shared.clone();
            // The call that was in progress, and one from now.
            bench.until(&id, "looked at", |_| shared.world().looks >= looks + 2).await;
            if agent_is_away {
                bench.crash_agent().await;
            }
            bench.shared.end_at(&id, Some(ExitReason::PowerOff), forged);
            if agent_is_away {
                bench.start_agent();
            }
            bench.until(&id, "stopped", |seen| seen.state == Observed::Stopped).await;
            let text = std::fs::read(bench.folders.file(&id, "run.json")).unwrap();
            let run: Run = serde_json::from_slice(&text).unwrap();
            let ended = run.ended.unwrap().at_ns.unwrap();
            // An agent that was away knows only its last durable proof.
            let least = if agent_is_away { run.last_seen_ns.unwrap() } else { seen_alive };
            assert!((least..=bench.shared.now()).contains(&ended), "{forged}: {ended}, seen at {least}");
        }
    }
}

#[tokio::test]
async fn a_forced_stop_asks_nobody() {
    let mut bench = Bench::new();
    let launch = ensure(1);
    let id = launch.instance_id.clone();
    bench.want(launch.clone());
    bench.until(&id, "running", |seen| seen.state == Observed::Running).await;
    bench.want(next(&launch, |e| {
        e.spec.desired = DesiredState::Stopped;
        e.spec.force = true;
    }));
    bench.until(&id, "stopped", |seen| seen.state == Observed::Stopped).await;
    assert_eq!(bench.shared.world().machines[&id].power_presses, 0);
}

#[tokio::test]
async fn a_step_that_fails_is_shown_and_tried_again() {
    let mut bench = Bench::new();
    bench.shared.world().fails = Some(("network", false));
    let launch = ensure(1);
    let id = launch.instance_id.clone();
    bench.want(launch);
    let seen = bench.until(&id, "trouble", |seen| seen.trouble.is_some()).await;
    assert_eq!((seen.state, seen.trouble.as_deref()), (Observed::Preparing, Some("network fails")));
    bench.shared.world().fails = None;
    let seen = bench.until(&id, "running", |seen| seen.state == Observed::Running).await;
    assert_eq!(seen.trouble, None);
}

#[tokio::test]
async fn what_can_never_work_fails_with_its_reason_and_leaves_only_the_disk() {
    let mut bench = Bench::new();
    bench.shared.world().fails = Some(("cgroup", true));
    let launch = ensure(1);
    let id = launch.instance_id.clone();
    bench.want(launch.clone());
    let seen = bench.until(&id, "failed", |seen| seen.state == Observed::Failed).await;
    assert_eq!(seen.reason.unwrap().message, "cgroup fails");
    {
        let world = bench.shared.world();
        assert!(world.machines[&id].network.is_none() && world.machines[&id].disk);
    }
    bench.want(next(&launch, |e| e.spec.desired = DesiredState::Terminated));
    bench.until(&id, "absent", |seen| seen.state == Observed::Absent).await;
    assert!(!bench.shared.world().machines[&id].disk);
}

#[tokio::test]
async fn a_volume_that_was_made_before_is_never_made_again() {
    let mut bench = Bench::new();
    let launch = ensure(1);
    let id = launch.instance_id.clone();
    bench.want(launch.clone());
    bench.until(&id, "running", |seen| seen.state == Observed::Running).await;
    let stop = next(&launch, |e| e.spec.desired = DesiredState::Stopped);
    bench.want(stop.clone());
    bench.until(&id, "stopped", |seen| seen.state == Observed::Stopped).await;
    bench.shared.poke(&id, |machine| machine.disk = false);
    bench.restart_agent().await;
    let start = next(&stop, |e| {
        e.spec.desired = DesiredState::Running;
        e.spec.incarnation = 2;
    });
    bench.want(start.clone());
    let seen = bench.until(&id, "failed", |seen| seen.state == Observed::Failed).await;
    let reason = seen.reason.unwrap();
    let expected = format!("volume {} is not on this host", launch.spec.root_volume.volume_id);
    assert!(reason.code == "Server.VolumeNotFound" && reason.message.starts_with(&expected), "{reason:?}");
    assert!(!bench.shared.world().machines[&id].disk);
    // The file is put back: the instance starts again.
    bench.shared.poke(&id, |machine| machine.disk = true);
    bench.want(next(&start, |e| e.spec.incarnation = 3));
    bench.until(&id, "running", |seen| seen.state == Observed::Running && seen.incarnation == 3).await;
}

#[tokio::test]
async fn a_volume_lost_between_the_two_monitors_of_a_reboot_ends_the_run() {
    let mut bench = Bench::new();
    let launch = ensure(1);
    let id = launch.instance_id.clone();
    bench.want(launch.clone());
    bench.until(&id, "running", |seen| seen.state == Observed::Running).await;
    bench.shared.world().fails = Some(("start", false));
    bench.want(next(&launch, |e| e.spec.reboots = 1));
    bench.until(&id, "trouble", |seen| seen.trouble.is_some()).await;
    bench.shared.poke(&id, |machine| machine.disk = false);
    let seen = bench.until(&id, "stopped", |seen| seen.state == Observed::Stopped).await;
    assert_eq!(seen.reason.unwrap().code, "Server.VolumeNotFound");
    assert!(!bench.shared.world().machines[&id].disk);
}

#[tokio::test]
async fn a_reboot_whose_monitor_cannot_be_started_again_ends_its_run_with_the_reason() {
    for for_good in [false, true] {
        for restarted in [false, true] {
            let mut bench = Bench::new();
            let launch = ensure(1);
            let id = launch.instance_id.clone();
            bench.want(launch.clone());
            bench.until(&id, "running", |seen| seen.state == Observed::Running).await;
            bench.shared.world().fails = Some(("start", for_good));
            bench.want(next(&launch, |e| e.spec.reboots = 1));
            if restarted {
                bench.until(&id, "the end of the first monitor", |seen| seen.generation == 2).await;
                bench.restart_agent().await;
            }
            let seen = bench.until(&id, "stopped", |seen| seen.state == Observed::Stopped).await;
            let reason = seen.reason.unwrap();
            let told = reason.message.contains("could not be started again")
                && reason.message.contains("start fails");
            assert!(reason.code == "Server.InternalError" && told, "{reason:?}");
            assert!(seen.run_ended_age_us.is_some(), "its end is known: when the first monitor went down");
            assert!(!bench.shared.world().machines[&id].cgroup, "nothing of the run is left");
        }
    }
}

#[tokio::test]
async fn a_reboot_that_takes_two_tries_is_one_run() {
    let mut bench = Bench::new();
    let launch = ensure(1);
    let id = launch.instance_id.clone();
    bench.want(launch.clone());
    let before = bench.until(&id, "running", |seen| seen.state == Observed::Running).await;
    bench.shared.world().fails = Some(("start", false));
    bench.want(next(&launch, |e| e.spec.reboots = 1));
    let between = bench.until(&id, "trouble", |seen| seen.trouble.is_some()).await;
    assert_eq!(between.state, Observed::Running);
    bench.shared.world().fails = None;
    let shared = bench.shared.clone();
    let after = bench
        .until(&id, "running", |seen| {
            seen.state == Observed::Running && shared.world().machines[&seen.instance_id].runs == 2
        })
        .await;
    assert!(after.run_began_age_us > before.run_began_age_us);
}

/// The host has no trace of the volume, but the controller has seen the guest run.
#[tokio::test]
async fn a_volume_that_the_controller_knows_is_not_made_on_a_host_with_an_empty_state_folder() {
    let mut bench = Bench::new();
    let mut start = ensure(7);
    start.volume_made = true;
    let id = start.instance_id.clone();
    bench.want(start);
    let seen = bench.until(&id, "failed", |seen| seen.state == Observed::Failed).await;
    assert_eq!(seen.reason.unwrap().code, "Server.VolumeNotFound");
    assert!(!bench.shared.world().machines.get(&id).is_some_and(|machine| machine.disk));
}

#[tokio::test]
async fn a_monitor_that_cannot_start_fails_the_launch_with_its_last_word() {
    let mut bench = Bench::new();
    let launch = ensure(1);
    let id = launch.instance_id.clone();
    bench.shared.poke(&id, |machine| machine.breaks_at_start = true);
    bench.want(launch);
    let seen = bench.until(&id, "failed", |seen| seen.state == Observed::Failed).await;
    let message = seen.reason.unwrap().message;
    assert!(message.contains("3 times") && message.contains("kernel image: broken"), "{message}");
    assert_eq!(seen.run_began_age_us, None, "it never ran, so there is nothing to bill");
}

#[tokio::test]
async fn a_console_tells_readiness_and_the_host_key_and_both_are_remembered() {
    let mut bench = Bench::new();
    let launch = ensure(1);
    let id = launch.instance_id.clone();
    bench.want(launch);
    bench.until(&id, "running", |seen| seen.state == Observed::Running && !seen.guest_ready).await;
    let blob = "AAAAC3NzaC1lZDI1NTE5AAAAIAcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcH";
    bench.shared.poke(&id, |machine| {
        let text = format!(
            "-----BEGIN SSH HOST KEY KEYS-----\nssh-ed25519 {blob} root@x\n-----END SSH HOST KEY KEYS-----\n\
             roost-guest: ready\n"
        );
        machine.console.extend(text.bytes());
    });
    bench.until(&id, "ready", |seen| seen.guest_ready && seen.ssh_host_key.is_some()).await;
    bench.shared.poke(&id, |machine| machine.console.iter_mut().for_each(|byte| *byte = b'x'));
    bench.restart_agent().await;
    let seen = bench.until(&id, "ready", |seen| seen.guest_ready).await;
    assert_eq!(seen.ssh_host_key.unwrap(), format!("ssh-ed25519 {blob}"));
}

#[tokio::test]
async fn a_guest_that_prints_another_host_key_all_the_time_is_heard_now_and_then() {
    let mut bench = Bench::new();
    let launch = ensure(1);
    let id = launch.instance_id.clone();
    bench.want(launch);
    bench.until(&id, "running", |seen| seen.state == Observed::Running).await;
    let printer = bench.shared.clone();
    let print = |number: u8| {
        let mut blob = b"\x00\x00\x00\x0bssh-ed25519\x00\x00\x00\x20".to_vec();
        blob.extend([number; 32]);
        let line = format!("ssh-ed25519 {}", STANDARD.encode(blob));
        printer.poke(&id, |machine| {
            let text =
                format!("-----BEGIN SSH HOST KEY KEYS-----\n{line}\n-----END SSH HOST KEY KEYS-----\n");
            machine.console.extend(text.bytes());
        });
        line
    };
    let first = print(0);
    bench.until(&id, "the first key", |seen| seen.ssh_host_key.as_ref() == Some(&first)).await;
    let begin = Instant::now();
    let mut keys = BTreeSet::new();
    let mut last = String::new();
    for number in 1..=60 {
        last = print(number);
        let looks = bench.shared.world().looks;
        let shared = bench.shared.clone();
        let seen = bench.until(&id, "a look", |_| shared.world().looks > looks + 1).await;
        keys.extend(seen.ssh_host_key);
    }
    let periods = begin.elapsed().as_millis() / Bench::pace().host_key.as_millis();
    assert!(keys.len() as u128 <= periods + 2, "{} keys in {periods} periods", keys.len());
    // The newest key is not lost.
    bench.until(&id, "the last key", |seen| seen.ssh_host_key.as_ref() == Some(&last)).await;
}

#[tokio::test]
async fn a_second_agent_on_the_same_state_folder_is_refused_clearly() {
    let bench = Bench::new();
    let error = StateLock::take(&bench.folders).unwrap_err().to_string();
    assert!(error.contains("another roost-agent already works on"), "{error}");
    assert!(error.contains("--state-dir"), "{error}");
}

#[tokio::test]
async fn a_volume_that_is_to_stay_stays_and_its_guest_is_asked_to_end() {
    let mut bench = Bench::new();
    let mut launch = ensure(1);
    launch.spec.root_volume.delete_on_termination = false;
    let id = launch.instance_id.clone();
    bench.want(launch.clone());
    bench.until(&id, "running", |seen| seen.state == Observed::Running).await;
    bench.want(next(&launch, |e| e.spec.desired = DesiredState::Terminated));
    bench.until(&id, "absent", |seen| seen.state == Observed::Absent).await;
    let world = bench.shared.world();
    assert!(world.machines[&id].disk && world.machines[&id].power_presses == 1);
}

#[tokio::test]
async fn an_instance_that_never_was_is_absent_when_asked_to_be() {
    let mut bench = Bench::new();
    let mut gone = ensure(9);
    gone.spec.desired = DesiredState::Terminated;
    let id = gone.instance_id.clone();
    bench.want(gone);
    bench.until(&id, "absent", |seen| seen.state == Observed::Absent && seen.generation == 9).await;
    bench.desired.instances.clear();
    bench.agent.as_ref().unwrap().apply(&bench.desired).unwrap();
    assert_eq!(bench.observation(&id), None, "forgotten once the controller has");
}

#[tokio::test]
async fn instances_have_slots_of_their_own_and_new_rules_reach_a_running_one() {
    let mut bench = Bench::new();
    let (a, b) = (ensure_of(5, 1), ensure_of(6, 1));
    bench.want(a.clone());
    bench.want(b.clone());
    for id in [&a.instance_id, &b.instance_id] {
        bench.until(id, "running", |seen| seen.state == Observed::Running).await;
    }
    let agent = bench.agent.clone().unwrap();
    let slot = |id| agent.accepted(id).unwrap().slot;
    assert_ne!(slot(&a.instance_id), slot(&b.instance_id));
    drop(agent);
    let before = bench.shared.world().machines[&a.instance_id].network.clone();
    bench.want(next(&a, |e| e.spec.interface.ingress.clear()));
    let shared = bench.shared.clone();
    bench
        .until(&a.instance_id, "new rules", |seen| {
            seen.generation == 2 && shared.world().machines[&seen.instance_id].network != before
        })
        .await;
    assert_eq!(bench.shared.world().machines[&a.instance_id].runs, 1);
}
