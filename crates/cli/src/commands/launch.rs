//! `launch`.

use crate::args::{LaunchArgs, WaitFor};
use crate::context::Context;
use crate::error::{Error, Result};
use crate::parse;
use crate::wait::{self, Goal};
use base64::Engine;
use roost_types::api::{MAX_USER_DATA, Reservation, RunInstances};
use roost_types::{ErrorCode, InstanceId};
use std::io::Read;
use std::path::Path;

/// `launch`.
pub async fn run(context: &Context, args: LaunchArgs) -> Result<()> {
    let (min_count, max_count) = parse::count(&args.count)?;
    if args.volume_gib == Some(0) {
        return Err(Error::parameter(
            "--volume-gib 0 is not allowed: give 1 or more, at least the image's size",
        ));
    }
    let request = RunInstances {
        image: args.image,
        instance_type: args.instance_type,
        min_count,
        max_count,
        key_name: args.key,
        user_data: args.user_data.as_deref().map(user_data).transpose()?,
        volume_gib: args.volume_gib,
        tags: parse::tags(&args.tags, args.name.as_deref())?,
        // With a token of its own, a launch that is sent again because an answer was lost stays one launch.
        client_token: Some(args.client_token.map_or_else(new_token, Ok)?),
        dry_run: args.dry_run,
    };
    let client = context.client()?;
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
    let goal = match args.wait_for {
        WaitFor::Running => Goal::Running,
        WaitFor::Ready => Goal::Ready,
    };
    let waited = wait::until(context, &client, &ids, goal, args.timeout.timeout).await;
    if waited.is_err() && context.json() {
        context.output.json(&reservation)?;
    }
    let instances = waited?;
    if context.json() {
        return context.output.json(&Reservation { instances, ..reservation });
    }
    for instance in &instances {
        let how = if instance.guest_ready { "runs and is ready" } else { "runs" };
        context.output.note(&format!("{} {how} at {}", instance.instance_id, instance.public_ip));
    }
    Ok(())
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
    fn tokens_differ() {
        assert_ne!(new_token().unwrap(), new_token().unwrap());
        assert_eq!(new_token().unwrap().len(), 32);
    }
}
