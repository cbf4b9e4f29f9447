//! What a user is told when the store fails.

use roost_store::StoreError;
use roost_types::{ApiError, ErrorCode};

/// Returns true if an error concerns one row only, so that other rows can be written.
pub const fn is_of_one_row(error: &StoreError) -> bool {
    !matches!(
        error,
        StoreError::Locked { .. }
            | StoreError::Full { .. }
            | StoreError::Corrupt { .. }
            | StoreError::Unusable { .. }
            | StoreError::TooNew { .. }
    )
}

/// An error of the store as an answer. What only the owner of the controller can mend goes to the log, and the
/// user learns whether to try again.
pub fn of_store(error: StoreError) -> ApiError {
    match error {
        StoreError::NoRoom { .. } | StoreError::NoAddress(_) => {
            ApiError::new(ErrorCode::InsufficientInstanceCapacity, error.to_string())
        }
        StoreError::Stale(_) => ApiError::new(
            ErrorCode::RequestLimitExceeded,
            format!("{error}, again and again: try again in a moment"),
        ),
        StoreError::Locked { .. } => {
            tracing::error!(%error, "the store is locked");
            ApiError::new(
                ErrorCode::Unavailable,
                "the controller's database is locked by another process: try again",
            )
        }
        StoreError::Full { .. } => {
            tracing::error!(%error, "the store is full");
            ApiError::new(
                ErrorCode::Unavailable,
                "the disk of the controller's database is full: nothing was changed; free some space and try again",
            )
        }
        error => {
            tracing::error!(%error, "the store failed");
            ApiError::new(ErrorCode::InternalError, "the controller's database failed; its log says how")
        }
    }
}
