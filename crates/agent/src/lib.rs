//! The host agent: jail, cgroups, network, storage, metadata.
