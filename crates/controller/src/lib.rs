//! Lifecycles, API fronts, authentication and metering.
