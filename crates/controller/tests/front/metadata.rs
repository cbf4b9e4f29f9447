//! Metadata options of an instance, from the launch to its host.

use crate::harness::{Server, answer, refusal};
use roost_types::ErrorCode;
use roost_types::agent::{Desired, HttpEndpoint, HttpTokens, MetadataOptions};
use roost_types::api::Reservation;

#[tokio::test]
async fn the_options_of_a_launch_reach_its_host_and_its_owner() {
    let server = Server::start().await;
    let host = server.host("box-1").await;
    let admin = server.admin();
    admin.image("debian").await;
    let launch = async |options: &str| {
        let rest = r#""instance_type":"t3.nano","min_count":1,"max_count":1"#;
        admin.post("RunInstances", &format!(r#"{{"image":"debian",{rest}{options}}}"#)).await
    };
    let required = r#","metadata_options":{"http_tokens":"required"}"#;
    let off = r#","metadata_options":{"http_endpoint":"disabled"}"#;
    let options = |http_tokens, http_endpoint| MetadataOptions { http_tokens, http_endpoint };
    for (given, expected) in [
        ("", options(HttpTokens::Optional, HttpEndpoint::Enabled)),
        (required, options(HttpTokens::Required, HttpEndpoint::Enabled)),
        (off, options(HttpTokens::Optional, HttpEndpoint::Disabled)),
    ] {
        let made: Reservation = answer(launch(given).await).await.unwrap();
        let instance = &made.instances[0];
        assert_eq!(instance.metadata_options, expected);
        let desired: Desired = host.get("desired").await.unwrap();
        let told = desired.instances.iter().find(|ensure| ensure.instance_id == instance.instance_id);
        assert_eq!(told.unwrap().spec.metadata.options, expected);
    }
    let wrong = refusal(launch(r#","metadata_options":{"http_tokens":"always"}"#).await).await;
    assert_eq!(wrong.code, ErrorCode::InvalidParameterValue);
    assert!(wrong.message.contains("always") && wrong.message.contains("required"), "{wrong:?}");
}
