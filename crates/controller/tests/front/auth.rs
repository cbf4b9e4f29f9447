//! Who may call.

use crate::harness::{Server, agent_http, refusal};
use reqwest::Method;
use roost_controller::config::StateDir;
use roost_controller::setup::{self, InitOptions};
use roost_types::ErrorCode;
use roost_types::api::{
    BillBy, CallerIdentity, CreateAccount, CreateKeyPair, DescribeAccounts, DescribeHosts, DescribeKeyPairs,
    GetBill, GetCallerIdentity,
};

#[tokio::test]
async fn a_signed_request_is_answered_for_its_account() {
    let server = Server::start().await;
    let CallerIdentity { admin, account_name, region, .. } =
        server.admin().call(&GetCallerIdentity {}).await.unwrap();
    assert_eq!((admin, account_name.as_str(), region.as_str()), (true, "admin", "home-1"));
    let alice = server.account("alice").await;
    let caller = alice.call(&GetCallerIdentity {}).await.unwrap();
    assert_eq!((caller.admin, caller.account_name.as_str()), (false, "alice"));
}

#[tokio::test]
async fn an_unsigned_request_is_told_what_is_missing() {
    let server = Server::start().await;
    let client = server.admin();
    let reply =
        client.http.post(format!("{}/v1/DescribeHosts", client.base)).body("{}").send().await.unwrap();
    let refused = refusal(reply).await;
    assert_eq!((refused.status, refused.code), (401, ErrorCode::MissingAuthenticationToken));
}

#[tokio::test]
async fn an_unknown_key_and_a_wrong_secret_are_refused_in_the_same_words() {
    let server = Server::start().await;
    let good = server.admin();
    let wrong_secret = server.client(&good.access_key_id, "w".repeat(40).as_str());
    let unknown_key = server.client("AKIAUNKNOWNUNKNOWN00", &good.secret);
    let wrong = wrong_secret.call(&GetCallerIdentity {}).await.unwrap_err();
    assert_eq!((wrong.status, wrong.code), (401, ErrorCode::AuthFailure));
    assert_eq!(wrong, unknown_key.call(&GetCallerIdentity {}).await.unwrap_err());
}

#[tokio::test]
async fn a_request_may_be_five_minutes_off_and_no_more() {
    let server = Server::start().await;
    for (skew, accepted) in [(-240, true), (240, true), (-310, false), (310, false)] {
        let mut client = server.admin();
        client.skew = skew;
        match client.call(&GetCallerIdentity {}).await {
            Ok(_) => assert!(accepted, "{skew}"),
            Err(refused) => {
                assert!(!accepted, "{skew}: {refused:?}");
                assert_eq!((refused.status, refused.code), (400, ErrorCode::RequestExpired));
            }
        }
    }
}

#[tokio::test]
async fn what_was_signed_is_what_counts() {
    let server = Server::start().await;
    let client = server.admin();
    let signed = || client.signed(Method::POST, "/v1/DescribeHosts", b"{}".to_vec(), None);
    let resent = |change: &dyn Fn(&mut reqwest::Request)| {
        let mut request = signed().build().unwrap();
        change(&mut request);
        client.http.execute(request)
    };
    assert!(resent(&|_| {}).await.unwrap().status().is_success());
    let changes: [&dyn Fn(&mut reqwest::Request); 5] = [
        &|request| *request.body_mut() = Some("{ }".into()),
        &|request| request.url_mut().set_path("/v1/DescribeAccounts"),
        &|request| request.url_mut().set_query(Some("a=1")),
        &|request| drop(request.headers_mut().insert("host", "elsewhere".parse().unwrap())),
        &|request| drop(request.headers_mut().insert("x-amz-meta", "unsigned".parse().unwrap())),
    ];
    for (at, change) in changes.iter().enumerate() {
        let refused = refusal(resent(change).await.unwrap()).await;
        assert_eq!((refused.status, refused.code), (401, ErrorCode::AuthFailure), "change {at}: {refused:?}");
        assert_eq!(
            refused.message.contains("x-amz-content-sha256"),
            at == 0,
            "the body is named: {refused:?}"
        );
    }
    let mut elsewhere = client.clone();
    elsewhere.region = "elsewhere-1".to_owned();
    let refused = elsewhere.call(&GetCallerIdentity {}).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::AuthFailure);
    assert!(refused.message.contains("elsewhere-1") && refused.message.contains("home-1"), "{refused:?}");
}

#[tokio::test]
async fn accounts_do_not_see_each_other() {
    let server = Server::start().await;
    let (alice, bob) = (server.account("alice").await, server.account("bob").await);
    alice.call(&CreateKeyPair { key_name: "mine".into() }).await.unwrap();
    assert_eq!(alice.call(&DescribeKeyPairs {}).await.unwrap().key_pairs.len(), 1);
    assert!(bob.call(&DescribeKeyPairs {}).await.unwrap().key_pairs.is_empty());
    let names = |accounts: roost_types::api::Accounts| -> Vec<String> {
        accounts.accounts.into_iter().map(|account| account.name).collect()
    };
    assert_eq!(names(bob.call(&DescribeAccounts {}).await.unwrap()), ["bob"]);
    assert_eq!(names(server.admin().call(&DescribeAccounts {}).await.unwrap()), ["admin", "alice", "bob"]);
}

#[tokio::test]
async fn only_administrators_administrate() {
    let server = Server::start().await;
    let alice = server.account("alice").await;
    let refused = [
        alice.call(&CreateAccount { name: "eve".into(), admin: true }).await.unwrap_err(),
        alice.call(&DescribeHosts {}).await.unwrap_err(),
        alice
            .call(&GetBill { since: None, until: None, by: BillBy::Account, all_accounts: true })
            .await
            .unwrap_err(),
    ];
    for refused in refused {
        assert_eq!((refused.status, refused.code), (403, ErrorCode::UnauthorizedOperation));
    }
}

#[tokio::test]
async fn secrets_are_nowhere_in_the_database() {
    let server = Server::start().await;
    let alice = server.account("alice").await;
    let admin = server.admin_file();
    let (_dir, state) = server.stop().await;
    let mut bytes = Vec::new();
    for name in ["roost.db", "roost.db-wal"] {
        bytes.extend(std::fs::read(state.path(name)).unwrap_or_default());
    }
    let holds = |text: &str| bytes.windows(text.len()).any(|window| window == text.as_bytes());
    assert!(holds(&alice.access_key_id), "the key's id is there, so this looks in the right place");
    assert!(!holds(&alice.secret));
    assert!(!holds(&admin.secret_access_key));
}

#[tokio::test]
async fn an_agent_without_a_certificate_of_this_authority_is_not_let_in() {
    let server = Server::start().await;
    let url = format!("https://localhost:{}/agent/v1/desired", server.agents.port());
    assert!(server.admin().http.get(&url).send().await.is_err(), "no certificate");
    // A certificate of another controller's authority, with this one's authority to trust the server by.
    let other = StateDir::new(server.dir.path().join("other"));
    setup::init(&other, &InitOptions::default()).unwrap();
    let out = server.dir.path().join("stranger");
    setup::agent_identity(&other, "stranger", None, None, &out).unwrap();
    std::fs::copy(server.state.path("ca.pem"), out.join("ca.pem")).unwrap();
    assert!(agent_http(&out).get(&url).send().await.is_err(), "another authority's certificate");
    // The server's own certificate is for servers.
    for (from, to) in [("server.pem", "cert.pem"), ("server-key.pem", "key.pem")] {
        std::fs::copy(server.state.path(from), out.join(to)).unwrap();
    }
    assert!(agent_http(&out).get(&url).send().await.is_err(), "a server certificate");
    let agent = server.host("box-1").await;
    assert!(agent.http.get(&url).send().await.unwrap().status().is_success());
}

#[tokio::test]
async fn an_agent_speaks_for_its_own_host_only() {
    let server = Server::start().await;
    let (one, two) = (server.host("box-1").await, server.host("box-2").await);
    let report = serde_json::json!({
        "host": two.facts, "boot_id": "b", "agent_run": "r", "instances": [],
    });
    let refused = refusal(one.request(Method::POST, "observed").json(&report).send().await.unwrap()).await;
    assert_eq!((refused.status, refused.code), (403, ErrorCode::UnauthorizedOperation));
}
