//! `account` and `key`: who may do things, and who may log in.

use crate::args::{AccountCommand, KeyCommand};
use crate::config::{Config, Profile, check_profile_name, write_private};
use crate::context::Context;
use crate::error::{Error, Result};
use crate::output::{format, views};
use roost_types::api::{
    CreateAccount, CreateKeyPair, DeleteKeyPair, DescribeAccounts, DescribeKeyPairs, ImportKeyPair, KeyPair,
};
use std::io::Read;
use std::path::{Path, PathBuf};

/// `account`.
pub async fn account(context: &Context, command: AccountCommand) -> Result<()> {
    match command {
        AccountCommand::Create { name, admin, save_profile } => {
            create_account(context, name, admin, save_profile).await
        }
        AccountCommand::Ls => {
            let accounts = context.client()?.call(&DescribeAccounts {}).await?;
            context.output.response(&accounts, || views::accounts(&accounts, context.now()))
        }
    }
}

async fn create_account(
    context: &Context,
    name: String,
    admin: bool,
    save_profile: Option<String>,
) -> Result<()> {
    let path = context.config_path()?;
    // The secret is shown once: whatever could keep it from being saved is found before it is made.
    if let Some(saved) = &save_profile {
        check_profile_name(saved)?;
        if Config::load(&path)?.profiles.contains_key(saved) {
            return Err(Error::State(format!(
                "{} has a profile {saved:?} already: choose another name, or remove it with \
                 `roost configure rm {saved}`",
                path.display()
            )));
        }
    }
    let mine = context.profile()?;
    let made = context.client()?.call(&CreateAccount { name, admin }).await?;
    if let Some(saved) = &save_profile {
        let mut config = Config::load(&path)?;
        let profile = Profile {
            access_key_id: made.access_key_id.clone(),
            secret_access_key: made.secret_access_key.clone(),
            account_id: Some(made.account.account_id.to_string()),
            ..mine
        };
        config.profiles.insert(saved.clone(), profile);
        if let Err(error) = config.save(&path) {
            // Better on the screen than lost.
            context.output.note(&format!("the profile was not saved: {}", error.chain()));
            context.output.json(&made)?;
            return Err(error);
        }
        context.output.note(&format!("its access key is the profile {saved} in {}", path.display()));
    }
    context.output.lines(&made, || {
        let mut text = format!("account            {}\n", made.account.account_id);
        text.push_str(&format!("name               {}\n", made.account.name));
        text.push_str(&format!("access key id      {}\n", made.access_key_id));
        if save_profile.is_none() {
            text.push_str(&format!("secret access key  {}\n", made.secret_access_key));
        }
        text
    })?;
    if save_profile.is_none() {
        context.output.note("the secret is not shown again: keep it, or next time use --save-profile");
    }
    Ok(())
}

/// `key`.
pub async fn key(context: &Context, command: KeyCommand) -> Result<()> {
    match command {
        KeyCommand::Create { name, out } => create_key(context, name, out).await,
        KeyCommand::Import { name, file } => {
            let public_key = public_key(&file)?;
            let pair = context.client()?.call(&ImportKeyPair { key_name: name, public_key }).await?;
            context.output.lines(&pair, || pair_line(&pair))
        }
        KeyCommand::Ls => {
            let pairs = context.client()?.call(&DescribeKeyPairs {}).await?;
            context.output.response(&pairs, || views::key_pairs(&pairs, context.now()))
        }
        KeyCommand::Rm { name } => {
            let done = context.client()?.call(&DeleteKeyPair { key_name: name.clone() }).await?;
            context.output.lines(&done, || format!("key pair {name} is forgotten"))?;
            if let Ok(file) = context.key_file(&name)
                && file.exists()
            {
                context.output.note(&format!("its private half stays in {}", file.display()));
            }
            Ok(())
        }
    }
}

async fn create_key(context: &Context, name: String, out: Option<PathBuf>) -> Result<()> {
    let file = out.map_or_else(|| context.key_file(&name), Ok)?;
    // The private half is shown once: a file in the way is found before it is made.
    if file.exists() {
        return Err(Error::State(format!(
            "{} exists already: name another file with --out, or move it away",
            file.display()
        )));
    }
    let made = context.client()?.call(&CreateKeyPair { key_name: name }).await?;
    if let Err(error) = write_private(&file, made.private_key.as_bytes(), false) {
        // A key pair whose private half is lost is of no use to anybody.
        let removed = context.client()?.call(&DeleteKeyPair { key_name: made.key_pair.key_name }).await;
        if removed.is_err() {
            context
                .output
                .note("the key pair is there without a private half: remove it with `roost key rm`");
        }
        return Err(error);
    }
    context.output.lines(&made.key_pair, || pair_line(&made.key_pair))?;
    context.output.note(&format!("its private half is in {}", file.display()));
    Ok(())
}

fn pair_line(pair: &KeyPair) -> String {
    format!(
        "{}  {}  {}  {}",
        pair.key_pair_id,
        pair.key_name,
        pair.fingerprint,
        format::moment(pair.created_at)
    )
}

/// Longest public key that a controller takes; a byte more is enough to be refused.
const MAX_KEY_BYTES: u64 = 16 * 1024;

/// Reads a public key file. A leading `~/` that the shell did not expand is the home folder. A
/// private key is refused here and never sent; the controller diagnoses every other input.
fn public_key(file: &Path) -> Result<String> {
    let failed = |source| Error::File { action: "read", path: file.into(), source };
    let mut bytes = Vec::new();
    if file == Path::new("-") {
        std::io::stdin().take(MAX_KEY_BYTES + 1).read_to_end(&mut bytes)?;
    } else {
        let path = match (file.strip_prefix("~"), crate::config::variable("HOME")) {
            (Ok(rest), Some(home)) => home.join(rest),
            _ => file.to_owned(),
        };
        std::fs::File::open(path)
            .and_then(|file| file.take(MAX_KEY_BYTES + 1).read_to_end(&mut bytes))
            .map_err(failed)?;
    }
    // A comment may have any encoding, and is not part of the key.
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let shown = file.display();
    if text.contains("PuTTY-User-Key-File") {
        return Err(Error::parameter(format!(
            "{shown} is a private key of PuTTY's: keep it to yourself and give its public half: \
             `puttygen {shown} -L | roost key import NAME -`"
        )));
    }
    // The other formats of ssh-keygen name themselves; PKCS #12 and DER are not text.
    if text.contains("PRIVATE KEY") || bytes.contains(&0) {
        return Err(Error::parameter(format!(
            "{shown} is a private key or no text: keep it to yourself and give the public one (the file ending in \
             .pub, or `ssh-keygen -y -f {shown} | roost key import NAME -`)"
        )));
    }
    Ok(text)
}
