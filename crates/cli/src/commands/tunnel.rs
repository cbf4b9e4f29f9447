//! `tunnel`: standard input and output to a TCP port of an instance, by way of controller and agent.

use crate::args::TunnelArgs;
use crate::client::{Client, Duplex};
use crate::context::Context;
use crate::error::{Error, Result};
use crate::resolve;
use roost_types::InstanceId;
use roost_types::agent::TunnelHeader;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// `tunnel`.
pub async fn run(context: &Context, args: TunnelArgs) -> Result<()> {
    let client = context.client()?;
    let id = resolve::id(&client, &args.instance).await?;
    let Duplex { mut reader, mut writer } = open(&client, &id, args.port).await?;
    let out = async { pump(&mut reader, &mut tokio::io::stdout(), false).await };
    let into = async { pump(&mut tokio::io::stdin(), &mut writer, true).await };
    tokio::pin!(out, into);
    tokio::select! {
        // The instance has closed: nobody reads what else is typed.
        done = &mut out => done?,
        // The input has ended, or the instance takes no more of it: its answer is still to come.
        _ = &mut into => out.await?,
    }
    Ok(())
}

/// Opens a TCP connection to a port of an instance.
pub async fn open(client: &Client, id: &InstanceId, port: u16) -> Result<Duplex> {
    let mut stream = client.open(&format!("/v1/instances/{id}/tcp/{port}")).await?;
    match stream.header::<TunnelHeader>().await?.error {
        None => Ok(stream),
        Some(why) => Err(Error::Unavailable(format!("port {port} of {id} does not answer: {why}"))),
    }
}

/// Copies until the end, each piece at once; then closes the other side if wanted.
async fn pump<R, W>(from: &mut R, to: &mut W, close: bool) -> std::io::Result<()>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let mut bytes = vec![0; 64 * 1024];
    loop {
        let count = from.read(&mut bytes).await?;
        if count == 0 {
            return if close { to.shutdown().await } else { Ok(()) };
        }
        to.write_all(&bytes[..count]).await?;
        to.flush().await?;
    }
}
