//! What COM1 is configured with.

use serde::{Deserialize, Serialize};

use crate::config::TokenBucket;
use crate::error::{Error, Result};

/// COM1.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SerialConfig {
    /// A console ring file (see [`crate::console`]); `"stdout"` for the process's own. Nothing: output goes to `serial_out_path`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output: Option<String>,
    /// A file that output is appended to, or a named pipe. Without this and `output` it is dropped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial_out_path: Option<String>,
    /// Bytes of output; what is over it is dropped and counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<TokenBucket>,
    /// A pipe or socket that input is read from; `"stdin"` for the process's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input: Option<String>,
}

impl SerialConfig {
    /// Checks what types cannot say.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn check(&self) -> Result<()> {
        match (&self.output, &self.serial_out_path) {
            (Some(output), Some(path)) => Err(Error::Config(format!(
                "serial: output {output:?} and serial_out_path {path:?}: output goes to one of them"
            ))),
            _ => Ok(()),
        }
    }
}
