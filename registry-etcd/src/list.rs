//! Reads of many keys: pages, children, counts.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use etcd_client::proto::{PbKeyValue, PbRangeResponse, PbTxnOpResponse};
use etcd_client::{GetOptions, Txn, TxnOp};
use registry_api::{Depth, Entry, Error, List, Page, Prefix, Read, Result, Revision, WatchRequest, WatchScope};
use tokio::time::Instant;

use crate::link::{Link, Member};
use crate::names::{Names, after, revision};

/// The most keys that one request asks for.
const MAX_KEYS: usize = 4096;
/// How many at first, and how many bytes of values an answer may have before the next asks for fewer.
const FIRST_KEYS: usize = 1024;
const MANY_BYTES: usize = 4 << 20;
/// How many requests one page of direct children may take, where most of what lies below is deeper.
const MAX_STEPS: usize = 64;
/// How many keys are asked for where the last ones were not direct children, and the next may not be either.
const FEW_KEYS: usize = 16;

/// Reads ranges in answers of bounded size.
pub(crate) struct Reader<'l> {
    pub(crate) link: &'l Link,
    pub(crate) names: &'l Names,
    pub(crate) size: &'l AnswerSize,
    pub(crate) deadline: Instant,
}

/// How many keys to ask for at once, learnt from the sizes of the answers so far.
#[derive(Debug)]
pub(crate) struct AnswerSize(AtomicUsize);

impl Default for AnswerSize {
    fn default() -> Self {
        Self(AtomicUsize::new(FIRST_KEYS))
    }
}

impl AnswerSize {
    fn keys(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    /// Learns from an answer of so many keys and bytes.
    fn learn(&self, keys: usize, bytes: usize) {
        let fitting = keys * MANY_BYTES / bytes.max(1);
        let next = fitting.min(self.keys() * 2).clamp(1, MAX_KEYS);
        if bytes > MANY_BYTES || keys >= self.keys() {
            self.0.store(next, Ordering::Relaxed);
        }
    }

    /// An answer to so many keys was too large to be taken.
    fn too_large(&self, keys: usize) {
        self.0.fetch_min((keys / 8).max(1), Ordering::Relaxed);
    }
}

/// Whether values are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Values {
    Wanted,
    /// Names and revisions are enough.
    Omitted,
}

/// A part of a range, as of one revision.
struct Part {
    stored: Vec<PbKeyValue>,
    more: bool,
    revision: i64,
}

impl Reader<'_> {
    /// A page of a listing.
    pub(crate) async fn page(&self, list: &List) -> Result<Page> {
        match list.depth {
            Depth::Subtree => {
                let from = list.after.as_ref().map(|key| self.names.key(key));
                self.subtree(&list.prefix, from, list.limit, list.read).await
            }
            Depth::Children => self.direct(list).await,
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
        let response = self.link.read(self.deadline, ask).await?.0;
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
        if request.scope != WatchScope::Children
            && let Some(name) = self.names.prefix(&request.prefix)
        {
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

    /// Reads a part of a range, as large as an answer may be.
    async fn ask(&self, ask: Ask) -> Result<Part> {
        loop {
            let keys = match ask.values {
                Values::Wanted => ask.limit.min(self.size.keys()),
                Values::Omitted => ask.limit.min(MAX_KEYS),
            };
            let call = |member| ask.clone().send(member, keys);
            let part = match self.link.read_in_range(self.deadline, call).await? {
                Some(part) => part,
                // Too large to be taken; or else, which one key alone never is, of a revision that is compacted.
                None if keys > 1 => {
                    self.size.too_large(keys);
                    continue;
                }
                None => {
                    return Err(Error::Compacted {
                        requested: revision(ask.revision),
                        oldest: Revision(0),
                    });
                }
            };
            if ask.values == Values::Wanted {
                self.size
                    .learn(part.stored.len(), part.stored.iter().map(|kv| kv.value.len()).sum());
            }
            return Ok(part);
        }
    }
}

/// A read of a range, and of one key before it.
#[derive(Clone)]
struct Ask {
    itself: Option<Vec<u8>>,
    range: Range<Vec<u8>>,
    limit: usize,
    /// Zero for now.
    revision: i64,
    read: Read,
    values: Values,
}

impl Ask {
    async fn send(self, member: Arc<Member>, keys: usize) -> Result<Part, etcd_client::Error> {
        let mut options = freshness(GetOptions::new().with_revision(self.revision), self.read);
        if self.values == Values::Omitted {
            options = options.with_keys_only();
        }
        let limit = i64::try_from(keys).unwrap_or(i64::MAX);
        let of_range = options.clone().with_range(self.range.end).with_limit(limit);
        let mut part = match self.itself {
            None => {
                let response = member.kv().get(self.range.start, Some(of_range)).await?;
                Part::of(response.0)
            }
            Some(name) => {
                let gets = [
                    TxnOp::get(name, Some(options)),
                    TxnOp::get(self.range.start, Some(of_range)),
                ];
                let response = member.kv().txn(Txn::new().and_then(gets)).await?.0;
                let mut part = Part {
                    stored: Vec::new(),
                    more: false,
                    revision: response.header.map_or(0, |header| header.revision),
                };
                for answer in response
                    .responses
                    .into_iter()
                    .filter_map(|answer| range(answer.response))
                {
                    part.more = answer.more;
                    part.stored.extend(answer.kvs);
                }
                part
            }
        };
        if part.stored.len() > keys {
            part.stored.truncate(keys);
            part.more = true;
        }
        // An answer about the past carries the present revision.
        if self.revision != 0 {
            part.revision = self.revision;
        }
        Ok(part)
    }
}

impl Part {
    fn of(answer: PbRangeResponse) -> Self {
        Self {
            stored: answer.kvs,
            more: answer.more,
            revision: answer.header.map_or(0, |header| header.revision),
        }
    }
}

/// A walk over a range at one revision, part by part.
struct Walk {
    /// The length of the names' common beginning, its `/` included.
    common: usize,
    rest: Range<Vec<u8>>,
    revision: i64,
    read: Read,
    values: Values,
    /// Whether what lies deeper than a direct child is leapt over.
    leaps: bool,
    keys: usize,
}

impl Walk {
    fn new(below: Range<Vec<u8>>, from: Option<Vec<u8>>, read: Read, values: Values) -> Self {
        Self {
            common: below.start.len(),
            rest: from.map_or_else(Vec::new, after).max(below.start)..below.end,
            revision: 0,
            read,
            values,
            leaps: true,
            keys: MAX_KEYS,
        }
    }

    fn is_done(&self) -> bool {
        self.rest.start >= self.rest.end
    }

    /// The next part, of at most so many keys; `None` at the end.
    async fn step(&mut self, reader: &Reader<'_>, limit: usize) -> Result<Option<Vec<PbKeyValue>>> {
        if self.is_done() {
            return Ok(None);
        }
        let ask = Ask {
            itself: None,
            range: self.rest.clone(),
            limit: limit.min(self.keys),
            revision: self.revision,
            read: self.read,
            values: self.values,
        };
        let part = reader.ask(ask).await?;
        self.revision = part.revision;
        self.rest.start = match part.stored.last() {
            Some(last) if part.more => self.following(last.key.clone()),
            _ => self.rest.end.clone(),
        };
        Ok(Some(part.stored))
    }

    /// Where to go on after a name. Below a child, that is after everything below it: `prefix/child0`, `0` being the
    /// byte after `/`.
    fn following(&mut self, name: Vec<u8>) -> Vec<u8> {
        let deep = name.iter().skip(self.common).position(|&byte| byte == b'/');
        match deep {
            Some(child) if self.leaps => {
                self.keys = FEW_KEYS;
                let mut next = name;
                next.truncate(self.common + child);
                next.push(b'0');
                next
            }
            _ => {
                self.keys = (self.keys * 4).min(MAX_KEYS);
                after(name)
            }
        }
    }
}

fn freshness(options: GetOptions, read: Read) -> GetOptions {
    match read {
        Read::Linearizable => options,
        Read::Stale => options.with_serializable(),
    }
}

fn range(answer: Option<PbTxnOpResponse>) -> Option<PbRangeResponse> {
    match answer {
        Some(PbTxnOpResponse::ResponseRange(range)) => Some(range),
        _ => None,
    }
}
