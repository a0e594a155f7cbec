//! Ends sessions whose time has run out.
//!
//! Only the Raft leader keeps time. When a session's TTL has passed without a keep-alive it proposes to expire it, and
//! every member drops the session's keys when it applies that entry, at the same revision. A new leader grants every
//! session a full TTL again, because it can't know how much had passed: a session may live longer than its TTL, never
//! shorter. So does a leader that finds itself stalled, since what its clients sent meanwhile waits unread. (Gray and
//! Cheriton, *Leases*, 1989.)
//!
//! A session that is silent for half its TTL, when no live one is, has that noted in the log, and again with each further
//! eighth. The next leader grants it only the rest: elections, however many, do not keep a dead session. One that is heard
//! again has that noted before it is told so.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use registry_api::{Error, Result, SessionId};

use crate::link::BACKEND;

/// How often the leader looks.
pub(crate) const TICK: Duration = Duration::from_millis(100);
/// A look that comes this late says that the process stood still.
const STALL: Duration = Duration::from_millis(700);
/// The most sessions that one entry speaks of, and how many keys it takes along, but for those of its last session. The
/// next entry follows when this one is applied: however many sessions end at once, others' writes wait for one such entry.
pub(crate) const BATCH: usize = 500;
const BATCH_KEYS: usize = 500;

/// The deadlines of all sessions, while this member leads.
#[derive(Debug, Default)]
pub(crate) struct Expiry {
    deadlines: Mutex<Deadlines>,
    /// Whose turn it is to propose.
    turn: tokio::sync::Mutex<()>,
}

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
    /// How much of the silence is noted in the log, or on its way there.
    noted: Duration,
}

/// A session as a leader finds it in the replicated state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Known {
    pub(crate) session: u64,
    pub(crate) ttl: Duration,
    /// What earlier leaders noted of its silence.
    pub(crate) silent: Duration,
    pub(crate) heard: u64,
    /// How many keys end with it.
    pub(crate) keys: usize,
}

/// What a look at the clock has found.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Due {
    /// Their time has run out: those of an entry together.
    pub(crate) expired: Vec<Vec<u64>>,
    /// Their silence is to be noted.
    pub(crate) silent: Vec<(Known, Duration)>,
}

impl Expiry {
    /// Counts a session's TTL from `now` on. The caller has made sure that this member still leads. Answers whether the
    /// log says, or is about to, that the session was silent: it must say otherwise before the session is told anything.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if it is about to be expired, or not known to the leader yet: ask again.
    pub(crate) fn extend(&self, session: SessionId, now: Instant) -> Result<bool> {
        let mut deadlines = self.deadlines.lock();
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
        let Some(deadline) = deadlines.sessions.get_mut(&session.0) else {
            return Ok(false);
        };
        deadline.at = deadline.at.max(now + deadline.ttl);
        Ok(!std::mem::take(&mut deadline.noted).is_zero())
    }

    /// This member does not lead: it counts nothing.
    pub(crate) fn rest(&self) {
        let mut deadlines = self.deadlines.lock();
        if deadlines.term.is_some() {
            *deadlines = Deadlines::default();
        }
    }

    /// Takes up the sessions there are, and answers those whose time has run out, and those that are silent. The former
    /// count as expiring until [`Expiry::settled`].
    pub(crate) fn due(&self, term: u64, now: Instant, sessions: impl Iterator<Item = Known>) -> Due {
        let mut deadlines = self.deadlines.lock();
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
        let (mut due, mut keys) = (Due::default(), 0);
        for known in sessions {
            let mut deadline = before.remove(&known.session).unwrap_or_else(|| Deadline {
                at: now + known.ttl.saturating_sub(known.silent),
                ttl: known.ttl,
                noted: known.silent,
            });
            let silence = deadline.ttl.saturating_sub(deadline.at.saturating_duration_since(now));
            let next = (deadline.ttl / 2).max(deadline.noted + deadline.ttl / 8);
            if deadline.at <= now && !deadlines.expiring.contains(&known.session) {
                deadlines.expiring.insert(known.session);
                keys = match due.expired.last_mut() {
                    Some(batch) if batch.len() < BATCH && keys < BATCH_KEYS => {
                        batch.push(known.session);
                        keys + known.keys
                    }
                    _ => {
                        due.expired.push(vec![known.session]);
                        known.keys
                    }
                };
            } else if silence >= next && silence < deadline.ttl {
                deadline.noted = silence;
                due.silent.push((known, silence));
            }
            deadlines.sessions.insert(known.session, deadline);
        }
        due
    }

    /// Waits for its turn to propose, in the order of asking.
    ///
    /// # Cancel safety
    /// Who stops waiting lets the next go first.
    pub(crate) async fn turn(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.turn.lock().await
    }

    /// The proposal to expire these was answered, one way or the other.
    pub(crate) fn settled(&self, sessions: &[u64]) {
        let mut deadlines = self.deadlines.lock();
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
        run_known(expiry, term, from, millis, Duration::ZERO)
    }

    fn run_known(expiry: &Expiry, term: u64, from: Instant, millis: u64, silent: Duration) -> Option<u64> {
        let known = Known {
            session: S.0,
            ttl: TTL,
            silent,
            heard: 0,
            keys: 0,
        };
        (0..=millis).step_by(100).find(|ms| {
            let due = expiry.due(term, from + Duration::from_millis(*ms), [known].into_iter());
            !due.expired.is_empty()
        })
    }

    #[test]
    fn silence_is_noted_and_the_next_leader_goes_on_from_there() {
        let (expiry, start) = (Expiry::default(), Instant::now());
        let known = Known {
            session: S.0,
            ttl: TTL,
            silent: Duration::ZERO,
            heard: 0,
            keys: 0,
        };
        let mut noted = Vec::new();
        for ms in (0..1_000).step_by(50) {
            let due = expiry.due(1, start + Duration::from_millis(ms), [known].into_iter());
            noted.extend(due.silent.into_iter().map(|(_, silent)| silent.as_millis()));
        }
        assert_eq!(noted, [500, 650, 800, 950]);
        let rest = run_known(&Expiry::default(), 2, start, 5_000, Duration::from_millis(800));
        assert_eq!(rest, Some(200));
        assert!(expiry.extend(S, start + Duration::from_millis(950)).unwrap());
        assert!(!expiry.extend(S, start + Duration::from_millis(950)).unwrap());
    }

    #[test]
    fn an_entry_takes_few_keys_along() {
        let (expiry, start) = (Expiry::default(), Instant::now());
        // So many keys each of them has, and so many end together.
        let cases = [
            (0, vec![BATCH, BATCH, 200]),
            (11, vec![46, 46, 46]),
            (2 * BATCH_KEYS, vec![1, 1, 1]),
        ];
        for (term, (keys, together)) in (1..).zip(cases) {
            let known = |session| Known {
                session,
                ttl: TTL,
                silent: Duration::ZERO,
                heard: 0,
                keys,
            };
            let sessions = || (0..together.iter().sum::<usize>() as u64).map(known);
            assert_eq!(expiry.due(term, start, sessions()), Due::default());
            // In steps, so that it is not taken to have stood still.
            let due = (1..=10).map(|tick| expiry.due(term, start + tick * TICK, sessions()));
            let expired: Vec<_> = due.flat_map(|due| due.expired).collect();
            assert_eq!(
                expired.iter().map(Vec::len).collect::<Vec<_>>(),
                together,
                "{keys} keys"
            );
            assert_eq!(
                expired.concat(),
                sessions().map(|known| known.session).collect::<Vec<_>>()
            );
            expiry.rest();
        }
    }

    #[test]
    fn a_session_that_is_kept_alive_is_never_noted() {
        let (expiry, start) = (Expiry::default(), Instant::now());
        let known = Known {
            session: S.0,
            ttl: TTL,
            silent: Duration::ZERO,
            heard: 0,
            keys: 0,
        };
        for ms in (0..10_000).step_by(100) {
            let now = start + Duration::from_millis(ms);
            assert_eq!(expiry.due(1, now, [known].into_iter()), Due::default());
            if ms % 300 == 0 {
                assert!(!expiry.extend(S, now).unwrap());
            }
        }
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
