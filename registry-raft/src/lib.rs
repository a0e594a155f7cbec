//! The embedded Raft backend of `registry`.

mod command;
mod types;
