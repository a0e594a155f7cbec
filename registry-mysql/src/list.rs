//! Reads: one key, pages, children, counts, and all that a watch covers.

use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use registry_api::{Depth, Entry, Key, List, Page, Prefix, Result, Revision, SessionId, WatchRequest, WatchScope};
use sqlx::mysql::MySqlRow;
use tokio::time::Instant;

use crate::line::{NO_BOUND, column, number};
use crate::store::Store;
use crate::tables::{Hex, Tables};

/// The most rows that one statement asks for, how many at first, and how many bytes an answer may have before the next
/// asks for fewer. One of twice that is cut.
const MAX_ROWS: usize = 4096;
const FIRST_ROWS: usize = 512;
const MANY_BYTES: usize = 4 << 20;

/// How many rows to ask for at once, learnt from the sizes of the answers so far.
#[derive(Debug)]
pub(crate) struct AnswerSize(AtomicUsize);

impl Default for AnswerSize {
    fn default() -> Self {
        Self(AtomicUsize::new(FIRST_ROWS))
    }
}

impl AnswerSize {
    /// The bytes at which an answer is cut.
    pub(crate) const ROOM: usize = 2 * MANY_BYTES;

    pub(crate) fn rows(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    /// Learns from an answer of so many rows and bytes.
    pub(crate) fn learn(&self, rows: usize, bytes: usize) {
        let fitting = rows * MANY_BYTES / bytes.max(1);
        let next = fitting.min(self.rows() * 2).clamp(1, MAX_ROWS);
        if bytes > MANY_BYTES || rows >= self.rows() {
            self.0.store(next, Ordering::Relaxed);
        }
    }
}

const ENTRY: &str = "name, value, create_revision, mod_revision, session";

/// The entry in a row, its columns from `from` on; `None` for a name that no registry wrote.
pub(crate) fn entry(row: &MySqlRow, from: usize) -> Result<Option<Entry>, sqlx::Error> {
    let Some(key) = key(column(row, from)?) else {
        return Ok(None);
    };
    Ok(Some(Entry {
        key,
        value: Bytes::copy_from_slice(column(row, from + 1)?),
        create_revision: Revision(number(row, from + 2)?),
        mod_revision: Revision(number(row, from + 3)?),
        session: column::<Option<u64>>(row, from + 4)?.map(SessionId),
    }))
}

fn key(name: &[u8]) -> Option<Key> {
    let key = std::str::from_utf8(name)
        .ok()
        .and_then(|name| Key::from_store(name).ok());
    if key.is_none() {
        tracing::debug!(name = %String::from_utf8_lossy(name), "passing over a foreign key");
    }
    key
}

impl Store {
    fn entries(&self, rows: &[MySqlRow]) -> Result<Vec<Entry>> {
        let entries: Result<Vec<_>, _> = rows.iter().filter_map(|row| entry(row, 0).transpose()).collect();
        self.decode(entries)
    }

    /// One key.
    pub(crate) async fn get(&self, key: &Key, deadline: Instant) -> Result<Option<Entry>> {
        let Tables { entries, namespace, .. } = &self.tables;
        let name = Hex::key(key);
        let sql = format!("SELECT {ENTRY} FROM {entries} WHERE namespace = {namespace} AND name = {name}");
        let answers = self.ask(deadline, &sql).await?;
        Ok(answers
            .first()
            .map(|answer| self.entries(&answer.rows))
            .transpose()?
            .and_then(|mut found| found.pop()))
    }

    /// A page of a listing, of one moment.
    pub(crate) async fn page(&self, list: &List, deadline: Instant) -> Result<Page> {
        let Tables { entries, .. } = &self.tables;
        let place = match list.depth {
            Depth::Subtree => self.tables.covered(&list.prefix),
            Depth::Children => self.children_of(&list.prefix),
        };
        let after = list
            .after
            .as_ref()
            .map(|key| format!(" AND name > {}", Hex::key(key)))
            .unwrap_or_default();
        let (mut found, revision, rows, more) = loop {
            let rows = list.limit.min(self.size.rows());
            // One more, to know whether more follow.
            let sql = format!(
                "{}; SELECT {ENTRY} FROM {entries} WHERE {place}{after} ORDER BY name LIMIT {}",
                self.select_revision(),
                rows + 1
            );
            let answers = self.ask_at_once(deadline, &sql, AnswerSize::ROOM).await?;
            let revision = Revision(self.counters(answers.first())?.revision);
            let Some(answer) = answers.get(1) else {
                return Ok(Page {
                    entries: Vec::new(),
                    next: None,
                    revision,
                });
            };
            let found = self.entries(&answer.rows)?;
            self.size
                .learn(found.len(), found.iter().map(|entry| entry.value.len()).sum());
            // A cut answer does not say whether the server was still the primary. The next one asks for fewer rows; one
            // row and the one more are never cut.
            if !answer.cut || rows == 1 {
                break (found, revision, rows, answer.cut || answer.rows.len() > rows);
            }
        };
        found.truncate(rows);
        let next = found.last().filter(|_| more).map(|entry| entry.key.clone());
        Ok(Page {
            entries: found,
            next,
            revision,
        })
    }

    /// The names of the direct children, those that only have keys below them too.
    pub(crate) async fn children(&self, prefix: &Prefix, deadline: Instant) -> Result<Vec<String>> {
        let Tables { entries, namespace, .. } = &self.tables;
        let below = self.tables.below(prefix);
        let from = prefix.as_str().len() + 2;
        let slash = Hex(b"/");
        let sql = format!(
            "SELECT DISTINCT SUBSTRING_INDEX(SUBSTRING(name, {from}), {slash}, 1) AS child FROM {entries} \
             WHERE namespace = {namespace} AND {below} ORDER BY child"
        );
        let answers = self.ask(deadline, &sql).await?;
        let rows = answers.first().map_or(&[][..], |answer| &answer.rows);
        let names: Result<Vec<_>, _> = rows
            .iter()
            .map(|row| column::<&[u8]>(row, 0).map(<[u8]>::to_vec))
            .collect();
        Ok(self
            .decode(names)?
            .into_iter()
            .filter_map(|name| String::from_utf8(name).ok())
            .collect())
    }

    /// How many keys there are at and below a prefix.
    pub(crate) async fn count(&self, prefix: &Prefix, deadline: Instant) -> Result<u64> {
        let sql = format!(
            "SELECT COUNT(*) FROM {} WHERE {}",
            self.tables.entries,
            self.tables.covered(prefix)
        );
        let answers = self.ask(deadline, &sql).await?;
        let row = answers.first().and_then(|answer| answer.rows.first());
        self.decode(row.map_or(Ok(0), |row| number(row, 0)))
    }

    /// All that a watch of this scope covers, of one moment.
    pub(crate) async fn watched(&self, request: &WatchRequest, deadline: Instant) -> Result<(Vec<Entry>, Revision)> {
        let Tables { entries, namespace, .. } = &self.tables;
        let place = match (request.scope, request.prefix.key()) {
            (WatchScope::Subtree, _) => self.tables.covered(&request.prefix),
            (WatchScope::Children, _) => self.children_of(&request.prefix),
            (WatchScope::Key, Some(key)) => format!("namespace = {namespace} AND name = {}", Hex::key(&key)),
            (WatchScope::Key, None) => "FALSE".into(),
        };
        let revision = self.select_revision();
        let sql = format!("{revision}; SELECT {ENTRY} FROM {entries} WHERE {place} ORDER BY name");
        let answers = self.ask_at_once(deadline, &sql, NO_BOUND).await?;
        let revision = Revision(self.counters(answers.first())?.revision);
        let found = answers.get(1).map(|answer| self.entries(&answer.rows)).transpose()?;
        Ok((found.unwrap_or_default(), revision))
    }

    /// The condition on a row of `entries` that its key is a direct child. What lies deeper is read over.
    fn children_of(&self, prefix: &Prefix) -> String {
        let Tables { namespace, .. } = &self.tables;
        let (below, from, slash) = (self.tables.below(prefix), prefix.as_str().len() + 2, Hex(b"/"));
        format!("namespace = {namespace} AND {below} AND LOCATE({slash}, name, {from}) = 0")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_values_are_asked_for_in_smaller_answers() {
        let size = AnswerSize::default();
        size.learn(FIRST_ROWS, FIRST_ROWS * 100);
        assert_eq!(size.rows(), 2 * FIRST_ROWS);
        size.learn(9, 9 * 900_000);
        assert_eq!(size.rows(), 4);
        // An answer that was short for want of rows says nothing.
        size.learn(1, 10);
        assert_eq!(size.rows(), 4);
        size.learn(4, 40);
        assert_eq!(size.rows(), 8);
    }
}
