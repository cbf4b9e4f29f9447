//! What bad input gets: one message that names the value, EC2's code, nothing half made.

use crate::harness::{Client, Server, refusal};
use reqwest::{Method, StatusCode};
use roost_types::ErrorCode;
use roost_types::api::{
    CreateAccount, CreateKeyPair, DeleteKeyPair, DeregisterImage, DescribeImages, DescribeInstanceTypes,
    DescribeInstances, DescribeKeyPairs, ImportKeyPair, RegisterImage,
};

#[tokio::test]
async fn every_wrong_request_gets_ec2s_code_and_the_value() {
    let server = Server::start().await;
    let admin = server.admin();
    let missing = "f".repeat(64);
    let image = |change: &str| {
        format!(
            r#"{{"name":"n","kernel":"{missing}","root":"{missing}","root_bytes":1,"boot_args":"","default_user":"root"{change}}}"#
        )
    };
    let run = |change: &str| {
        format!(r#"{{"image":"none","instance_type":"t3.nano","min_count":1,"max_count":1{change}}}"#)
    };
    for (action, body, code, named) in [
        ("RunInstance", "{}".to_owned(), "InvalidAction", "\"RunInstances\""),
        ("", "{}".to_owned(), "InvalidAction", "no action"),
        ("DescribeHosts", "{".to_owned(), "MalformedQueryString", "not JSON"),
        ("DescribeHosts", "{\"a\":1}".to_owned(), "UnknownParameter", "\"a\""),
        ("StopInstances", "{}".to_owned(), "MissingParameter", "\"instance_ids\""),
        ("StopInstances", "{\"instance_ids\":\"i-1\"}".to_owned(), "InvalidParameterValue", "instance_ids"),
        (
            "StopInstances",
            "{\"instance_ids\":[\"i-xyz\"]}".to_owned(),
            "InvalidInstanceID.Malformed",
            "\"i-xyz\"",
        ),
        (
            "StopInstances",
            "{\"instance_ids\":[\"i-0123456789abcdef0\"]}".to_owned(),
            "InvalidInstanceID.NotFound",
            "i-0123456789abcdef0",
        ),
        ("RunInstances", run(""), "InvalidAMIID.NotFound", "none"),
        ("RunInstances", run(",\"colour\":1"), "UnknownParameter", "\"colour\""),
        ("CreateAccount", "{\"name\":\"a b\"}".to_owned(), "InvalidParameterValue", "\"a b\""),
        ("CreateAccount", "{\"name\":\"admin\"}".to_owned(), "InvalidParameterValue", "\"admin\""),
        ("CreateKeyPair", "{\"key_name\":\"\"}".to_owned(), "InvalidParameterValue", "key_name"),
        (
            "ImportKeyPair",
            "{\"key_name\":\"k\",\"public_key\":\"ssh-rsa AAAA\"}".to_owned(),
            "InvalidKey.Format",
            "OpenSSH",
        ),
        ("RegisterImage", image(""), "InvalidBlob.NotFound", missing.as_str()),
        ("RegisterImage", image(",\"initrd\":\"short\""), "InvalidParameterValue", "short"),
        ("DeregisterImage", "{\"image\":\"ami-nope\"}".to_owned(), "InvalidAMIID.Malformed", "ami-nope"),
        ("DeregisterImage", "{\"image\":\"nope\"}".to_owned(), "InvalidAMIID.NotFound", "nope"),
        ("GetBill", "{\"by\":\"colour\"}".to_owned(), "InvalidParameterValue", "by"),
        (
            "GetBill",
            "{\"by\":\"day\",\"since\":2,\"until\":1}".to_owned(),
            "InvalidParameterCombination",
            "until",
        ),
    ] {
        let refused = refusal(admin.post(action, &body).await).await;
        assert_eq!(refused.code.as_str(), code, "{action} {body}: {refused:?}");
        assert!(refused.message.contains(named), "{action} {body}: {refused:?}");
    }
}

#[tokio::test]
async fn other_paths_and_methods_are_named() {
    let server = Server::start().await;
    let client = server.admin();
    for (method, path) in [(Method::GET, "/"), (Method::GET, "/v1/DescribeHosts"), (Method::PUT, "/v1/blobs")]
    {
        let refused = refusal(client.signed(method, path, Vec::new(), None).send().await.unwrap()).await;
        assert_eq!(refused.code, ErrorCode::InvalidAction);
        assert!(refused.message.contains(path), "{refused:?}");
    }
    let health = client.http.get(format!("{}/v1/health", client.base)).send().await.unwrap();
    assert_eq!(health.status(), StatusCode::OK);
}

#[tokio::test]
async fn a_key_pair_is_made_once_and_its_private_key_opens_it() {
    let server = Server::start().await;
    let alice = server.account("alice").await;
    let made = alice.call(&CreateKeyPair { key_name: "laptop".into() }).await.unwrap();
    let private = ssh_key::PrivateKey::from_openssh(&made.private_key).unwrap();
    assert_eq!(private.public_key().to_openssh().unwrap(), made.key_pair.public_key);
    assert_eq!(private.fingerprint(ssh_key::HashAlg::Sha256).to_string(), made.key_pair.fingerprint);
    let again = alice.call(&CreateKeyPair { key_name: "laptop".into() }).await.unwrap_err();
    assert_eq!(again.code, ErrorCode::InvalidKeyPairDuplicate);
    let import = ImportKeyPair { key_name: "desk".into(), public_key: made.key_pair.public_key.clone() };
    let imported = alice.call(&import).await.unwrap();
    assert_eq!(imported.fingerprint, made.key_pair.fingerprint);
    // Deleting is idempotent, as on EC2.
    for _ in 0..2 {
        alice.call(&DeleteKeyPair { key_name: "laptop".into() }).await.unwrap();
    }
    assert_eq!(alice.call(&DescribeKeyPairs {}).await.unwrap().key_pairs, [imported]);
}

#[tokio::test]
async fn images_of_administrators_are_public_and_those_of_others_their_own() {
    let server = Server::start().await;
    let (admin, alice, bob) = (server.admin(), server.account("alice").await, server.account("bob").await);
    admin.image("debian").await;
    let mine = alice.image("mine").await;
    let names = |images: roost_types::api::Images| -> Vec<String> {
        images.images.into_iter().map(|image| image.name).collect()
    };
    assert_eq!(names(alice.call(&DescribeImages {}).await.unwrap()), ["debian", "mine"]);
    assert_eq!(names(bob.call(&DescribeImages {}).await.unwrap()), ["debian"]);
    // The same image again is the same image; another one of that name is refused.
    assert_eq!(alice.call(&mine).await.unwrap().image_id, alice.call(&mine).await.unwrap().image_id);
    let other = RegisterImage { boot_args: "quiet".into(), ..mine };
    assert_eq!(alice.call(&other).await.unwrap_err().code, ErrorCode::InvalidAmiNameDuplicate);
    let withdraw = |image: &str| DeregisterImage { image: image.to_owned() };
    assert_eq!(alice.call(&withdraw("debian")).await.unwrap_err().code, ErrorCode::UnauthorizedOperation);
    assert_eq!(bob.call(&withdraw("mine")).await.unwrap_err().code, ErrorCode::InvalidAmiIdNotFound);
    alice.call(&withdraw("mine")).await.unwrap();
    assert_eq!(names(alice.call(&DescribeImages {}).await.unwrap()), ["debian"]);
}

#[tokio::test]
async fn an_account_name_is_given_once() {
    let server = Server::start().await;
    server.account("alice").await;
    let again = server.admin().call(&CreateAccount { name: "alice".into(), admin: false }).await.unwrap_err();
    assert!(again.message.contains("\"alice\"") && again.message.contains("exists"), "{again:?}");
}

#[tokio::test]
async fn a_request_names_at_most_a_thousand_ids() {
    let server = Server::start().await;
    let admin = server.admin();
    let request = |count: u64| {
        let instance_ids = (0..count).map(|n| format!("i-{n:017x}")).collect();
        DescribeInstances { instance_ids, include_terminated: false, all_accounts: false }
    };
    let refused = admin.call(&request(1001)).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::InvalidParameterValue);
    assert!(refused.message.contains("1001") && refused.message.contains("1000"), "{refused:?}");
    let refused = admin.call(&request(1000)).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::InvalidInstanceIdNotFound);
    assert!(refused.message.contains("and 980 more") && refused.message.len() < 1000, "{refused:?}");
}

#[tokio::test]
async fn a_tenant_is_told_no_hosts_name_or_room() {
    let server = Server::start().await;
    for name in ["box-one", "box-two"] {
        server.host(name).await;
    }
    let (admin, alice) = (server.admin(), server.account("alice").await);
    admin.image("debian").await;
    let too_many = |client: &Client| {
        let client = client.clone();
        async move {
            let body = r#"{"image":"debian","instance_type":"t3.nano","min_count":900,"max_count":900}"#;
            refusal(client.post("RunInstances", body).await).await.message
        }
    };
    let told = too_many(&alice).await;
    assert!(told.contains("on 2 of 2 hosts") && !told.contains("box-"), "{told}");
    let named = too_many(&admin).await;
    assert!(named.contains("host box-one has") && named.contains("host box-two has"), "{named}");
    let why = async |client: &Client| {
        let types = client.call(&DescribeInstanceTypes {}).await.unwrap().instance_types;
        types.into_iter().filter_map(|kind| kind.unsupported).collect::<Vec<_>>()
    };
    let (told, named) = (why(&alice).await, why(&admin).await);
    assert!(!told.is_empty() && told.iter().all(|why| !why.contains("box-")), "{told:?}");
    assert!(named.iter().all(|why| why.contains("host box-one")), "{named:?}");
}
