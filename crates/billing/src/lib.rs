//! Usage log + price book + window -> charges. Pure.
