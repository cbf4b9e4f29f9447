//! The life of an instance.

use crate::agent::Agent;
use crate::stack::Stack;
use serde_json::Value;

fn prepared() -> (Stack, Agent) {
    let stack = Stack::start();
    let folder = stack.image_folder("tiny", 1);
    stack.roost(&["image", "import", &folder]).ok();
    let agent = Agent::start(&stack);
    (stack, agent)
}

fn one(answer: &Value) -> &Value {
    let instances = answer["instances"].as_array().unwrap();
    assert_eq!(instances.len(), 1, "{answer}");
    &instances[0]
}

#[test]
fn an_instance_is_launched_stopped_resized_started_rebooted_and_terminated() {
    let (stack, _agent) = prepared();
    let id = stack
        .roost(&[
            "launch",
            "--type",
            "t3.micro",
            "--image",
            "tiny",
            "--name",
            "web",
            "--wait",
            "--wait-for",
            "ready",
        ])
        .ok();
    let id = id.trim();
    assert!(id.starts_with("i-") && id.len() == 19, "{id}");
    let listed = stack.roost(&["ls"]).ok();
    assert!(listed.contains(id) && listed.contains("running") && listed.contains("web"), "{listed}");

    let unchanged = stack.roost(&["start", "web"]).ok();
    assert_eq!(
        unchanged.lines().nth(1).unwrap().split_whitespace().collect::<Vec<_>>(),
        [id, "running", "running"]
    );
    let unchanged = stack.json(&["start", "web", "--wait"]);
    assert_eq!(unchanged["changes"][0]["current"], "running");
    assert_eq!(one(&stack.json(&["describe", "web"]))["incarnation"], 1);
    stack
        .roost(&["resize", "web", "--type", "t3.small"])
        .fails(6, &["IncorrectInstanceState", "--stop-start", "stopped"]);
    let stopped = stack.json(&["stop", "web", "--wait"]);
    assert_eq!(stopped["changes"][0]["current"], "stopped");
    stack.roost(&["resize", "web", "--type", "t3.small"]).ok();
    assert_eq!(one(&stack.json(&["describe", "web"]))["memory_mib"], 2048);
    stack.roost(&["start", "web", "--wait"]).ok();
    stack.roost(&["reboot", "web"]).ok();

    let resized = stack.json(&["resize", "web", "--type", "t3.micro", "--stop-start"]);
    let resized = one(&resized);
    assert_eq!((&resized["state"], &resized["instance_type"]), (&"running".into(), &"t3.micro".into()));
    assert_eq!(resized["incarnation"], 3);
    let timing = stack.json(&["describe", "web", "--timing"]);
    assert!(!timing["parts"].as_array().unwrap().is_empty(), "{timing}");

    let bill = stack.json(&["bill", "--by", "instance"]);
    let lines = bill["lines"].as_array().unwrap();
    let line = lines.iter().find(|line| line["group"] == id).unwrap();
    assert!(line["billed"].as_str().unwrap().parse::<u64>().unwrap() >= 60, "{line}");

    stack.roost(&["terminate", "web", "--wait"]).ok();
    stack.roost(&["describe", "web"]).fails(5, &["web"]);
    assert_eq!(one(&stack.json(&["describe", id]))["state"], "terminated");
    stack
        .roost(&["start", id])
        .fails(6, &["IncorrectInstanceState", id, "terminated", "stopped, pending and running"]);
    assert_eq!(stack.json(&["ls"])["instances"], serde_json::json!([]));
}

#[test]
fn one_client_token_is_one_launch_and_names_must_be_unique_to_name() {
    let (stack, _agent) = prepared();
    let launch = |token: &str, name: &str| {
        let args =
            ["launch", "-t", "t3.nano", "-i", "tiny", "--name", name, "--client-token", token, "--wait"];
        stack.roost(&args)
    };
    let first = launch("once", "a").ok();
    assert_eq!(launch("once", "a").ok(), first, "the same launch");
    launch("once", "b").fails(6, &["IdempotentParameterMismatch"]);
    launch("twice", "a").ok();
    stack.roost(&["stop", "a"]).fails(3, &["2 instances have the name", first.trim()]);
    let dry = stack.json(&["launch", "-t", "t3.nano", "-i", "tiny", "--dry-run"]);
    assert_eq!(dry["dry_run"], true);
    assert_eq!(stack.json(&["ls"])["instances"].as_array().unwrap().len(), 2);
}

#[test]
fn a_wait_that_takes_too_long_ends_and_the_launch_goes_on() {
    let (stack, agent) = prepared();
    drop(agent);
    let ran = stack.roost(&["launch", "-t", "t3.nano", "-i", "tiny", "--wait", "--timeout", "1s"]);
    assert_eq!(ran.code, 8, "{ran:?}");
    assert!(ran.stdout.starts_with("i-") && ran.stderr.contains("it goes on"), "{ran:?}");
    assert_eq!(one(&stack.json(&["ls"]))["state"], "pending");
}

#[test]
fn an_interrupted_wait_says_that_the_launch_goes_on_and_how_to_end_it() {
    use std::io::Read;
    use std::process::Stdio;
    let (stack, agent) = prepared();
    drop(agent);
    let mut child = stack
        .command(&["launch", "-t", "t3.nano", "-i", "tiny", "--wait"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Its id on the screen is the sign that it was accepted and the wait begins.
    let mut id = [0; 20];
    child.stdout.as_mut().unwrap().read_exact(&mut id).unwrap();
    let id = String::from_utf8_lossy(&id).trim().to_owned();
    let pid = nix::unistd::Pid::from_raw(child.id().try_into().unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    let ended = child.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(130));
    let said = String::from_utf8(ended.stderr).unwrap();
    assert!(said.contains("the launch goes on") && said.contains(&format!("roost terminate {id}")), "{said}");
}

#[test]
fn a_launch_says_when_one_can_log_in_and_when_nobody_can() {
    let (stack, _agent) = prepared();
    for (name, ssh) in [("with", true), ("without", false)] {
        let folder = stack.image_folder(name, 1);
        Stack::has_ssh(&folder, ssh);
        stack.roost(&["image", "import", &folder]).ok();
    }
    stack.roost(&["key", "create", "home"]).ok();
    let launch = |name: &str, more: &[&str]| {
        let ran = stack.roost(
            &[&["launch", "-t", "t3.nano", "--name", name, "--wait", "--timeout", "60s"], more].concat(),
        );
        ran.stderr.clone() + &ran.ok()
    };
    let keyless = launch("keyless", &["-i", "with"]);
    assert!(keyless.contains("without --key: nobody can log in"), "{keyless}");
    assert!(keyless.contains("answers ssh at"), "{keyless}");
    let keyed = launch("keyed", &["-i", "with", "--key", "home"]);
    assert!(!keyed.contains("without --key") && keyed.contains("answers ssh at"), "{keyed}");
    let runs = launch("runs", &["-i", "with", "--key", "home", "--wait-for", "running"]);
    assert!(runs.contains("runs at"), "{runs}");
    let without = launch("quiet", &["-i", "without"]);
    assert!(!without.contains("without --key") && without.contains("is ready at"), "{without}");
    stack.roost(&["ssh", "quiet"]).fails(6, &["\"without\"", "no ssh server", "roost console --attach"]);
    for name in ["i-web", "a\u{1b}[2J"] {
        stack
            .roost(&["launch", "-t", "t3.nano", "-i", "with", "--name", name])
            .fails(3, &["the name", "must"]);
    }
}
