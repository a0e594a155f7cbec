//! The change log, read from where a reader stands.
//!
//! Every revision above what is compacted has at least one row, and revisions have no holes. So a reader that finds the
//! next revision missing knows that it is no longer kept; and one that finds another mark on the last change it read, or
//! a smaller revision than its own, knows that the server went back: it was restored, or replaced by a replica that
//! lagged.

use std::sync::atomic::Ordering;

use registry_api::{DeleteCause, Entry, Event, Result, Revision};
use sqlx::mysql::MySqlRow;

use crate::commit::{PUT, SESSION_ENDED};
use crate::line::{Answer, NO_BOUND, column, number};
use crate::list::{AnswerSize, entry};
use crate::store::{Counters, Store};
use crate::tables::Tables;

/// Where a reader stands.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cursor {
    /// Everything up to here was read.
    pub(crate) revision: Revision,
    /// Who wrote that, if it is known: the client and its sequence.
    mark: Option<(u64, u64)>,
}

impl Cursor {
    pub(crate) fn at(revision: Revision) -> Self {
        Self { revision, mark: None }
    }
}

/// What the server says of where a reader stands.
struct Standing {
    counters: Counters,
    /// Who wrote the last revision that was read, if that is kept.
    mark: Option<(u64, u64)>,
}

impl Standing {
    /// Whether the server went back in time since.
    fn went_back(&self, cursor: &Cursor) -> bool {
        let told = cursor.revision.0;
        let lost = self.mark.is_none() && told > self.counters.compacted;
        let another = self.mark.is_some() && self.mark != cursor.mark;
        self.counters.revision < told || cursor.mark.is_some() && (lost || another)
    }
}

/// A change.
#[derive(Clone, Debug)]
pub(crate) struct Change {
    pub(crate) revision: Revision,
    /// The entry, as it is or as it last was.
    pub(crate) entry: Entry,
    kind: u64,
}

impl Change {
    pub(crate) fn event(&self) -> Event {
        let entry = self.entry.clone();
        match self.kind {
            PUT if entry.create_revision == self.revision => Event::Created(entry),
            PUT => Event::Updated(entry),
            kind => Event::Deleted {
                last: entry,
                revision: self.revision,
                cause: match kind {
                    SESSION_ENDED => DeleteCause::SessionEnded,
                    _ => DeleteCause::Deleted,
                },
            },
        }
    }
}

/// What was found.
#[derive(Debug)]
pub(crate) enum Found {
    /// The changes that follow, whole revisions, up to where the cursor stands now.
    Changes {
        changes: Vec<Change>,
        /// More may follow at once.
        more: bool,
    },
    /// The next revision is no longer kept.
    Compacted,
    /// The server went back in time.
    WentBack,
}

impl Store {
    /// Reads what follows, and moves the cursor on.
    pub(crate) async fn changes(&self, cursor: &mut Cursor) -> Result<Found> {
        let (mut rows, mut room) = (self.size.rows(), AnswerSize::ROOM);
        loop {
            match self.try_changes(cursor, rows, room).await? {
                Some(found) => return Ok(found),
                // One revision alone has more rows than were asked for, and is told in one piece.
                None => (rows, room) = (rows * 4, room.saturating_mul(4)),
            }
        }
    }

    /// Whether nothing follows: one statement, for a reader that expects nothing.
    pub(crate) async fn is_quiet(&self, cursor: &mut Cursor) -> Result<bool> {
        let sql = self.select_standing(cursor.revision);
        let answers = self.lines.ask(self.deadline(), &sql, NO_BOUND).await?;
        let standing = self.standing(answers.first())?;
        let quiet = standing.counters.revision == cursor.revision.0 && !standing.went_back(cursor);
        if quiet {
            cursor.mark = standing.mark;
        }
        Ok(quiet)
    }

    fn select_standing(&self, told: Revision) -> String {
        let Tables {
            namespaces,
            namespace,
            changes,
            ..
        } = &self.tables;
        format!(
            "SELECT n.revision, n.compacted, c.client, c.sequence FROM {namespaces} n \
             LEFT JOIN {changes} c ON c.namespace = n.id AND c.revision = {told} AND c.position = 0 \
             WHERE n.id = {namespace}"
        )
    }

    /// The answer to [`Store::select_standing`].
    fn standing(&self, answer: Option<&Answer>) -> Result<Standing> {
        let counters = self.counters(answer)?;
        let row = answer.and_then(|answer| answer.rows.first());
        let mark = row.map(|row| Ok((column::<Option<u64>>(row, 2)?, column::<Option<u64>>(row, 3)?)));
        let mark = self.decode(mark.transpose())?;
        Ok(Standing {
            counters,
            mark: mark.and_then(|(client, sequence)| client.zip(sequence)),
        })
    }

    async fn try_changes(&self, cursor: &mut Cursor, limit: usize, room: usize) -> Result<Option<Found>> {
        let Tables { changes, namespace, .. } = &self.tables;
        let told = cursor.revision.0;
        let sql = format!(
            "{}; SELECT name, value, create_revision, mod_revision, session, revision, kind, client, sequence FROM {changes} \
             WHERE namespace = {namespace} AND revision > {told} ORDER BY revision, position LIMIT {limit}",
            self.select_standing(cursor.revision)
        );
        // Of one snapshot: `compacted` is published before a row is deleted, so rows that are missing show in it.
        let answers = self.ask_at_once(self.deadline(), &sql, room).await?;
        let standing = self.standing(answers.first())?;
        let Standing { counters, mark } = &standing;
        if standing.went_back(cursor) {
            self.rollbacks.fetch_add(1, Ordering::Relaxed);
            return Ok(Some(Found::WentBack));
        }
        // Part of a revision may be deleted and the rest not yet.
        if told < counters.compacted {
            return Ok(Some(Found::Compacted));
        }
        let Some(answer) = answers.get(1) else {
            return Ok(None);
        };
        let revision = |row: &MySqlRow| number(row, 5);
        let first = answer.rows.first().map(|row| self.decode(revision(row))).transpose()?;
        if first.map_or(counters.revision > told, |first| first > told + 1) {
            return Ok(Some(Found::Compacted));
        }
        let mut rows = &answer.rows[..];
        let more = answer.cut || rows.len() >= limit;
        if let (true, Some(last)) = (more, rows.last()) {
            // The last revision may go on beyond what was read.
            let last = self.decode(revision(last))?;
            let whole = rows.partition_point(|row| revision(row).is_ok_and(|revision| revision < last));
            rows = &rows[..whole];
            if rows.is_empty() {
                return Ok(None);
            }
        }
        let Some(last) = rows.last() else {
            cursor.mark = *mark;
            let changes = Vec::new();
            return Ok(Some(Found::Changes { changes, more }));
        };
        let found: Result<Vec<_>, _> = rows.iter().filter_map(|row| change(row).transpose()).collect();
        let found = self.decode(found)?;
        self.size.learn(
            answer.rows.len(),
            found.iter().map(|change| change.entry.value.len()).sum(),
        );
        *cursor = self.decode(revision(last).and_then(|revision| {
            let mark = Some(self::mark(last, 7)?);
            let revision = Revision(revision);
            Ok(Cursor { revision, mark })
        }))?;
        Ok(Some(Found::Changes { changes: found, more }))
    }
}

fn mark(row: &MySqlRow, from: usize) -> Result<(u64, u64), sqlx::Error> {
    Ok((number(row, from)?, number(row, from + 1)?))
}

fn change(row: &MySqlRow) -> Result<Option<Change>, sqlx::Error> {
    let Some(entry) = entry(row, 0)? else { return Ok(None) };
    Ok(Some(Change {
        revision: Revision(number(row, 5)?),
        entry,
        kind: number(row, 6)?,
    }))
}
