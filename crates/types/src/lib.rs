//! Ids, states, instance types, sizes, money and the wire types of both APIs. No I/O, no clock.
