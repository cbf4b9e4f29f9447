//! Signature Version 4: what a request claims in its `authorization` header, and what the signature of it must be.
//!
//! Pure. The canonical request is built from the path, query and headers as they were received; nothing is
//! trusted that is not signed. Only the header form exists here: there are no presigned URLs.

use hmac::{Hmac, KeyInit, Mac};
use http::HeaderMap;
use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use roost_types::Micros;
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

const ALGORITHM: &str = "AWS4-HMAC-SHA256";
const TERMINATOR: &str = "aws4_request";

/// Why a request's authentication cannot even be checked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClaimError {
    /// There is no `authorization` header.
    #[error(
        "the request is not signed: expected an authorization header with Signature Version 4 ({ALGORITHM})"
    )]
    Missing,
    /// A part of the claim is missing or misshapen.
    #[error("the request's signature cannot be read: {0}")]
    Malformed(String),
}

/// What a request says about its signature.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim<'a> {
    /// The access key that signed.
    pub access_key_id: &'a str,
    /// Date of the credential scope, `YYYYMMDD`.
    pub date: &'a str,
    /// Region of the credential scope.
    pub region: &'a str,
    /// Service of the credential scope.
    pub service: &'a str,
    /// Names of the signed headers, in the order of the canonical request.
    pub signed_headers: Vec<&'a str>,
    /// The signature.
    pub signature: [u8; 32],
    /// `x-amz-date` as it came.
    pub timestamp: &'a str,
    /// The same, read.
    pub signed_at: Micros,
}

impl<'a> Claim<'a> {
    /// Reads the claim from a request's headers.
    ///
    /// # Errors
    /// [`ClaimError`].
    pub fn parse(headers: &'a HeaderMap) -> Result<Self, ClaimError> {
        let text = |name: &str| headers.get(name).map(|value| value.to_str());
        let authorization = text("authorization")
            .ok_or(ClaimError::Missing)?
            .map_err(|_| malformed("authorization is not plain ASCII"))?;
        let fields = authorization
            .strip_prefix(ALGORITHM)
            .and_then(|rest| rest.strip_prefix(' '))
            .ok_or_else(|| malformed(&format!("authorization must begin with {ALGORITHM}")))?;
        let field = |name: &str| {
            let mut parts = fields.split(',').map(str::trim);
            parts.find_map(|part| part.strip_prefix(name)?.strip_prefix('='))
        };
        let field =
            |name: &str| field(name).ok_or_else(|| malformed(&format!("authorization has no {name}")));
        let scope: Vec<_> = field("Credential")?.split('/').collect();
        let [access_key_id, date, region, service, TERMINATOR] = scope[..] else {
            return Err(malformed("Credential must be KEY/YYYYMMDD/REGION/SERVICE/aws4_request"));
        };
        let mut signature = [0; 32];
        hex::decode_to_slice(field("Signature")?, &mut signature)
            .map_err(|_| malformed("Signature must be 64 hexadecimal digits"))?;
        let signed_headers: Vec<_> = field("SignedHeaders")?.split(';').collect();
        let Some(Ok(timestamp)) = text("x-amz-date") else {
            return Err(malformed("there is no x-amz-date header"));
        };
        let signed_at = parse_timestamp(timestamp)
            .ok_or_else(|| malformed(&format!("x-amz-date is {timestamp:?}, expected YYYYMMDDTHHMMSSZ")))?;
        if date.len() != 8 || !timestamp.starts_with(date) {
            return Err(malformed("the date in Credential is not that of x-amz-date"));
        }
        // What is not signed could be swapped by whoever carries the request.
        let needed = headers.keys().map(http::HeaderName::as_str).filter(|name| name.starts_with("x-amz-"));
        for name in needed.chain(["host"]) {
            if !signed_headers.contains(&name) {
                return Err(malformed(&format!("the header {name} must be among SignedHeaders")));
            }
        }
        Ok(Self { access_key_id, date, region, service, signed_headers, signature, timestamp, signed_at })
    }
}

/// A request as far as its signature goes.
#[derive(Debug, Clone, Copy)]
pub struct SignedRequest<'a> {
    /// `GET`, `POST` …
    pub method: &'a str,
    /// Path as received, still percent-encoded.
    pub path: &'a str,
    /// Query as received, without the question mark.
    pub query: &'a str,
    /// Headers as received.
    pub headers: &'a HeaderMap,
    /// SHA-256 of the body, hexadecimal.
    pub payload_hash: &'a str,
}

/// What the signature of a request must be, if `secret` signed it.
pub fn signature(claim: &Claim<'_>, request: &SignedRequest<'_>, secret: &[u8]) -> [u8; 32] {
    let canonical = canonical_request(claim, request);
    let text = format!(
        "{ALGORITHM}\n{timestamp}\n{date}/{region}/{service}/{TERMINATOR}\n{hash}",
        timestamp = claim.timestamp,
        date = claim.date,
        region = claim.region,
        service = claim.service,
        hash = hex::encode(Sha256::digest(&canonical)),
    );
    let first = Zeroizing::new([b"AWS4", secret].concat());
    let key = [claim.date, claim.region, claim.service, TERMINATOR]
        .iter()
        .fold(first, |key, part| Zeroizing::new(hmac(&key, part.as_bytes()).to_vec()));
    hmac(&key, text.as_bytes())
}

fn hmac(key: &[u8], text: &[u8]) -> [u8; 32] {
    match Hmac::<Sha256>::new_from_slice(key) {
        Ok(mac) => mac.chain_update(text).finalize().into_bytes().into(),
        // HMAC takes keys of any length.
        Err(_) => [0; 32],
    }
}

fn canonical_request(claim: &Claim<'_>, request: &SignedRequest<'_>) -> Vec<u8> {
    let mut out = Vec::with_capacity(512);
    out.extend(request.method.as_bytes());
    out.push(b'\n');
    // Every service but S3 encodes the path a second time: a received `%` is signed as `%25`.
    encode(normalize(request.path).as_bytes(), b"/", &mut out);
    out.push(b'\n');
    out.extend(canonical_query(request.query));
    out.push(b'\n');
    for name in &claim.signed_headers {
        out.extend(name.as_bytes());
        out.push(b':');
        for (at, value) in request.headers.get_all(*name).iter().enumerate() {
            if at > 0 {
                out.push(b',');
            }
            collapse(value.as_bytes(), &mut out);
        }
        out.push(b'\n');
    }
    out.push(b'\n');
    out.extend(claim.signed_headers.join(";").as_bytes());
    out.push(b'\n');
    out.extend(request.payload_hash.as_bytes());
    out
}

/// Without empty and dot segments.
fn normalize(path: &str) -> String {
    let mut kept: Vec<&str> = Vec::new();
    for segment in path.split('/') {
        match segment {
            "" | "." => {}
            ".." => drop(kept.pop()),
            other => kept.push(other),
        }
    }
    let trailing = ["/", "/.", "/.."].iter().any(|end| path.ends_with(end)) && !kept.is_empty();
    format!("/{}{}", kept.join("/"), if trailing { "/" } else { "" })
}

/// Decoded, encoded anew, sorted by name and then by value.
fn canonical_query(query: &str) -> Vec<u8> {
    let part = |text: &str| {
        let mut out = Vec::new();
        encode(&decode(text), b"", &mut out);
        out
    };
    let mut pairs: Vec<_> = query
        .split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .map(|(name, value)| (part(name), part(value)))
        .collect();
    pairs.sort();
    let pairs: Vec<_> = pairs.into_iter().map(|(name, value)| [name, value].join(&b'=')).collect();
    pairs.join(&b'&')
}

fn encode(text: &[u8], also_kept: &[u8], out: &mut Vec<u8>) {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    for byte in text {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(byte) || also_kept.contains(byte) {
            out.push(*byte);
        } else {
            out.extend([b'%', HEX[usize::from(byte >> 4)], HEX[usize::from(byte & 15)]]);
        }
    }
}

fn decode(text: &str) -> Vec<u8> {
    let (bytes, mut out, mut at) = (text.as_bytes(), Vec::with_capacity(text.len()), 0);
    while let Some(byte) = bytes.get(at) {
        let mut pair = [0_u8];
        let escaped = *byte == b'%'
            && bytes.get(at + 1..at + 3).is_some_and(|hex| hex::decode_to_slice(hex, &mut pair).is_ok());
        if escaped {
            out.push(pair[0]);
            at += 3;
        } else {
            out.push(if *byte == b'+' { b' ' } else { *byte });
            at += 1;
        }
    }
    out
}

/// Trimmed, and every run of spaces as one.
fn collapse(value: &[u8], out: &mut Vec<u8>) {
    let words = value.split(|byte| *byte == b' ').filter(|word| !word.is_empty());
    for (at, word) in words.enumerate() {
        if at > 0 {
            out.push(b' ');
        }
        out.extend(word);
    }
}

fn parse_timestamp(text: &str) -> Option<Micros> {
    let civil = DateTime::strptime("%Y%m%dT%H%M%SZ", text).ok()?;
    let moment: Timestamp = civil.to_zoned(TimeZone::UTC).ok()?.timestamp();
    (text.len() == 16).then(|| Micros(moment.as_microsecond()))
}

fn malformed(what: &str) -> ClaimError {
    ClaimError::Malformed(what.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    const SECRET: &[u8] = b"wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY";
    const EMPTY: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in pairs {
            map.append(*name, HeaderValue::from_str(value).unwrap());
        }
        map
    }

    /// The example of AWS's own documentation: a GET of IAM's ListUsers on 2015-08-30.
    #[test]
    fn the_published_example_has_the_published_signature() {
        let signature_text = "5d672d79c15b13162d9279b0855cfba6789a8edb4c82c400e06b5924a6f2b5d7";
        let headers = headers(&[
            ("content-type", "application/x-www-form-urlencoded; charset=utf-8"),
            ("host", "iam.amazonaws.com"),
            ("x-amz-date", "20150830T123600Z"),
            (
                "authorization",
                &format!(
                    "AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/iam/aws4_request, \
                     SignedHeaders=content-type;host;x-amz-date, Signature={signature_text}"
                ),
            ),
        ]);
        let claim = Claim::parse(&headers).unwrap();
        assert_eq!((claim.access_key_id, claim.region, claim.service), ("AKIDEXAMPLE", "us-east-1", "iam"));
        assert_eq!(claim.signed_at, Micros::from_secs(1_440_938_160));
        let request = SignedRequest {
            method: "GET",
            path: "/",
            query: "Action=ListUsers&Version=2010-05-08",
            headers: &headers,
            payload_hash: EMPTY,
        };
        assert_eq!(
            hex::encode(Sha256::digest(canonical_request(&claim, &request))),
            "f536975d06c0309214f805bb90ccff089219ecd68b2577efef23edd43b7e1a59"
        );
        assert_eq!(hex::encode(signature(&claim, &request, SECRET)), signature_text);
        assert_eq!(signature(&claim, &request, SECRET), claim.signature);
        let other = SignedRequest { path: "/x", ..request };
        assert_ne!(signature(&claim, &other, SECRET), claim.signature);
    }

    #[test]
    fn a_claim_that_cannot_be_read_says_what_is_missing() {
        let credential = "Credential=A/20150830/r/roost/aws4_request";
        let zeros = "0".repeat(64);
        let good = format!("AWS4-HMAC-SHA256 {credential}, SignedHeaders=host;x-amz-date, Signature={zeros}");
        let parse = |authorization: &str, date: &str| {
            let headers = headers(&[("host", "h"), ("x-amz-date", date), ("authorization", authorization)]);
            Claim::parse(&headers).map(drop).map_err(|error| error.to_string())
        };
        assert_eq!(parse(&good, "20150830T000000Z"), Ok(()));
        for (authorization, date, expected) in [
            ("Basic abc".to_owned(), "20150830T000000Z", "begin with AWS4-HMAC-SHA256"),
            (good.replace("/aws4_request", ""), "20150830T000000Z", "Credential must be"),
            (good.replace("Signature", "Sig"), "20150830T000000Z", "no Signature"),
            (good.replace("0000", "zzzz"), "20150830T000000Z", "64 hexadecimal digits"),
            (good.replace("host;", ""), "20150830T000000Z", "header host must be among"),
            (good.replace(";x-amz-date", ""), "20150830T000000Z", "header x-amz-date must be among"),
            (good.clone(), "2015-08-30", "expected YYYYMMDDTHHMMSSZ"),
            (good.clone(), "20150831T000000Z", "not that of x-amz-date"),
            (good.replace("20150830", ""), "20150830T000000Z", "not that of x-amz-date"),
            (good.replace("20150830", "2015083"), "20150830T000000Z", "not that of x-amz-date"),
        ] {
            let error = parse(&authorization, date).unwrap_err();
            assert!(error.contains(expected), "{authorization}: {error}");
        }
        assert_eq!(Claim::parse(&HeaderMap::new()), Err(ClaimError::Missing));
    }

    #[test]
    fn paths_queries_and_header_values_take_their_canonical_form() {
        assert_eq!(normalize("//a/./b/../c/"), "/a/c/");
        assert_eq!(normalize("/a/b/."), "/a/b/");
        assert_eq!(normalize("/a/b/.."), "/a/");
        assert_eq!(normalize(""), "/");
        assert_eq!(normalize("/../.."), "/");
        assert_eq!(canonical_query("b=2&a=%7e+x&a=1&c"), b"a=1&a=~%20x&b=2&c=".to_vec());
        let mut out = Vec::new();
        collapse(b"  a   b  c ", &mut out);
        assert_eq!(out, b"a b c");
    }
}
