//! What bad input gets: one clear message that names the value and what is allowed, EC2's code, the exit code of
//! its class, and nothing half made.
#![allow(clippy::unwrap_used, missing_docs)]

use roost_e2e::{Rig, TempFile};
use serde_json::Value;

#[test]
fn every_mistake_has_its_code_its_sentence_and_no_trace() {
    let rig = Rig::get();
    let tenant = rig.tenant("mistakes");
    let launch = |more: &[&str]| -> Vec<String> {
        let mut words = vec!["launch"];
        words.extend(more);
        words.into_iter().map(str::to_owned).collect()
    };
    let table: Vec<(Vec<String>, i32, &[&str])> = vec![
        (launch(&["--image", "tiny-fast", "--type", "t9.huge"]), 3, &["InvalidParameterValue", "t9.huge"]),
        (launch(&["--image", "no-such", "--type", "home1.nano"]), 5, &["InvalidAMIID.NotFound", "no-such"]),
        (
            launch(&["--image", "tiny-fast", "--type", "home1.nano", "--key", "nokey"]),
            5,
            &["InvalidKeyPair.NotFound", "nokey"],
        ),
        (launch(&["--image", "tiny-fast", "--type", "home1.nano", "--count", "0"]), 3, &["0", "1"]),
        (
            launch(&["--image", "tiny-fast", "--type", "home1.nano", "--count", "10000"]),
            3,
            &["10000", "1000"],
        ),
        (
            launch(&["--image", "tiny-fast", "--type", "home1.large", "--count", "900"]),
            7,
            &["InsufficientInstanceCapacity"],
        ),
        (launch(&["--image", "tiny-fast", "--type", "m5.24xlarge"]), 7, &["Unsupported", "m5.24xlarge"]),
        (
            vec!["describe".into(), "i-0123456789abcdef0".into()],
            5,
            &["InvalidInstanceID.NotFound", "i-0123456789abcdef0"],
        ),
        (vec!["stop".into(), "i-0123456789abcdef0".into()], 5, &["InvalidInstanceID.NotFound"]),
        (
            vec!["describe".into(), "i-xyz".into()],
            3,
            &["InvalidInstanceID.Malformed", "17 hexadecimal digits"],
        ),
    ];
    for (words, code, said) in table {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let ran = tenant.roost(&words);
        assert_eq!(ran.code, Some(code), "{ran:?}");
        for part in said {
            assert!(ran.stderr.contains(part), "{part:?} in: {ran:?}");
        }
        assert_eq!(ran.stdout, "", "{ran:?}");
    }
    let listed = tenant.roost(&["ls", "--all", "--output", "json"]).json();
    assert_eq!(listed["instances"], Value::Array(vec![]), "nothing half made");
}

#[test]
fn an_action_that_the_state_forbids_says_which_state_allows_it() {
    let rig = Rig::get();
    let tenant = rig.tenant("states");
    let id = tenant.launch("tiny-fast", "home1.nano", &["--wait"]);
    let refused = |words: &[&str], state: &str| {
        let ran = tenant.roost(words);
        assert_eq!(ran.code, Some(6), "{ran:?}");
        for part in ["IncorrectInstanceState", state, "stopped"] {
            assert!(ran.stderr.contains(part), "{part:?} in: {ran:?}");
        }
    };
    refused(&["resize", &id, "--type", "home1.micro"], "running");
    // As on EC2: what runs goes on.
    let ran = tenant.roost(&["start", &id, "--wait", "--output", "json"]).json();
    let change = &ran["changes"][0];
    assert_eq!((&change["previous"], &change["current"]), (&"running".into(), &"running".into()), "{ran}");
    assert_eq!(tenant.describe(&id)["incarnation"], 1);
    tenant.terminate_clean(&id);
    refused(&["start", &id], "terminated");
    tenant.roost(&["terminate", &id]).ok();
}

#[test]
fn another_tenants_instance_is_not_there() {
    let rig = Rig::get();
    let (owner, stranger) = (rig.tenant("owner"), rig.tenant("stranger"));
    let id = owner.launch("tiny-fast", "home1.pico", &[]);
    for words in
        [&["describe", id.as_str()] as &[&str], &["terminate", &id], &["console", &id], &["stop", &id]]
    {
        let ran = stranger.roost(words);
        assert_eq!(ran.code, Some(5), "{ran:?}");
    }
    assert!(stranger.roost(&["ls", "--output", "json"]).json()["instances"].as_array().unwrap().is_empty());
    owner.terminate_clean(&id);
}

#[test]
fn a_wrong_secret_and_a_closed_port_are_told_apart() {
    let rig = Rig::get();
    let config = std::fs::read_to_string(&rig.config).unwrap();
    let broken: String = config
        .lines()
        .map(|line| {
            if line.starts_with("secret_access_key") {
                "secret_access_key = \"0123456789012345678901234567890123456789\""
            } else {
                line
            }
        })
        .collect::<Vec<_>>()
        .join("\n");
    let file = TempFile::new("wrong-secret.toml", &broken);
    let with = |config: &str, more: &[&str]| {
        let mut command = std::process::Command::new(rig.bin.join("roost"));
        let output = command
            .env("ROOST_CONFIG", config)
            .args(["--profile", "default", "ls"])
            .args(more)
            .output()
            .unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, said) = with(file.path(), &[]);
    assert_eq!(code, Some(4), "{said}");
    assert!(said.contains("AuthFailure"), "{said}");
    let (code, said) = with(rig.config.to_str().unwrap(), &["--endpoint", "https://127.0.0.1:1"]);
    assert_eq!(code, Some(8), "{said}");
    assert!(said.contains("127.0.0.1:1"), "{said}");
}

#[test]
fn a_second_agent_on_the_same_state_is_refused() {
    let rig = Rig::get();
    let ran = rig.host(&format!(
        "{}/roost-agent serve --state-dir {s}/agent --identity {s}/identity --vmm {}/roost-vmm",
        rig.host_bin.display(),
        rig.host_bin.display(),
        s = rig.state.display()
    ));
    assert_ne!(ran.code, Some(0));
    assert!(ran.stderr.contains("in use") || ran.stderr.contains("already"), "{}", ran.stderr);
}

/// The root is a file system without an init: the kernel panics and restarts without end.
#[test]
fn a_guest_that_cannot_boot_stops_by_itself_with_the_reason() {
    let rig = Rig::get();
    let folder = std::env::temp_dir().join(format!("roost-e2e-no-init-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    for entry in std::fs::read_dir(&rig.images["tiny-fast"]).unwrap().flatten() {
        std::fs::copy(entry.path(), folder.join(entry.file_name())).unwrap();
    }
    let root = std::process::Command::new("mke2fs")
        .args(["-q", "-t", "ext4", "-F", folder.join("root.ext4").to_str().unwrap(), "4M"])
        .status();
    assert!(root.unwrap().success());
    let name = format!("no-init-{}", std::process::id());
    rig.admin(&["image", "import", folder.to_str().unwrap(), "--name", &name]).ok();
    let tenant = rig.tenant("no-init");
    let id = tenant.launch(&name, "home1.nano", &[]);
    let ended = tenant.wait_state(&id, "stopped", std::time::Duration::from_secs(180));
    let reason = &ended["state_reason"];
    assert_eq!(reason["code"], "Client.GuestCannotBoot", "{ended}");
    assert!(reason["message"].as_str().unwrap().contains("roost console"), "{ended}");
    assert!(tenant.roost(&["console", &id]).ok().contains("panic"), "the console says why");
    tenant.terminate_clean(&id);
    rig.admin(&["image", "rm", &name]).ok();
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn a_broken_image_makes_a_failed_launch_with_a_reason() {
    let rig = Rig::get();
    let folder = std::env::temp_dir().join(format!("roost-e2e-broken-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("kernel"), b"this is no kernel").unwrap();
    let mut root = vec![0_u8; 1 << 20];
    // The magic number of ext4, so that only the kernel is wrong.
    root[0x438..0x43a].copy_from_slice(b"\x53\xef");
    std::fs::write(folder.join("root.ext4"), root).unwrap();
    let name = format!("broken-{}", std::process::id());
    std::fs::write(
        folder.join("manifest.json"),
        format!(
            r#"{{"name":"{name}","kernel":"kernel","root":"root.ext4","boot_args":"","default_user":"root","min_volume_gib":1,"description":"no kernel"}}"#
        ),
    )
    .unwrap();
    // What is no kernel at all is refused before anything is uploaded; what only begins like one, when launched.
    let refused = rig.admin(&["image", "import", folder.to_str().unwrap()]);
    assert_eq!(refused.code, Some(3), "{refused:?}");
    assert!(refused.stderr.contains("no kernel"), "{}", refused.stderr);
    std::fs::write(folder.join("kernel"), [b"\x7fELF".as_slice(), &[0; 4096]].concat()).unwrap();
    rig.admin(&["image", "import", folder.to_str().unwrap()]).ok();
    let tenant = rig.tenant("broken");
    let id = tenant.launch(&name, "home1.nano", &[]);
    let ended = tenant.wait_state(&id, "terminated", std::time::Duration::from_secs(60));
    let reason = ended["state_reason"]["message"].as_str().unwrap_or_default();
    assert!(reason.contains("kernel"), "{ended}");
    assert_eq!(ended["billed_seconds"], 0, "what never ran costs nothing");
    assert_eq!(rig.leftovers(&id), Value::Array(vec![]));
    rig.admin(&["image", "rm", &name]).ok();
    std::fs::remove_dir_all(folder).unwrap();
}
