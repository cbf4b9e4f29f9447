//! `console`: the serial console, shown or typed on.
//!
//! What a guest writes goes through a filter ([`crate::harmless`]) on its way to the terminal.

use super::escape::{Escape, Typed};
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
/// Most typed bytes that wait for a console that is away.
const KEPT_MAX: usize = 64 * 1024;
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

/// The user's keyboard, or a script that is piped in.
struct Typist {
    stdin: tokio::io::Stdin,
    interactive: bool,
    escape: Escape,
    ended: bool,
}

impl Typist {
    /// What is typed next; it may be dropped while it waits. The end of a script is nothing typed, once. After it nothing
    /// comes any more, but its answers still may.
    async fn next(&mut self) -> Result<Typed> {
        let mut bytes = [0; 4096];
        if !self.ended {
            match self.stdin.read(&mut bytes).await? {
                0 => {
                    self.ended = true;
                    return Ok(Typed::default());
                }
                count if self.interactive => return Ok(self.escape.feed(&bytes[..count])),
                count => return Ok(Typed { bytes: bytes[..count].to_vec(), ..Typed::default() }),
            }
        }
        std::future::pending().await
    }
}

/// Joins the user's terminal and the console, also after the connection, the agent or the controller was away. What is
/// typed meanwhile is kept.
async fn attach(context: &Context, client: &Client, id: &InstanceId) -> Result<()> {
    let (mut link, mut offset) = open(context, client, id, 0, true, true).await?;
    let interactive = std::io::stdin().is_terminal();
    if interactive {
        context.output.note(&format!("console of {id}: Ctrl-] ends (or ~. after Enter)"));
    }
    // Until the end of this function, however it is reached.
    let mode = if interactive { Some(Mode::raw()?) } else { None };
    let mut filter = if std::io::stdout().is_terminal() { Stream::terminal() } else { Stream::plain() };
    let mut typist =
        Typist { stdin: tokio::io::stdin(), interactive, escape: Escape::LineStart, ended: false };
    let mut shown = vec![0; 16 * 1024];
    let mut kept = Vec::new();
    loop {
        let mut lost = !send(&mut link, &mut kept).await;
        let mut farewell = false;
        while !lost {
            tokio::select! {
                count = link.reader.read(&mut shown) => match count {
                    Ok(count @ 1..) => {
                        offset += count as u64;
                        print(&filter.feed(&shown[..count]))?;
                    }
                    // A script that has been typed to its end has nothing to wait for.
                    Ok(0) if typist.ended => return Ok(()),
                    Ok(0) => (lost, farewell) = (true, true),
                    Err(_) => lost = true,
                },
                typed = typist.next() => {
                    let Typed { bytes, end, help } = typed?;
                    kept.extend(bytes);
                    lost = !send(&mut link, &mut kept).await;
                    if help {
                        print(HELP)?;
                    }
                    if end {
                        drop(mode);
                        context.output.note("\nleft the console; the instance goes on");
                        return Ok(());
                    }
                }
            }
        }
        let again = reopen(context, client, id, offset);
        tokio::pin!(again);
        let opened = loop {
            tokio::select! {
                opened = &mut again => break opened?,
                typed = typist.next() => {
                    let Typed { bytes, end, .. } = typed?;
                    kept.extend(bytes);
                    kept.truncate(KEPT_MAX);
                    if end {
                        drop(mode);
                        context.output.note("\nleft the console, which was away");
                        return Ok(());
                    }
                    // Whether a script's end or the stream's is seen first is chance.
                    if typist.ended && farewell && kept.is_empty() {
                        return Ok(());
                    }
                }
            }
        };
        let Some(opened) = opened else { break };
        (link, offset) = opened;
    }
    drop(mode);
    context.output.note(&format!("\nthe console of {id} has ended; `roost describe {id}` says why"));
    Ok(())
}

/// Sends what was typed; `false`, and it is kept, if nobody takes it.
async fn send(link: &mut Duplex, typed: &mut Vec<u8>) -> bool {
    if typed.is_empty() {
        return true;
    }
    let sent = async {
        link.writer.write_all(typed).await?;
        link.writer.flush().await
    };
    let sent = sent.await.is_ok();
    if sent {
        typed.clear();
    }
    sent
}

/// Opens an attached console again, as long as the instance goes on.
async fn reopen(
    context: &Context,
    client: &Client,
    id: &InstanceId,
    offset: u64,
) -> Result<Option<(Duplex, u64)>> {
    while goes_on(client, id).await? {
        tokio::time::sleep(RECONNECT).await;
        match open(context, client, id, offset, true, true).await {
            Ok(link) => return Ok(Some(link)),
            Err(error) if may_come_back(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}
