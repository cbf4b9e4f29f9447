//! AWS Signature Version 4, by AWS's own signer.

use super::Endpoint;
use crate::config::Profile;
use crate::error::{Error, Result};
use aws_credential_types::Credentials;
use aws_sigv4::http_request::{PayloadChecksumKind, SignableBody, SignableRequest, SigningSettings, sign};
use aws_sigv4::sign::v4;
use roost_types::api::SIGNING_SERVICE;
use std::time::SystemTime;

/// Headers of a signed request, in the order to send.
pub type SignedHeaders = Vec<(&'static str, String)>;

/// Signs as one access key in one region.
pub struct Signer {
    credentials: Credentials,
    region: String,
}

impl Signer {
    /// Signs as this profile.
    pub fn new(profile: &Profile) -> Self {
        let credentials =
            Credentials::new(&profile.access_key_id, &profile.secret_access_key, None, None, "profile");
        Self { credentials, region: profile.region.clone() }
    }

    /// Signs a request with this body.
    pub fn sign(
        &self,
        method: &str,
        endpoint: &Endpoint,
        path_and_query: &str,
        headers: &[(&'static str, &str)],
        body: &[u8],
    ) -> Result<SignedHeaders> {
        self.sign_at(SystemTime::now(), method, endpoint, path_and_query, headers, SignableBody::Bytes(body))
    }

    /// Signs a request whose body has this SHA-256, in hexadecimal.
    pub fn sign_hashed(
        &self,
        method: &str,
        endpoint: &Endpoint,
        path_and_query: &str,
        headers: &[(&'static str, &str)],
        sha256: &str,
    ) -> Result<SignedHeaders> {
        let body = SignableBody::Precomputed(sha256.to_owned());
        self.sign_at(SystemTime::now(), method, endpoint, path_and_query, headers, body)
    }

    fn sign_at(
        &self,
        time: SystemTime,
        method: &str,
        endpoint: &Endpoint,
        path_and_query: &str,
        headers: &[(&'static str, &str)],
        body: SignableBody<'_>,
    ) -> Result<SignedHeaders> {
        let fault = |error: &dyn std::error::Error| Error::Internal(format!("cannot sign: {error}"));
        let mut settings = SigningSettings::default();
        settings.payload_checksum_kind = PayloadChecksumKind::XAmzSha256;
        let identity = self.credentials.clone().into();
        let params = v4::SigningParams::builder()
            .identity(&identity)
            .region(&self.region)
            .name(SIGNING_SERVICE)
            .time(time)
            .settings(settings)
            .build()
            .map_err(|error| fault(&error))?
            .into();
        let mut signed: SignedHeaders = vec![("host", endpoint.authority.clone())];
        signed.extend(headers.iter().map(|(name, value)| (*name, (*value).to_owned())));
        let url = endpoint.url(path_and_query);
        let request = SignableRequest::new(
            method,
            url,
            signed.iter().map(|(name, value)| (*name, value.as_str())),
            body,
        )
        .map_err(|error| fault(&error))?;
        let (instructions, _signature) = sign(request, &params).map_err(|error| fault(&error))?.into_parts();
        let (made, _query) = instructions.into_parts();
        signed.extend(made.iter().map(|header| (header.name(), header.value().to_owned())));
        Ok(signed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_signature_covers_host_date_and_body_hash_in_the_profiles_scope() {
        let signer = Signer::new(&Profile {
            endpoint: String::new(),
            region: "home-1".into(),
            access_key_id: "AKIAIOSFODNN7EXAMPLE".into(),
            secret_access_key: "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY".into(),
            ca_pem: String::new(),
            account_id: None,
        });
        let endpoint = Endpoint::parse("https://127.0.0.1:7443").unwrap();
        let time = SystemTime::UNIX_EPOCH + Duration::from_secs(1_795_176_000);
        let headers = signer
            .sign_at(time, "GET", &endpoint, "/v1/x?follow=true&offset=0", &[], SignableBody::Bytes(b""))
            .unwrap();
        let get = |name| headers.iter().find(|(known, _)| *known == name).map(|(_, value)| value.as_str());
        assert_eq!(get("host"), Some("127.0.0.1:7443"));
        assert_eq!(
            get("x-amz-content-sha256"),
            Some("e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")
        );
        let authorization = get("authorization").unwrap();
        assert!(authorization.contains("/home-1/roost/aws4_request"), "{authorization}");
        assert!(
            authorization.contains("SignedHeaders=host;x-amz-content-sha256;x-amz-date"),
            "{authorization}"
        );
    }
}
