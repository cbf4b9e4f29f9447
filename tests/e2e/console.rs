//! The console as its owner uses it: followed, typed on, and both over a restart of the agent.
#![allow(clippy::unwrap_used, missing_docs)]

use roost_e2e::session::Session;
use roost_e2e::{Rig, wait_for};
use std::time::Duration;

const SOON: Duration = Duration::from_secs(90);

#[test]
fn a_guest_that_boots_while_the_agent_is_away_has_its_address_and_is_ready_once_the_agent_is_back() {
    let rig = Rig::get();
    let tenant = rig.tenant("away");
    let id = tenant.launch("tiny-fast", "home1.micro", &["--wait"]);
    tenant.wait_console(&id, "roost-guest: ready", SOON);
    let mut typed = Session::start(&tenant, &["console", &id, "--attach"]);
    typed.enter("(sleep 8; reboot) & echo leaves-$((6 * 7))");
    typed.wait_text("leaves-42", SOON);
    rig.host(&format!("systemctl stop {}-agent", rig.units)).ok();
    // The console states that nobody answers, and the guest keeps asking.
    let console = format!("{}/agent/instances/{id}/console", rig.state.display());
    let asks = format!(
        "for n in $(seq 90); do ! grep -aq 'no address for eth0' {console} || exit 0; sleep 1; done; exit 1"
    );
    let asked = rig.host(&asks);
    rig.host(&format!("systemctl start {}-agent", rig.units)).ok();
    asked.ok();
    let console = wait_for("the guest to be ready again", SOON, || {
        let console = tenant.roost(&["console", &id]).stdout;
        let times = console.matches("roost-guest: ready").count();
        if times == 2 { Ok(console) } else { Err(format!("{times} times")) }
    });
    let said = console.rfind("no address for eth0").unwrap();
    assert!(said < console.rfind("roost-guest: ready").unwrap(), "ready only with an address:\n{console}");
    drop(typed);
    tenant.terminate_clean(&id);
}

#[test]
fn a_console_is_followed_and_typed_on_while_the_agent_restarts() {
    let rig = Rig::get();
    let tenant = rig.tenant("console");
    let id = tenant.launch("tiny-fast", "home1.micro", &["--wait"]);
    tenant.wait_console(&id, "roost-guest: ready", SOON);
    let mut follows = Session::start(&tenant, &["console", &id, "--follow"]);
    let mut typed = Session::start(&tenant, &["console", &id, "--attach"]);

    // The guest answers; its echo of the command is not taken for the answer.
    typed.enter("echo first-$((6 * 7))-answer");
    for session in [&follows, &typed] {
        session.wait_text("first-42-answer", SOON);
    }

    // A clean restart: both sessions go on by themselves, and what is typed at once is not lost.
    rig.host(&format!("systemctl restart {}-agent", rig.units)).ok();
    typed.enter("echo second-$((6 * 8))-answer");
    for session in [&follows, &typed] {
        session.wait_text("second-48-answer", SOON);
    }
    // A killed agent: they go on, too. What was on its way through it is gone, so whoever sees no echo types again.
    rig.host(&format!("systemctl kill --signal=KILL {}-agent", rig.units)).ok();
    let third = (1..=6).map(|n| format!("third-{n}-54-answer")).enumerate().find(|(n, answer)| {
        typed.enter(&format!("echo third-{}-$((6 * 9))-answer", n + 1));
        typed.shows(answer, Duration::from_secs(15))
    });
    let (_, third) = third.expect("the console goes on after the agent was killed");
    for session in [&follows, &typed] {
        session.wait_text(&third, SOON);
        for answer in ["first-42-answer", "second-48-answer", third.as_str()] {
            let times = session.shown().matches(answer).count();
            assert_eq!(times, 1, "{answer} is shown once, not {times} times:\n{}", session.shown());
        }
    }

    // When the guest has ended, so does what shows it; the last words are there.
    typed.enter("poweroff");
    for session in [&mut follows, &mut typed] {
        assert!(session.wait_end(SOON).success());
        assert!(session.shown().contains("shutting down"), "{}", session.shown());
    }
    tenant.wait_state(&id, "stopped", SOON);
    // A stopped instance's console is shown to its end, followed or not.
    for more in [&["--follow"][..], &[]] {
        let ran = tenant.roost(&[&["console", id.as_str()], more].concat());
        assert!(ran.ok().contains(&third));
    }
    tenant.terminate_clean(&id);
}

#[test]
fn a_guest_that_is_stopped_while_it_boots_is_shut_down_and_not_cut_off() {
    let rig = Rig::get();
    let tenant = rig.tenant("early-stop");
    let id = tenant.launch("tiny-fast", "home1.micro", &[]);
    // Its kernel runs, but its power button's driver does not yet.
    wait_for("the state running", SOON, || {
        let seen = tenant.describe(&id);
        if seen["state"] == "running" { Ok(()) } else { Err(seen.to_string()) }
    });
    let console = tenant.roost(&["console", &id]).stdout;
    assert!(!console.contains("roost-guest: ready"), "too late to be early:\n{console}");
    let stopped = tenant.roost(&["stop", &id, "--wait"]);
    println!("stopped in {:.1} s", stopped.took.as_secs_f64());
    stopped.ok();
    // Cut off at the end of its time, it could not have said so.
    let console = tenant.roost(&["console", &id]).stdout;
    assert!(console.contains("power button, shutting down"), "{console}");
    tenant.terminate_clean(&id);
}
