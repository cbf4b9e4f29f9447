//! What the command line of `run` names: the configuration and the API's socket. Both are opened before the lock-down, by the
//! monitor itself or by the jail's step.

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use crate::cli::Run;
use crate::descriptors::take;
use crate::error::{Error, Result};

/// The text of the configuration, if one is named.
///
/// # Errors
/// [`Error::Config`], [`Error::Io`].
pub fn config_text(run: &Run) -> Result<Option<String>> {
    if let Some(path) = &run.config {
        let text = std::fs::read_to_string(path);
        text.map(Some).map_err(|error| Error::Config(format!("{}: {error}", path.display())))
    } else if let Some(number) = run.config_fd {
        let file = File::from(take(number, "--config-fd")?);
        std::io::read_to_string(file).map(Some).map_err(Error::io("reading the configuration"))
    } else {
        Ok(None)
    }
}

/// The API's listening socket, if one is named.
///
/// # Errors
/// [`Error::Config`], [`Error::Io`].
pub fn listener(run: &Run) -> Result<Option<UnixListener>> {
    match (&run.api_sock, run.api_fd) {
        (Some(path), _) => bind(path, "API socket").map(Some),
        (None, Some(number)) => Ok(Some(UnixListener::from(take(number, "--api-fd")?))),
        (None, None) => Ok(None),
    }
}

/// Makes a socket, called so. One that a dead monitor left behind is replaced, one that answers is not.
pub(crate) fn bind(path: &Path, what: &str) -> Result<UnixListener> {
    // A file that is no socket refuses connections, too.
    let socket = std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
    let dead =
        socket && UnixStream::connect(path).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused);
    if dead {
        std::fs::remove_file(path)
            .map_err(Error::io(format!("removing the dead {what} {}", path.display())))?;
    }
    UnixListener::bind(path).map_err(Error::io(format!("making the {what} {}", path.display())))
}
