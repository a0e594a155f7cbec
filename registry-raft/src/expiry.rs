//! Ends sessions whose time has run out.
//!
//! Only the Raft leader keeps time. When a session's TTL has passed without a keep-alive it proposes to expire it, and
//! every member drops the session's keys when it applies that entry, at the same revision. A new leader grants every
//! session a full TTL again, because it can't know how much had passed: a session may live longer than its TTL, never
//! shorter. So does a leader that finds itself stalled, since what its clients sent meanwhile waits unread. (Gray and
//! Cheriton, *Leases*, 1989.)

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use registry_api::{Error, Result, SessionId};

use crate::link::BACKEND;

/// How often the leader looks.
pub(crate) const TICK: Duration = Duration::from_millis(100);
/// A look that comes this late says that the process stood still.
const STALL: Duration = Duration::from_millis(700);
/// The most sessions that one entry expires: ten thousand at once must not hold up others' writes.
pub(crate) const BATCH: usize = 500;

/// The deadlines of all sessions, while this member leads.
#[derive(Debug, Default)]
pub(crate) struct Expiry(Mutex<Deadlines>);

#[derive(Debug, Default)]
struct Deadlines {
    /// The term this member leads in, if it does.
    term: Option<u64>,
    sessions: HashMap<u64, Deadline>,
    /// Proposed to be expired; a keep-alive comes too late for them.
    expiring: HashSet<u64>,
    looked: Option<Instant>,
}

#[derive(Debug)]
struct Deadline {
    at: Instant,
    ttl: Duration,
}

impl Expiry {
    /// Counts a session's TTL from `now` on. The caller has made sure that this member still leads.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if it is about to be expired, or not known to the leader yet: ask again.
    pub(crate) fn extend(&self, session: SessionId, now: Instant) -> Result<()> {
        let mut deadlines = self.0.lock();
        let not_now = |reason: &str| {
            Err(Error::Unavailable {
                backend: BACKEND,
                source: reason.into(),
            })
        };
        if deadlines.expiring.contains(&session.0) {
            return not_now("the session is being expired");
        }
        if deadlines.term.is_none() {
            return not_now("the member leads no longer");
        }
        // One that is not there yet was opened just now, and gets its full TTL with the next look.
        if let Some(deadline) = deadlines.sessions.get_mut(&session.0) {
            deadline.at = deadline.at.max(now + deadline.ttl);
        }
        Ok(())
    }

    /// This member does not lead: it counts nothing.
    pub(crate) fn rest(&self) {
        let mut deadlines = self.0.lock();
        if deadlines.term.is_some() {
            *deadlines = Deadlines::default();
        }
    }

    /// Takes up the sessions there are, and answers those whose time has run out. They count as expiring until
    /// [`Expiry::settled`].
    pub(crate) fn due(&self, term: u64, now: Instant, sessions: impl Iterator<Item = (u64, Duration)>) -> Vec<u64> {
        let mut deadlines = self.0.lock();
        let stalled = deadlines
            .looked
            .is_some_and(|looked| now.saturating_duration_since(looked) > STALL);
        if deadlines.term != Some(term) || stalled {
            *deadlines = Deadlines {
                term: Some(term),
                expiring: std::mem::take(&mut deadlines.expiring),
                ..Deadlines::default()
            };
        }
        deadlines.looked = Some(now);
        let mut before = std::mem::take(&mut deadlines.sessions);
        for (session, ttl) in sessions {
            let deadline = before.remove(&session).unwrap_or(Deadline { at: now + ttl, ttl });
            deadlines.sessions.insert(session, deadline);
        }
        let due = deadlines
            .sessions
            .iter()
            .filter(|(session, deadline)| deadline.at <= now && !deadlines.expiring.contains(session));
        let due: Vec<_> = due.map(|(session, _)| *session).collect();
        deadlines.expiring.extend(&due);
        due
    }

    /// The proposal to expire these was answered, one way or the other.
    pub(crate) fn settled(&self, sessions: &[u64]) {
        let mut deadlines = self.0.lock();
        for session in sessions {
            deadlines.expiring.remove(session);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TTL: Duration = Duration::from_secs(1);
    const S: SessionId = SessionId(7);

    /// Looks every tick from `from` for so many milliseconds; answers when the session was due, if it was.
    fn run(expiry: &Expiry, term: u64, from: Instant, millis: u64) -> Option<u64> {
        (0..=millis).step_by(100).find(|ms| {
            !expiry
                .due(term, from + Duration::from_millis(*ms), [(S.0, TTL)].into_iter())
                .is_empty()
        })
    }

    #[test]
    fn a_session_without_keep_alives_is_due_after_its_ttl() {
        assert_eq!(run(&Expiry::default(), 1, Instant::now(), 5_000), Some(1_000));
    }

    #[test]
    fn a_keep_alive_counts_anew() {
        let (expiry, start) = (Expiry::default(), Instant::now());
        assert_eq!(run(&expiry, 1, start, 900), None);
        expiry.extend(S, start + Duration::from_millis(900)).unwrap();
        assert_eq!(run(&expiry, 1, start + Duration::from_millis(1_000), 5_000), Some(900));
    }

    #[test]
    fn a_keep_alive_comes_too_late_for_one_that_is_being_expired() {
        let (expiry, start) = (Expiry::default(), Instant::now());
        assert_eq!(run(&expiry, 1, start, 1_000), Some(1_000));
        assert!(expiry.extend(S, start).is_err());
        expiry.settled(&[S.0]);
        expiry.extend(S, start).unwrap();
    }

    #[test]
    fn a_new_term_and_a_stall_grant_a_full_ttl() {
        let (expiry, start) = (Expiry::default(), Instant::now());
        let at = |ms| start + Duration::from_millis(ms);
        assert_eq!(run(&expiry, 1, start, 900), None);
        assert_eq!(run(&expiry, 2, at(950), 5_000), Some(1_000));
        expiry.settled(&[S.0]);
        // Ten seconds pass unseen.
        assert_eq!(run(&expiry, 2, at(12_000), 5_000), Some(1_000));
    }

    #[test]
    fn who_does_not_lead_counts_nothing() {
        let expiry = Expiry::default();
        assert_eq!(run(&expiry, 1, Instant::now(), 500), None);
        expiry.rest();
        assert!(expiry.extend(S, Instant::now()).is_err());
    }
}
