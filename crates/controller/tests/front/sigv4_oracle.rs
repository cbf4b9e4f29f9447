//! Our verifier against an independent signer, over arbitrary requests.

use aws_credential_types::Credentials;
use aws_sigv4::http_request::{PayloadChecksumKind, SignableBody, SignableRequest, SigningSettings, sign};
use aws_sigv4::sign::v4;
use http::{HeaderMap, HeaderName, HeaderValue};
use proptest::prelude::*;
use roost_controller::auth::sigv4::{Claim, SignedRequest, signature};
use sha2::{Digest, Sha256};
use std::time::{Duration, UNIX_EPOCH};

/// Text as it stands in a URL: plain or percent-encoded.
fn encoded() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        4 => "[a-zA-Z0-9._~-]",
        1 => "[!$'()*,;:@]",
        1 => "(20|2F|25|7E|C3%A9|2B|3D|26)".prop_map(|hex| format!("%{hex}")),
    ];
    prop::collection::vec(piece, 0..8).prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn what_the_signer_signs_verifies_and_any_other_request_does_not(
        method in prop_oneof![Just("GET"), Just("POST"), Just("PUT"), Just("HEAD")],
        path in prop::collection::vec(prop_oneof![6 => encoded(), 1 => Just(".".to_owned()), 1 => Just("..".to_owned())], 0..5),
        query in prop::collection::vec((encoded(), encoded()), 0..4),
        headers in prop::collection::btree_map("x-[a-z]{1,6}", " {0,2}[a-zA-Z0-9=/]{1,4}( {1,3}[a-z]{1,3}){0,2} {0,2}", 0..3),
        body in prop::collection::vec(any::<u8>(), 0..64),
        secret in "[a-zA-Z0-9+/]{40}",
        port in prop::option::of(1_u16..),
        seconds in 1_000_000_000_u64..3_000_000_000,
        flip in 0..32_usize,
    ) {
        let path = format!("/{}", path.join("/"));
        let query = query.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join("&");
        let host = port.map_or("roost.lan".to_owned(), |port| format!("roost.lan:{port}"));
        let mark = if query.is_empty() { "" } else { "?" };
        let url = format!("https://{host}{path}{mark}{query}");

        let identity = Credentials::new("AKIDEXAMPLE", &secret, None, None, "test").into();
        let mut settings = SigningSettings::default();
        settings.payload_checksum_kind = PayloadChecksumKind::XAmzSha256;
        let params = v4::SigningParams::builder().identity(&identity).region("home-1").name("roost");
        let params = params.time(UNIX_EPOCH + Duration::from_secs(seconds)).settings(settings).build().unwrap();
        let params = params.into();
        let given = headers.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        let request = SignableRequest::new(method, &url, given, SignableBody::Bytes(&body)).unwrap();
        let (instructions, _) = sign(request, &params).unwrap().into_parts();

        // What a server receives.
        let mut received = HeaderMap::new();
        let said_host = if port == Some(443) { "roost.lan".to_owned() } else { host };
        received.insert("host", HeaderValue::from_str(&said_host).unwrap());
        for (name, value) in headers.iter().map(|(n, v)| (n.as_str(), v.as_str())).chain(instructions.headers()) {
            received.append(name.parse::<HeaderName>().unwrap(), HeaderValue::from_str(value).unwrap());
        }
        let hash = hex::encode(Sha256::digest(&body));
        let received_request =
            SignedRequest { method, path: &path, query: &query, headers: &received, payload_hash: &hash };
        let claim = Claim::parse(&received).unwrap();
        prop_assert_eq!(signature(&claim, &received_request, secret.as_bytes()), claim.signature);

        let mut other_secret = secret.clone().into_bytes();
        other_secret[flip] ^= 1;
        prop_assert_ne!(signature(&claim, &received_request, &other_secret), claim.signature);
        let other_path = format!("{path}x");
        let other = SignedRequest { path: &other_path, ..received_request };
        prop_assert_ne!(signature(&claim, &other, secret.as_bytes()), claim.signature);
        let other_hash = hex::encode(Sha256::digest([&body[..], b"x"].concat()));
        let other = SignedRequest { payload_hash: &other_hash, ..received_request };
        prop_assert_ne!(signature(&claim, &other, secret.as_bytes()), claim.signature);
    }
}
