//! Certificates: the controller's own authority, its server certificate, and one for each agent.
//!
//! ```text
//! authority (ca.pem, 20 years) ──┬── server certificate: the names that clients dial; server use only
//!                                └── agent certificate: `<host id>.host.roost`; client use only
//! ```
//! Whoever holds an agent certificate speaks for that host and for no other; the name in the certificate is the
//! one that counts, whatever a request says.

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, date_time_ymd,
};
use roost_types::HostId;
use rustls::crypto::ring;
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use std::sync::Arc;
use webpki::EndEntityCert;

const HOST_SUFFIX: &str = ".host.roost";
const AUTHORITY_YEARS: i32 = 20;
const LEAF_YEARS: i32 = 10;

/// Why certificates cannot be made or used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A certificate cannot be made.
    #[error("cannot make a certificate: {0}")]
    Make(#[from] rcgen::Error),
    /// A certificate or key file cannot be read.
    #[error("cannot read the {what}: {detail}")]
    Read {
        /// Which.
        what: &'static str,
        /// Why.
        detail: String,
    },
    /// The TLS library refuses them.
    #[error("the certificates do not fit together: {0}")]
    Use(String),
}

/// A certificate and its private key, PEM.
pub struct Identity {
    /// The certificate.
    pub cert_pem: String,
    /// Its private key.
    pub key_pem: String,
}

/// The authority that signs every certificate here.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate's life: it begins a day early, for clocks that are behind.
fn life(params: &mut CertificateParams, today: (i32, u8, u8), years: i32) {
    // The 28th is a day of every month.
    params.not_before = date_time_ymd(today.0 - 1, today.1, today.2.min(28));
    params.not_after = date_time_ymd(today.0 + years, today.1, today.2.min(28));
}

fn authority_params() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, "Roost authority");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

impl Authority {
    /// Makes an authority: its own certificate and key.
    ///
    /// # Errors
    /// [`TlsError::Make`].
    pub fn create(today: (i32, u8, u8)) -> Result<Identity, TlsError> {
        let key = KeyPair::generate()?;
        let mut params = authority_params();
        life(&mut params, today, AUTHORITY_YEARS);
        Ok(Identity { cert_pem: params.self_signed(&key)?.pem(), key_pem: key.serialize_pem() })
    }

    /// Takes up an authority by its private key.
    ///
    /// # Errors
    /// [`TlsError::Read`].
    pub fn load(key_pem: &str) -> Result<Self, TlsError> {
        let key = KeyPair::from_pem(key_pem)
            .map_err(|error| TlsError::Read { what: "authority's key", detail: error.to_string() })?;
        Ok(Self { issuer: Issuer::new(authority_params(), key) })
    }

    /// Makes a server certificate for these DNS names and addresses.
    ///
    /// # Errors
    /// [`TlsError::Make`], such as for a name that is none.
    pub fn server(&self, names: &[String], today: (i32, u8, u8)) -> Result<Identity, TlsError> {
        self.leaf(names, "Roost controller", ExtendedKeyUsagePurpose::ServerAuth, today)
    }

    /// Makes the certificate by which a host's agent is known.
    ///
    /// # Errors
    /// [`TlsError::Make`].
    pub fn agent(&self, host: &HostId, today: (i32, u8, u8)) -> Result<Identity, TlsError> {
        self.leaf(
            &[format!("{host}{HOST_SUFFIX}")],
            host.as_str(),
            ExtendedKeyUsagePurpose::ClientAuth,
            today,
        )
    }

    fn leaf(
        &self,
        names: &[String],
        common_name: &str,
        usage: ExtendedKeyUsagePurpose,
        today: (i32, u8, u8),
    ) -> Result<Identity, TlsError> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(names)?;
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, common_name);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![usage];
        params.use_authority_key_identifier_extension = true;
        life(&mut params, today, LEAF_YEARS);
        Ok(Identity { cert_pem: params.signed_by(&key, &self.issuer)?.pem(), key_pem: key.serialize_pem() })
    }
}

fn read<T: PemObject>(what: &'static str, pem: &str) -> Result<T, TlsError> {
    T::from_pem_slice(pem.as_bytes()).map_err(|error| TlsError::Read { what, detail: error.to_string() })
}

fn refused(error: impl std::fmt::Display) -> TlsError {
    TlsError::Use(error.to_string())
}

/// TLS for the API: the server shows its certificate, clients sign their requests.
///
/// # Errors
/// [`TlsError`].
pub fn api_config(server: &Identity) -> Result<Arc<ServerConfig>, TlsError> {
    config(server, None)
}

/// TLS for agents: a client must show a certificate of this authority.
///
/// # Errors
/// [`TlsError`].
pub fn agent_config(server: &Identity, ca_pem: &str) -> Result<Arc<ServerConfig>, TlsError> {
    config(server, Some(ca_pem))
}

fn config(server: &Identity, clients_of: Option<&str>) -> Result<Arc<ServerConfig>, TlsError> {
    let provider = Arc::new(ring::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider));
    let builder = builder.with_safe_default_protocol_versions().map_err(refused)?;
    let builder = if let Some(ca_pem) = clients_of {
        let mut roots = RootCertStore::empty();
        roots.add(read("authority's certificate", ca_pem)?).map_err(refused)?;
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
        builder.with_client_cert_verifier(verifier.map_err(refused)?)
    } else {
        builder.with_no_client_auth()
    };
    let chain = vec![read::<CertificateDer<'static>>("server certificate", &server.cert_pem)?];
    let key = read::<PrivateKeyDer<'static>>("server certificate's key", &server.key_pem)?;
    let mut config = builder.with_single_cert(chain, key).map_err(refused)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// The host that an agent's certificate speaks for. The certificate's signature has been verified before.
pub fn host_of(certificate: &CertificateDer<'_>) -> Option<HostId> {
    let certificate = EndEntityCert::try_from(certificate).ok()?;
    certificate.valid_dns_names().find_map(|name| name.strip_suffix(HOST_SUFFIX)?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TODAY: (i32, u8, u8) = (2026, 11, 30);

    #[test]
    fn an_agent_certificate_speaks_for_its_host_and_a_server_certificate_for_none() {
        let authority = Authority::load(&Authority::create(TODAY).unwrap().key_pem).unwrap();
        let host = HostId::from_random([7; 9]);
        let of = |identity: &Identity| host_of(&read("certificate", &identity.cert_pem).unwrap());
        assert_eq!(of(&authority.agent(&host, TODAY).unwrap()), Some(host));
        let names = ["localhost".to_owned(), "127.0.0.1".to_owned(), "::1".to_owned()];
        assert_eq!(of(&authority.server(&names, TODAY).unwrap()), None);
    }

    #[test]
    fn both_configurations_accept_what_the_authority_made() {
        let ca = Authority::create(TODAY).unwrap();
        let server = Authority::load(&ca.key_pem).unwrap().server(&["localhost".to_owned()], TODAY).unwrap();
        assert!(api_config(&server).is_ok());
        assert!(agent_config(&server, &ca.cert_pem).is_ok());
        assert!(agent_config(&server, "no certificate").is_err());
    }
}
