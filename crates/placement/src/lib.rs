//! Instances x hosts -> where. Pure.
