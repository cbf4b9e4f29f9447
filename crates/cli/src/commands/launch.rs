//! `launch`.

use super::ssh;
use crate::args::{LaunchArgs, Switch, Tokens, WaitFor};
use crate::client::Client;
use crate::context::Context;
use crate::error::{Error, Result};
use crate::parse;
use crate::wait::{self, Goal};
use base64::Engine;
use roost_types::agent::{HttpEndpoint, HttpTokens, MetadataOptions};
use roost_types::api::{DescribeImages, Instance, MAX_USER_DATA, Reservation, RunInstances};
use roost_types::{ErrorCode, InstanceId};
use std::io::Read;
use std::path::Path;
use tokio::time::Instant;

/// `launch`.
pub async fn run(context: &Context, args: LaunchArgs) -> Result<()> {
    let (min_count, max_count) = parse::count(&args.count)?;
    if args.volume_gib == Some(0) {
        return Err(Error::parameter(
            "--volume-gib 0 is not allowed: give 1 or more, at least the image's size",
        ));
    }
    let request = RunInstances {
        image: args.image.clone(),
        instance_type: args.instance_type.clone(),
        min_count,
        max_count,
        key_name: args.key.clone(),
        user_data: args.user_data.as_deref().map(user_data).transpose()?,
        volume_gib: args.volume_gib,
        tags: parse::tags(&args.tags, args.name.as_deref())?,
        metadata_options: metadata_options(args.metadata, args.metadata_tokens),
        // With a token of its own, a launch that is sent again because an answer was lost stays one launch.
        client_token: Some(args.client_token.clone().map_or_else(new_token, Ok)?),
        dry_run: args.dry_run,
    };
    let client = context.client()?;
    let images = client.call(&DescribeImages {}).await?.images;
    let ssh = images
        .iter()
        .find(|image| image.name == request.image || image.image_id.as_str() == request.image)
        .and_then(|image| image.ssh);
    if request.key_name.is_none() && ssh == Some(true) {
        context.output.note(
            "launched without --key: nobody can log in by ssh, unless the user data sees to it \
             (`roost key create NAME`, then --key NAME)",
        );
    }
    context.on_interrupt(
        "interrupted; the launch may have been accepted: `roost ls` shows it, `roost terminate ID` ends it",
    );
    let reservation = match client.call(&request).await {
        Err(Error::Api { error, .. }) if error.code == ErrorCode::DryRunOperation => {
            let said = serde_json::json!({ "dry_run": true, "message": error.message });
            return context.output.lines(&said, || error.message.clone());
        }
        other => other?,
    };
    let ids: Vec<InstanceId> =
        reservation.instances.iter().map(|instance| instance.instance_id.clone()).collect();
    let listed = ids.iter().map(InstanceId::as_str).collect::<Vec<_>>();
    context.on_interrupt(format!(
        "interrupted; the launch goes on: `roost ls` shows it, `roost terminate {}` ends it",
        listed.join(" ")
    ));
    if !context.json() {
        // At once, so that they are known whatever becomes of the wait.
        context.output.write(&listed.join("\n"))?;
    }
    if !args.wait {
        return if context.json() { context.output.json(&reservation) } else { Ok(()) };
    }
    let waited = wait(context, &client, &ids, &args, ssh).await;
    if waited.is_err() && context.json() {
        context.output.json(&reservation)?;
    }
    let instances = waited?;
    if context.json() {
        return context.output.json(&Reservation { instances, ..reservation });
    }
    for instance in &instances {
        let how = match args.wait_for {
            WaitFor::Running => "runs",
            WaitFor::Ready if answers_ssh(instance, ssh) => "answers ssh",
            WaitFor::Ready => "is ready",
        };
        context.output.note(&format!("{} {how} at {}", instance.instance_id, instance.public_ip));
    }
    Ok(())
}

/// Waits for the state that `--wait-for` names. The host key is on the console before the ssh
/// server listens.
async fn wait(
    context: &Context,
    client: &Client,
    ids: &[InstanceId],
    args: &LaunchArgs,
    ssh: Option<bool>,
) -> Result<Vec<Instance>> {
    let deadline = Instant::now() + args.timeout.timeout;
    let goal = match args.wait_for {
        WaitFor::Running => Goal::Running,
        WaitFor::Ready => Goal::Ready { ssh },
    };
    let instances = wait::until(context, client, ids, goal, args.timeout.timeout).await?;
    if args.wait_for == WaitFor::Ready {
        for instance in instances.iter().filter(|instance| answers_ssh(instance, ssh)) {
            ssh::wait_for_server(context, client, &instance.instance_id, deadline).await?;
        }
    }
    Ok(instances)
}

/// Returns true if a ready instance accepts a login: a host key alone does not mean a server.
fn answers_ssh(instance: &Instance, image_has_ssh: Option<bool>) -> bool {
    instance.ssh_host_key.is_some() && image_has_ssh != Some(false)
}

/// `None` without options, so that an older controller sees the same launch.
fn metadata_options(service: Option<Switch>, tokens: Option<Tokens>) -> Option<MetadataOptions> {
    (service.is_some() || tokens.is_some()).then_some(MetadataOptions {
        http_endpoint: match service {
            Some(Switch::Off) => HttpEndpoint::Disabled,
            Some(Switch::On) | None => HttpEndpoint::Enabled,
        },
        http_tokens: match tokens {
            Some(Tokens::Required) => HttpTokens::Required,
            Some(Tokens::Optional) | None => HttpTokens::Optional,
        },
    })
}

/// 32 random hexadecimal digits.
fn new_token() -> Result<String> {
    let mut random = [0; 16];
    getrandom::fill(&mut random).map_err(|error| Error::Internal(format!("no randomness: {error}")))?;
    Ok(random.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// User data in base64, from a file or from standard input.
fn user_data(file: &Path) -> Result<String> {
    let mut bytes = Vec::new();
    let limit = MAX_USER_DATA as u64 + 1;
    if file == Path::new("-") {
        std::io::stdin().lock().take(limit).read_to_end(&mut bytes)?;
    } else {
        std::fs::File::open(file)
            .and_then(|file| file.take(limit).read_to_end(&mut bytes))
            .map_err(|source| Error::File { action: "read", path: file.into(), source })?;
    }
    if bytes.len() > MAX_USER_DATA {
        return Err(Error::parameter(format!(
            "the user data in {} is too long: at most {MAX_USER_DATA} bytes are allowed",
            file.display()
        )));
    }
    Ok(base64::engine::general_purpose::STANDARD.encode(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_data_is_taken_as_it_is_up_to_its_limit() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), vec![b'x'; MAX_USER_DATA]).unwrap();
        assert_eq!(user_data(file.path()).unwrap().len(), MAX_USER_DATA.div_ceil(3) * 4);
        std::fs::write(file.path(), vec![b'x'; MAX_USER_DATA + 1]).unwrap();
        assert!(user_data(file.path()).unwrap_err().to_string().contains("at most 16384 bytes"));
    }

    #[test]
    fn metadata_options_are_sent_where_they_were_given() {
        assert_eq!(metadata_options(None, None), None);
        let required = metadata_options(None, Some(Tokens::Required)).unwrap();
        assert_eq!(
            (required.http_tokens, required.http_endpoint),
            (HttpTokens::Required, HttpEndpoint::Enabled)
        );
        let off = metadata_options(Some(Switch::Off), None).unwrap();
        assert_eq!((off.http_tokens, off.http_endpoint), (HttpTokens::Optional, HttpEndpoint::Disabled));
    }

    #[test]
    fn tokens_differ() {
        assert_ne!(new_token().unwrap(), new_token().unwrap());
        assert_eq!(new_token().unwrap().len(), 32);
    }
}
