//! What etcd is asked to compare, and what is read of keys to tell why it refused.

use std::collections::HashMap;

use etcd_client::proto::{PbTxnOpResponse, PbTxnResponse};
use etcd_client::{Compare, CompareOp, GetOptions, TxnOp};

use crate::names::after;

/// What etcd is to verify.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Demand {
    Absent(Vec<u8>),
    Present(Vec<u8>),
    Modified(Vec<u8>, i64),
    Created(Vec<u8>, i64),
    Lease(Vec<u8>, i64),
    /// Nothing in this range.
    Empty(Vec<u8>, Vec<u8>),
    /// Nothing in this range was put after the revision.
    Untouched(Vec<u8>, Vec<u8>, i64),
}

/// What is read to tell why a transaction was refused.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Probe {
    Key(Vec<u8>),
    Range(Vec<u8>, Vec<u8>),
}

/// A key as a probe found it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Found {
    pub(crate) created: i64,
    pub(crate) modified: i64,
    pub(crate) lease: i64,
}

/// What the probes found, at one revision.
#[derive(Debug, Default)]
pub(crate) struct State {
    pub(crate) revision: i64,
    pub(crate) found: HashMap<Probe, Found>,
}

impl Demand {
    /// The names it is about.
    pub(crate) fn range(&self) -> (Vec<u8>, Vec<u8>) {
        match self {
            Self::Empty(start, end) | Self::Untouched(start, end, _) => (start.clone(), end.clone()),
            Self::Absent(key)
            | Self::Present(key)
            | Self::Modified(key, _)
            | Self::Created(key, _)
            | Self::Lease(key, _) => (key.clone(), after(key.clone())),
        }
    }

    pub(crate) fn compare(self) -> Compare {
        match self {
            Self::Absent(key) => Compare::create_revision(key, CompareOp::Equal, 0),
            Self::Present(key) => Compare::create_revision(key, CompareOp::NotEqual, 0),
            Self::Modified(key, revision) => Compare::mod_revision(key, CompareOp::Equal, revision),
            Self::Created(key, revision) => Compare::create_revision(key, CompareOp::Equal, revision),
            Self::Lease(key, lease) => Compare::lease(key, CompareOp::Equal, lease),
            Self::Empty(start, end) => Compare::create_revision(start, CompareOp::Equal, 0).with_range(end),
            Self::Untouched(start, end, before) => {
                Compare::mod_revision(start, CompareOp::Less, before).with_range(end)
            }
        }
    }
}

impl Probe {
    /// The read for this probe, at a revision or, for zero, now.
    pub(crate) fn get(&self, revision: i64) -> TxnOp {
        let options = GetOptions::new().with_keys_only().with_limit(1).with_revision(revision);
        match self {
            Self::Key(key) => TxnOp::get(key.clone(), Some(options)),
            Self::Range(start, end) => TxnOp::get(start.clone(), Some(options.with_range(end.clone()))),
        }
    }
}

impl State {
    /// Takes the answers to probes, in their order.
    pub(crate) fn add<'p>(&mut self, probes: impl Iterator<Item = &'p Probe>, response: &PbTxnResponse) {
        if self.revision == 0 {
            self.revision = response.header.as_ref().map_or(0, |header| header.revision);
        }
        for (probe, answer) in probes.zip(&response.responses) {
            if let Some(PbTxnOpResponse::ResponseRange(range)) = &answer.response
                && let Some(kv) = range.kvs.first()
            {
                let found = Found {
                    created: kv.create_revision,
                    modified: kv.mod_revision,
                    lease: kv.lease,
                };
                self.found.insert(probe.clone(), found);
            }
        }
    }

    pub(crate) fn key(&self, name: Vec<u8>) -> Option<Found> {
        self.found.get(&Probe::Key(name)).copied()
    }
}
