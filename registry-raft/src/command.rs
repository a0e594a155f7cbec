//! What the log carries and what applying it answers.

use std::fmt;

/// The answer of the state machine to one command.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reply;

impl fmt::Display for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}
