//! What the guest's CPUs say about themselves, and the state they start in.

pub mod cpuid;
pub mod features;
pub mod model;
pub mod registers;
pub mod state;
pub mod template;
