//! Completion, manual pages, exit codes, version: what needs no controller and no profile.

use crate::args::Cli;
use crate::context::Context;
use crate::error::{Error, Result};
use crate::exit;
use clap::CommandFactory;
use clap_complete::Shell;
use std::path::Path;

/// `completion`.
pub fn completion(context: &Context, shell: Shell) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "roost", &mut script);
    context.output.write(&String::from_utf8_lossy(&script))
}

/// `man`.
pub fn man(folder: &Path) -> Result<()> {
    let failed = |source| Error::File { action: "write manual pages into", path: folder.into(), source };
    std::fs::create_dir_all(folder).map_err(failed)?;
    clap_mangen::generate_to(Cli::command(), folder).map_err(failed)
}

/// `exit-codes`.
pub fn exit_codes(context: &Context) -> Result<()> {
    let codes: Vec<_> = exit::TABLE
        .iter()
        .map(|(code, name, meaning)| serde_json::json!({ "code": code, "name": name, "meaning": meaning }))
        .collect();
    context.output.lines(&serde_json::json!({ "exit_codes": codes }), exit::text)
}

/// `version`.
pub fn version(context: &Context) -> Result<()> {
    let version = env!("CARGO_PKG_VERSION");
    context.output.lines(&serde_json::json!({ "version": version }), || format!("roost {version}"))
}
