//! The command line.

use crate::parse;
use clap::builder::Resettable;
use clap::builder::styling::{AnsiColor, Styles};
use clap::{ArgMatches, Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum, ValueHint};
use roost_types::api::BillBy;
use std::ffi::OsStr;
use std::path::PathBuf;
use std::time::Duration;

const STYLES: Styles = Styles::styled()
    .header(AnsiColor::Green.on_default().bold())
    .usage(AnsiColor::Green.on_default().bold())
    .literal(AnsiColor::Cyan.on_default().bold())
    .placeholder(AnsiColor::Cyan.on_default());

/// An EC2 you own: launch, look inside, stop, start, resize, terminate and bill virtual machines
#[derive(Debug, Parser)]
#[command(
    name = "roost",
    version,
    styles = STYLES,
    propagate_version = false,
    disable_help_subcommand = false,
    subcommand_required = true,
    arg_required_else_help = true,
    after_help = "An instance is named by its id (i-…) or by its tag Name where that is unique.\n\
                  `roost help COMMAND` says more about a command, `roost help exit-codes` lists the exit codes."
)]
pub struct Cli {
    /// What holds for every command.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

impl Cli {
    /// The program's arguments and environment, or the end of the program with its exit code.
    pub fn from_environment() -> Self {
        let mut command = without_empty_variables(Cli::command(), |name| {
            std::env::var_os(name).is_some_and(|value| value.is_empty())
        });
        let matches: ArgMatches = command.get_matches_mut();
        Self::from_arg_matches(&matches).unwrap_or_else(|error| error.format(&mut command).exit())
    }
}

/// The command in which a variable that is set to nothing counts as not set, as XDG and NO_COLOR have it.
fn without_empty_variables(mut command: clap::Command, is_empty: impl Fn(&OsStr) -> bool) -> clap::Command {
    let empty: Vec<clap::Id> = command
        .get_arguments()
        .filter(|argument| argument.get_env().is_some_and(&is_empty))
        .map(|argument| argument.get_id().clone())
        .collect();
    for id in empty {
        command = command.mut_arg(id, |argument| argument.env(Resettable::<clap::builder::OsStr>::Reset));
    }
    command
}

/// What holds for every command.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Global options")]
pub struct Global {
    /// Profile to act as [default: default]
    #[arg(long, global = true, value_name = "NAME", env = "ROOST_PROFILE", hide_env_values = true)]
    pub profile: Option<String>,
    /// Configuration file [default: ~/.config/roost/config.toml]
    #[arg(long, global = true, value_name = "FILE", env = "ROOST_CONFIG", hide_env_values = true, value_hint = ValueHint::FilePath)]
    pub config: Option<PathBuf>,
    /// Controller to use instead of the profile's
    #[arg(long, global = true, value_name = "URL")]
    pub endpoint: Option<String>,
    /// How to print: tables for people, or the API's own responses
    #[arg(
        long,
        short,
        global = true,
        value_name = "FORMAT",
        env = "ROOST_OUTPUT",
        hide_env_values = true,
        default_value = "table"
    )]
    pub output: Format,
    /// No progress and no notes on standard error
    #[arg(long, short, global = true)]
    pub quiet: bool,
    /// No colours, as the environment variable NO_COLOR
    #[arg(long, global = true)]
    pub no_color: bool,
}

/// How to print.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    Table,
    /// For programs.
    Json,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Check whether this machine can run instances, and say how to mend what is missing
    Doctor(DoctorArgs),
    /// Add, list or remove profiles: where a controller is and what to sign with
    #[command(args_conflicts_with_subcommands = true)]
    Configure(ConfigureArgs),
    /// Make and list accounts
    #[command(subcommand)]
    Account(AccountCommand),
    /// Make, import, list and remove key pairs
    #[command(subcommand)]
    Key(KeyCommand),
    /// Import, list and remove images
    #[command(subcommand)]
    Image(ImageCommand),
    /// Launch instances and print their ids
    Launch(LaunchArgs),
    /// List instances
    #[command(visible_alias = "list")]
    Ls(LsArgs),
    /// Show all about an instance
    Describe(DescribeArgs),
    /// Show an instance's serial console, or type on it
    Console(ConsoleArgs),
    /// Log in to an instance; its host key is pinned from its console
    Ssh(SshArgs),
    /// Connect standard input and output to a TCP port of an instance
    Tunnel(TunnelArgs),
    /// Stop instances: disk and addresses stay, CPU, memory and their cost end
    Stop(StopArgs),
    /// Start stopped instances
    ///
    /// Those that are pending or running stay as they are.
    Start(StartArgs),
    /// Reboot running instances
    Reboot(RebootArgs),
    /// Remove instances and their disks for good
    Terminate(TerminateArgs),
    /// Give a stopped instance another type
    Resize(ResizeArgs),
    /// Compute a bill from the usage log
    Bill(BillArgs),
    /// List instance types: size, price, and why one cannot run here
    Types(TypesArgs),
    /// List hosts and how full they are (administrators)
    Hosts(HostsArgs),
    /// List volumes
    Volumes,
    /// Say which account the profile acts as
    Whoami,
    /// Print the completion script of a shell
    #[command(
        after_help = "For bash: roost completion bash > ~/.local/share/bash-completion/completions/roost"
    )]
    Completion {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write the manual pages into a folder
    #[command(hide = true)]
    Man {
        /// The folder
        #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
        dir: PathBuf,
    },
    /// List the exit codes
    #[command(hide = true, name = "exit-codes", long_about = crate::exit::text())]
    ExitCodes,
    /// Print the version
    Version,
}

#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// The monitor that runs the probe guest [default: beside this program, then on the PATH]
    #[arg(long, value_name = "PATH", value_hint = ValueHint::FilePath)]
    pub vmm: Option<PathBuf>,
    /// Where instances' disks will be
    #[arg(long, value_name = "DIR", default_value = "/var/lib/roost", value_hint = ValueHint::DirPath)]
    pub state_dir: PathBuf,
    /// Run folder of the agent, where it writes what is wrong with this host
    #[arg(long, value_name = "DIR", default_value = "/run/roost", value_hint = ValueHint::DirPath)]
    pub run_dir: PathBuf,
}

#[derive(Debug, Args)]
pub struct ConfigureArgs {
    /// Take everything from a controller's admin.json
    #[arg(long, value_name = "FILE", conflicts_with_all = ["ca_file", "access_key_id", "secret_file", "region"], value_hint = ValueHint::FilePath)]
    pub from: Option<PathBuf>,
    /// File with the controller's CA certificate (PEM)
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub ca_file: Option<PathBuf>,
    /// Access key id (AKIA…)
    #[arg(long, value_name = "KEY")]
    pub access_key_id: Option<String>,
    /// File with the secret access key, or - for standard input; never on the command line, where others see it
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub secret_file: Option<PathBuf>,
    /// Region of the controller
    #[arg(long, value_name = "NAME")]
    pub region: Option<String>,
    #[command(subcommand)]
    pub command: Option<ConfigureCommand>,
}

#[derive(Debug, Subcommand)]
pub enum ConfigureCommand {
    /// List profiles; secrets are not shown
    Ls,
    /// Remove a profile
    Rm {
        /// The profile
        name: String,
    },
}

#[derive(Debug, Subcommand)]
pub enum AccountCommand {
    /// Make an account with an access key (administrators)
    Create {
        /// 1 to 64 characters of a-z A-Z 0-9 . _ -; unique
        name: String,
        /// May make accounts, share images and see every bill
        #[arg(long)]
        admin: bool,
        /// Keep the access key as a profile of this name instead of printing it
        #[arg(long, value_name = "NAME")]
        save_profile: Option<String>,
    },
    /// List accounts
    Ls,
}

#[derive(Debug, Subcommand)]
pub enum KeyCommand {
    /// Make an ed25519 key pair and keep its private half in a file of mode 0600
    Create {
        /// Name of the key pair
        name: String,
        /// File to write [default: ~/.config/roost/keys/NAME.pem, or keys/PROFILE/NAME.pem]
        #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
        out: Option<PathBuf>,
    },
    /// Import a public key
    Import {
        /// Name of the key pair
        name: String,
        /// Public key file, or - for standard input
        #[arg(default_value = "~/.ssh/id_ed25519.pub", value_hint = ValueHint::FilePath)]
        file: PathBuf,
    },
    /// List key pairs
    Ls,
    /// Forget a key pair; instances that have it keep it, and so do you
    Rm {
        /// Name of the key pair
        name: String,
    },
}

#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Upload an image: a folder with manifest.json, kernel, root disk and perhaps an initrd
    #[command(after_help = "manifest.json: {\"name\", \"kernel\", \"initrd\"?, \"root\", \"boot_args\", \
        \"default_user\", \"ssh\"?, \"description\"?};\n\
        files are regular ones inside its folder; \"ssh\" says whether instances run an ssh server.\n\
        What the controller has already is not sent again, so an import that was cut off is simply repeated.")]
    Import {
        /// Folder, or its manifest.json
        #[arg(value_name = "DIR", value_hint = ValueHint::AnyPath)]
        path: PathBuf,
        /// Register under this name instead of the manifest's
        #[arg(long, value_name = "NAME")]
        name: Option<String>,
        /// Withdraw an image of that name first
        #[arg(long)]
        replace: bool,
    },
    /// List images
    Ls,
    /// Withdraw an image; instances made from it go on
    Rm {
        /// Id or name
        image: String,
    },
}

#[derive(Debug, Args)]
pub struct LaunchArgs {
    /// Instance type (`roost types`)
    #[arg(long = "type", short = 't', value_name = "TYPE")]
    pub instance_type: String,
    /// Image, by id or name (`roost image ls`)
    #[arg(long, short)]
    pub image: String,
    /// Key pair that may log in (`roost key ls`)
    #[arg(long, short, value_name = "NAME")]
    pub key: Option<String>,
    /// How many: N, or MIN:MAX to take as many as there is room for
    #[arg(long, short = 'n', value_name = "N|MIN:MAX", default_value = "1")]
    pub count: String,
    /// Script or cloud-config for the first boot, or - for standard input; at most 16 KiB
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub user_data: Option<PathBuf>,
    /// Size of the root volume in GiB [default: the image's]
    #[arg(long, value_name = "GIB")]
    pub volume_gib: Option<u64>,
    /// Tag; may be repeated
    #[arg(long = "tag", value_name = "KEY=VALUE")]
    pub tags: Vec<String>,
    /// Name: the tag Name, shown in tables and accepted instead of the id
    #[arg(long)]
    pub name: Option<String>,
    /// Whether the metadata service answers the instances; without it they get no key, no name and no user data
    /// [default: on]
    #[arg(long, value_name = "ON|OFF")]
    pub metadata: Option<Switch>,
    /// Whether the metadata service wants a session token (IMDSv2 only) [default: optional]
    #[arg(long, value_name = "WHEN")]
    pub metadata_tokens: Option<Tokens>,
    /// Makes a repeated launch the same launch [default: a new one each time]
    #[arg(long, value_name = "TOKEN")]
    pub client_token: Option<String>,
    /// Check everything, launch nothing
    #[arg(long, conflicts_with = "wait")]
    pub dry_run: bool,
    /// Return when the instances can be used (see --wait-for)
    #[arg(long, short)]
    pub wait: bool,
    /// What to wait for: `running` (its CPUs run) or `ready` (it answers ssh, or where its image has none, says so)
    #[arg(long, value_name = "STATE", default_value = "ready", requires = "wait")]
    pub wait_for: WaitFor,
    #[command(flatten)]
    pub timeout: Timeout,
}

/// On or off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    /// On.
    On,
    /// Off.
    Off,
}

/// Whether a session token is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Tokens {
    /// IMDSv1 and IMDSv2.
    Optional,
    /// IMDSv2 only.
    Required,
}

/// What `launch --wait` waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum WaitFor {
    /// Virtual CPUs run.
    Running,
    /// It answers ssh; where its image has no ssh, its guest said that it is ready.
    Ready,
}

/// How long to wait.
#[derive(Debug, Clone, Copy, Args)]
pub struct Timeout {
    /// Longest wait, such as 90s or 5m
    #[arg(long, value_name = "SPAN", default_value = "5m", value_parser = parse::duration)]
    pub timeout: Duration,
}

#[derive(Debug, Args)]
pub struct LsArgs {
    /// Only these, by id or name
    pub instances: Vec<String>,
    /// Terminated ones too
    #[arg(long, short)]
    pub all: bool,
    /// Every account's (administrators)
    #[arg(long)]
    pub all_accounts: bool,
}

#[derive(Debug, Args)]
pub struct DescribeArgs {
    /// Id or name
    pub instance: String,
    /// How long each part of its latest start took
    #[arg(long)]
    pub timing: bool,
}

#[derive(Debug, Args)]
pub struct ConsoleArgs {
    /// Id or name
    pub instance: String,
    /// Go on with what comes, across reboots, until the instance ends
    #[arg(long, short, conflicts_with = "attach")]
    pub follow: bool,
    /// Type on it; Ctrl-] or (after Enter) ~. ends
    #[arg(long, short)]
    pub attach: bool,
}

#[derive(Debug, Args)]
#[command(
    after_help = "ssh's own configuration files are not read, and neither agent nor X11 is forwarded.\n\
    `-L`, agent forwarding and the like: use ssh yourself with\n  \
    ssh -o ProxyCommand='roost tunnel ID 22' USER@ID"
)]
pub struct SshArgs {
    /// Id or name
    pub instance: String,
    /// Login [default: the image's]
    #[arg(long, short, value_name = "NAME")]
    pub user: Option<String>,
    /// Private key file [default: that of the instance's key pair]
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub key: Option<PathBuf>,
    #[command(flatten)]
    pub timeout: Timeout,
    /// Command to run instead of a login shell
    #[arg(last = true, value_name = "CMD")]
    pub command: Vec<String>,
}

#[derive(Debug, Args)]
pub struct TunnelArgs {
    /// Id or name
    pub instance: String,
    /// TCP port of the instance
    #[arg(value_parser = clap::value_parser!(u16).range(1..))]
    pub port: u16,
}

#[derive(Debug, Args)]
pub struct StopArgs {
    /// Ids or names
    #[arg(required = true)]
    pub instances: Vec<String>,
    /// Without asking the guest first: as if the power went
    #[arg(long, short)]
    pub force: bool,
    /// Return when they are stopped
    #[arg(long, short)]
    pub wait: bool,
    #[command(flatten)]
    pub timeout: Timeout,
}

#[derive(Debug, Args)]
pub struct StartArgs {
    /// Ids or names
    #[arg(required = true)]
    pub instances: Vec<String>,
    /// Return when they run
    #[arg(long, short)]
    pub wait: bool,
    #[command(flatten)]
    pub timeout: Timeout,
}

#[derive(Debug, Args)]
pub struct RebootArgs {
    /// Ids or names
    #[arg(required = true)]
    pub instances: Vec<String>,
}

#[derive(Debug, Args)]
pub struct TerminateArgs {
    /// Ids or names
    #[arg(required = true)]
    pub instances: Vec<String>,
    /// Return when nothing of them is left
    #[arg(long, short)]
    pub wait: bool,
    #[command(flatten)]
    pub timeout: Timeout,
}

#[derive(Debug, Args)]
pub struct ResizeArgs {
    /// Id or name
    pub instance: String,
    /// Its new type
    #[arg(long = "type", short = 't', value_name = "TYPE")]
    pub instance_type: String,
    /// Stop it first if it runs, and start it afterwards
    #[arg(long)]
    pub stop_start: bool,
    #[command(flatten)]
    pub timeout: Timeout,
}

#[derive(Debug, Args)]
pub struct BillArgs {
    /// From: a day, a moment (UTC) or how long ago [default: the first of this month]
    #[arg(long, value_name = "TIME")]
    pub since: Option<String>,
    /// Up to: the same [default: now]
    #[arg(long, value_name = "TIME")]
    pub until: Option<String>,
    /// One line per instance, account, type or day
    #[arg(long, value_name = "WHAT", default_value = "instance", value_parser = bill_by())]
    pub by: BillBy,
    /// Every account's (administrators)
    #[arg(long)]
    pub all_accounts: bool,
}

fn bill_by() -> impl clap::builder::TypedValueParser<Value = BillBy> {
    use clap::builder::{PossibleValuesParser, TypedValueParser};
    PossibleValuesParser::new(BillBy::ALL.iter().map(|by| by.as_str())).try_map(|text| text.parse::<BillBy>())
}

/// Arguments of `hosts`.
#[derive(Debug, Args)]
pub struct HostsArgs {
    /// End an instance that a host has and the database does not know, with its disk
    #[arg(long, value_name = "INSTANCE")]
    pub end_orphan: Option<String>,
}

#[derive(Debug, Args)]
pub struct TypesArgs {
    /// Only this family, such as t3
    #[arg(long, short, value_name = "NAME")]
    pub family: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
