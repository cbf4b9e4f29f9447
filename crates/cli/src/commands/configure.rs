//! `configure`: profiles.

use crate::args::{ConfigureArgs, ConfigureCommand};
use crate::client::Client;
use crate::config::{Config, Profile, check_profile_name};
use crate::context::Context;
use crate::error::{Error, Result};
use crate::output::Table;
use crate::terminal;
use serde::{Deserialize, Serialize};
use std::io::{IsTerminal, Read};
use std::path::Path;

/// What `roost-controller init` writes; more fields may come.
#[derive(Deserialize)]
struct AdminFile {
    endpoint: String,
    ca_pem: String,
    region: String,
    #[serde(default)]
    account_id: Option<String>,
    access_key_id: String,
    secret_access_key: String,
}

/// A profile as it is listed: no secret.
#[derive(Serialize)]
struct Listed<'a> {
    name: &'a str,
    endpoint: &'a str,
    region: &'a str,
    access_key_id: &'a str,
    account_id: Option<&'a str>,
    current: bool,
}

/// `configure`.
pub fn run(context: &Context, args: &ConfigureArgs) -> Result<()> {
    match &args.command {
        None => add(context, args),
        Some(ConfigureCommand::Ls) => list(context),
        Some(ConfigureCommand::Rm { name }) => remove(context, name),
    }
}

fn add(context: &Context, args: &ConfigureArgs) -> Result<()> {
    let name = context.profile_name().to_owned();
    check_profile_name(&name)?;
    let path = context.config_path()?;
    let mut config = Config::load(&path)?;
    let mut profile = match &args.from {
        Some(file) => from_admin_file(file)?,
        None => asked(context, args, config.profiles.get(&name))?,
    };
    if let Some(endpoint) = &context.global.endpoint {
        profile.endpoint.clone_from(endpoint);
    }
    // Whatever cannot work is refused now, not at the first use.
    Client::new(&profile)?;
    let endpoint = profile.endpoint.clone();
    config.profiles.insert(name.clone(), profile);
    config.save(&path)?;
    context.output.note(&format!(
        "profile {name} for {endpoint} is in {}; try `roost{} whoami`",
        path.display(),
        if name == crate::config::DEFAULT_PROFILE { String::new() } else { format!(" --profile {name}") },
    ));
    Ok(())
}

fn from_admin_file(file: &Path) -> Result<Profile> {
    let text = std::fs::read_to_string(file).map_err(|source| Error::File {
        action: "read",
        path: file.into(),
        source,
    })?;
    let admin: AdminFile = serde_json::from_str(&text).map_err(|error| {
        Error::parameter(format!(
            "{} is not an admin.json as `roost-controller init` writes it: {error}",
            file.display()
        ))
    })?;
    Ok(Profile {
        endpoint: admin.endpoint,
        region: admin.region,
        access_key_id: admin.access_key_id,
        secret_access_key: admin.secret_access_key,
        ca_pem: admin.ca_pem,
        account_id: admin.account_id,
    })
}

/// From flags, and from the user where a flag is missing and there is a user.
fn asked(context: &Context, args: &ConfigureArgs, old: Option<&Profile>) -> Result<Profile> {
    let ask = |what: &str, flag: &str, given: Option<&String>, default: Option<&str>| match given {
        Some(given) => Ok(given.clone()),
        None if std::io::stdin().is_terminal() => terminal::ask(what, default),
        None => Err(Error::Usage(format!(
            "{flag} is needed (there is no terminal to ask on); or take everything with --from admin.json"
        ))),
    };
    let endpoint = ask(
        "Endpoint",
        "--endpoint",
        context.global.endpoint.as_ref(),
        Some(old.map_or("https://127.0.0.1:7443", |old| old.endpoint.as_str())),
    )?;
    let region = ask(
        "Region",
        "--region",
        args.region.as_ref(),
        Some(old.map_or("home-1", |old| old.region.as_str())),
    )?;
    let given_ca = args.ca_file.as_ref().map(|file| file.display().to_string());
    let ca_pem = match (&given_ca, old) {
        (None, Some(old)) => old.ca_pem.clone(),
        _ => {
            let file = ask("File with the CA certificate", "--ca-file", given_ca.as_ref(), None)?;
            std::fs::read_to_string(&file).map_err(|source| Error::File {
                action: "read",
                path: file.into(),
                source,
            })?
        }
    };
    let access_key_id = ask(
        "Access key id",
        "--access-key-id",
        args.access_key_id.as_ref(),
        old.map(|old| old.access_key_id.as_str()),
    )?;
    let secret_access_key = match &args.secret_file {
        Some(file) if file == Path::new("-") => {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text)?;
            text.trim().to_owned()
        }
        Some(file) => std::fs::read_to_string(file)
            .map_err(|source| Error::File { action: "read", path: file.into(), source })?
            .trim()
            .to_owned(),
        None if std::io::stdin().is_terminal() => terminal::ask_hidden("Secret access key")?,
        None => return Err(Error::Usage("--secret-file is needed (- reads standard input)".to_owned())),
    };
    if secret_access_key.is_empty() {
        return Err(Error::parameter("the secret access key is empty"));
    }
    Ok(Profile { endpoint, region, access_key_id, secret_access_key, ca_pem, account_id: None })
}

fn list(context: &Context) -> Result<()> {
    let config = Config::load(&context.config_path()?)?;
    let listed: Vec<Listed<'_>> = config
        .profiles
        .iter()
        .map(|(name, profile)| Listed {
            name,
            endpoint: &profile.endpoint,
            region: &profile.region,
            access_key_id: &profile.access_key_id,
            account_id: profile.account_id.as_deref(),
            current: name == context.profile_name(),
        })
        .collect();
    context.output.response(&serde_json::json!({ "profiles": listed }), || {
        let mut table = Table::new("No profiles. `roost configure --from admin.json` makes one.")
            .text("PROFILE", 0)
            .text("ENDPOINT", 0)
            .text("REGION", 2)
            .text("ACCESS-KEY", 1)
            .text("ACCOUNT", 1)
            .text("CURRENT", 3);
        for profile in &listed {
            table.row([
                profile.name.to_owned(),
                profile.endpoint.to_owned(),
                profile.region.to_owned(),
                profile.access_key_id.to_owned(),
                profile.account_id.unwrap_or("-").to_owned(),
                if profile.current { "*" } else { "" }.to_owned(),
            ]);
        }
        table
    })
}

fn remove(context: &Context, name: &str) -> Result<()> {
    let path = context.config_path()?;
    let mut config = Config::load(&path)?;
    if config.profiles.remove(name).is_none() {
        let known = config.profiles.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
        return Err(Error::NotFound(format!(
            "there is no profile {name:?} in {}: it has {known}",
            path.display()
        )));
    }
    config.save(&path)?;
    context.output.note(&format!("profile {name} is removed; its access key still works elsewhere"));
    Ok(())
}
