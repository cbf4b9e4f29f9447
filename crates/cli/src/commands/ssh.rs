//! `ssh`: the system's ssh through a tunnel, with the host key that the guest printed on its console.
//!
//! The console comes over the controller's authenticated API, so the key in it is the instance's own: there is
//! nothing to trust at first use.

use super::tunnel;
use crate::args::SshArgs;
use crate::client::Client;
use crate::config::write_private;
use crate::context::Context;
use crate::error::{Error, Result};
use crate::resolve;
use crate::wait::{self, Goal};
use base64::Engine;
use roost_types::InstanceId;
use roost_types::api::Instance;
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use tokio::time::Instant;

const KEY_TYPE: &str = "ssh-ed25519";
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
    let key = match (args.key, &instance.key_name) {
        (Some(key), _) => Some(key),
        (None, Some(name)) => context.key_file(name).ok().filter(|file| file.exists()),
        (None, None) => None,
    };
    let known_hosts = pin(context, &instance)?;
    let program = std::env::current_exe()?;
    let mut ssh = Command::new("ssh");
    ssh.args(options(&id, &known_hosts, &proxy(context, &program, &id)?));
    if let Some(key) = key {
        ssh.arg("-i").arg(key).args(["-o", "IdentitiesOnly=yes"]);
    }
    ssh.args(["-l", &user, "--", id.as_str()]).args(&args.command);
    let source = ssh.exec();
    Err(Error::File { action: "run (apt-get install openssh-client)", path: "ssh".into(), source })
}

/// Waits for the host key, but not for ever for one that will not come.
async fn wait_for_key(
    context: &Context,
    client: &Client,
    id: &InstanceId,
    deadline: Instant,
) -> Result<Instance> {
    let first = resolve::describe(client, id).await?;
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
async fn wait_for_server(
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
    let config = context.config_path()?;
    let folder =
        config.parent().map_or_else(|| PathBuf::from("known_hosts"), |home| home.join("known_hosts"));
    let file = folder.join(id.as_str());
    write_private(&file, format!("{id} {KEY_TYPE} {key}\n").as_bytes(), true)?;
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
    let mut options: Vec<OsString> = Vec::new();
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
