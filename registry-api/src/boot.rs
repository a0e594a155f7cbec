//! The machine's clock, suspension included.

use std::ops::Add;
use std::time::Duration;

/// A moment of the clock that counts the time the machine was suspended (`CLOCK_BOOTTIME`).
///
/// [`std::time::Instant`] does not count it on Linux: a moment until which a lock is surely held, taken before a virtual
/// machine was suspended, would lie too late by the length of the suspension.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BootInstant(Duration);

impl BootInstant {
    /// The moment now.
    pub fn now() -> Self {
        Self(boottime())
    }

    /// How long it is until then; zero once it has passed.
    pub fn left(self) -> Duration {
        self.0.saturating_sub(boottime())
    }

    /// Whether it has passed.
    pub fn has_passed(self) -> bool {
        self.0 <= boottime()
    }

    /// How long after `earlier` it is; zero if it is before.
    pub fn saturating_duration_since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }

    pub(crate) fn from_boottime(time: Duration) -> Self {
        Self(time)
    }
}

impl Add<Duration> for BootInstant {
    type Output = Self;

    fn add(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(duration))
    }
}

/// Time since the machine started, its suspension included where the system tells.
pub(crate) fn boottime() -> Duration {
    #[cfg(target_os = "linux")]
    {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        Duration::new(
            now.tv_sec.unsigned_abs(),
            u32::try_from(now.tv_nsec).unwrap_or_default(),
        )
    }
    #[cfg(not(target_os = "linux"))]
    {
        static START: std::sync::OnceLock<std::time::Instant> = std::sync::OnceLock::new();
        START.get_or_init(std::time::Instant::now).elapsed()
    }
}
