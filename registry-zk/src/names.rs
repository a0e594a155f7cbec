//! How keys and values lie in ZooKeeper.
//!
//! A key is the znode at `/<namespace><key>`; a recipe's key lies beside that tree, below `/<namespace>~`, and so do the
//! few znodes of the backend's own. A znode's data is the plain value. Only what begins with the magic is not: the mark
//! of a parent that nobody put, and a value that begins with the magic itself.

use bytes::Bytes;
use registry_api::{Entry, Key, Namespace, Prefix, Revision, SessionId};
use zookeeper_client::Stat;

const MAGIC: &[u8] = b"\0registry\0";
const ESCAPED: u8 = b'=';
/// The data of a parent that nobody put.
pub(crate) const MARK: &[u8] = b"\0registry\0/";

/// The guards against ABA: as many parts, so that few writes meet.
pub(crate) const GUARDS: std::ops::RangeInclusive<u8> = 0..=u8::MAX;

/// What a znode's data says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Data {
    /// A value.
    Value(Bytes),
    /// A parent that nobody put.
    Mark,
}

impl Data {
    pub(crate) fn decode(stored: Vec<u8>) -> Self {
        if stored == MARK {
            return Self::Mark;
        }
        let stored = Bytes::from(stored);
        match stored.strip_prefix(MAGIC) {
            Some([ESCAPED, ..]) => Self::Value(stored.slice(MAGIC.len() + 1..)),
            // Another client's, then.
            _ => Self::Value(stored),
        }
    }
}

/// A value as it is stored.
pub(crate) fn encode(value: &Bytes) -> Bytes {
    if !value.starts_with(MAGIC) {
        return value.clone();
    }
    let mut stored = Vec::with_capacity(value.len() + MAGIC.len() + 1);
    stored.extend_from_slice(MAGIC);
    stored.push(ESCAPED);
    stored.extend_from_slice(value);
    stored.into()
}

/// Whether the data may be the mark, by its length alone.
pub(crate) fn may_be_mark(stat: &Stat) -> bool {
    usize::try_from(stat.data_length) == Ok(MARK.len())
}

/// Whether a key may have been put over a placeholder, by its stat alone: that had children, and was written again.
pub(crate) fn may_have_birth(stat: &Stat) -> bool {
    stat.version > 0 && stat.cversion > 0
}

/// A znode of the side tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Beside {
    Guard,
    Sign(SessionId),
    /// A recipe's, or what the backend has one of.
    Other,
}

/// The paths of one namespace.
#[derive(Clone, Debug)]
pub(crate) struct Names {
    namespace: Namespace,
}

impl Names {
    pub(crate) fn new(namespace: Namespace) -> Self {
        Self { namespace }
    }

    /// The znode above the user's keys.
    pub(crate) fn root(&self) -> &str {
        self.namespace.as_str()
    }

    /// The znode above everything else.
    pub(crate) fn side(&self) -> String {
        self.namespace.qualify("~")
    }

    /// The znode that is written when a transaction writes no other whose answer tells the revision, and before a
    /// write-backed read.
    pub(crate) fn clock(&self) -> String {
        self.namespace.qualify("~/clock")
    }

    /// Held by the handle that sweeps.
    pub(crate) fn sweeper(&self) -> String {
        self.namespace.qualify("~/sweeper")
    }

    /// The znode above the signs of sessions.
    pub(crate) fn sessions(&self) -> String {
        self.namespace.qualify("~/session")
    }

    /// The sign of a session, which goes with its keys.
    pub(crate) fn sign(&self, session: SessionId) -> String {
        self.namespace.qualify(&format!("~/session/{session}"))
    }

    /// The znode above the birth znodes.
    pub(crate) fn births(&self) -> String {
        self.namespace.qualify("~/birth")
    }

    /// The znode that is created together with a key whose znode is there already, as a placeholder: its `czxid` is the
    /// key's `create_revision`. `None` for a recipe's keys, which have no children.
    pub(crate) fn birth(&self, path: &str) -> Option<String> {
        let name = self.namespace.strip(path).filter(|name| name.starts_with('/'))?;
        let name = name.replace('%', "%25").replace('/', "%2F");
        Some(self.namespace.qualify(&format!("~/birth/{name}")))
    }

    /// The path of the key that a birth znode is of.
    pub(crate) fn born(&self, birth: &str) -> Option<String> {
        let name = self.namespace.strip(birth)?.strip_prefix("~/birth/")?;
        Some(self.namespace.qualify(&name.replace("%2F", "/").replace("%25", "%")))
    }

    /// The znode above the guards.
    pub(crate) fn guards(&self) -> String {
        self.namespace.qualify("~/rev")
    }

    /// A guard: its version counts how often a key of its part of the tree was made or deleted.
    pub(crate) fn guard(&self, part: u8) -> String {
        self.namespace.qualify(&format!("~/rev/{part:02x}"))
    }

    /// What a znode beside the keys is.
    pub(crate) fn beside(&self, path: &str) -> Beside {
        let name = self.namespace.strip(path).and_then(|name| name.strip_prefix("~/"));
        match name.and_then(|name| name.split_once('/')) {
            Some(("rev", _)) => Beside::Guard,
            Some(("session", session)) => {
                u64::from_str_radix(session, 16).map_or(Beside::Other, |session| Beside::Sign(SessionId(session)))
            }
            _ => Beside::Other,
        }
    }

    /// Which guard a key's making and deleting counts on. `None` for a recipe's keys, whose names are used once, so that
    /// none can be taken for an earlier one. Every version of this crate has to agree on it.
    pub(crate) fn part(&self, path: &str) -> Option<u8> {
        let name = self.namespace.strip(path).filter(|name| name.starts_with('/'))?;
        // FNV-1a (Fowler, Noll and Vo).
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        Some((hash ^ (hash >> 32)).to_le_bytes()[0])
    }

    pub(crate) fn path(&self, key: &Key) -> String {
        self.namespace.qualify(key.as_str())
    }

    pub(crate) fn prefix(&self, prefix: &Prefix) -> String {
        self.namespace.qualify(prefix.as_str())
    }

    /// The key of a path; `None` for what no key names.
    pub(crate) fn key(&self, path: &str) -> Option<Key> {
        Key::from_store(self.namespace.strip(path)?).ok()
    }

    /// The entry in a znode, of a key that was created as the change `created`; `None` for a path that no key names.
    pub(crate) fn entry(&self, path: &str, value: Bytes, stat: &Stat, created: i64) -> Option<Entry> {
        Some(Entry {
            key: self.key(path)?,
            value,
            create_revision: revision(created),
            mod_revision: revision(stat.mzxid),
            session: owner(stat),
        })
    }
}

/// The paths above this one, the nearest first, without the root of its tree, which always stays.
pub(crate) fn ancestors(path: &str) -> impl Iterator<Item = &str> {
    let tree = path[1..].find('/').map_or(path.len(), |at| at + 1);
    path.match_indices('/')
        .rev()
        .map(move |(at, _)| &path[..at])
        .filter(move |above| above.len() > tree)
}

/// The path one segment up.
pub(crate) fn parent(path: &str) -> &str {
    &path[..path.rfind('/').unwrap_or_default()]
}

pub(crate) fn revision(zxid: i64) -> Revision {
    Revision(u64::try_from(zxid).unwrap_or_default())
}

/// Whose ephemeral key it is.
pub(crate) fn owner(stat: &Stat) -> Option<SessionId> {
    (stat.ephemeral_owner != 0).then(|| SessionId(stat.ephemeral_owner.cast_unsigned()))
}

/// The newest change that a znode's stat knows of: to its data, its children or itself.
pub(crate) fn newest(stat: &Stat) -> i64 {
    stat.mzxid.max(stat.pzxid).max(stat.czxid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_value_survives() {
        for value in [
            &b""[..],
            b"x",
            MAGIC,
            MARK,
            b"\0registry\0=",
            b"\0registry\0=\0registry\0/",
        ] {
            let value = Bytes::copy_from_slice(value);
            let stored = encode(&value);
            assert_ne!(stored, MARK);
            assert_eq!(Data::decode(stored.to_vec()), Data::Value(value));
        }
        assert_eq!(Data::decode(MARK.to_vec()), Data::Mark);
    }

    #[test]
    fn paths() {
        let names = Names::new(Namespace::parse("/n").expect("a namespace"));
        assert_eq!(ancestors("/n/a/b/c").collect::<Vec<_>>(), ["/n/a/b", "/n/a"]);
        assert_eq!(ancestors("/n/a").count(), 0);
        assert_eq!(ancestors("/n").count(), 0);
        assert_eq!(ancestors("/n~/lock/1").collect::<Vec<_>>(), ["/n~/lock"]);
        assert_eq!(parent("/n/a"), "/n");
        assert_ne!(names.part("/n/a"), None);
        assert_eq!(names.part("/n~/lock/1/a"), None);
        assert_eq!(names.key("/n/a/b").map(|key| key.to_string()), Some("/a/b".into()));
        assert_eq!(names.key("/other/a"), None);
        assert_eq!(names.key("/n"), None);
        for path in ["/n/a/b", "/n/%2F/%25", "/n/a%2Fb"] {
            let birth = names.birth(path).expect("a user's key");
            assert_eq!(parent(&birth), names.births());
            assert_eq!(names.born(&birth).as_deref(), Some(path));
        }
        assert_eq!(names.birth("/n~/lock/1/a"), None);
        assert_eq!(names.born("/n~/rev/00"), None);
        assert_eq!(names.beside(&names.guard(7)), Beside::Guard);
        assert_eq!(names.beside(&names.sign(SessionId(7))), Beside::Sign(SessionId(7)));
        for other in [
            names.sweeper(),
            names.clock(),
            names.sessions(),
            "/n~/lock/1/session/7".into(),
        ] {
            assert_eq!(names.beside(&other), Beside::Other, "{other}");
        }
    }
}
