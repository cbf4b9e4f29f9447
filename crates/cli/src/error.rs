//! How a command fails: what was wrong with which value, and the way out.

use crate::exit;
use roost_types::error::ApiError;
use roost_types::{ErrorCode, ids::MalformedId};
use std::io;
use std::path::PathBuf;

/// The result of anything here.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a command ends without having done its work.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The command line or the configuration file is wrong.
    #[error("{0}")]
    Usage(String),
    /// No profile to sign with.
    #[error("{0}")]
    NoCredentials(String),
    /// The controller (or a check that it would make as well) refused.
    #[error("{error}")]
    Api {
        /// The refusal.
        error: ApiError,
        /// Where to find it in the controller's log.
        request_id: Option<String>,
    },
    /// A file of the user's cannot be used.
    #[error("cannot {action} {path}")]
    File {
        /// Such as `read`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// No connection to the controller.
    #[error("the controller does not answer at {endpoint}")]
    Unreachable {
        /// Where it was expected.
        endpoint: String,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Something else stands at the endpoint.
    #[error("{endpoint} answered, but not as a Roost controller does: {detail}")]
    NotAController {
        /// Where.
        endpoint: String,
        /// What it said.
        detail: String,
    },
    /// It did not get there in time, or does not answer.
    #[error("{0}")]
    Unavailable(String),
    /// The state forbids it.
    #[error("{0}")]
    State(String),
    /// No such thing.
    #[error("{0}")]
    NotFound(String),
    /// Standard input or output failed.
    #[error("standard input or output failed")]
    Stdio(#[from] io::Error),
    /// A fault of ours.
    #[error("{0}")]
    Internal(String),
    /// Ends with this code; everything was said already.
    #[error("exit code {0}")]
    Exit(u8),
}

impl Error {
    /// A parameter with a value that is not allowed.
    pub fn parameter(message: impl Into<String>) -> Self {
        ApiError::new(ErrorCode::InvalidParameterValue, message).into()
    }

    /// The exit code of its class (docs/cli.md).
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Usage(_) => exit::USAGE,
            Error::NoCredentials(_) => exit::AUTH,
            Error::Api { error, .. } => error.code.exit_code(),
            Error::File { .. } => exit::PARAMETER,
            Error::Unreachable { .. } | Error::NotAController { .. } | Error::Unavailable(_) => {
                exit::UNAVAILABLE
            }
            Error::State(_) => exit::STATE,
            Error::NotFound(_) => exit::NOT_FOUND,
            Error::Stdio(_) | Error::Internal(_) => exit::INTERNAL,
            Error::Exit(code) => *code,
        }
    }

    /// The code in JSON: EC2's own where the API refused, `Client.…` where the CLI did.
    pub fn code(&self) -> &'static str {
        match self {
            Error::Usage(_) => "Client.Usage",
            Error::NoCredentials(_) => "Client.NoCredentials",
            Error::Api { error, .. } => error.code.as_str(),
            Error::File { .. } => "Client.File",
            Error::Unreachable { .. } => "Client.Unreachable",
            Error::NotAController { .. } => "Client.NotAController",
            Error::Unavailable(_) => "Client.Unavailable",
            Error::State(_) => "Client.IncorrectState",
            Error::NotFound(_) => "Client.NotFound",
            Error::Stdio(_) | Error::Internal(_) => "Client.InternalError",
            Error::Exit(_) => "Client.Exit",
        }
    }

    /// The way out, where the message itself does not name it.
    pub fn hint(&self) -> Option<String> {
        let text = match self {
            Error::Unreachable { endpoint, .. } => format!(
                "start it with `systemctl start roost-controller` (installed) or `scripts/virtual-host up`, or \
                 name another one with --endpoint or --profile (`roost configure ls`); this was {endpoint}"
            ),
            Error::NoCredentials(_) => {
                "`roost configure --from admin.json` (the controller's state folder has that file), or ask its \
                 administrator for `roost account create NAME --save-profile NAME`"
                    .to_owned()
            }
            Error::Api { error, .. } => match error.code {
                ErrorCode::AuthFailure | ErrorCode::MissingAuthenticationToken => {
                    "see which key is in use with `roost configure ls`; --profile picks another".to_owned()
                }
                ErrorCode::RequestExpired => {
                    "the clocks of this machine and of the controller differ: set both by NTP \
                     (`timedatectl set-ntp true`)"
                        .to_owned()
                }
                ErrorCode::UnauthorizedOperation => {
                    "only administrators may; use an administrator's profile with --profile".to_owned()
                }
                ErrorCode::InsufficientInstanceCapacity => {
                    "see what is left with `roost hosts`; stop something, or take a smaller --type \
                     (`roost types`)"
                        .to_owned()
                }
                ErrorCode::Unsupported => "`roost types` shows which types can run here, and why not".to_owned(),
                ErrorCode::InvalidAmiIdNotFound => {
                    "`roost image ls` shows what there is; `roost image import DIR` adds one".to_owned()
                }
                ErrorCode::InvalidKeyPairNotFound => {
                    "`roost key ls` shows what there is; `roost key create NAME` makes one".to_owned()
                }
                ErrorCode::InvalidInstanceIdNotFound => {
                    "`roost ls` shows what there is; terminated ones with --all".to_owned()
                }
                ErrorCode::InternalError => "the controller's log says more under that request id".to_owned(),
                _ => return None,
            },
            _ => return None,
        };
        Some(text)
    }

    /// The same refusal, if it is this one, with the way out in its message.
    pub fn with_advice(self, code: ErrorCode, advice: &str) -> Self {
        match self {
            Error::Api { mut error, request_id } if error.code == code => {
                error.message = format!("{}: {advice}", error.message.trim_end_matches('.'));
                Error::Api { error, request_id }
            }
            other => other,
        }
    }

    /// Whether it is the connection, not the request, that failed.
    pub fn is_transport(&self) -> bool {
        matches!(self, Error::Unreachable { .. })
    }

    /// Whether the API refused with this code.
    pub fn is_api(&self, code: ErrorCode) -> bool {
        matches!(self, Error::Api { error, .. } if error.code == code)
    }

    /// The message with all its causes, each said once.
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            let part = error.to_string();
            if !text.contains(&part) {
                text.push_str(": ");
                text.push_str(&part);
            }
            cause = error.source();
        }
        text
    }
}

impl From<ApiError> for Error {
    fn from(error: ApiError) -> Self {
        Error::Api { error, request_id: None }
    }
}

impl From<MalformedId> for Error {
    fn from(error: MalformedId) -> Self {
        ApiError::from(error).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_says_each_cause_once() {
        let error = Error::Unreachable {
            endpoint: "https://127.0.0.1:1".into(),
            source: Box::new(io::Error::other(Error::Internal("connection refused".into()))),
        };
        assert_eq!(
            error.chain(),
            "the controller does not answer at https://127.0.0.1:1: connection refused"
        );
        assert!(error.hint().unwrap().contains("--endpoint"));
        assert_eq!(error.exit_code(), exit::UNAVAILABLE);
    }

    #[test]
    fn an_api_refusal_keeps_ec2s_code_and_its_class() {
        let error = Error::from("i-nope".parse::<roost_types::InstanceId>().unwrap_err());
        assert_eq!((error.code(), error.exit_code()), ("InvalidInstanceID.Malformed", exit::PARAMETER));
    }
}
