//! Streams: a guest's console and its ports, for a user who waits at the controller.

use crate::agent::Agent;
use crate::controller::Controller;
use crate::error::{Error, Result};
use crate::names::Folders;
use crate::net::service;
use crate::real::RealHost;
use roost_types::agent::{ConsoleHeader, HostRequest, StreamTarget, TunnelHeader};
use roost_types::ids::InstanceId;
use roost_vmm::console::{Chunk, ConsoleReader};
use serde::Serialize;
use std::fs::File;
use std::net::SocketAddrV4;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::unix::pipe;
use tokio::sync::Semaphore;

/// Streams at a time.
const STREAMS: usize = 256;
/// How long a guest may take to accept a connection.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often a console that is followed is looked at.
const LOOK: Duration = Duration::from_millis(50);

/// Opens streams.
pub struct Streams {
    agent: Arc<Agent<RealHost>>,
    controller: Controller,
    folders: Folders,
    slots: Arc<Semaphore>,
}

impl Streams {
    /// Streams of an agent's instances.
    pub fn new(agent: Arc<Agent<RealHost>>, controller: Controller, folders: Folders) -> Arc<Self> {
        Arc::new(Self { agent, controller, folders, slots: Arc::new(Semaphore::new(STREAMS)) })
    }

    /// Opens one, in the background. The user of one too many is told by the controller, which waits in vain.
    pub fn open(self: &Arc<Self>, request: HostRequest) {
        let Ok(slot) = Arc::clone(&self.slots).try_acquire_owned() else {
            tracing::warn!(instance = %request.instance_id, "too many streams");
            return;
        };
        let this = Arc::clone(self);
        tokio::spawn(async move {
            let id = request.instance_id.clone();
            if let Err(error) = this.serve(request).await {
                tracing::debug!(instance = %id, error = %error.chain(), "a stream ended");
            }
            drop(slot);
        });
    }

    async fn serve(&self, request: HostRequest) -> Result<()> {
        let connection = self.controller.stream(&request.stream).await?;
        let HostRequest { instance_id: id, target, .. } = request;
        let ended = match target {
            StreamTarget::Console { offset, follow, input } => {
                self.console(connection, &id, offset, follow, input).await
            }
            StreamTarget::Tcp { port } => self.tcp(connection, &id, port).await,
        };
        ended.map_err(Error::io("a stream"))
    }

    async fn console(
        &self,
        mut connection: impl AsyncRead + AsyncWrite + Unpin,
        id: &InstanceId,
        offset: u64,
        follow: bool,
        input: bool,
    ) -> std::io::Result<()> {
        let reader = File::open(self.folders.console(id)).and_then(ConsoleReader::new);
        let reader = match reader {
            Ok(reader) => reader,
            Err(error) => {
                let error = Some(format!("instance {id} has no console on this host yet: {error}"));
                header(&mut connection, &ConsoleHeader { offset, lost: 0, error }).await?;
                return connection.shutdown().await;
            }
        };
        // An offset that lies ahead, such as the largest number, begins at the end of what there is.
        let offset = offset.min(reader.written()?);
        let mut chunk = reader.read_from(offset)?;
        let begin = ConsoleHeader { offset: offset + chunk.lost, lost: chunk.lost, error: None };
        header(&mut connection, &begin).await?;
        connection.write_all(&chunk.bytes).await?;
        connection.flush().await?;
        if !follow && !input {
            return connection.shutdown().await;
        }
        let (mut from, mut to) = tokio::io::split(connection);
        let out = async {
            loop {
                tokio::time::sleep(LOOK).await;
                // Asked first: what a guest wrote before its end is shown.
                let rests = self.agent.rests(id);
                let Chunk { bytes, lost, next_offset } = reader.read_from(chunk.next_offset)?;
                // The user's side counts what it gets. It opens another stream where this one ended, and is told
                // there how much the ring has lost meanwhile.
                if lost > 0 || rests && bytes.is_empty() {
                    return to.shutdown().await;
                }
                chunk.next_offset = next_offset;
                if !bytes.is_empty() {
                    to.write_all(&bytes).await?;
                    to.flush().await?;
                }
            }
        };
        let typed = async {
            let mut buffer = [0; 1024];
            loop {
                let count = from.read(&mut buffer).await?;
                if count == 0 {
                    return Ok(());
                }
                if input {
                    type_in(&self.folders, id, &buffer[..count]).await;
                }
            }
        };
        tokio::select! {
            ended = out => ended,
            ended = typed => ended,
        }
    }

    async fn tcp(
        &self,
        mut connection: impl AsyncRead + AsyncWrite + Unpin,
        id: &InstanceId,
        port: u16,
    ) -> std::io::Result<()> {
        let mut guest = match self.connect(id, port).await {
            Ok(guest) => guest,
            Err(error) => {
                header(&mut connection, &TunnelHeader { error: Some(error.chain()) }).await?;
                return connection.shutdown().await;
            }
        };
        header(&mut connection, &TunnelHeader { error: None }).await?;
        tokio::io::copy_bidirectional(&mut connection, &mut guest).await.map(drop)
    }

    async fn connect(&self, id: &InstanceId, port: u16) -> Result<TcpStream> {
        let accepted = self
            .agent
            .accepted(id)
            .ok_or_else(|| Error::NotNow(format!("instance {id} is not on this host")))?;
        let to = SocketAddrV4::new(accepted.spec().interface.private_ip, port);
        let namespace = self.folders.netns_file(id);
        let stream = tokio::task::spawn_blocking(move || service::connect(&namespace, to, PATIENCE))
            .await
            .unwrap_or_else(|error| Err(Error::NotNow(format!("connecting was cut short: {error}"))))?;
        TcpStream::from_std(stream).map_err(Error::io("setting up a connection"))
    }
}

async fn header<T: Serialize>(to: &mut (impl AsyncWrite + Unpin), header: &T) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(header)?;
    line.push(b'\n');
    to.write_all(&line).await?;
    to.flush().await
}

/// Types into the console, if a monitor reads there. A guest that does not read loses what does not fit in its pipe.
async fn type_in(folders: &Folders, id: &InstanceId, bytes: &[u8]) {
    let Ok(mut pipe) = pipe::OpenOptions::new().open_sender(folders.console_input(id)) else { return };
    let _ = tokio::time::timeout(Duration::from_secs(2), pipe.write_all(bytes)).await;
}
