//! The names of contenders' keys.
//!
//! A name is used again where it can be. A store may keep what is gone for a while, as etcd does until it is compacted,
//! and then to see that a queue is empty is to pass over every name that was ever in it: were each round of a lock to
//! bring a new one, each would be slower than the one before.

use std::sync::{Mutex, PoisonError};

use uuid::Uuid;

use super::epoch;
use crate::SessionId;

/// The most names that are kept. Of those that come back beyond it, each is used once.
const MOST: usize = 1024;

/// A name that was never used, of a contender that enters in that epoch.
pub(super) fn fresh(epoch: u32) -> String {
    epoch::named(epoch, &Uuid::new_v4().simple().to_string())
}

/// The names that a handle's contenders may use again.
#[derive(Debug, Default)]
pub(crate) struct Names(Mutex<Free>);

#[derive(Debug, Default)]
struct Free {
    /// The session they are of: a name of another may yet be put or deleted for that one. And the epoch that is in them.
    of: Option<(SessionId, u32)>,
    names: Vec<String>,
}

impl Names {
    /// A name that no contender has, whichever handle it is of.
    pub(crate) fn take(&self, session: SessionId, epoch: u32) -> String {
        self.of(session, epoch, Vec::pop).unwrap_or_else(|| fresh(epoch))
    }

    /// Takes a name back once its key is deleted and no request is in flight that could put or delete it.
    pub(crate) fn give_back(&self, session: SessionId, epoch: u32, name: &str) {
        if epoch::of_name(name) != epoch {
            return;
        }
        self.of(session, epoch, |names| {
            if names.len() < MOST {
                names.push(name.to_owned());
            }
        });
    }

    fn of<T>(&self, session: SessionId, epoch: u32, act: impl FnOnce(&mut Vec<String>) -> T) -> T {
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let of = Some((session, epoch));
        if std::mem::replace(&mut free.of, of) != of {
            free.names.clear();
        }
        act(&mut free.names)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_had_by_one_at_a_time_and_by_one_session() {
        let names = Names::default();
        let (one, other) = (SessionId(1), SessionId(2));
        let first = names.take(one, 0);
        assert_ne!(names.take(one, 0), first);
        names.give_back(one, 0, &first);
        assert_eq!(names.take(one, 0), first);
        assert_ne!(names.take(one, 0), first);
        names.give_back(one, 0, &first);
        assert_ne!(names.take(other, 0), first);
        assert_ne!(names.take(one, 0), first, "it was another session's in between");
    }

    /// The epoch in a name is that of the contender who has it.
    #[test]
    fn a_name_is_of_one_epoch() {
        let names = Names::default();
        let session = SessionId(1);
        let first = names.take(session, 0);
        assert_eq!(epoch::of_name(&first), 0);
        names.give_back(session, 0, &first);
        let second = names.take(session, 7);
        assert_eq!(epoch::of_name(&second), 7);
        names.give_back(session, 7, &first);
        assert_eq!(epoch::of_name(&names.take(session, 7)), 7);
    }
}
