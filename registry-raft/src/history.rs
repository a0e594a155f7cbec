//! The newest changes, kept so that a watch can go on from where it was.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::state::KeyChange;

/// How many changes, and how many bytes of keys and values, are kept.
const MAX_CHANGES: usize = 200_000;
const MAX_BYTES: usize = 64 << 20;

/// The changes of the newest revisions. Each member keeps its own; it is no part of the replicated state.
#[derive(Debug, Default)]
pub(crate) struct History {
    batches: VecDeque<Batch>,
    changes: usize,
    bytes: usize,
    /// The newest revision whose changes are not kept any more.
    compacted: u64,
}

/// The changes of one revision.
#[derive(Clone, Debug)]
pub(crate) struct Batch {
    pub(crate) revision: u64,
    pub(crate) changes: Arc<[KeyChange]>,
}

impl Batch {
    fn bytes(&self) -> usize {
        self.changes
            .iter()
            .map(|change| change.record.key.len() + change.record.value.len() + 64)
            .sum()
    }
}

impl History {
    /// A history that knows nothing up to `revision`.
    pub(crate) fn since(revision: u64) -> Self {
        Self {
            compacted: revision,
            ..Self::default()
        }
    }

    pub(crate) fn compacted(&self) -> u64 {
        self.compacted
    }

    pub(crate) fn push(&mut self, batch: Batch) {
        self.changes += batch.changes.len();
        self.bytes += batch.bytes();
        self.batches.push_back(batch);
        while self.changes > MAX_CHANGES || self.bytes > MAX_BYTES {
            let Some(oldest) = self.batches.pop_front() else { return };
            self.changes -= oldest.changes.len();
            self.bytes -= oldest.bytes();
            self.compacted = oldest.revision;
        }
    }

    /// The changes after a revision; `None` if they are not all kept.
    pub(crate) fn after(&self, revision: u64) -> Option<impl Iterator<Item = &Batch>> {
        let from = self.batches.partition_point(|batch| batch.revision <= revision);
        (revision >= self.compacted).then(|| self.batches.range(from..))
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::state::ChangeKind;
    use crate::tree::Record;

    fn batch(revision: u64, bytes: usize) -> Batch {
        let value = Bytes::from(vec![0; bytes]);
        let (create_revision, mod_revision) = (revision, revision);
        let record = Record {
            key: "/ns/a".into(),
            value,
            create_revision,
            mod_revision,
            version: 1,
            session: 0,
        };
        Batch {
            revision,
            changes: [KeyChange {
                kind: ChangeKind::Created,
                record: record.into(),
            }]
            .into(),
        }
    }

    #[test]
    fn keeps_the_newest_within_its_bounds() {
        let mut history = History::since(10);
        assert!(history.after(9).is_none());
        assert_eq!(history.after(10).unwrap().count(), 0);
        for revision in 11..=31 {
            history.push(batch(revision, MAX_BYTES / 10));
        }
        assert!(history.compacted() > 10 && history.after(history.compacted() - 1).is_none());
        let kept: Vec<_> = history
            .after(history.compacted())
            .unwrap()
            .map(|batch| batch.revision)
            .collect();
        assert_eq!(kept, (history.compacted() + 1..=31).collect::<Vec<_>>());
        assert_eq!(history.after(31).unwrap().count(), 0);
    }
}
