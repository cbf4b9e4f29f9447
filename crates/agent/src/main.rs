//! The host agent.
fn main() {}
