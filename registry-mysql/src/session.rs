//! Sessions are rows, each with a counter that its keep-alives move.

use std::time::Duration;

use async_trait::async_trait;
use registry_api::{Error, Grant, Result, SessionId, SessionStore};
use tokio::time::Instant;

use crate::commit::{CHANGE, SESSION_ENDED};
use crate::line::{Lines, NO_BOUND};
use crate::store::random;
use crate::tables::Tables;

/// Sessions, over a connection of their own that lives on the session thread.
pub(crate) struct Sessions {
    pub(crate) lines: Lines,
    pub(crate) tables: Tables,
    pub(crate) client: u64,
    pub(crate) ttl: Duration,
    pub(crate) request_timeout: Duration,
}

impl Sessions {
    async fn ask(&self, sql: &str) -> Result<Vec<crate::line::Answer>> {
        self.lines
            .ask(Instant::now() + self.request_timeout, sql, NO_BOUND)
            .await
    }
}

#[async_trait]
impl SessionStore for Sessions {
    async fn open(&self) -> Result<Grant> {
        let Tables {
            sessions, namespace, ..
        } = &self.tables;
        let (session, ttl) = (SessionId(random()), self.ttl.as_millis());
        // Asked twice after a lost answer, it finds its own row and leaves it.
        self.ask(&format!(
            "INSERT IGNORE INTO {sessions} (namespace, id, ttl_ms, beat, seen_at) \
             VALUES ({namespace}, {}, {ttl}, 0, UTC_TIMESTAMP(3))",
            session.0
        ))
        .await?;
        Ok(Grant {
            session,
            ttl: self.ttl,
            // Whoever sweeps counts from when it sees a keep-alive, which is after its sending, by a monotonic clock.
            margin: Duration::ZERO,
        })
    }

    async fn keep_alive(&self, session: SessionId) -> Result<()> {
        let Tables {
            sessions, namespace, ..
        } = &self.tables;
        // A session whose TTL an operator set to nothing is to end.
        let beat = format!(
            "UPDATE {sessions} SET beat = beat + 1, seen_at = UTC_TIMESTAMP(3) \
             WHERE namespace = {namespace} AND id = {} AND ttl_ms > 0",
            session.0
        );
        match self.ask(&beat).await?.first().map(|answer| answer.affected) {
            Some(0) => Err(Error::SessionExpired { session }),
            _ => Ok(()),
        }
    }

    async fn close(&self, session: SessionId) -> Result<()> {
        let ended = self.ask(&end(&self.tables, self.client, session, None)).await;
        ended.map(drop).map_err(|error| match error {
            // An attempt whose response was lost may have ended it.
            Error::Unavailable { source, .. } => Error::OutcomeUnknown {
                operation: "close",
                source,
            },
            error => error,
        })
    }
}

/// The transaction that ends a session and deletes its keys at one revision; if `beat` is given, only if no keep-alive
/// came since. In one piece, so that nobody holds the counter's lock while a client thinks. Done twice it does nothing.
pub(crate) fn end(tables: &Tables, client: u64, session: SessionId, beat: Option<u64>) -> String {
    let Tables {
        namespaces,
        entries,
        changes,
        sessions,
        namespace,
    } = tables;
    let session = session.0;
    let unchanged = beat.map(|beat| format!(" AND beat = {beat}")).unwrap_or_default();
    let ended = format!("NOT EXISTS (SELECT 1 FROM {sessions} s WHERE s.namespace = {namespace} AND s.id = {session})");
    format!(
        "SET TRANSACTION ISOLATION LEVEL READ COMMITTED; START TRANSACTION; \
         UPDATE {namespaces} SET revision = revision + 1 WHERE id = {namespace}; \
         DELETE FROM {sessions} WHERE namespace = {namespace} AND id = {session}{unchanged}; \
         INSERT INTO {changes} ({CHANGE}) \
           SELECT e.namespace, n.revision, ROW_NUMBER() OVER (ORDER BY e.name) - 1, e.name, {SESSION_ENDED}, e.value, \
             e.create_revision, e.mod_revision, e.session, {client}, 0 \
           FROM {entries} e JOIN {namespaces} n ON n.id = e.namespace \
           WHERE e.namespace = {namespace} AND e.session = {session} AND {ended}; \
         DELETE FROM {entries} WHERE namespace = {namespace} AND session = {session} AND {ended}; \
         UPDATE {namespaces} SET revision = revision - 1 WHERE id = {namespace} AND NOT EXISTS \
           (SELECT 1 FROM {changes} c WHERE c.namespace = {namespace} AND c.revision = {namespaces}.revision); \
         COMMIT"
    )
}
