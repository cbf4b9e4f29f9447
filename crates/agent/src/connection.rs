//! The conversation with a controller: hello, then three loops until one of them fails, then again after a pause.
//! While nobody answers, guests run on and everything that was accepted goes on.

use crate::agent::Agent;
use crate::controller::Controller;
use crate::error::{Error, Result};
use crate::real::RealHost;
use crate::streams::Streams;
use roost_types::agent::{HelloRequest, PROTOCOL, Report};
use std::sync::Arc;
use std::time::Duration;

/// First pause after a failure.
const PAUSE_FIRST: Duration = Duration::from_millis(250);
/// Longest pause after a failure.
const PAUSE_MAX: Duration = Duration::from_secs(10);
/// Changes that come together are reported together.
const GATHER: Duration = Duration::from_millis(5);

/// How long the end of the agent waits for an answer.
const PARTING: Duration = Duration::from_secs(3);

/// Talks for ever.
pub async fn run(agent: Arc<Agent<RealHost>>, controller: Controller, streams: Arc<Streams>) {
    let mut pause = PAUSE_FIRST;
    loop {
        let error = match hello(&agent, &controller).await {
            Ok(every) => {
                tracing::info!("connected to the controller");
                pause = PAUSE_FIRST;
                tokio::select! {
                    error = desired(&agent, &controller) => error,
                    error = report(&agent, &controller, every) => error,
                    error = requests(&controller, &streams) => error,
                }
            }
            Err(error) => error,
        };
        tracing::warn!(error = %error.chain(), "the controller is not there; guests run on, trying again");
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

async fn hello(agent: &Agent<RealHost>, controller: &Controller) -> Result<Duration> {
    let hello = HelloRequest {
        protocol: PROTOCOL,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        host: agent.report().host,
    };
    let welcome = controller.hello(&hello).await?;
    Ok(Duration::from_millis(welcome.report_every_ms.clamp(100, 60_000)))
}

async fn desired(agent: &Arc<Agent<RealHost>>, controller: &Controller) -> Error {
    let mut after = None;
    loop {
        let desired = match controller.desired(after).await {
            Ok(desired) => desired,
            Err(error) => return error,
        };
        if after == Some(desired.version) {
            continue;
        }
        let version = desired.version;
        let taker = Arc::clone(agent);
        let taken = tokio::task::spawn_blocking(move || taker.apply(&desired)).await;
        match taken {
            Ok(Ok(())) => after = Some(version),
            // Such as a full disk: it is taken in again, with everything else that changed meanwhile.
            Ok(Err(error)) => {
                tracing::error!(error = %error.chain(), "what is wanted cannot be written down");
                after = None;
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            Err(error) => return Error::NotNow(format!("taking in what is wanted was cut short: {error}")),
        }
    }
}

async fn report(agent: &Agent<RealHost>, controller: &Controller, every: Duration) -> Error {
    let mut changes = agent.changes();
    let mut troubles = agent.host_troubles();
    loop {
        // Seen before the report is made: a change during it wakes the next round.
        changes.borrow_and_update();
        troubles.borrow_and_update();
        if let Err(error) = controller.observed(&agent.report()).await {
            return error;
        }
        tokio::select! {
            _ = changes.changed() => tokio::time::sleep(GATHER).await,
            _ = troubles.changed() => tokio::time::sleep(GATHER).await,
            () = tokio::time::sleep(every) => {}
        }
    }
}

/// Says for the last time what is seen here: a host that goes down in order is billed to that moment, and not to the last report that
/// happened to be made durable.
pub async fn part(agent: &Agent<RealHost>, controller: &Controller) {
    let report = Report { last: true, ..agent.report() };
    let told = tokio::time::timeout(PARTING, controller.observed(&report)).await;
    let why = match told {
        Ok(Ok(_)) => return,
        Ok(Err(error)) => error.chain(),
        Err(_) => format!("no answer within {} s", PARTING.as_secs()),
    };
    tracing::warn!(error = %why, "the last report was not taken");
}

async fn requests(controller: &Controller, streams: &Arc<Streams>) -> Error {
    loop {
        match controller.requests().await {
            Ok(requests) => requests.into_iter().for_each(|request| streams.open(request)),
            Err(error) => return error,
        }
    }
}
