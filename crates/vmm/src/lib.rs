//! The monitor: one process per instance.
