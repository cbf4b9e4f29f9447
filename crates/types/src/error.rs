//! Every error that an API call can end in: EC2's own code, an HTTP status, the CLI's exit code, a sentence.

use crate::ids::MalformedId;
use crate::state::UnknownName;
use crate::state::named_enum;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

named_enum! {
    /// An error code, spelled as EC2 spells it where EC2 has it.
    ErrorCode, "error code" {
        /// The signature is wrong or the access key unknown.
        AuthFailure = "AuthFailure",
        /// The request's time stamp is more than five minutes off.
        RequestExpired = "RequestExpired",
        /// The request is not signed.
        MissingAuthenticationToken = "MissingAuthenticationToken",
        /// The caller may not do this.
        UnauthorizedOperation = "UnauthorizedOperation",
        /// No such action.
        InvalidAction = "InvalidAction",
        /// The body cannot be read.
        MalformedRequest = "MalformedQueryString",
        /// A parameter that the action does not have.
        UnknownParameter = "UnknownParameter",
        /// A parameter is missing.
        MissingParameter = "MissingParameter",
        /// A parameter's value is not allowed.
        InvalidParameterValue = "InvalidParameterValue",
        /// Parameters that exclude each other.
        InvalidParameterCombination = "InvalidParameterCombination",
        /// One client token, two sets of parameters.
        IdempotentParameterMismatch = "IdempotentParameterMismatch",
        /// The call would have succeeded.
        DryRunOperation = "DryRunOperation",
        /// An instance id of the wrong shape.
        InvalidInstanceIdMalformed = "InvalidInstanceID.Malformed",
        /// No such instance.
        InvalidInstanceIdNotFound = "InvalidInstanceID.NotFound",
        /// The instance's state forbids the action.
        IncorrectInstanceState = "IncorrectInstanceState",
        /// An image id of the wrong shape.
        InvalidAmiIdMalformed = "InvalidAMIID.Malformed",
        /// No such image.
        InvalidAmiIdNotFound = "InvalidAMIID.NotFound",
        /// An image of that name exists.
        InvalidAmiNameDuplicate = "InvalidAMIName.Duplicate",
        /// No such key pair.
        InvalidKeyPairNotFound = "InvalidKeyPair.NotFound",
        /// A key pair of that name exists.
        InvalidKeyPairDuplicate = "InvalidKeyPair.Duplicate",
        /// The public key cannot be read.
        InvalidKeyFormat = "InvalidKey.Format",
        /// No such zone.
        InvalidZoneNotFound = "InvalidZone.NotFound",
        /// No such account.
        InvalidAccountNotFound = "InvalidAccountID.NotFound",
        /// No such uploaded file.
        InvalidBlobNotFound = "InvalidBlob.NotFound",
        /// The resource is in use.
        DependencyViolation = "DependencyViolation",
        /// More instances than the account may have.
        InstanceLimitExceeded = "InstanceLimitExceeded",
        /// No host has room.
        InsufficientInstanceCapacity = "InsufficientInstanceCapacity",
        /// The type cannot run here at all.
        Unsupported = "Unsupported",
        /// Known, not built.
        UnsupportedOperation = "UnsupportedOperation",
        /// Too much at once; try again.
        RequestLimitExceeded = "RequestLimitExceeded",
        /// Something that the call needs does not answer now; try again.
        Unavailable = "Unavailable",
        /// A fault of ours.
        InternalError = "InternalError",
    }
}

impl ErrorCode {
    /// The HTTP status that the error travels with.
    pub const fn http_status(self) -> u16 {
        use ErrorCode as E;
        match self {
            E::AuthFailure | E::MissingAuthenticationToken => 401,
            E::RequestExpired => 400,
            E::UnauthorizedOperation => 403,
            E::DryRunOperation => 412,
            E::InternalError => 500,
            E::RequestLimitExceeded | E::Unavailable | E::InsufficientInstanceCapacity => 503,
            _ => 400,
        }
    }

    /// The exit code of a program that ends in this error: one per class (docs/cli.md).
    pub const fn exit_code(self) -> u8 {
        use ErrorCode as E;
        match self {
            E::AuthFailure | E::RequestExpired | E::MissingAuthenticationToken | E::UnauthorizedOperation => {
                4
            }
            E::InvalidInstanceIdNotFound
            | E::InvalidAmiIdNotFound
            | E::InvalidKeyPairNotFound
            | E::InvalidZoneNotFound
            | E::InvalidAccountNotFound
            | E::InvalidBlobNotFound => 5,
            E::IncorrectInstanceState
            | E::DependencyViolation
            | E::InvalidKeyPairDuplicate
            | E::InvalidAmiNameDuplicate
            | E::IdempotentParameterMismatch => 6,
            E::InstanceLimitExceeded | E::InsufficientInstanceCapacity | E::Unsupported => 7,
            E::RequestLimitExceeded | E::Unavailable => 8,
            E::InternalError => 1,
            E::DryRunOperation => 0,
            _ => 3,
        }
    }
}

/// How an API call failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message} ({code})")]
pub struct ApiError {
    /// EC2's code.
    #[serde(rename = "Code")]
    pub code: ErrorCode,
    /// What was wrong, with the value, and what is allowed.
    #[serde(rename = "Message")]
    pub message: String,
}

impl ApiError {
    /// An error of this code with this sentence.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

impl From<MalformedId> for ApiError {
    fn from(error: MalformedId) -> Self {
        let code = match error.prefix {
            "i-" => ErrorCode::InvalidInstanceIdMalformed,
            "ami-" => ErrorCode::InvalidAmiIdMalformed,
            _ => ErrorCode::InvalidParameterValue,
        };
        Self::new(code, error.to_string())
    }
}

/// The body of every answer that is not a success.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// The error.
    #[serde(rename = "Error")]
    pub error: ApiError,
    /// The id of the request, to be found in the controller's log.
    #[serde(rename = "RequestId")]
    pub request_id: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_has_a_status_and_an_exit_code_of_its_class() {
        for code in ErrorCode::ALL {
            assert!((400..=503).contains(&code.http_status()), "{code}");
            assert!(code.exit_code() <= 8, "{code}");
            assert_eq!(code.as_str().parse::<ErrorCode>().unwrap(), *code);
        }
    }

    #[test]
    fn a_malformed_instance_id_becomes_ec2s_own_code() {
        let error = ApiError::from("i-nope".parse::<crate::InstanceId>().unwrap_err());
        assert_eq!(error.code.as_str(), "InvalidInstanceID.Malformed");
        assert!(error.message.contains("\"i-nope\""));
    }
}
