//! A range, read in parts that are not too large.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use etcd_client::proto::{PbKeyValue, PbRangeResponse, PbTxnOpResponse};
use etcd_client::{GetOptions, Txn, TxnOp};
use registry_api::{Error, Read, Result, Revision};
use tokio::time::Instant;

use crate::link::{Backoff, Member};
use crate::list::Reader;
use crate::names::{after, revision};

/// The most keys that one request asks for.
pub(crate) const MAX_KEYS: usize = 4096;
/// How many at first, and how many bytes of values an answer may have before the next asks for fewer.
const FIRST_KEYS: usize = 1024;
pub(crate) const MANY_BYTES: usize = 4 << 20;
/// How many keys are asked for where the last ones were not direct children, and the next may not be either.
const FEW_KEYS: usize = 16;

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
pub(crate) struct Part {
    pub(crate) stored: Vec<PbKeyValue>,
    pub(crate) more: bool,
    pub(crate) revision: i64,
}

/// How long the requests of a listing may take.
#[derive(Debug)]
pub(crate) enum Patience {
    /// Until the listing's deadline, all together.
    Until(Instant),
    /// So many milliseconds each, until it is answered. What counts is progress: to list a million keys takes etcd 3.4
    /// longer than any deadline of a call. A request that was not answered gets twice the time.
    Each(AtomicU64),
}

/// The longest that one request of a listing without a deadline may take.
const MAX_PATIENCE: u64 = 60_000;

impl Patience {
    pub(crate) fn each(time: Duration) -> Self {
        Self::Each(AtomicU64::new(u64::try_from(time.as_millis()).unwrap_or(MAX_PATIENCE)))
    }

    /// The deadline of a request that is sent now.
    pub(crate) fn deadline(&self) -> Instant {
        match self {
            Self::Until(deadline) => *deadline,
            Self::Each(millis) => Instant::now() + Duration::from_millis(millis.load(Ordering::Relaxed)),
        }
    }

    /// Whether a request that was not answered is to be retried; the next one has longer then.
    fn grow(&self) -> bool {
        let Self::Each(millis) = self else {
            return false;
        };
        let longer = |millis: u64| Some((millis * 2).min(MAX_PATIENCE.max(millis)));
        let _ = millis.fetch_update(Ordering::Relaxed, Ordering::Relaxed, longer);
        true
    }
}

impl Reader<'_> {
    /// Reads a part of a range, as large as an answer may be.
    pub(crate) async fn ask(&self, ask: Ask) -> Result<Part> {
        let mut backoff = Backoff::default();
        loop {
            match self.try_ask(&ask).await {
                Err(error @ Error::Unavailable { .. }) if self.patience.grow() => {
                    tracing::debug!(%error, "a watch can't list, trying again");
                    backoff.wait().await;
                }
                part => return part,
            }
        }
    }

    async fn try_ask(&self, ask: &Ask) -> Result<Part> {
        loop {
            let keys = match ask.values {
                Values::Wanted => ask.limit.min(self.size.keys()),
                Values::Omitted => ask.limit.min(MAX_KEYS),
            };
            let call = |member| ask.clone().send(member, keys);
            let part = match self.link.read_in_range(self.patience.deadline(), call).await? {
                Some(part) => part,
                // Too large to be taken, which one key alone never is; or of a revision that is compacted.
                None if keys > 1 && self.is_kept(ask).await? => {
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

    async fn is_kept(&self, ask: &Ask) -> Result<bool> {
        let first = Ask {
            values: Values::Omitted,
            ..ask.clone()
        };
        let first = self
            .link
            .read_in_range(self.patience.deadline(), |member| first.clone().send(member, 1));
        Ok(first.await?.is_some())
    }
}

/// A read of a range, and of one key before it.
#[derive(Clone)]
pub(crate) struct Ask {
    pub(crate) itself: Option<Vec<u8>>,
    pub(crate) range: Range<Vec<u8>>,
    pub(crate) limit: usize,
    /// Zero for now.
    pub(crate) revision: i64,
    pub(crate) read: Read,
    pub(crate) values: Values,
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
pub(crate) struct Walk {
    /// The length of the names' common beginning, its `/` included.
    common: usize,
    rest: Range<Vec<u8>>,
    pub(crate) revision: i64,
    read: Read,
    values: Values,
    /// Whether what lies deeper than a direct child is leapt over.
    pub(crate) leaps: bool,
    keys: usize,
}

impl Walk {
    pub(crate) fn new(below: Range<Vec<u8>>, from: Option<Vec<u8>>, read: Read, values: Values) -> Self {
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

    pub(crate) fn is_done(&self) -> bool {
        self.rest.start >= self.rest.end
    }

    /// The next part, of at most so many keys; `None` at the end.
    pub(crate) async fn step(&mut self, reader: &Reader<'_>, limit: usize) -> Result<Option<Vec<PbKeyValue>>> {
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

pub(crate) fn freshness(options: GetOptions, read: Read) -> GetOptions {
    match read {
        Read::Linearizable => options,
        Read::Stale => options.with_serializable(),
    }
}

pub(crate) fn range(answer: Option<PbTxnOpResponse>) -> Option<PbRangeResponse> {
    match answer {
        Some(PbTxnOpResponse::ResponseRange(range)) => Some(range),
        _ => None,
    }
}
