//! As much of HTTP/1.1 as a local API needs: requests with `Content-Length`, one after the other.

/// A complete request.
#[derive(Debug, PartialEq, Eq)]
pub struct Request<'a> {
    /// `GET`, `PUT`, `PATCH`, …
    pub method: &'a str,
    /// The path, without a query.
    pub path: &'a str,
    /// The body.
    pub body: &'a [u8],
}

/// What a buffer holds.
#[derive(Debug, PartialEq, Eq)]
pub enum Parsed<'a> {
    /// A request, and how many bytes it took.
    Request(Request<'a>, usize),
    /// The begin of a request.
    Incomplete,
    /// No request.
    Bad(&'static str),
}

/// Longest head of a request.
const MAX_HEAD: usize = 16 * 1024;
/// Longest body.
const MAX_BODY: usize = 256 * 1024;

/// Parses what has arrived.
#[must_use]
pub fn parse(buffer: &[u8]) -> Parsed<'_> {
    let Some(head_length) = buffer.windows(4).position(|window| window == b"\r\n\r\n") else {
        return if buffer.len() > MAX_HEAD {
            Parsed::Bad("the request's head is too long")
        } else {
            Parsed::Incomplete
        };
    };
    let Ok(head) = std::str::from_utf8(&buffer[..head_length]) else {
        return Parsed::Bad("the request's head is not text");
    };
    let mut lines = head.split("\r\n");
    let mut words = lines.next().unwrap_or_default().split(' ');
    let (Some(method), Some(target), Some("HTTP/1.1" | "HTTP/1.0"), None) =
        (words.next(), words.next(), words.next(), words.next())
    else {
        return Parsed::Bad("the request line is not of the form METHOD PATH HTTP/1.1");
    };
    let mut length = 0;
    for line in lines {
        let Some((name, value)) = line.split_once(':') else {
            return Parsed::Bad("a header line has no colon");
        };
        if name.eq_ignore_ascii_case("content-length") {
            match value.trim().parse::<usize>() {
                Ok(count) if count <= MAX_BODY => length = count,
                _ => return Parsed::Bad("Content-Length is no number up to 262144"),
            }
        } else if name.eq_ignore_ascii_case("transfer-encoding") {
            return Parsed::Bad("Transfer-Encoding is not taken, send Content-Length");
        }
    }
    let start = head_length + 4;
    let end = start + length;
    if buffer.len() < end {
        return Parsed::Incomplete;
    }
    let path = target.split('?').next().unwrap_or(target);
    Parsed::Request(Request { method, path, body: &buffer[start..end] }, end)
}

/// A response.
#[derive(Debug, PartialEq, Eq)]
pub struct Response {
    status: &'static str,
    body: Vec<u8>,
}

impl Response {
    /// 200 with a body.
    #[must_use]
    pub fn ok(body: &serde_json::Value) -> Self {
        Self { status: "200 OK", body: body.to_string().into_bytes() }
    }

    /// 204.
    #[must_use]
    pub const fn no_content() -> Self {
        Self { status: "204 No Content", body: Vec::new() }
    }

    /// 400 with the reason.
    #[must_use]
    pub fn fault(message: &str) -> Self {
        let body = serde_json::json!({ "fault_message": message }).to_string().into_bytes();
        Self { status: "400 Bad Request", body }
    }

    /// What goes over the wire.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = format!("HTTP/1.1 {}\r\nServer: roost-vmm\r\n", self.status).into_bytes();
        if !self.body.is_empty() {
            let head = format!("Content-Type: application/json\r\nContent-Length: {}\r\n", self.body.len());
            bytes.extend(head.into_bytes());
        }
        bytes.extend(b"\r\n");
        bytes.extend(&self.body);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_request_is_complete_with_its_last_byte_and_not_before() {
        let text = b"PUT /actions?x=1 HTTP/1.1\r\nHost: localhost\r\ncontent-length: 4\r\n\r\nbodyGET /";
        let end = text.len() - 5;
        for length in 0..end {
            assert_eq!(parse(&text[..length]), Parsed::Incomplete, "{length}");
        }
        let Parsed::Request(request, used) = parse(text) else { panic!("no request") };
        assert_eq!(
            (request.method, request.path, request.body, used),
            ("PUT", "/actions", &b"body"[..], end)
        );
    }

    #[test]
    fn what_is_not_taken_is_said() {
        for (text, word) in [
            (&b"GET /\r\n\r\n"[..], "METHOD"),
            (b"PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", "Transfer-Encoding"),
            (b"PUT / HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n", "Content-Length"),
            (b"PUT / HTTP/1.1\r\nnonsense\r\n\r\n", "colon"),
            (b"\xff\xff\r\n\r\n", "text"),
        ] {
            let Parsed::Bad(why) = parse(text) else { panic!("{text:?} was taken") };
            assert!(why.contains(word), "{why}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(&bytes);
        }
    }
}
