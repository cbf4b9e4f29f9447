//! The virtual host and the simulated agents that tests run on.
