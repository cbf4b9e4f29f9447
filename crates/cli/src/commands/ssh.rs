//! `ssh`: the system's ssh through a tunnel, with the host key that the guest printed on its console.
//!
//! The console comes over the controller's authenticated API, so the key in it is the instance's own: there is
//! nothing to trust at first use.

use super::tunnel;
use crate::args::SshArgs;
use crate::client::Client;
use crate::config::{self, write_private};
use crate::context::Context;
use crate::error::{Error, Result};
use crate::wait::{self, Goal};
use crate::{exit, harmless, resolve, stderr};
use base64::Engine;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use roost_types::InstanceId;
use roost_types::api::{DescribeImages, DescribeKeyPairs, Instance};
use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::process::Command;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::Instant;

const KEY_TYPE: &str = "ssh-ed25519";
/// Exit code of ssh for its own failures.
const SSH_FAILED: u8 = 255;
/// How long a guest that calls itself ready may take to show a host key.
const READY_WITHOUT_KEY: Duration = Duration::from_secs(10);
/// Pause between two attempts to reach the ssh server.
const ATTEMPT: Duration = Duration::from_millis(500);

/// `ssh`.
pub async fn run(context: &Context, args: SshArgs) -> Result<()> {
    let client = context.client()?;
    let id = resolve::id(&client, &args.instance).await?;
    let deadline = Instant::now() + args.timeout.timeout;
    let instance = wait_for_key(context, &client, &id, deadline).await?;
    wait_for_server(context, &client, &id, deadline).await?;

    let user = args.user.unwrap_or_else(|| instance.default_user.clone());
    check_user(&user)?;
    let identity = identity(context, &client, args.key, &instance).await?;
    let known_hosts = pin(context, &instance)?;
    let program = std::env::current_exe()?;
    let mut ssh = Command::new("ssh");
    // The user's shell may parse the proxy command's quotes differently from sh.
    ssh.env("SHELL", "/bin/sh");
    ssh.args(options(&id, &known_hosts, &proxy(context, &program, &id)?));
    if let Some(file) = &identity.file {
        ssh.arg("-i").arg(file);
    }
    ssh.args(["-l", &user, "--", id.as_str()]).args(&args.command);
    let code = run_to_end(context, ssh).await?;
    if code == SSH_FAILED {
        stderr::line(&harmless::lines(&format!(
            "roost: ssh ended with {SSH_FAILED}. {id}, user {user}: {}",
            identity.explained
        )));
    }
    if code == exit::OK { Ok(()) } else { Err(Error::Exit(code)) }
}

/// Runs ssh in the foreground and returns its exit code. The terminal and every signal belong to
/// ssh.
async fn run_to_end(context: &Context, mut ssh: Command) -> Result<u8> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    context.hand_on_signals();
    let mut child = ssh.spawn().map_err(|source| Error::File {
        action: "run (apt-get install openssh-client)",
        path: "ssh".into(),
        source,
    })?;
    let pid = child.id().and_then(|pid| i32::try_from(pid).ok()).map(Pid::from_raw);
    // Ctrl-C reaches ssh directly, through the terminal's process group.
    let status = loop {
        let passed_on = tokio::select! {
            status = child.wait() => break status?,
            _ = terminate.recv() => Signal::SIGTERM,
            _ = hangup.recv() => Signal::SIGHUP,
        };
        if let Some(pid) = pid {
            // ssh is not reaped yet, so its process id is still its own.
            let _ = kill(pid, passed_on);
        }
    };
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default());
    Ok(u8::try_from(code).unwrap_or(SSH_FAILED))
}

/// The key to log in with.
struct Identity {
    /// The private key file, or its public half if an ssh-agent may hold the private one.
    file: Option<PathBuf>,
    /// For a failed login: the instance's key pair, the keys offered, and the way out.
    explained: String,
}

/// Finds the private key of the instance's key pair. Only that key is offered: a server ends the
/// connection after a few wrong keys, and an ssh-agent may hold many.
async fn identity(
    context: &Context,
    client: &Client,
    given: Option<PathBuf>,
    instance: &Instance,
) -> Result<Identity> {
    let pair = instance.key_name.as_deref();
    let has = pair.map_or_else(
        || "it has no key pair (it was launched without --key)".to_owned(),
        |name| format!("it has the key pair {name:?}"),
    );
    if let Some(file) = given {
        std::fs::metadata(&file).map_err(|source| Error::File {
            action: "read",
            path: file.clone(),
            source,
        })?;
        let explained = format!("{has}; offered was {} (--key)", file.display());
        return Ok(Identity { file: Some(file), explained });
    }
    let Some(name) = pair else {
        let explained = format!(
            "{has}, so that only ssh's own key files were offered; name another with --key FILE, or use \
             `roost console --attach {}`",
            instance.instance_id
        );
        return Ok(Identity { file: None, explained });
    };
    if let Ok(file) = context.key_file(name)
        && file.exists()
    {
        let explained = format!("{has}; offered was {}; --key names another file", file.display());
        return Ok(Identity { file: Some(file), explained });
    }
    let pairs = client.call(&DescribeKeyPairs {}).await?.key_pairs;
    let Some(public) = pairs.into_iter().find(|known| known.key_name == name).map(|known| known.public_key)
    else {
        let explained = format!(
            "{has}, which was removed since, so that only ssh's own key files were offered; name the right one \
             with --key FILE"
        );
        return Ok(Identity { file: None, explained });
    };
    let home = config::variable("HOME").map(|home| home.join(".ssh"));
    if let Some(file) = home.and_then(|folder| private_half(&folder, &public)) {
        let explained = format!("{has}; offered was {}", file.display());
        return Ok(Identity { file: Some(file), explained });
    }
    let folder = config_folder(context)?.join("known_hosts");
    let file = folder.join(format!("{}.pub", instance.instance_id));
    write_private(&file, format!("{public}\n").as_bytes(), true)?;
    let explained = format!(
        "{has}, whose private half is neither where `roost key create` puts it nor in ~/.ssh; offered was the one \
         that an ssh-agent has, if any has it (`ssh-add -l`); name its file with --key FILE"
    );
    Ok(Identity { file: Some(file), explained })
}

/// The private key in this folder whose `.pub` file holds this public key.
fn private_half(folder: &Path, public: &str) -> Option<PathBuf> {
    let key = |line: &str| line.split_whitespace().take(2).map(str::to_owned).collect::<Vec<_>>();
    let wanted = key(public);
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(folder).ok()?.filter_map(|entry| Some(entry.ok()?.path())).collect();
    files.sort();
    files.into_iter().filter(|file| file.extension().is_some_and(|end| end == "pub")).find_map(|file| {
        let text = std::fs::read_to_string(&file).ok()?;
        let private = file.with_extension("");
        (text.lines().any(|line| key(line) == wanted) && private.is_file()).then_some(private)
    })
}

fn config_folder(context: &Context) -> Result<PathBuf> {
    let config = context.config_path()?;
    Ok(config.parent().map_or_else(PathBuf::new, Path::to_owned))
}

/// Waits for the host key, but not for ever for one that will not come.
async fn wait_for_key(
    context: &Context,
    client: &Client,
    id: &InstanceId,
    deadline: Instant,
) -> Result<Instance> {
    let first = resolve::describe(client, id).await?;
    let images = client.call(&DescribeImages {}).await?.images;
    if images.iter().any(|image| image.image_id == first.image_id && image.ssh == Some(false)) {
        return Err(Error::State(format!(
            "the image of {id}, {:?}, has no ssh server: `roost console --attach {id}` reaches it",
            first.image_name
        )));
    }
    let left = deadline.saturating_duration_since(Instant::now());
    let patience = if first.guest_ready { left.min(READY_WITHOUT_KEY) } else { left };
    let ids = [id.clone()];
    match wait::until(context, client, &ids, Goal::HostKey, patience).await {
        Ok(instances) => {
            instances.into_iter().next().ok_or_else(|| Error::NotFound(format!("there is no instance {id}")))
        }
        Err(Error::Unavailable(_)) if resolve::describe(client, id).await?.guest_ready => {
            Err(Error::State(format!(
                "{id} is ready, but has shown no ssh host key on its console: its image {:?} has no ssh server; \
                 `roost console --attach {id}` reaches it",
                first.image_name
            )))
        }
        Err(Error::State(why)) => {
            Err(Error::State(format!("{why}; `roost start {id}` starts a stopped instance")))
        }
        Err(error) => Err(error),
    }
}

/// Waits until something listens on port 22: the key is on the console before the server is up.
pub(super) async fn wait_for_server(
    context: &Context,
    client: &Client,
    id: &InstanceId,
    deadline: Instant,
) -> Result<()> {
    let mut progress = context.progress();
    loop {
        let Err(error) = tunnel::open(client, id, 22).await else { return Ok(()) };
        let lasting = !matches!(error, Error::Unavailable(_)) && !error.is_transport();
        if lasting || Instant::now() >= deadline {
            return Err(error);
        }
        progress.set(&format!("{id}: {}", error.chain()));
        tokio::time::sleep(ATTEMPT).await;
    }
}

/// Writes the file that pins the instance's host key, and answers with its path.
fn pin(context: &Context, instance: &Instance) -> Result<PathBuf> {
    let id = &instance.instance_id;
    let printed = instance.ssh_host_key.as_deref().unwrap_or_default();
    let key = host_key(printed).ok_or_else(|| {
        Error::State(format!(
            "{id} has shown something on its console that is no ed25519 host key: {printed:?}; \
             `roost console {id}` shows all of it"
        ))
    })?;
    let file = config_folder(context)?.join("known_hosts").join(id.as_str());
    let line = format!("{id} {KEY_TYPE} {key}\n");
    match std::fs::read_to_string(&file) {
        Ok(before) if before != line => stderr::line(&format!(
            "roost: warning: {id} shows another host key than at the last `roost ssh`: SSH's keys were made again \
             inside, or its disk is another one. The new one comes from its console and is used from now on; the \
             old one was {:?} ({})",
            before.trim(),
            file.display()
        )),
        _ => {}
    }
    write_private(&file, line.as_bytes(), true)?;
    Ok(file)
}

/// The key in `ssh-ed25519 BASE64 …`, if it is one: the guest may print anything.
fn host_key(line: &str) -> Option<&str> {
    let mut words = line.split_ascii_whitespace();
    let key = words.next().filter(|kind| *kind == KEY_TYPE).and_then(|_| words.next())?;
    // RFC 8709, 4: the name and 32 bytes, each after its length.
    let blob = base64::engine::general_purpose::STANDARD.decode(key).ok()?;
    let fixed = b"\0\0\0\x0bssh-ed25519\0\0\0\x20";
    (blob.starts_with(fixed) && blob.len() == fixed.len() + 32).then_some(key)
}

/// An image's default user comes from whoever made the image: it must not become an option of ssh.
fn check_user(user: &str) -> Result<()> {
    let fine = !user.is_empty()
        && !user.starts_with('-')
        && user.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
    if fine {
        return Ok(());
    }
    Err(Error::parameter(format!("login {user:?} is not allowed: give a-z A-Z 0-9 . _ - with --user")))
}

fn options(id: &InstanceId, known_hosts: &Path, proxy: &str) -> Vec<OsString> {
    let mut known = OsString::from("UserKnownHostsFile=\"");
    known.push(known_hosts);
    known.push("\"");
    // No configuration file is read, the user's or the system's: their settings are not meant for
    // hosts of unknown owners. Agent and X11 forwarding would be open to root on the instance.
    let mut options: Vec<OsString> = ["-F", "none", "-a", "-x"].map(OsString::from).to_vec();
    for option in [
        OsString::from(format!("ProxyCommand={proxy}")),
        known,
        "GlobalKnownHostsFile=/dev/null".into(),
        "StrictHostKeyChecking=yes".into(),
        format!("HostKeyAlgorithms={KEY_TYPE}").into(),
        format!("HostKeyAlias={id}").into(),
        "CheckHostIP=no".into(),
        "UpdateHostKeys=no".into(),
        "LogLevel=ERROR".into(),
        // Only the key of `-i`, whatever an ssh-agent holds.
        "IdentitiesOnly=yes".into(),
    ] {
        options.push("-o".into());
        options.push(option);
    }
    options
}

/// The command by which ssh reaches the instance: this program, with the same profile.
fn proxy(context: &Context, program: &Path, id: &InstanceId) -> Result<String> {
    let mut words = vec![
        program.display().to_string(),
        "--config".to_owned(),
        std::path::absolute(context.config_path()?)?.display().to_string(),
        "--profile".to_owned(),
        context.profile_name().to_owned(),
    ];
    if let Some(endpoint) = &context.global.endpoint {
        words.extend(["--endpoint".to_owned(), endpoint.clone()]);
    }
    words.extend(["--output=table".to_owned(), "tunnel".to_owned(), id.to_string(), "22".to_owned()]);
    Ok(words.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" "))
}

/// A word for the shell that runs a ProxyCommand, in which ssh replaces `%`.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''").replace('%', "%%"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::samples;

    #[test]
    fn a_host_key_is_one_ed25519_key_and_nothing_else() {
        let good = samples::instance().ssh_host_key.unwrap();
        assert_eq!(host_key(&good).unwrap(), good.split(' ').nth(1).unwrap());
        assert!(host_key(&format!("{good} root@guest")).is_some());
        for bad in
            ["", "ssh-ed25519", "ssh-rsa AAAA", "ssh-ed25519 AAAA", "ssh-ed25519 !!", "@cert-authority * x"]
        {
            assert!(host_key(bad).is_none(), "{bad}");
        }
        assert!(host_key(&good.replacen("ssh-ed25519", "ssh-rsa", 1)).is_none());
    }

    #[test]
    fn words_for_the_proxy_shell_stay_words() {
        assert_eq!(quoted("/a b/'%h'"), r"'/a b/'\''%%h'\'''");
    }

    #[test]
    fn a_login_cannot_become_an_option() {
        assert!(check_user("admin").is_ok());
        for bad in ["", "-oProxyCommand=x", "a b", "a;b", "$(x)"] {
            assert!(check_user(bad).is_err(), "{bad}");
        }
    }
}
