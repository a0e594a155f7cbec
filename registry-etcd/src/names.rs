//! The names under which keys are stored, and back.

use std::ops::Range;

use bytes::Bytes;
use etcd_client::proto::PbKeyValue;
use registry_api::{Entry, Key, Namespace, Prefix, Revision, SessionId};

/// The namespace's part of etcd's flat key space.
///
/// A key is stored under its plain name, `/myapp/a/b`; what recipes store is beside it, under `/myapp~/`.
#[derive(Clone, Debug)]
pub(crate) struct Names(pub(crate) Namespace);

impl Names {
    pub(crate) fn key(&self, key: &Key) -> Vec<u8> {
        self.0.qualify(key.as_str()).into_bytes()
    }

    /// The name of the prefix itself; `None` for the root, which holds no value.
    pub(crate) fn prefix(&self, prefix: &Prefix) -> Option<Vec<u8>> {
        prefix.key().map(|key| self.key(&key))
    }

    /// A name that is no key's, and that a user of the namespace may read.
    pub(crate) fn sign(&self) -> Vec<u8> {
        self.below(&Prefix::root()).start
    }

    /// The names below a prefix.
    pub(crate) fn below(&self, prefix: &Prefix) -> Range<Vec<u8>> {
        let below = prefix.below();
        self.0.qualify(&below.start).into_bytes()..self.0.qualify(&below.end).into_bytes()
    }

    /// The key of a name; `None` for one that no registry wrote.
    pub(crate) fn parse(&self, name: &[u8]) -> Option<Key> {
        let key = Key::from_store(self.0.strip(std::str::from_utf8(name).ok()?)?);
        if let Err(error) = &key {
            tracing::debug!(%error, "passing over a foreign key");
        }
        key.ok()
    }

    pub(crate) fn entry(&self, stored: PbKeyValue) -> Option<Entry> {
        Some(Entry {
            key: self.parse(&stored.key)?,
            value: Bytes::from(stored.value),
            create_revision: revision(stored.create_revision),
            mod_revision: revision(stored.mod_revision),
            session: session(stored.lease),
        })
    }
}

/// The name right after another.
pub(crate) fn after(mut name: Vec<u8>) -> Vec<u8> {
    name.push(0);
    name
}

/// etcd's revisions and leases are never negative.
pub(crate) fn revision(stored: i64) -> Revision {
    Revision(stored.unsigned_abs())
}

pub(crate) fn session(lease: i64) -> Option<SessionId> {
    (lease != 0).then(|| SessionId(lease.cast_unsigned()))
}

pub(crate) fn lease(session: SessionId) -> i64 {
    session.0.cast_signed()
}

/// A revision as etcd takes it in a comparison, where zero would mean an absent key: -1 is no key's.
pub(crate) fn compared(revision: Revision) -> i64 {
    match i64::try_from(revision.0) {
        Ok(0) | Err(_) => -1,
        Ok(revision) => revision,
    }
}
