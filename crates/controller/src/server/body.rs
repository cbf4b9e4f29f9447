//! Request bodies: read whole within limits of size and time, and parsed with errors that name what is wrong.

use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::{Bytes, Incoming};
use roost_types::{ApiError, ErrorCode};
use serde::de::DeserializeOwned;
use std::time::Duration;

/// Reads a whole body of at most `limit` bytes, for no longer than `patience`.
///
/// # Errors
/// `MalformedQueryString` if it is longer, slower, or breaks off.
pub async fn read(body: Incoming, limit: usize, patience: Duration) -> Result<Bytes, ApiError> {
    let refuse = |message: String| ApiError::new(ErrorCode::MalformedRequest, message);
    match tokio::time::timeout(patience, Limited::new(body, limit).collect()).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            Err(refuse(format!("the body is too long: allowed are {limit} bytes")))
        }
        Ok(Err(error)) => Err(refuse(format!("the body broke off: {error}"))),
        Err(_) => Err(refuse(format!("the body did not come within {} s", patience.as_secs()))),
    }
}

/// Parses a JSON body; an empty one counts as `{}`.
///
/// # Errors
/// `UnknownParameter`, `MissingParameter`, `InvalidParameterValue` or `MalformedQueryString`, naming the parameter.
pub fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    let body = if body.is_empty() { b"{}" } else { body };
    // serde would take an array for the fields in their order.
    if body.trim_ascii_start().first() != Some(&b'{') {
        let message = "the body is not a JSON object, such as {}".to_owned();
        return Err(ApiError::new(ErrorCode::MalformedRequest, message));
    }
    let mut input = serde_json::Deserializer::from_slice(body);
    let value = serde_path_to_error::deserialize(&mut input).map_err(|error| {
        let path = error.path().to_string();
        explain(&path, error.inner())
    })?;
    input.end().map_err(|error| explain(".", &error))?;
    Ok(value)
}

fn explain(path: &str, error: &serde_json::Error) -> ApiError {
    let text = error.to_string();
    if !error.is_data() {
        let message = format!("the body is not JSON: {text}");
        return ApiError::new(ErrorCode::MalformedRequest, message);
    }
    // serde's own words, without the position: people see parameters, not columns.
    let text = text.rsplit_once(" at line ").map_or(text.as_str(), |(text, _)| text);
    let place = if path == "." { String::new() } else { format!(" (at {path})") };
    if let Some(rest) = text.strip_prefix("unknown field ") {
        let (name, allowed) = rest.split_once(", ").unwrap_or((rest, "there are no parameters"));
        let allowed = allowed.replace('`', "");
        let name = name.replace('`', "\"");
        return ApiError::new(
            ErrorCode::UnknownParameter,
            format!("unknown parameter {name}{place}: {allowed}"),
        );
    }
    if let Some(name) = text.strip_prefix("missing field ") {
        let message = format!("the parameter {} is missing{place}", name.replace('`', "\""));
        return ApiError::new(ErrorCode::MissingParameter, message);
    }
    let subject = if path == "." { "the body".to_owned() } else { format!("the parameter {path:?}") };
    ApiError::new(ErrorCode::InvalidParameterValue, format!("{subject} is not valid: {text}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use roost_types::api::{DescribeHosts, RunInstances, StopInstances};

    fn refusal<T: DeserializeOwned>(body: &str) -> (ErrorCode, String) {
        parse::<T>(body.as_bytes()).map(drop).map_err(|error| (error.code, error.message)).unwrap_err()
    }

    #[test]
    fn what_is_wrong_with_a_body_is_named() {
        let (code, message) = refusal::<StopInstances>(r#"{"instance_ids":[],"fore":true}"#);
        assert_eq!(code, ErrorCode::UnknownParameter);
        assert!(message.contains("\"fore\"") && message.contains("instance_ids"), "{message}");
        let (code, message) = refusal::<StopInstances>("{}");
        assert_eq!(
            (code, message.as_str()),
            (ErrorCode::MissingParameter, "the parameter \"instance_ids\" is missing")
        );
        let (code, message) =
            refusal::<RunInstances>(r#"{"image":"a","instance_type":"b","min_count":"one"}"#);
        assert_eq!(code, ErrorCode::InvalidParameterValue);
        assert!(message.contains("\"min_count\"") && message.contains("u32"), "{message}");
        let (code, message) = refusal::<StopInstances>(r#"{"instance_ids":["a", 5]}"#);
        assert_eq!(code, ErrorCode::InvalidParameterValue);
        assert!(message.contains("instance_ids[1]"), "{message}");
        let twice = r#"{"instance_ids":[]} {}"#;
        for broken in ["{", "nonsense", twice, r#"{"instance_ids":[]"#, "\u{0}", "[[\"i-1\"], true]", "null"]
        {
            assert_eq!(refusal::<StopInstances>(broken).0, ErrorCode::MalformedRequest, "{broken}");
        }
    }

    #[test]
    fn an_empty_body_has_no_parameters() {
        assert!(parse::<DescribeHosts>(b"").is_ok());
        let (code, message) = refusal::<DescribeHosts>(r#"{"all":true}"#);
        assert_eq!(code, ErrorCode::UnknownParameter);
        assert!(message.contains("\"all\""), "{message}");
    }
}
