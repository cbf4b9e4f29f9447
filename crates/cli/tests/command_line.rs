//! The program as a user meets it: help, exit codes, messages. No controller is needed for any of this.

#![allow(clippy::unwrap_used, reason = "a failing test is what an unwrap is for here")]

use std::path::Path;
use std::process::{Command, Output};

/// Runs `roost` with nothing in its environment but this configuration file.
fn roost(config: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_roost"))
        .args(args)
        .env_clear()
        .env("ROOST_CONFIG", config)
        .env("PATH", "/usr/bin:/bin")
        .output()
        .unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

const COMMANDS: &[&str] = &[
    "",
    "doctor",
    "configure",
    "configure ls",
    "configure rm",
    "account",
    "account create",
    "account ls",
    "key",
    "key create",
    "key import",
    "key ls",
    "key rm",
    "image",
    "image import",
    "image ls",
    "image rm",
    "launch",
    "ls",
    "describe",
    "console",
    "ssh",
    "tunnel",
    "stop",
    "start",
    "reboot",
    "terminate",
    "resize",
    "bill",
    "types",
    "hosts",
    "volumes",
    "whoami",
    "completion",
    "exit-codes",
    "version",
];

#[test]
fn help_of_every_command() {
    for command in COMMANDS {
        let mut words: Vec<&str> = command.split_whitespace().collect();
        words.push("--help");
        let output = roost(Path::new("/nonexistent"), &words);
        assert!(output.status.success(), "{command}");
        let name = if command.is_empty() { "help".to_owned() } else { format!("help {command}") };
        insta::assert_snapshot!(name.replace(' ', "_"), stdout(&output));
    }
}

#[test]
fn every_command_in_the_help_has_its_golden_help() {
    let help = stdout(&roost(Path::new("/nonexistent"), &["--help"]));
    let listed = help.split("Commands:\n").nth(1).unwrap().split("\n\n").next().unwrap();
    for line in listed.lines() {
        let name = line.split_whitespace().next().unwrap();
        assert!(name == "help" || COMMANDS.contains(&name), "{name} has no golden help");
    }
}

/// A profile whose controller does not listen.
fn profile_without_controller(folder: &Path) -> std::path::PathBuf {
    let signed = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    // A port that was free a moment ago: nobody listens on it.
    let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let admin = serde_json::json!({
        "endpoint": format!("https://{address}"), "ca_pem": signed.cert.pem(), "region": "home-1",
        "account_id": "123456789012", "access_key_id": "AKIAIOSFODNN7EXAMPLE", "secret_access_key": "hush-hush",
    });
    std::fs::write(folder.join("admin.json"), admin.to_string()).unwrap();
    let config = folder.join("config.toml");
    let made = roost(&config, &["configure", "--from", folder.join("admin.json").to_str().unwrap()]);
    assert!(made.status.success(), "{}", stderr(&made));
    config
}

#[test]
fn each_class_of_mistake_has_its_exit_code_and_names_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let config = profile_without_controller(folder.path());
    let cases: &[(&[&str], i32, &str)] = &[
        (&[], 2, "Usage"),
        (&["frobnicate"], 2, "frobnicate"),
        (&["launch"], 2, "--type"),
        (&["ls", "--output", "xml"], 2, "xml"),
        (&["tunnel", "i-0123456789abcdef0", "0"], 2, "0"),
        (&["bill", "--by", "moon"], 2, "moon"),
        (&["stop", "i-1", "--timeout", "soon"], 2, "soon"),
        (&["launch", "--type", "t", "--image", "i", "--count", "0"], 3, "from 1 to 1000"),
        (&["launch", "--type", "t", "--image", "i", "--count", "10000"], 3, "\"10000\""),
        (&["launch", "--type", "t", "--image", "i", "--tag", "x"], 3, "KEY=VALUE"),
        (&["launch", "--type", "t", "--image", "i", "--user-data", "/nonexistent/u"], 3, "/nonexistent/u"),
        (&["describe", "i-nope"], 3, "InvalidInstanceID.Malformed"),
        (&["image", "import", "/nonexistent/image"], 3, "/nonexistent/image"),
        (&["key", "import", "k", "/nonexistent/key.pub"], 3, "/nonexistent/key.pub"),
        (&["key", "create", "../../etc/passwd"], 3, "--out"),
        (&["bill", "--since", "yesterday"], 3, "yesterday"),
        (&["bill", "--since", "1h", "--until", "2h"], 3, "--until"),
        (&["ls", "--endpoint", "http://127.0.0.1:1"], 3, "TLS"),
        (&["ls", "--profile", "nobody"], 4, "nobody"),
        (&["configure", "rm", "nobody"], 5, "nobody"),
        (&["account", "create", "a", "--save-profile", "default"], 6, "default"),
        (&["ls"], 8, "https://127.0.0.1:"),
        (&["console", "i-0123456789abcdef0"], 8, "https://127.0.0.1:"),
        (&["tunnel", "i-0123456789abcdef0", "22"], 8, "https://127.0.0.1:"),
    ];
    for (args, code, said) in cases {
        let output = roost(&config, args);
        assert_eq!(output.status.code(), Some(*code), "{args:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(said), "{args:?} should say {said:?}: {}", stderr(&output));
        assert_eq!(stdout(&output), "", "{args:?}");
        assert!(!stderr(&output).contains("hush"), "{args:?} shows the secret");
    }
}

#[test]
fn an_error_in_json_has_ec2s_code_and_the_exit_code() {
    let folder = tempfile::tempdir().unwrap();
    let config = profile_without_controller(folder.path());
    let output = roost(&config, &["--output", "json", "describe", "i-nope"]);
    let body: serde_json::Value = serde_json::from_slice(&output.stderr).unwrap();
    assert_eq!(body["Error"]["Code"], "InvalidInstanceID.Malformed");
    assert_eq!(body["ExitCode"], 3);
}

#[test]
fn a_profile_is_kept_private_listed_without_its_secret_and_removed() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let config = profile_without_controller(folder.path());
    assert_eq!(std::fs::metadata(&config).unwrap().permissions().mode() & 0o777, 0o600);
    let listed = roost(&config, &["configure", "ls", "--output", "json"]);
    let body: serde_json::Value = serde_json::from_slice(&listed.stdout).unwrap();
    assert_eq!(body["profiles"][0]["name"], "default");
    assert_eq!(body["profiles"][0]["current"], true);
    assert!(!stdout(&listed).contains("hush"));
    assert!(roost(&config, &["configure", "rm", "default"]).status.success());
    assert!(stdout(&roost(&config, &["configure", "ls"])).contains("No profiles"));
}

#[test]
fn flags_make_a_profile_with_the_secret_from_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("config.toml");
    let signed = rcgen::generate_simple_self_signed(["roost.lan".to_owned()]).unwrap();
    let (ca, secret) = (folder.path().join("ca.pem"), folder.path().join("secret"));
    std::fs::write(&ca, signed.cert.pem()).unwrap();
    std::fs::write(&secret, "s3cret\n").unwrap();
    let path = |path: &Path| path.to_str().unwrap().to_owned();
    let (ca, secret) = (path(&ca), path(&secret));
    let all = [
        "configure",
        "--profile",
        "lan",
        "--endpoint",
        "https://roost.lan:7443",
        "--region",
        "home-1",
        "--ca-file",
        &ca,
        "--access-key-id",
        "AKIAIOSFODNN7EXAMPLE",
        "--secret-file",
        &secret,
    ];
    let made = roost(&config, &all);
    assert!(made.status.success(), "{}", stderr(&made));
    assert!(std::fs::read_to_string(&config).unwrap().contains("secret_access_key = \"s3cret\""));
    let partial =
        roost(&config, &["configure", "--profile", "other", "--endpoint", "https://roost.lan:7443"]);
    assert_eq!(partial.status.code(), Some(2));
    assert!(stderr(&partial).contains("--region"), "{}", stderr(&partial));
}

#[test]
fn a_broken_admin_file_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("admin.json");
    std::fs::write(&file, "{}").unwrap();
    let output = roost(&folder.path().join("config.toml"), &["configure", "--from", file.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(3));
    assert!(stderr(&output).contains("admin.json"), "{}", stderr(&output));
    assert!(!folder.path().join("config.toml").exists());
}

#[test]
fn completion_and_manual_pages_cover_every_command() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = stdout(&roost(Path::new("/nonexistent"), &["completion", shell]));
        assert!(script.contains("terminate") && script.contains("wait-for"), "{shell}");
    }
    let folder = tempfile::tempdir().unwrap();
    let written = roost(Path::new("/nonexistent"), &["man", folder.path().to_str().unwrap()]);
    assert!(written.status.success(), "{}", stderr(&written));
    for command in COMMANDS.iter().filter(|command| !command.is_empty() && **command != "exit-codes") {
        let page = folder.path().join(format!("roost-{}.1", command.replace(' ', "-")));
        assert!(page.is_file(), "{}", page.display());
    }
}

#[test]
fn the_exit_codes_are_one_table_in_help_program_and_documentation() {
    let table = stdout(&roost(Path::new("/nonexistent"), &["exit-codes"]));
    let help = stdout(&roost(Path::new("/nonexistent"), &["help", "exit-codes"]));
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/cli.md")).unwrap();
    let listed = stdout(&roost(Path::new("/nonexistent"), &["exit-codes", "--output", "json"]));
    let listed: serde_json::Value = serde_json::from_str(&listed).unwrap();
    for entry in listed["exit_codes"].as_array().unwrap() {
        let meaning = entry["meaning"].as_str().unwrap();
        assert!(table.contains(meaning) && help.contains(meaning), "{meaning}");
        let row = format!("| {} | {} | {meaning} |", entry["code"], entry["name"].as_str().unwrap());
        assert!(page.contains(&row), "docs/cli.md lacks: {row}");
    }
}

#[test]
fn the_doctor_answers_without_a_controller_and_its_exit_code_is_its_decision() {
    let output =
        roost(Path::new("/nonexistent"), &["doctor", "--output", "json", "--vmm", "/nonexistent/vmm"]);
    let body: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let expected = match body["decision"].as_str().unwrap() {
        "bare-host" => 0,
        "virtual-host" => 10,
        "refuse" => 11,
        other => panic!("{other}"),
    };
    assert_eq!(output.status.code(), Some(expected));
    for finding in body["findings"].as_array().unwrap() {
        assert_eq!(finding["ok"].as_bool().unwrap(), finding["fix"].is_null(), "{finding}");
    }
    // A monitor that is not there proves nothing: it must never be taken for a good KVM.
    assert_ne!(expected, 0, "{body}");
}

#[test]
fn output_that_nobody_reads_is_no_error() {
    use std::process::Stdio;
    let mut child = Command::new(env!("CARGO_BIN_EXE_roost"))
        .args(["completion", "zsh"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(stderr(&output), "");
}

/// The writing end of a pipe that nobody reads.
fn closed_pipe() -> std::io::PipeWriter {
    std::io::pipe().unwrap().1
}

#[test]
fn errors_that_nobody_reads_change_no_exit_code() {
    let folder = tempfile::tempdir().unwrap();
    let config = profile_without_controller(folder.path());
    let admin = folder.path().join("admin.json");
    let cases: &[(&[&str], i32)] = &[
        (&["describe", "i-nope"], 3),
        (&["describe", "i-nope", "--output", "json"], 3),
        (&["ls", "--profile", "nobody"], 4),
        (&["ls"], 8),
        (&["launch"], 2),
        (&["configure", "--from", admin.to_str().unwrap()], 0),
        (&["stop", "i-0123456789abcdef0", "--wait"], 8),
    ];
    for (args, code) in cases {
        for full in [false, true] {
            let mut command = Command::new(env!("CARGO_BIN_EXE_roost"));
            command.args(*args).env_clear().env("ROOST_CONFIG", &config);
            if full {
                command.stderr(std::fs::File::options().write(true).open("/dev/full").unwrap());
            } else {
                command.stderr(closed_pipe());
            }
            assert_eq!(command.status().unwrap().code(), Some(*code), "{args:?}, full: {full}");
        }
    }
}

#[test]
fn a_variable_that_is_set_to_nothing_counts_as_unset() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join(".config/roost/config.toml");
    std::fs::create_dir_all(config.parent().unwrap()).unwrap();
    std::fs::rename(profile_without_controller(folder.path()), &config).unwrap();
    for empty in ["ROOST_CONFIG", "ROOST_PROFILE", "ROOST_OUTPUT", "XDG_CONFIG_HOME", "NO_COLOR"] {
        let output = Command::new(env!("CARGO_BIN_EXE_roost"))
            .args(["configure", "ls"])
            .env_clear()
            .env("HOME", folder.path())
            .env(empty, "")
            .output()
            .unwrap();
        assert!(output.status.success(), "{empty}: {}", stderr(&output));
        assert!(stdout(&output).contains("default"), "{empty}: {}", stdout(&output));
    }
}
