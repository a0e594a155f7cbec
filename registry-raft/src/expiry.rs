//! Ends sessions whose time has run out.
//!
//! Only the Raft leader keeps time. When a session's TTL has passed without a keep-alive it proposes to expire it, and
//! every member drops the session's keys when it applies that entry, at the same revision. A new leader grants every
//! session a full TTL again, because it can't know how much had passed: a session may live longer than its TTL, never
//! shorter. A leader that finds itself stalled adds the stall to every deadline, since the keep-alives that were sent
//! meanwhile are still unread. (Gray and Cheriton, *Leases*, 1989.)
//!
//! A session that is silent for half its TTL, when no live one is, has that noted in the log, and again with each further
//! eighth. The next leader grants it only the rest: elections, however many, do not keep a dead session. One that is heard
//! again has that noted before its keep-alive is answered. A keep-alive that has arrived and waits for the majority's
//! confirmation is no silence: otherwise a busy group would write entries about live sessions, and be busier for it.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use registry_api::{Error, Result, SessionId};

use crate::link::BACKEND;

/// How often the leader looks.
pub(crate) const TICK: Duration = Duration::from_millis(100);
/// A look that comes this late says that the process was paused. A session has at least so long after a pause, in which
/// the leader reads the keep-alives that wait.
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
    /// How much of the silence is noted in the log or proposed to be, and how often the session had been heard again before
    /// that: the note is void once it was heard once more.
    noted: Duration,
    heard: u64,
    /// When its last keep-alive arrived, confirmed or not.
    arrived: Option<Instant>,
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
    /// Notes that a keep-alive has arrived, which is not confirmed yet: it promises nothing, and is no silence.
    pub(crate) fn arrived(&self, session: SessionId, now: Instant) {
        if let Some(deadline) = self.deadlines.lock().sessions.get_mut(&session.0) {
            deadline.arrived = deadline.arrived.max(Some(now));
        }
    }

    /// Counts a session's TTL from `now` on. The caller has made sure, since the keep-alive arrived, that this member leads in
    /// `term`, and has read since then that the session was heard again `heard` times. Returns whether the log says, or is
    /// about to, that the session was silent since: it must say otherwise before the keep-alive is answered.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the session is about to be expired, or if this member does not count in that term: a later
    /// leader counts by itself, and knows nothing of what would be promised here.
    pub(crate) fn extend(&self, session: SessionId, term: u64, heard: u64, now: Instant) -> Result<bool> {
        let mut deadlines = self.deadlines.lock();
        let not_now = |reason: &str| {
            Err(Error::Unavailable {
                backend: BACKEND,
                source: reason.into(),
            })
        };
        if deadlines.term != Some(term) {
            return not_now("the member does not count the sessions' time in this term");
        }
        if deadlines.expiring.contains(&session.0) {
            return not_now("the session is being expired");
        }
        // One that is not there yet was opened just now, and gets its full TTL with the next look.
        let Some(deadline) = deadlines.sessions.get_mut(&session.0) else {
            return Ok(false);
        };
        deadline.at = deadline.at.max(now + deadline.ttl);
        Ok(!deadline.noted.is_zero() && deadline.heard >= heard)
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
        if deadlines.term != Some(term) {
            *deadlines = Deadlines {
                term: Some(term),
                expiring: std::mem::take(&mut deadlines.expiring),
                ..Deadlines::default()
            };
        }
        let late = deadlines.looked.map(|looked| now.saturating_duration_since(looked));
        let stalled = late.filter(|late| *late > STALL);
        deadlines.looked = Some(now);
        let mut before = std::mem::take(&mut deadlines.sessions);
        let (mut due, mut keys) = (Due::default(), 0);
        for known in sessions {
            let mut deadline = before.remove(&known.session).unwrap_or_else(|| Deadline {
                at: now + known.ttl.saturating_sub(known.silent),
                ttl: known.ttl,
                noted: known.silent,
                heard: known.heard,
                arrived: None,
            });
            if let Some(stalled) = stalled {
                // Only what was unread: each further stall would grant a dead session more otherwise.
                deadline.at = (deadline.at + stalled).max(now + STALL);
            }
            if deadline.heard == known.heard {
                // A note that was in flight when this member began to count.
                deadline.noted = deadline.noted.max(known.silent);
            } else {
                // Another leader may have answered the keep-alive that this is from.
                let granted = now + deadline.ttl.saturating_sub(known.silent);
                deadline.at = deadline.at.max(granted);
                (deadline.noted, deadline.heard) = (known.silent, known.heard);
            }
            let silence = deadline.ttl.saturating_sub(deadline.at.saturating_duration_since(now));
            let arrived = deadline.arrived.map(|arrived| now.saturating_duration_since(arrived));
            let silence = arrived.map_or(silence, |arrived| silence.min(arrived));
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
    }

    /// A second keep-alive that comes before the log says that the session was heard is not answered without that either.
    #[test]
    fn a_session_that_was_silent_is_answered_once_the_log_says_that_it_was_heard() {
        let (expiry, start) = (Expiry::default(), Instant::now());
        let at = |ms| start + Duration::from_millis(ms);
        let known = |heard, silent| Known {
            session: S.0,
            ttl: TTL,
            silent: Duration::from_millis(silent),
            heard,
            keys: 0,
        };
        expiry.due(1, start, [known(0, 0)].into_iter());
        assert_eq!(expiry.due(1, at(500), [known(0, 0)].into_iter()).silent.len(), 1);
        for _ in 0..3 {
            assert!(expiry.extend(S, 1, 0, at(550)).unwrap(), "the note may be in the log");
        }
        // The state says that it was heard, once before the leader looks again and once after.
        assert!(!expiry.extend(S, 1, 1, at(560)).unwrap());
        expiry.due(1, at(600), [known(1, 0)].into_iter());
        assert!(!expiry.extend(S, 1, 1, at(610)).unwrap());
        // It is noted once more: what was read before that does not make it void.
        for ms in [1_200, 1_300] {
            expiry.due(1, at(ms), [known(1, 0)].into_iter());
        }
        assert!(expiry.extend(S, 1, 1, at(1_310)).unwrap());
        assert!(expiry.extend(S, 1, 0, at(1_310)).unwrap());
    }

    /// However long the majority's confirmation takes; what has not arrived is silence.
    #[test]
    fn a_keep_alive_that_waits_to_be_confirmed_is_no_silence_and_no_promise() {
        let (expiry, start) = (Expiry::default(), Instant::now());
        let known = Known {
            session: S.0,
            ttl: TTL,
            silent: Duration::ZERO,
            heard: 0,
            keys: 0,
        };
        let mut due = Due::default();
        for ms in (0..=1_000).step_by(100) {
            let now = start + Duration::from_millis(ms);
            if ms % 300 == 0 {
                expiry.arrived(S, now);
            }
            assert_eq!(due, Due::default(), "after {ms} ms");
            due = expiry.due(1, now, [known].into_iter());
        }
        assert_eq!(due.expired, [[S.0]], "nobody confirmed one");
    }

    #[test]
    fn a_keep_alive_counts_only_in_the_term_that_was_confirmed() {
        let (expiry, start) = (Expiry::default(), Instant::now());
        assert!(expiry.extend(S, 2, 0, start).is_err(), "it has not begun to count");
        assert_eq!(run(&expiry, 2, start, 500), None);
        for term in [1, 3] {
            assert!(expiry.extend(S, term, 0, start + Duration::from_millis(900)).is_err());
        }
        assert_eq!(run(&expiry, 2, start + Duration::from_millis(600), 5_000), Some(400));
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
                assert!(!expiry.extend(S, 1, 0, now).unwrap());
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
        expiry.extend(S, 1, 0, start + Duration::from_millis(900)).unwrap();
        assert_eq!(run(&expiry, 1, start + Duration::from_millis(1_000), 5_000), Some(900));
    }

    #[test]
    fn a_keep_alive_comes_too_late_for_one_that_is_being_expired() {
        let (expiry, start) = (Expiry::default(), Instant::now());
        assert_eq!(run(&expiry, 1, start, 1_000), Some(1_000));
        assert!(expiry.extend(S, 1, 0, start).is_err());
        expiry.settled(&[S.0]);
        expiry.extend(S, 1, 0, start).unwrap();
    }

    #[test]
    fn a_new_term_grants_a_full_ttl() {
        let (expiry, start) = (Expiry::default(), Instant::now());
        assert_eq!(run(&expiry, 1, start, 900), None);
        assert_eq!(run(&expiry, 2, start + Duration::from_millis(950), 5_000), Some(1_000));
    }

    #[test]
    fn a_stall_is_added_to_every_deadline() {
        let (expiry, start) = (Expiry::default(), Instant::now());
        let at = |ms| start + Duration::from_millis(ms);
        // 900 ms are left when ten seconds pass unseen.
        assert_eq!(run(&expiry, 1, start, 100), None);
        assert_eq!(run(&expiry, 1, at(10_100), 5_000), Some(900));
        expiry.settled(&[S.0]);
        // Nothing is left: the keep-alives that wait are read first.
        assert_eq!(run(&expiry, 1, at(21_000), 5_000), Some(700));
    }

    /// However often the leader is paused, a dead session ends within its TTL and the pauses.
    #[test]
    fn stalls_keep_no_dead_session() {
        let (expiry, start, ttl) = (Expiry::default(), Instant::now(), Duration::from_secs(10));
        let known = Known {
            session: S.0,
            ttl,
            silent: Duration::ZERO,
            heard: 0,
            keys: 0,
        };
        let (mut now, mut stalls) = (start, Duration::ZERO);
        let mut tick = 0;
        while expiry.due(1, now, [known].into_iter()).expired.is_empty() {
            tick += 1;
            let pause = Duration::from_millis(if tick % 40 == 0 { 800 } else { 100 });
            stalls += pause.saturating_sub(TICK);
            now += pause;
            assert!(
                now - start < 2 * ttl + stalls,
                "a dead session lives after {:?}",
                now - start
            );
        }
        assert!(now - start >= ttl);
    }

    /// A new leader counts before it has applied what an earlier one has committed.
    #[test]
    fn a_session_that_was_heard_by_an_earlier_leader_gets_its_full_ttl() {
        let (expiry, start) = (Expiry::default(), Instant::now());
        let at = |ms| start + Duration::from_millis(ms);
        let known = |heard, silent| Known {
            session: S.0,
            ttl: TTL,
            silent: Duration::from_millis(silent),
            heard,
            keys: 0,
        };
        assert_eq!(expiry.due(2, at(0), [known(0, 800)].into_iter()), Due::default());
        for ms in (100..1_100).step_by(100) {
            let due = expiry.due(2, at(ms), [known(1, 0)].into_iter());
            assert!(due.expired.is_empty(), "expired after {ms} ms");
        }
        let due = expiry.due(2, at(1_100), [known(1, 0)].into_iter());
        assert_eq!(due.expired, [[S.0]]);
    }

    /// The note of a silence is in flight while the leader is paused: the keep-alive that it reads then is answered once
    /// the log says that the session was heard.
    #[test]
    fn a_stall_forgets_no_note_of_a_silence() {
        let (expiry, start) = (Expiry::default(), Instant::now());
        let at = |ms| start + Duration::from_millis(ms);
        let known = |silent| Known {
            session: S.0,
            ttl: TTL,
            silent: Duration::from_millis(silent),
            heard: 0,
            keys: 0,
        };
        expiry.due(1, start, [known(0)].into_iter());
        assert_eq!(expiry.due(1, at(500), [known(0)].into_iter()).silent.len(), 1);
        expiry.due(1, at(1_300), [known(0)].into_iter());
        assert!(expiry.extend(S, 1, 0, at(1_310)).unwrap());
        // A note of another leader, applied after this one has begun to count.
        let later = Expiry::default();
        later.due(2, start, [known(0)].into_iter());
        later.due(2, at(100), [known(500)].into_iter());
        assert!(later.extend(S, 2, 0, at(110)).unwrap());
    }

    #[test]
    fn who_does_not_lead_counts_nothing() {
        let expiry = Expiry::default();
        assert_eq!(run(&expiry, 1, Instant::now(), 500), None);
        expiry.rest();
        assert!(expiry.extend(S, 1, 0, Instant::now()).is_err());
    }
}
