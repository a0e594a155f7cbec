//! Reads of many keys: pages, children, counts.

use std::collections::BTreeSet;
use std::sync::Arc;

use etcd_client::proto::PbKeyValue;
use etcd_client::{GetOptions, Txn, TxnOp};
use registry_api::{Depth, Entry, Error, List, Page, Prefix, Read, Result, Revision, WatchRequest, WatchScope};

use crate::link::{Link, Member};
use crate::names::{Names, after, revision};
use crate::range::{AnswerSize, Ask, MANY_BYTES, MAX_KEYS, Patience, Values, Walk, freshness, range};

/// How many requests one page of direct children may take, where most of what lies below is deeper.
const MAX_STEPS: usize = 64;

/// Reads ranges in answers of bounded size.
pub(crate) struct Reader<'l> {
    pub(crate) link: &'l Link,
    pub(crate) names: &'l Names,
    pub(crate) size: &'l AnswerSize,
    pub(crate) patience: Patience,
}

impl Reader<'_> {
    /// A page of a listing.
    pub(crate) async fn page(&self, list: &List) -> Result<Page> {
        loop {
            let page = match list.depth {
                Depth::Subtree => {
                    let from = list.after.as_ref().map(|key| self.names.key(key));
                    self.subtree(&list.prefix, from, list.limit, list.read).await
                }
                Depth::Children => self.direct(list).await,
            };
            // Compacted while it was read, part by part.
            if !matches!(page, Err(Error::Compacted { .. })) {
                return page;
            }
        }
    }

    async fn subtree(&self, prefix: &Prefix, from: Option<Vec<u8>>, limit: usize, read: Read) -> Result<Page> {
        let below = self.names.below(prefix);
        let itself = self.names.prefix(prefix).filter(|_| from.is_none());
        let start = from.map_or_else(Vec::new, after).max(below.start);
        let ask = Ask {
            itself,
            range: start..below.end,
            limit,
            revision: 0,
            read,
            values: Values::Wanted,
        };
        let part = self.ask(ask).await?;
        let last = part.stored.last().map(|kv| kv.key.clone());
        let entries = self.entries(part.stored);
        // What follows the last entry that is returned; foreign keys after it are passed over once more.
        let next = match (part.more, entries.last(), last) {
            (false, _, _) | (_, _, None) => None,
            (true, Some(entry), _) => Some(entry.key.clone()),
            (true, None, Some(name)) => return Box::pin(self.subtree(prefix, Some(name), limit, read)).await,
        };
        Ok(Page {
            entries,
            next,
            revision: revision(part.revision),
        })
    }

    /// A page of direct children, without reading what lies deeper where that can be leapt over.
    async fn direct(&self, list: &List) -> Result<Page> {
        let from = list.after.as_ref().map(|key| self.names.key(key));
        let mut walk = Walk::new(self.names.below(&list.prefix), from, list.read, Values::Wanted);
        let mut entries: Vec<Entry> = Vec::new();
        let (mut bytes, mut steps) = (0, 0);
        let mut last = None;
        while let Some(stored) = walk.step(self, list.limit - entries.len()).await? {
            last = stored.iter().rev().find_map(|kv| self.names.parse(&kv.key)).or(last);
            let children = self.entries(stored).into_iter().filter(|entry| list.wants(&entry.key));
            entries.extend(children.inspect(|entry| bytes += entry.value.len()));
            steps += 1;
            // `last` may lie deeper than a child: the next page goes on from there all the same.
            if let Some(last) = last.clone()
                && !walk.is_done()
                && (entries.len() >= list.limit || bytes > MANY_BYTES || steps >= MAX_STEPS)
            {
                return Ok(Page {
                    entries,
                    next: Some(last),
                    revision: revision(walk.revision),
                });
            }
        }
        Ok(Page {
            entries,
            next: None,
            revision: revision(walk.revision),
        })
    }

    /// The names of the direct children, those that only have keys below them too.
    pub(crate) async fn children(&self, prefix: &Prefix, read: Read) -> Result<(Vec<String>, Revision)> {
        loop {
            let children = self.try_children(prefix, read).await;
            if !matches!(children, Err(Error::Compacted { .. })) {
                return children;
            }
        }
    }

    async fn try_children(&self, prefix: &Prefix, read: Read) -> Result<(Vec<String>, Revision)> {
        let mut walk = Walk::new(self.names.below(prefix), None, read, Values::Omitted);
        let mut children = BTreeSet::new();
        while let Some(stored) = walk.step(self, MAX_KEYS).await? {
            for key in stored.iter().filter_map(|kv| self.names.parse(&kv.key)) {
                if let Some((child, _)) = prefix.child_of(&key)
                    && !children.contains(child)
                {
                    children.insert(child.to_owned());
                }
            }
        }
        Ok((children.into_iter().collect(), revision(walk.revision)))
    }

    /// How many keys there are at and below a prefix.
    pub(crate) async fn count(&self, prefix: &Prefix, read: Read) -> Result<(u64, Revision)> {
        let options = || freshness(GetOptions::new().with_count_only(), read);
        let below = self.names.below(prefix);
        let mut counts: Vec<_> = self
            .names
            .prefix(prefix)
            .map(|name| TxnOp::get(name, Some(options())))
            .into_iter()
            .collect();
        counts.push(TxnOp::get(below.start, Some(options().with_range(below.end))));
        let ask = |member: Arc<Member>| {
            let counts = counts.clone();
            async move { member.kv().txn(Txn::new().and_then(counts)).await }
        };
        let response = self.link.read(self.patience.deadline(), ask).await?.0;
        let ranges = response
            .responses
            .into_iter()
            .filter_map(|answer| range(answer.response));
        let count = ranges.map(|range| range.count.unsigned_abs()).sum();
        Ok((count, revision(response.header.map_or(0, |header| header.revision))))
    }

    /// All that a watch of this scope covers, as of one revision: the present one, or the one given.
    pub(crate) async fn covered(
        &self,
        request: &WatchRequest,
        at: i64,
        values: Values,
    ) -> Result<(Vec<Entry>, Revision)> {
        let below = self.names.below(&request.prefix);
        let mut entries = Vec::new();
        let mut found = at;
        let itself = match (request.scope, self.names.prefix(&request.prefix)) {
            (WatchScope::Children, _) => None,
            // The root has no name of its own; what is below it begins with one that is no key's.
            (WatchScope::Key, None) => Some(below.start.clone()),
            (_, itself) => itself,
        };
        if let Some(name) = itself {
            let part = self.ask(Ask {
                itself: None,
                range: name.clone()..after(name),
                limit: 1,
                revision: at,
                read: Read::Linearizable,
                values,
            });
            let part = part.await?;
            found = part.revision;
            entries.extend(self.entries(part.stored));
        }
        if request.scope != WatchScope::Key {
            let mut walk = Walk::new(below, None, Read::Linearizable, values);
            walk.revision = found;
            walk.leaps = request.scope == WatchScope::Children;
            while let Some(stored) = walk.step(self, MAX_KEYS).await? {
                entries.extend(
                    self.entries(stored)
                        .into_iter()
                        .filter(|entry| request.wants(&entry.key)),
                );
            }
            found = walk.revision;
        }
        Ok((entries, revision(found)))
    }

    fn entries(&self, stored: Vec<PbKeyValue>) -> Vec<Entry> {
        stored.into_iter().filter_map(|kv| self.names.entry(kv)).collect()
    }
}
