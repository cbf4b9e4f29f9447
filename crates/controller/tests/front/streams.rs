//! Consoles and tunnels, with an agent that dials in.

use crate::harness::{Agent, Client, DEADLINE, Server, eventually, refusal};
use reqwest::{Method, Response, StatusCode, Upgraded};
use roost_controller::server::Limits;
use roost_types::agent::{HostRequest, StreamTarget};
use roost_types::{ErrorCode, InstanceId};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

async fn dial(client: &Client, path: &str) -> Response {
    let request = client.signed(Method::GET, path, Vec::new(), None);
    request.header("connection", "upgrade").header("upgrade", "roost-stream").send().await.unwrap()
}

/// What an agent does when it is asked for one stream.
async fn serve_one(agent: &Agent) -> (HostRequest, Upgraded) {
    let requests: Vec<HostRequest> = agent.get("requests").await.unwrap();
    let request = requests.into_iter().next().expect("a request within one long poll");
    let path = format!("streams/{}", request.stream);
    let reply = agent.request(Method::GET, &path);
    let reply = reply.header("connection", "upgrade").header("upgrade", "roost-stream").send().await.unwrap();
    assert_eq!(reply.status(), StatusCode::SWITCHING_PROTOCOLS);
    (request, reply.upgrade().await.unwrap())
}

async fn setting(limits: Limits) -> (Server, Client, Agent, InstanceId) {
    let server = Server::with_limits(limits).await;
    let agent = server.host("box-1").await;
    server.admin().image("debian").await;
    let alice = server.account("alice").await;
    let instance = alice.launch("debian").await;
    (server, alice, agent, instance)
}

#[tokio::test]
async fn a_console_reaches_the_agent_and_bytes_pass_both_ways() {
    let (_server, alice, agent, instance) = setting(Limits::default()).await;
    let path = format!("/v1/instances/{instance}/console?offset=5&follow=true&input=true");
    let (user, (request, mut far)) = tokio::join!(dial(&alice, &path), serve_one(&agent));
    assert_eq!(user.status(), StatusCode::SWITCHING_PROTOCOLS);
    assert_eq!(request.instance_id, instance);
    assert_eq!(request.target, StreamTarget::Console { offset: 5, follow: true, input: true });
    let mut near = user.upgrade().await.unwrap();
    // More than any buffer on the way.
    let boot_log: Vec<u8> = (0..300_000_u32).map(|n| u8::try_from(n % 251).unwrap()).collect();
    let sent = boot_log.clone();
    let far = tokio::spawn(async move {
        far.write_all(&sent).await.unwrap();
        far.flush().await.unwrap();
        let mut typed = [0; 3];
        far.read_exact(&mut typed).await.unwrap();
        typed
    });
    let mut seen = vec![0; boot_log.len()];
    near.read_exact(&mut seen).await.unwrap();
    assert!(seen == boot_log);
    near.write_all(b"ls\n").await.unwrap();
    assert_eq!(&far.await.unwrap(), b"ls\n");
    // The agent's end is closed: so is the user's.
    let mut rest = Vec::new();
    let _ = tokio::time::timeout(DEADLINE, near.read_to_end(&mut rest)).await.expect("it ends");
}

#[tokio::test]
async fn a_tunnel_reaches_the_port_and_ends_with_the_user() {
    let (_server, alice, agent, instance) = setting(Limits::default()).await;
    let path = format!("/v1/instances/{instance}/tcp/22");
    let (user, (request, mut far)) = tokio::join!(dial(&alice, &path), serve_one(&agent));
    assert_eq!(request.target, StreamTarget::Tcp { port: 22 });
    let mut near = user.upgrade().await.unwrap();
    near.write_all(b"SSH-2.0-test\r\n").await.unwrap();
    near.shutdown().await.unwrap();
    drop(near);
    let mut heard = Vec::new();
    let _ = tokio::time::timeout(DEADLINE, far.read_to_end(&mut heard)).await.expect("it ends");
    assert_eq!(heard, b"SSH-2.0-test\r\n");
}

#[tokio::test]
async fn an_agent_that_does_not_dial_in_is_named_and_its_request_withdrawn() {
    let limits = Limits { agent: Duration::from_millis(200), ..Limits::default() };
    let (_server, alice, agent, instance) = setting(limits).await;
    let refused = refusal(dial(&alice, &format!("/v1/instances/{instance}/console")).await).await;
    assert_eq!((refused.status, refused.code), (503, ErrorCode::Unavailable));
    assert!(refused.message.contains(agent.id().as_str()), "{refused:?}");
    // The request is withdrawn: the next one that the agent sees is a new one.
    let path = format!("/v1/instances/{instance}/tcp/80");
    let (_user, (request, _far)) = tokio::join!(dial(&alice, &path), serve_one(&agent));
    assert_eq!(request.target, StreamTarget::Tcp { port: 80 });
}

#[tokio::test]
async fn nobody_but_the_owner_opens_a_stream_and_no_other_host_takes_it() {
    let (server, alice, agent, instance) = setting(Limits::default()).await;
    let path = format!("/v1/instances/{instance}/console");
    let bob = server.account("bob").await;
    assert_eq!(refusal(dial(&bob, &path).await).await.code, ErrorCode::InvalidInstanceIdNotFound);
    let unsigned = alice.http.get(format!("{}{path}", alice.base)).send().await.unwrap();
    assert_eq!(refusal(unsigned).await.code, ErrorCode::MissingAuthenticationToken);
    let other = server.host("box-2").await;
    let user = tokio::spawn({
        let (alice, path) = (alice.clone(), path.clone());
        async move { dial(&alice, &path).await }
    });
    let requests: Vec<HostRequest> = agent.get("requests").await.unwrap();
    let stream = format!("streams/{}", requests[0].stream);
    let join = |agent: &Agent| {
        let request = agent.request(Method::GET, &stream);
        request.header("connection", "upgrade").header("upgrade", "roost-stream").send()
    };
    assert_eq!(refusal(join(&other).await.unwrap()).await.code, ErrorCode::InvalidParameterValue);
    assert_eq!(join(&agent).await.unwrap().status(), StatusCode::SWITCHING_PROTOCOLS);
    assert_eq!(user.await.unwrap().status(), StatusCode::SWITCHING_PROTOCOLS);
}

#[tokio::test]
async fn a_wrong_stream_request_is_refused_and_named() {
    let (_server, alice, _agent, instance) = setting(Limits::default()).await;
    for (path, code) in [
        (format!("/v1/instances/{instance}/tcp/0"), ErrorCode::InvalidParameterValue),
        (format!("/v1/instances/{instance}/tcp/70000"), ErrorCode::InvalidParameterValue),
        (format!("/v1/instances/{instance}/console?follow=maybe"), ErrorCode::InvalidParameterValue),
        (format!("/v1/instances/{instance}/console?folow=true"), ErrorCode::UnknownParameter),
        ("/v1/instances/i-xyz/console".to_owned(), ErrorCode::InvalidInstanceIdMalformed),
        ("/v1/instances/i-0123456789abcdef0/console".to_owned(), ErrorCode::InvalidInstanceIdNotFound),
    ] {
        assert_eq!(refusal(dial(&alice, &path).await).await.code, code, "{path}");
    }
    let path = format!("/v1/instances/{instance}/console");
    let plain = alice.signed(Method::GET, &path, Vec::new(), None).send().await.unwrap();
    let refused = refusal(plain).await;
    assert!(refused.message.contains("roost-stream"), "{refused:?}");
}

#[tokio::test]
async fn an_open_stream_does_not_hold_a_controller_that_stops() {
    let (server, alice, agent, instance) = setting(Limits::default()).await;
    let path = format!("/v1/instances/{instance}/console?follow=true");
    let (user, (_, _far)) = tokio::join!(dial(&alice, &path), serve_one(&agent));
    let mut near = user.upgrade().await.unwrap();
    let began = std::time::Instant::now();
    server.stop().await;
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    let mut rest = Vec::new();
    eventually("the user hears of it", async || {
        let read = near.read_to_end(&mut rest);
        tokio::time::timeout(DEADLINE, read).await.is_ok()
    })
    .await;
}
