//! One module per group of commands; each takes the context and its arguments and prints its result.

mod access;
mod configure;
mod console;
mod escape;
mod image;
mod instances;
mod launch;
mod manifest;
mod reports;
mod shell;
mod ssh;
mod tunnel;

use crate::args::Command;
use crate::context::Context;
use crate::doctor;
use crate::error::Result;

/// Runs one command.
pub async fn run(context: &Context, command: Command) -> Result<()> {
    match command {
        Command::Doctor(args) => doctor::run(context, &args).await,
        Command::Configure(args) => configure::run(context, &args),
        Command::Account(command) => access::account(context, command).await,
        Command::Key(command) => access::key(context, command).await,
        Command::Image(command) => image::run(context, command).await,
        Command::Launch(args) => launch::run(context, args).await,
        Command::Ls(args) => instances::ls(context, args).await,
        Command::Describe(args) => instances::describe(context, args).await,
        Command::Console(args) => console::run(context, args).await,
        Command::Ssh(args) => ssh::run(context, args).await,
        Command::Tunnel(args) => tunnel::run(context, args).await,
        Command::Stop(args) => instances::stop(context, args).await,
        Command::Start(args) => instances::start(context, args).await,
        Command::Reboot(args) => instances::reboot(context, args).await,
        Command::Terminate(args) => instances::terminate(context, args).await,
        Command::Resize(args) => instances::resize(context, args).await,
        Command::Bill(args) => reports::bill(context, args).await,
        Command::Types(args) => reports::types(context, args).await,
        Command::Hosts(args) => reports::hosts(context, args).await,
        Command::Volumes => reports::volumes(context).await,
        Command::Whoami => reports::whoami(context).await,
        Command::Completion { shell } => shell::completion(context, shell),
        Command::Man { dir } => shell::man(&dir),
        Command::ExitCodes => shell::exit_codes(context),
        Command::Version => shell::version(context),
    }
}
