//! From the command line to an exit code.

use crate::args::{Cli, Command, Format};
use crate::commands;
use crate::context::Context;
use crate::error::Error;
use crate::{exit, harmless, stderr, terminal};
use std::io::ErrorKind;
use std::process::ExitCode;
use tokio::signal::unix::{SignalKind, signal};

/// Runs the command that the program's arguments ask for.
pub fn main() -> ExitCode {
    // A panic in raw mode would leave a terminal that shows nothing of it.
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        terminal::restore();
        report(info);
    }));
    let cli = Cli::from_environment();
    let context = Context::new(cli.global.clone());
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return ExitCode::from(report_error(&context, &Error::Stdio(error))),
    };
    // ssh ends its proxy command with a hang-up when it is done: nobody was interrupted.
    let is_proxy = matches!(cli.command, Command::Tunnel(_));
    let outcome = runtime.block_on(async {
        tokio::select! {
            outcome = commands::run(&context, cli.command) => outcome,
            interrupted = interrupted(&context) => match interrupted {
                Ok(()) => Err(Error::Exit(exit::INTERRUPTED)),
                Err(error) => Err(Error::Stdio(error)),
            },
        }
    });
    // A thread that waits for standard input must not hold up the end.
    runtime.shutdown_background();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // By now the command has put back the terminal and removed what it had half made.
            if matches!(error, Error::Exit(exit::INTERRUPTED)) && !is_proxy {
                let note = context.interruption();
                stderr::line(if note.is_empty() { "interrupted" } else { &note });
            }
            ExitCode::from(report_error(&context, &error))
        }
    }
}

/// Returns when the user or the system asks for the end.
async fn interrupted(context: &Context) -> std::io::Result<()> {
    let mut signals =
        [signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?, signal(SignalKind::hangup())?];
    let [interrupt, terminate, hangup] = &mut signals;
    loop {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
        if !context.hands_on_signals() {
            return Ok(());
        }
    }
}

/// Says once what went wrong and the way out.
fn report_error(context: &Context, error: &Error) -> u8 {
    match error {
        Error::Exit(code) => return *code,
        // Whoever read the output has had enough of it.
        Error::Stdio(error) if error.kind() == ErrorKind::BrokenPipe => return exit::OK,
        _ => {}
    }
    let code = error.exit_code();
    let request_id = match error {
        Error::Api { request_id: Some(id), .. } => Some(id),
        _ => None,
    };
    if context.global.output == Format::Json {
        let mut body = serde_json::json!({
            "Error": { "Code": error.code(), "Message": message(error) },
            "ExitCode": code,
        });
        if let Some(id) = request_id {
            body["RequestId"] = id.as_str().into();
        }
        if let Some(hint) = error.hint() {
            body["Hint"] = hint.into();
        }
        stderr::line(&context.output.json_text(&body).unwrap_or_default());
        return code;
    }
    stderr::line(&format!("roost: {}", harmless::lines(&error.chain())));
    if let Some(hint) = error.hint() {
        stderr::line(&format!("  → {hint}"));
    }
    if let (Some(id), exit::INTERNAL) = (request_id, code) {
        stderr::line(&format!("  request id: {}", harmless::text(id)));
    }
    code
}

fn message(error: &Error) -> String {
    match error {
        Error::Api { error, .. } => error.message.clone(),
        other => other.chain(),
    }
}
