//! `console`: the serial console, shown or typed on.
//!
//! What a guest writes goes through a filter ([`crate::harmless`]) on its way to the terminal.

use super::escape::Escape;
use crate::args::ConsoleArgs;
use crate::client::{Client, Duplex};
use crate::context::Context;
use crate::error::{Error, Result};
use crate::harmless::Stream;
use crate::resolve;
use crate::terminal::Mode;
use roost_types::agent::ConsoleHeader;
use roost_types::{ErrorCode, InstanceId, InstanceState};
use std::io::IsTerminal;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Pause before a lost stream is opened again.
const RECONNECT: Duration = Duration::from_millis(500);
const HELP: &str = "\r\nCtrl-] ends; so does ~. after Enter; ~~ types one ~\r\n";

/// `console`.
pub async fn run(context: &Context, args: ConsoleArgs) -> Result<()> {
    let client = context.client()?;
    let id = resolve::id(&client, &args.instance).await?;
    if args.attach {
        attach(context, &client, &id).await
    } else {
        show(context, &client, &id, args.follow).await
    }
}

async fn open(
    context: &Context,
    client: &Client,
    id: &InstanceId,
    offset: u64,
    follow: bool,
    input: bool,
) -> Result<(Duplex, u64)> {
    let mut stream = client
        .open(&format!("/v1/instances/{id}/console?offset={offset}&follow={follow}&input={input}"))
        .await?;
    let header: ConsoleHeader = stream.header().await?;
    if let Some(why) = header.error {
        return Err(Error::State(format!("{id} has no console to show: {why}")));
    }
    if header.lost > 0 {
        let lost = header.lost;
        context.output.note(&format!("({lost} older bytes are gone: a console keeps its last 64 KiB)"));
    }
    Ok((stream, header.offset))
}

/// Shows what there is and, if wanted, what comes: also after the connection, the agent or the controller was away.
async fn show(context: &Context, client: &Client, id: &InstanceId, follow: bool) -> Result<()> {
    let mut filter = Stream::plain();
    let mut offset = 0;
    loop {
        let opened = open(context, client, id, offset, follow, false).await;
        let failed = match opened {
            Ok((mut stream, from)) => {
                offset = from;
                let mut bytes = vec![0; 16 * 1024];
                // An error here is a stream that ended without a farewell.
                while let Ok(count @ 1..) = stream.reader.read(&mut bytes).await {
                    offset += count as u64;
                    print(&filter.feed(&bytes[..count]))?;
                }
                None
            }
            Err(error) if follow && may_come_back(&error) => Some(error),
            Err(error) => return Err(error),
        };
        if !follow || !goes_on(client, id).await? {
            return failed.map_or(Ok(()), Err);
        }
        tokio::time::sleep(RECONNECT).await;
    }
}

/// Whether a console that cannot be opened now may be there later.
fn may_come_back(error: &Error) -> bool {
    error.is_transport()
        || error.is_api(ErrorCode::Unavailable)
        || error.is_api(ErrorCode::IncorrectInstanceState)
        || matches!(error, Error::Unavailable(_) | Error::State(_))
}

/// Whether more console output may come.
async fn goes_on(client: &Client, id: &InstanceId) -> Result<bool> {
    match resolve::describe(client, id).await {
        Ok(instance) => Ok(matches!(
            instance.state,
            InstanceState::Pending | InstanceState::Running | InstanceState::Stopping
        )),
        // A controller that restarts says nothing about the instance.
        Err(error) if error.is_transport() => Ok(true),
        Err(error) => Err(error),
    }
}

fn print(text: &str) -> Result<()> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(())
}

/// Joins the user's terminal and the console.
async fn attach(context: &Context, client: &Client, id: &InstanceId) -> Result<()> {
    let (Duplex { mut reader, mut writer }, _) = open(context, client, id, 0, true, true).await?;
    let interactive = std::io::stdin().is_terminal();
    if interactive {
        context.output.note(&format!("console of {id}: Ctrl-] ends (or ~. after Enter)"));
    }
    // Until the end of this function, however it is reached.
    let _mode = if interactive { Some(Mode::raw()?) } else { None };
    let mut filter = if std::io::stdout().is_terminal() { Stream::terminal() } else { Stream::plain() };
    let mut escape = Escape::LineStart;
    let mut stdin = tokio::io::stdin();
    let (mut typed, mut shown) = (vec![0; 4096], vec![0; 16 * 1024]);
    let mut typing = true;
    loop {
        tokio::select! {
            count = reader.read(&mut shown) => match count {
                Ok(count @ 1..) => print(&filter.feed(&shown[..count]))?,
                Ok(0) | Err(_) => break,
            },
            count = stdin.read(&mut typed), if typing => {
                let count = count?;
                if count == 0 {
                    // A script's input has ended; its answers may still come.
                    typing = false;
                    continue;
                }
                if !interactive {
                    writer.write_all(&typed[..count]).await?;
                    writer.flush().await?;
                    continue;
                }
                let keys = escape.feed(&typed[..count]);
                writer.write_all(&keys.bytes).await?;
                writer.flush().await?;
                if keys.help {
                    print(HELP)?;
                }
                if keys.end {
                    drop(_mode);
                    context.output.note("\nleft the console; the instance goes on");
                    return Ok(());
                }
            }
        }
    }
    drop(_mode);
    context.output.note(&format!("\nthe console of {id} has ended; `roost describe {id}` says why"));
    Ok(())
}
