//! The names of contenders' keys.
//!
//! A name is used again where it can be. A store may keep what is gone for a while, as etcd does until it is compacted,
//! and then to see that a queue is empty is to pass over every name that was ever in it: were each round of a lock to
//! bring a new one, each would be slower than the one before.

use std::sync::{Mutex, PoisonError};

use uuid::Uuid;

use crate::SessionId;

/// The most names that are kept. Of those that come back beyond it, each is used once.
const MOST: usize = 1024;

/// A name that was never used.
pub(super) fn fresh() -> String {
    Uuid::new_v4().simple().to_string()
}

/// The names that a handle's contenders may use again.
#[derive(Debug, Default)]
pub(crate) struct Names(Mutex<Free>);

#[derive(Debug, Default)]
struct Free {
    /// Whose they are: a name that another session had may yet be put or deleted for it.
    session: Option<SessionId>,
    names: Vec<String>,
}

impl Names {
    /// A name that no contender has, whichever handle it is of.
    pub(crate) fn take(&self, session: SessionId) -> String {
        self.of(session, Vec::pop).unwrap_or_else(fresh)
    }

    /// Takes a name back once its key is gone and nothing is under way any more that could put or delete it.
    pub(crate) fn give_back(&self, session: SessionId, name: &str) {
        self.of(session, |names| {
            if names.len() < MOST {
                names.push(name.to_owned());
            }
        });
    }

    fn of<T>(&self, session: SessionId, act: impl FnOnce(&mut Vec<String>) -> T) -> T {
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if free.session.replace(session) != Some(session) {
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
        let first = names.take(one);
        assert_ne!(names.take(one), first);
        names.give_back(one, &first);
        assert_eq!(names.take(one), first);
        assert_ne!(names.take(one), first);
        names.give_back(one, &first);
        assert_ne!(names.take(other), first);
        assert_ne!(names.take(one), first, "it was another session's in between");
    }
}
