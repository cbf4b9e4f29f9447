//! What bad input gets: one message that names the value, EC2's code, nothing half made.

use crate::harness::{Server, refusal, zstd_like};
use reqwest::{Method, StatusCode};
use roost_types::ErrorCode;
use roost_types::api::{
    CreateAccount, CreateKeyPair, DeleteKeyPair, DeregisterImage, DescribeImages, DescribeKeyPairs,
    ImportKeyPair, RegisterImage,
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
