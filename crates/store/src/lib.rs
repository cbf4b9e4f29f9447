//! The one Store trait and SQLite behind it.
