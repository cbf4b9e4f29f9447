//! Consoles, tunnels and ssh.

use crate::agent::{Agent, HOST_KEY};
use crate::stack::{DEADLINE, Ran, Stack};
use nix::sys::termios::{LocalFlags, Termios, tcgetattr};
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Stdio};
use std::sync::mpsc;
use std::time::Instant;

fn launched() -> (Stack, Agent) {
    let stack = Stack::start();
    let folder = stack.image_folder("tiny", 1);
    stack.roost(&["image", "import", &folder]).ok();
    let agent = Agent::start(&stack);
    stack.roost(&["launch", "-t", "t3.nano", "-i", "tiny", "--name", "web", "--wait"]).ok();
    (stack, agent)
}

fn with_input(stack: &Stack, args: &[&str], input: &[u8]) -> Ran {
    let mut child = stack
        .command(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    Ran::of(child.wait_with_output().unwrap())
}

#[test]
fn a_console_is_shown_without_what_a_terminal_would_obey() {
    let (stack, _agent) = launched();
    assert_eq!(stack.roost(&["console", "web"]).ok(), "Linux version 6.1\r\n\u{fffd}31mlogin: ");
}

#[test]
fn what_is_typed_reaches_the_guest_and_its_answer_comes_back() {
    let (stack, _agent) = launched();
    let shown = with_input(&stack, &["console", "web", "--attach"], b"root\rq").ok();
    assert!(shown.ends_with("login: ROOT\rQ"), "{shown:?}");
}

#[test]
fn a_script_that_ends_after_its_console_ends_the_command() {
    let (stack, _agent) = launched();
    let mut child = stack
        .command(&["console", "web", "--attach"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut script = child.stdin.take().unwrap();
    script.write_all(b"root\rq").unwrap();
    let mut shown = Vec::new();
    let mut screen = child.stdout.take().unwrap();
    while !shown.ends_with(b"ROOT\rQ") {
        let mut byte = [0];
        screen.read_exact(&mut byte).unwrap();
        shown.extend(byte);
    }
    drop(script);
    Ran::of(child.wait_with_output().unwrap()).ok();
}

/// A terminal with the command on it, attached to a console.
struct Attached {
    terminal: nix::pty::OpenptyResult,
    before: Termios,
    child: Child,
    shown: mpsc::Receiver<Vec<u8>>,
}

impl Attached {
    fn to(stack: &Stack) -> Self {
        let terminal = nix::pty::openpty(None, None).unwrap();
        let before = tcgetattr(&terminal.slave).unwrap();
        let end = || Stdio::from(terminal.slave.try_clone().unwrap());
        let child = stack
            .command(&["console", "web", "-a"])
            .stdin(end())
            .stdout(end())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut screen = File::from(terminal.master.try_clone().unwrap());
        let (sender, shown) = mpsc::channel();
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = screen.read(&mut bytes) {
                if sender.send(bytes[..count].to_vec()).is_err() {
                    break;
                }
            }
        });
        Self { terminal, before, child, shown }
    }

    /// Waits until the screen shows this text, and returns all that it showed up to then.
    fn wait_for(&self, text: &str) -> String {
        let deadline = Instant::now() + DEADLINE;
        let mut screen = Vec::new();
        while !String::from_utf8_lossy(&screen).contains(text) {
            let left = deadline.saturating_duration_since(Instant::now());
            let more = self.shown.recv_timeout(left);
            screen.extend(
                more.unwrap_or_else(|_| panic!("{text:?} is not on {:?}", String::from_utf8_lossy(&screen))),
            );
        }
        String::from_utf8(screen).unwrap()
    }

    fn keys(&self, keys: &[u8]) {
        File::from(self.terminal.master.try_clone().unwrap()).write_all(keys).unwrap();
    }

    fn is_as_before(&self) -> bool {
        tcgetattr(&self.terminal.slave).unwrap() == self.before
    }
}

#[test]
fn an_attached_terminal_is_raw_painted_on_and_put_back() {
    let (stack, _agent) = launched();
    let mut attached = Attached::to(&stack);
    let screen = attached.wait_for("login: ");
    assert!(screen.contains("\u{1b}[32mLinux\u{1b}[0m"), "colours pass: {screen:?}");
    assert!(!screen.contains("pwned"), "titles do not: {screen:?}");
    let raw = tcgetattr(&attached.terminal.slave).unwrap().local_flags;
    assert!(!raw.intersects(LocalFlags::ECHO | LocalFlags::ISIG | LocalFlags::ICANON), "{raw:?}");
    attached.keys(b"hi\x03~.\r");
    // The guest got Ctrl-C as a key; its echo of a control character is not printed.
    attached.wait_for("HI~.");
    attached.keys(b"~.");
    assert_eq!(attached.child.wait().unwrap().code(), Some(0));
    assert!(attached.is_as_before());
}

#[test]
fn a_signal_puts_the_terminal_back_as_well() {
    let (stack, _agent) = launched();
    let mut attached = Attached::to(&stack);
    attached.wait_for("login: ");
    let pid = nix::unistd::Pid::from_raw(attached.child.id().try_into().unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert_eq!(attached.child.wait().unwrap().code(), Some(130));
    assert!(attached.is_as_before());
}

#[test]
fn a_tunnel_carries_bytes_both_ways_to_the_end() {
    let (stack, _agent) = launched();
    let sent: Vec<u8> = (0..200_000_u32).flat_map(|number| format!("{number}\n").into_bytes()).collect();
    let mut child =
        stack.command(&["tunnel", "web", "22"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = sent.clone();
    let writer = std::thread::spawn(move || stdin.write_all(&input).unwrap());
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    assert!(output.status.success());
    let got = output.stdout.strip_prefix(b"SSH-2.0-simulated\r\n").unwrap();
    assert!(got == sent, "{} of {} bytes came back", got.len(), sent.len());
}

#[test]
fn a_port_that_nothing_listens_on_is_named() {
    let (stack, _agent) = launched();
    stack.roost(&["tunnel", "web", "80"]).fails(8, &["port 80", "Connection refused"]);
}

/// A folder for the PATH with a fake ssh. It prints its arguments, reads the server's greeting
/// through the proxy, and ends with this code.
fn stand_in_for_ssh(stack: &Stack, code: u8) -> String {
    let bin = stack.path("bin");
    std::fs::create_dir_all(&bin).unwrap();
    let script = format!(
        "#!/bin/sh\nprintf '%s\\n' \"$@\"\nfor word; do case $word in ProxyCommand=*) \
         eval \"${{word#ProxyCommand=}}\" </dev/null | head -n 1;; esac; done\nexit {code}\n"
    );
    std::fs::write(bin.join("ssh"), script).unwrap();
    std::fs::set_permissions(bin.join("ssh"), std::fs::Permissions::from_mode(0o755)).unwrap();
    format!("{}:/usr/bin:/bin", bin.display())
}

#[test]
fn ssh_is_given_a_pinned_host_key_and_a_proxy_that_reaches_the_instance() {
    let (stack, _agent) = launched();
    stack.roost(&["key", "create", "home"]).ok();
    let id = stack.roost(&["launch", "-t", "t3.nano", "-i", "tiny", "--key", "home", "--wait"]).ok();
    let id = id.trim();
    let path = stand_in_for_ssh(&stack, 7);
    let mut command = stack.command(&["ssh", id, "--", "echo", "a b"]);
    command.env("PATH", &path);
    let ran = Ran::of(command.stdin(Stdio::null()).output().unwrap());
    assert_eq!(ran.code, 7, "the exit code is ssh's own: {ran:?}");
    let lines: Vec<&str> = ran.stdout.lines().collect();
    for option in ["StrictHostKeyChecking=yes", "IdentitiesOnly=yes", "UpdateHostKeys=no", "none", "-a", "-x"]
    {
        assert!(lines.contains(&option), "{option}: {lines:#?}");
    }
    let end = ["-l", "admin", "--", id, "echo", "a b", "SSH-2.0-simulated"];
    assert!(lines.ends_with(&end), "{lines:#?}");
    assert!(lines.contains(&stack.path("cli/keys/home.pem").to_str().unwrap()), "{lines:#?}");
    let pinned = std::fs::read_to_string(stack.path("cli/known_hosts").join(id)).unwrap();
    let key: Vec<&str> = HOST_KEY.split(' ').collect();
    assert_eq!(pinned, format!("{id} ssh-ed25519 {}\n", key[1]));
}

#[test]
fn only_the_instances_own_key_is_offered_and_a_failure_says_which() {
    let (stack, _agent) = launched();
    let path = stand_in_for_ssh(&stack, 255);
    let home = stack.path("home");
    let ssh = |name: &str, more: &[&str]| {
        let mut command = stack.command(&[&["ssh", name], more].concat());
        command.env("PATH", &path).env("HOME", &home).env("SHELL", "/bin/false");
        let ran = Ran::of(command.stdin(Stdio::null()).output().unwrap());
        assert_eq!(ran.code, 255, "{ran:?}");
        ran
    };
    let offered = |ran: &Ran| {
        let lines: Vec<&str> = ran.stdout.lines().collect();
        lines.iter().position(|line| *line == "-i").map(|at| lines[at + 1].to_owned())
    };
    let launch = |name: &str, key: &str| {
        stack
            .roost(&["launch", "-t", "t3.nano", "-i", "tiny", "--name", name, "--key", key, "--wait"])
            .ok()
            .trim()
            .to_owned()
    };
    // Launched without a key: no key is offered, and the failure states it.
    let none = ssh("web", &[]);
    assert_eq!(offered(&none), None, "{none:?}");
    assert!(none.stderr.contains("launched without --key"), "{none:?}");

    // An imported key pair whose file is in the user's `~/.ssh`.
    std::fs::create_dir_all(home.join(".ssh")).unwrap();
    let data = HOST_KEY.split(' ').nth(1).unwrap();
    std::fs::write(home.join(".ssh/laptop.pub"), format!("ssh-ed25519 {data} me\n")).unwrap();
    let public = home.join(".ssh/laptop.pub");
    stack.roost(&["key", "import", "laptop", public.to_str().unwrap()]).ok();
    let id = launch("mine", "laptop");
    // The private half may be in an ssh-agent: the public half selects it.
    let agents = ssh("mine", &[]);
    let file = offered(&agents).unwrap();
    assert!(std::fs::read_to_string(&file).unwrap().contains(data), "{agents:?}");
    assert!(agents.stderr.contains("\"laptop\"") && agents.stderr.contains("ssh-add -l"), "{agents:?}");
    std::fs::write(home.join(".ssh/laptop"), "private").unwrap();
    let found = ssh("mine", &[]);
    assert_eq!(offered(&found).as_deref(), home.join(".ssh/laptop").to_str(), "{found:?}");
    assert!(found.stderr.contains("\"laptop\"") && found.stderr.contains(".ssh/laptop"), "{found:?}");
    let named = ssh("mine", &["--key", public.to_str().unwrap()]);
    assert_eq!(offered(&named).as_deref(), public.to_str(), "{named:?}");
    stack.roost(&["ssh", "mine", "--key", "/nonexistent/k"]).fails(3, &["/nonexistent/k"]);
    assert!(!found.stderr.contains("warning"), "the host key is the same: {found:?}");

    // A changed host key is reported.
    let pinned = stack.path("cli/known_hosts").join(&id);
    std::fs::write(&pinned, format!("{id} ssh-ed25519 AAAAold\n")).unwrap();
    let changed = ssh("mine", &[]);
    assert!(changed.stderr.contains("another host key") && changed.stderr.contains("AAAAold"), "{changed:?}");
    assert!(!ssh("mine", &[]).stderr.contains("another host key"));
}

#[test]
fn the_systems_ssh_takes_our_options_whatever_the_users_configuration_says() {
    let (stack, _agent) = launched();
    let home = stack.path("home");
    std::fs::create_dir_all(home.join(".ssh")).unwrap();
    std::fs::write(home.join(".ssh/config"), "this is no option\n").unwrap();
    let mut command = stack.command(&["ssh", "web"]);
    command.env("HOME", &home).env("SHELL", "/bin/false").env("SSH_AUTH_SOCK", "/nonexistent");
    let ran = Ran::of(command.stdin(Stdio::null()).output().unwrap());
    // The proxy connects to a listener on port 22 that greets and is no ssh server.
    assert_eq!(ran.code, 255, "{ran:?}");
    assert!(!ran.stderr.contains("configuration option"), "{ran:?}");
    assert!(ran.stderr.contains("launched without --key"), "{ran:?}");
}
