//! The settings that every backend shares.

use std::fmt;
use std::time::Duration;

use crate::{Error, Namespace, Result};

/// The settings of a handle that do not depend on the store: the `[registry]` table.
#[derive(Clone, Debug)]
pub struct Options {
    /// The part of the store that is used, `/registry` by default.
    pub namespace: Namespace,
    /// How long the session outlives its last keep-alive.
    pub session_ttl: SessionTtl,
    /// What to do when the store grants another TTL than was asked.
    pub session_ttl_bounds: TtlBounds,
    /// How long a call may take, 5 s by default (F1).
    pub request_timeout: Duration,
    /// How long opening a handle may take, 5 s by default (F4).
    pub connect_timeout: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            namespace: Namespace::default(),
            session_ttl: SessionTtl::default(),
            session_ttl_bounds: TtlBounds::Refuse,
            request_timeout: Duration::from_secs(5),
            connect_timeout: Duration::from_secs(5),
        }
    }
}

impl Options {
    /// The TTL to live with when the store grants `granted`.
    ///
    /// # Errors
    /// [`Error::Config`] if it is not what was asked and the bounds are not accepted (S1). `bounds` is the store's own
    /// account of what it grants.
    pub fn accept_ttl(&self, granted: Duration, bounds: impl fmt::Display) -> Result<Duration> {
        if granted == self.session_ttl.get() || self.session_ttl_bounds == TtlBounds::Accept {
            return Ok(granted);
        }
        Err(Error::Config {
            field: "registry.session_ttl".into(),
            reason: format!(
                "asked for {:?}, the store grants {granted:?} ({bounds}); ask for that, or set registry.session_ttl_bounds = \"accept\"",
                self.session_ttl.get()
            ),
        })
    }
}

/// How long a session outlives its last keep-alive: 1 s to 1 h, 10 s by default.
///
/// A shorter one frees a dead holder's locks sooner; a process that pauses for longer loses its session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SessionTtl(Duration);

impl SessionTtl {
    const MIN: Duration = Duration::from_secs(1);
    const MAX: Duration = Duration::from_secs(3600);

    /// A TTL.
    ///
    /// # Errors
    /// [`Error::Config`] outside 1 s to 1 h.
    pub fn new(ttl: Duration) -> Result<Self> {
        match (Self::MIN..=Self::MAX).contains(&ttl) {
            true => Ok(Self(ttl)),
            false => Err(Error::Config {
                field: "registry.session_ttl".into(),
                reason: format!("{} is not between 1s and 1h", humantime::format_duration(ttl)),
            }),
        }
    }

    /// The time.
    pub fn get(self) -> Duration {
        self.0
    }
}

impl Default for SessionTtl {
    fn default() -> Self {
        Self(Duration::from_secs(10))
    }
}

impl TryFrom<String> for SessionTtl {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let ttl =
            humantime::parse_duration(&text).map_err(|e| format!("{text:?} is no duration such as \"10s\": {e}"))?;
        Self::new(ttl).map_err(|e| e.to_string())
    }
}

impl From<SessionTtl> for String {
    fn from(ttl: SessionTtl) -> Self {
        humantime::format_duration(ttl.0).to_string()
    }
}

/// What to do when the store grants another TTL than was asked (S1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "String", rename_all = "lowercase")]
pub enum TtlBounds {
    /// Opening the handle fails and says the store's bounds.
    #[default]
    Refuse,
    /// The granted TTL is used, and reported by [`crate::Session::ttl`].
    Accept,
}

impl TryFrom<String> for TtlBounds {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match text.as_str() {
            "refuse" => Ok(Self::Refuse),
            "accept" => Ok(Self::Accept),
            _ => Err(format!("{text:?} is neither `refuse` nor `accept`")),
        }
    }
}
