//! Where a controller is, and whom to believe that it is one.

use crate::error::{Error, Result};
use rustls::pki_types::{CertificateDer, ServerName, pem::PemObject};
use std::fmt;
use std::sync::Arc;

/// `https://HOST:PORT`, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Host name or address, without brackets.
    pub host: String,
    /// Port.
    pub port: u16,
    /// As the `host` header has it.
    pub authority: String,
}

impl Endpoint {
    /// Reads an endpoint.
    pub fn parse(text: &str) -> Result<Self> {
        let bad = |why: &str| {
            Error::parameter(format!(
                "endpoint {text:?} is not allowed: {why}; give https://HOST:PORT such as https://127.0.0.1:7443"
            ))
        };
        let uri: http::Uri = text.parse().map_err(|_| bad("it is no URL"))?;
        match uri.scheme_str() {
            Some("https") => {}
            Some("http") => return Err(bad("requests are signed and must travel over TLS")),
            _ => return Err(bad("it does not begin with https://")),
        }
        if uri.path_and_query().is_some_and(|path| path.as_str() != "/") {
            return Err(bad("it has a path"));
        }
        let authority = uri.authority().ok_or_else(|| bad("it has no host"))?;
        if authority.as_str().contains('@') {
            return Err(bad("it holds a user name"));
        }
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        ServerName::try_from(host.clone()).map_err(|_| bad("its host is neither a name nor an address"))?;
        // `http` takes a port that is no port for none at all.
        let port = match authority.as_str()[authority.host().len()..].strip_prefix(':') {
            Some(port) => port.parse().ok().filter(|port| *port != 0),
            None => Some(443),
        };
        let port = port.ok_or_else(|| bad("its port is not 1 to 65535"))?;
        // The `host` header leaves the scheme's own port out, as every HTTP client does.
        let name = authority.host();
        let authority = if port == 443 { name.to_owned() } else { format!("{name}:{port}") };
        Ok(Self { host, port, authority })
    }

    /// The whole URL of a path.
    pub fn url(&self, path_and_query: &str) -> String {
        format!("https://{}{path_and_query}", self.authority)
    }

    /// The name that its certificate must bear.
    pub fn server_name(&self) -> Result<ServerName<'static>> {
        ServerName::try_from(self.host.clone()).map_err(|error| Error::Internal(error.to_string()))
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "https://{}", self.authority)
    }
}

/// A TLS client that trusts these certificates and no others.
pub fn tls(ca_pem: &str) -> Result<rustls::ClientConfig> {
    let bad = |why: String| {
        Error::Usage(format!(
            "the profile's ca_pem cannot be used: {why}; take the profile anew with `roost configure --from admin.json`"
        ))
    };
    let mut roots = rustls::RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(ca_pem.as_bytes()) {
        let certificate = certificate.map_err(|error| bad(error.to_string()))?;
        roots.add(certificate).map_err(|error| bad(error.to_string()))?;
    }
    if roots.is_empty() {
        return Err(bad("there is no certificate in it".to_owned()));
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| Error::Internal(error.to_string()))?;
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_https_with_a_host_and_no_path() {
        let endpoint = Endpoint::parse("https://[::1]:7443").unwrap();
        assert_eq!((endpoint.host.as_str(), endpoint.port), ("::1", 7443));
        assert_eq!(endpoint.url("/v1/health"), "https://[::1]:7443/v1/health");
        assert_eq!(Endpoint::parse("https://roost.lan/").unwrap().authority, "roost.lan");
        assert_eq!(Endpoint::parse("https://roost.lan:443").unwrap().authority, "roost.lan");
        for bad in
            ["", "127.0.0.1:7443", "http://a:1", "https://a/b", "https://u@a", "https://a:99999", "ftp://a"]
        {
            let error = Endpoint::parse(bad).unwrap_err();
            assert!(error.to_string().contains("https://HOST:PORT"), "{bad}: {error}");
        }
    }

    #[test]
    fn a_profile_without_a_usable_certificate_is_refused() {
        for bad in ["", "nonsense", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"] {
            assert!(tls(bad).unwrap_err().to_string().contains("ca_pem"), "{bad:?}");
        }
    }
}
