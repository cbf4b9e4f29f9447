//! `roost-vmm`: runs one virtual machine, or says what this host's KVM can do.

// `println!` and `eprintln!` panic on a closed output, and a panic has no exit code of ours.
#![deny(clippy::print_stderr, clippy::print_stdout)]

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::exit;

use roost_vmm::api::outputs::set_log;
use roost_vmm::api::{Machine, Server};
use roost_vmm::cli::{self, Command, Run};
use roost_vmm::config::{LoggerConfig, MetricsConfig, VmConfig};
use roost_vmm::cpu::template::{CpuTemplate, alike};
use roost_vmm::descriptors::Descriptors;
use roost_vmm::exit::ExitCode;
use roost_vmm::opener::Opener;
use roost_vmm::preboot::Preboot;
use roost_vmm::running::End;
use roost_vmm::status::StatusWriter;
use roost_vmm::vm::open_kvm;
use roost_vmm::{
    Error, Result, heap, jail, log, page_server, probe, seccomp, sigbus, snapshot, stand_alone, threads,
};

fn main() {
    let arguments = std::env::args_os().skip(1).map(|argument| argument.to_string_lossy().into_owned());
    let code = match cli::parse(arguments) {
        Ok(Command::Run(run)) => run_machine(&run),
        Ok(Command::Jail(options)) => exit(run_jailed(*options)),
        Ok(Command::Probe { json }) => run_probe(json),
        Ok(Command::Rebase { base, diff }) => run_rebase(&base, &diff),
        Ok(Command::ServeMemory(options)) => ended(page_server::serve(&options)),
        Ok(Command::DumpCpu) => print_template(open_kvm(None).and_then(|kvm| alike::dump(&kvm))),
        Ok(Command::CommonCpu(files)) => print_template(common_template(&files)),
        Ok(Command::Say(text)) => ended(log::print(&text)),
        Err(why) => {
            log::error(&why);
            ExitCode::Config
        }
    };
    exit(code.code());
}

fn run_machine(run: &Run) -> ExitCode {
    heap::share();
    let id = run.id.as_deref().unwrap_or("anonymous");
    log::set_id(id);
    threads::name_this(threads::API);
    end_process_on_panic();
    let mut status = StatusWriter::default();
    let mut server = prepare(run, id, &mut status);
    let end = match &mut server {
        Ok(server) => server.serve(&mut status).unwrap_or_else(|error| End::error(&error)),
        Err(error) => {
            let end = End::error(error);
            log::beside_the_log(&end.message);
            end
        }
    };
    end.announce(&mut status);
    roost_vmm::api::terminal::restore();
    // No destructor runs: parked threads and open devices go with the process.
    exit(end.code.code());
}

/// Parses, opens, builds: everything before the guest.
fn prepare(run: &Run, id: &str, status: &mut StatusWriter) -> Result<Server> {
    // First of all: it needs a process of one thread, and nothing of what is opened below.
    let opener = run.open_paths.then(Opener::start).transpose().map_err(Error::io("starting the opener"))?;
    let descriptors = Descriptors::from_options(&run.fds)?.with(opener);
    let config = stand_alone::config_text(run)?.map(|text| VmConfig::from_json(&text)).transpose()?;
    let listener = stand_alone::listener(run)?;
    if listener.is_none() && (config.is_none() || run.hold) {
        let what = if run.hold { "--hold" } else { "a machine without --config" };
        return Err(Error::Config(format!("{what} needs --api-sock or --api-fd to be started with")));
    }
    let configured = config.is_some();
    let mut config = config.unwrap_or_default();
    if run.logger != LoggerConfig::default() {
        config.logger = Some(run.logger.clone().with(config.logger.unwrap_or_default()));
    }
    if let Some(logger) = &config.logger {
        set_log(logger.clone(), &descriptors)?;
    }
    config.metrics = config
        .metrics
        .or_else(|| run.metrics_path.clone().map(|metrics_path| MetricsConfig { metrics_path }));
    let mut server = Server::new(listener, id.to_owned())?;
    server.open_metrics(config.metrics.as_ref(), &descriptors)?;
    let preboot = Preboot::new(config, descriptors);
    *status = preboot.open_status()?;
    seccomp::sigsys::install(status.raw_fd())?;
    sigbus::install()?;
    let machine = match (configured, run.hold) {
        (false, _) => {
            preboot.prepare();
            Machine::Preboot(preboot)
        }
        (true, true) => Machine::Held(server.build(&preboot, status)?),
        (true, false) => {
            let held = server.build(&preboot, status)?;
            Machine::Running(held.start(status)?)
        }
    };
    Ok(server.with(machine))
}

/// A thread that panics must not leave a machine behind that hangs.
fn end_process_on_panic() {
    std::panic::set_hook(Box::new(|info| {
        log::error(&format!("internal fault: {info}"));
        roost_vmm::api::terminal::restore();
        // SAFETY: ends the process at once; nothing else needs to run.
        unsafe { libc::_exit(ExitCode::Internal.code()) };
    }));
}

fn run_rebase(base: &Path, diff: &Path) -> ExitCode {
    let open = |path: &Path, what, write| {
        File::options().read(true).write(write).open(path).map_err(|source| Error::Path {
            what,
            path: path.to_owned(),
            source,
        })
    };
    let done = open(base, "base", true).and_then(|base| snapshot::rebase(&base, &open(diff, "diff", false)?));
    ended(done.and_then(|bytes| {
        log::print(&format!("{}: {} KiB from {}\n", base.display(), bytes / 1024, diff.display()))
    }))
}

fn ended(result: Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::PowerOff,
        Err(error) => {
            log::error(&error.chain());
            error.exit_code()
        }
    }
}

fn run_jailed(options: jail::Options) -> i32 {
    if let Some(id) = &options.id {
        log::set_id(id);
    }
    jail::run(options).unwrap_or_else(|error| {
        log::line(&error.chain());
        error.exit_code().code()
    })
}

fn common_template(files: &[PathBuf]) -> Result<CpuTemplate> {
    let read = |path: &PathBuf| {
        let named = |why: &dyn std::fmt::Display| Error::Config(format!("{}: {why}", path.display()));
        let text = std::fs::read_to_string(path).map_err(|error| named(&error))?;
        serde_json::from_str(&text).map_err(|error| named(&error))
    };
    let dumps: Vec<CpuTemplate> = files.iter().map(read).collect::<Result<_>>()?;
    alike::common(&dumps).map_err(Error::Config)
}

fn print_template(template: Result<CpuTemplate>) -> ExitCode {
    ended(template.and_then(|template| {
        log::print(&format!("{}\n", serde_json::to_string_pretty(&template).unwrap_or_default()))
    }))
}

fn run_probe(json: bool) -> ExitCode {
    let report = probe::run();
    let text = if json {
        format!("{}\n", serde_json::to_string_pretty(&report).unwrap_or_default())
    } else {
        report.to_string()
    };
    match ended(log::print(&text)) {
        ExitCode::PowerOff if !report.usable() => ExitCode::Kvm,
        code => code,
    }
}
