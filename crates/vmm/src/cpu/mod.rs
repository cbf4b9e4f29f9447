//! What the guest's CPUs say about themselves, and the state they start in.

pub mod cpuid;
pub mod registers;
pub mod state;
