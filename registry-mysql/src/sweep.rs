//! Ends the sessions of handles that are gone, and trims the change log.
//!
//! A session is dead when its counter was seen unchanged for its TTL, by the clock of whoever looks: a monotonic one, so
//! that neither a jump of the server's clock nor of a client's ends a session. The count starts when an answer has come
//! and ends when the next question is sent, which is the shortest that can have passed at the server; and the transaction
//! that ends the session demands that the counter still stands.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use registry_api::{Result, SessionId, SessionState};
use tokio::sync::watch::Receiver;

use crate::line::number;
use crate::session::end;
use crate::store::Store;
use crate::tables::Tables;

/// How many handles look after all the others; the rest look after these.
const SWEEPERS: usize = 8;
/// How many sessions the rest look after while one of those is silent: all of them may have ended together.
const SUSPECTED: usize = 256;
/// The longest pause of those that look after all. A session of the shortest TTL may be opened at any time.
const LONGEST_PAUSE: Duration = Duration::from_millis(250);
/// How many changes one statement trims, and the rest of the revision of the last one.
const TRIMMED: u64 = 1000;

/// Sweeps until the handle is closed.
pub(crate) async fn run(store: Arc<Store>, mut states: Receiver<SessionState>) {
    let mut sweep = Sweep {
        store,
        seen: HashMap::new(),
        limit: None,
    };
    loop {
        let own = states.borrow().id();
        let pause = match sweep.round(own).await {
            Ok(pause) => pause,
            Err(error) => {
                tracing::debug!(%error, "could not look for sessions that ended");
                Duration::from_millis(100)
            }
        };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            // An error says that the handle is gone.
            _ = states.wait_for(|state| matches!(state, SessionState::Closed(_))) => return,
        }
    }
}

struct Sweep {
    store: Arc<Store>,
    seen: HashMap<SessionId, Seen>,
    /// How many sessions this handle looks after; all if there is no number.
    limit: Option<usize>,
}

/// A session as it was last seen.
#[derive(Clone, Copy)]
struct Seen {
    beat: u64,
    ttl: Duration,
    /// Since when the counter stands.
    since: Instant,
}

impl Sweep {
    /// Looks once, and says when to look again.
    async fn round(&mut self, own: SessionId) -> Result<Duration> {
        let Tables {
            sessions, namespace, ..
        } = &self.store.tables;
        let limit = self.limit.map_or_else(String::new, |limit| format!(" LIMIT {limit}"));
        let sql = format!(
            "{}; SELECT id, beat, ttl_ms FROM {sessions} WHERE namespace = {namespace} ORDER BY id{limit}",
            self.store.select_revision()
        );
        let asked = Instant::now();
        let answers = self.store.ask(self.store.deadline(), &sql).await?;
        let answered = Instant::now();
        let counters = self.store.counters(answers.first())?;
        let rows = answers.get(1).map_or(&[][..], |answer| &answer.rows);
        let rows = rows
            .iter()
            .map(|row| Ok((SessionId(number(row, 0)?), number(row, 1)?, number(row, 2)?)));
        let rows = self.store.decode(rows.collect::<Result<Vec<_>, sqlx::Error>>())?;

        let mut seen = HashMap::new();
        for &(session, beat, ttl) in &rows {
            let ttl = Duration::from_millis(ttl);
            let before = self.seen.get(&session).filter(|seen| seen.beat == beat);
            let since = before.map_or(answered, |seen| seen.since);
            let now = Seen { beat, ttl, since };
            if now.is_dead(asked, before.is_some()) {
                self.end(session, beat).await?;
            } else {
                seen.insert(session, now);
            }
        }
        self.seen = seen;
        let place = rows.iter().position(|(session, ..)| *session == own);
        let first = rows
            .iter()
            .take(SWEEPERS)
            .filter_map(|(session, ..)| self.seen.get(session));
        let suspicious =
            first.clone().count() < rows.len().min(SWEEPERS) || first.into_iter().any(|seen| seen.is_silent(answered));
        self.limit = match place {
            Some(place) if place < SWEEPERS => None,
            _ if suspicious => Some(SUSPECTED),
            _ => Some(SWEEPERS),
        };
        if place == Some(0) {
            self.trim(counters.revision, counters.compacted).await?;
        }
        let shortest = self
            .seen
            .values()
            .map(|seen| seen.ttl)
            .min()
            .unwrap_or(Duration::from_secs(1));
        let pause = match self.limit {
            None => (shortest / 4).min(LONGEST_PAUSE),
            Some(SWEEPERS) => shortest / 4,
            Some(_) => shortest / 8,
        };
        Ok(pause.max(Duration::from_millis(50)))
    }

    async fn end(&self, session: SessionId, beat: u64) -> Result<()> {
        tracing::info!(%session, "a session has expired");
        let sql = end(&self.store.tables, self.store.client, session, Some(beat));
        self.store.ask(self.store.deadline(), &sql).await?;
        self.store.poll.changed();
        Ok(())
    }

    /// Trims the change log to the history that is kept. What is no longer kept is said before it is deleted.
    async fn trim(&self, revision: u64, compacted: u64) -> Result<()> {
        let history = self.store.history;
        if revision < compacted + history + history / 10 {
            return Ok(());
        }
        let Tables {
            namespaces,
            changes,
            namespace,
            ..
        } = &self.store.tables;
        let until = revision - history;
        let isolation = "SET TRANSACTION ISOLATION LEVEL READ COMMITTED";
        let told = format!(
            "{isolation}; UPDATE {namespaces} SET compacted = {until} WHERE id = {namespace} AND compacted < {until}"
        );
        self.store.ask(self.store.deadline(), &told).await?;
        let last = format!(
            "SELECT revision FROM {changes} WHERE namespace = {namespace} AND revision <= {until} \
             ORDER BY revision, position LIMIT 1 OFFSET {}",
            TRIMMED - 1
        );
        loop {
            // Whole revisions, so that no reader of the table finds a part of one.
            let answers = self.store.ask(self.store.deadline(), &last).await?;
            let row = answers.first().and_then(|answer| answer.rows.first());
            let upto = self.store.decode(row.map(|row| number(row, 0)).transpose())?;
            let delete = format!(
                "{isolation}; DELETE FROM {changes} WHERE namespace = {namespace} AND revision <= {}",
                upto.unwrap_or(until)
            );
            self.store.ask(self.store.deadline(), &delete).await?;
            if upto.is_none() {
                return Ok(());
            }
        }
    }
}

impl Seen {
    /// Whether a keep-alive is missing. They come each third of the TTL.
    fn is_silent(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.since) >= self.ttl.mul_f64(0.4)
    }

    fn is_dead(&self, asked: Instant, seen_before: bool) -> bool {
        // An operator ends a session by setting its TTL to nothing.
        self.ttl.is_zero() || seen_before && asked.saturating_duration_since(self.since) >= self.ttl
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_is_dead_when_its_counter_stood_for_its_ttl_and_not_before() {
        let since = Instant::now();
        let seen = |ttl| Seen {
            beat: 3,
            ttl: Duration::from_millis(ttl),
            since,
        };
        let after = |millis| since + Duration::from_millis(millis);
        assert!(!seen(1000).is_dead(after(999), true));
        assert!(seen(1000).is_dead(after(1000), true));
        // Seen for the first time, nothing is known of how long it stands.
        assert!(!seen(1000).is_dead(after(9000), false));
        assert!(seen(0).is_dead(since, false));
    }
}
