//! What the first in a queue has.

use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;

use super::{Backoff, Left, PATIENCE, Place, Queue, Retry, Sent, leave, leave_in_background};
use crate::{
    BootInstant, Condition, Error, Expect, Key, Read, Result, Revision, SessionId, Token, Txn, WatchRequest, WatchScope,
};

/// The first place: a lock held, or a leadership.
#[derive(Debug)]
pub(in crate::recipe) struct Hold {
    queue: Queue,
    key: Key,
    token: Token,
    /// The `create_revision` of the key.
    revision: Revision,
    session: SessionId,
    /// Whether no put or delete of the key can be in flight.
    settled: AtomicBool,
    /// Whether a put from before the hold may create the key after its delete. Those of [`Hold::publish`] can't.
    may_create: bool,
    lost: AtomicBool,
    released: bool,
}

impl Place {
    pub(super) fn into_hold(mut self) -> Result<Hold> {
        // The session may have ended between the store's last answer and now.
        if !self.queue.registry.session().is_valid(self.session) {
            return Err(self.session_gone());
        }
        let (Some(token), Some(revision)) = (self.token()?, self.revision) else {
            return Err(Error::HoldLost {
                key: self.queue.name.clone(),
            });
        };
        self.queue.registry.session().epochs().saw(token);
        self.kept = true;
        Ok(Hold {
            queue: self.queue.clone(),
            key: self.key.clone(),
            token,
            revision,
            session: self.session,
            settled: AtomicBool::new(self.sent.settled),
            may_create: self.sent.may_create,
            lost: AtomicBool::new(false),
            released: false,
        })
    }
}

impl Hold {
    pub(in crate::recipe) fn name(&self) -> &Key {
        &self.queue.name
    }

    pub(in crate::recipe) fn token(&self) -> Token {
        self.token
    }

    /// What a transaction requires so that the store refuses it once this hold is lost.
    pub(in crate::recipe) fn condition(&self) -> Condition {
        Condition {
            key: self.key.clone(),
            expect: Expect::CreateRevision(self.revision),
        }
    }

    pub(in crate::recipe) fn valid_until(&self) -> Option<BootInstant> {
        let until = self.queue.registry.session().valid_until(self.session);
        if until.is_none() {
            self.lost.store(true, Ordering::Release);
        }
        until.filter(|_| !self.lost.load(Ordering::Acquire))
    }

    /// Once lost, lost for ever.
    pub(in crate::recipe) fn is_lost(&self) -> bool {
        self.valid_until().is_none()
    }

    /// Waits until the session ends or the key is removed by another hand.
    pub(in crate::recipe) async fn lost(&self) {
        if self.is_lost() {
            return;
        }
        let registry = &*self.queue.registry;
        let removed = async {
            let mut backoff = Backoff::default();
            let gone = || async {
                let request = WatchRequest::new(&self.key, WatchScope::Key);
                registry.watch(request).await?.gone(self.revision).await
            };
            while gone().await.is_err() {
                backoff.wait().await;
            }
        };
        tokio::select! {
            () = removed => {}
            () = registry.session().ended(self.session) => {}
        }
        self.lost.store(true, Ordering::Release);
    }

    /// Whether the key is still there, as a linearizable read says. A hold whose key is gone is lost.
    ///
    /// # Errors
    /// As [`crate::Registry::get`].
    pub(in crate::recipe) async fn is_there(&self) -> Result<bool> {
        if self.is_lost() {
            return Ok(false);
        }
        let entry = self.queue.registry.get(&self.key, Read::Linearizable).await?;
        if entry.is_none_or(|entry| entry.create_revision != self.revision) {
            self.lost.store(true, Ordering::Release);
        }
        Ok(!self.is_lost())
    }

    /// Publishes a value under the own key.
    pub(in crate::recipe) async fn publish(&self, value: Bytes) -> Result<Revision> {
        if self.is_lost() {
            return Err(self.hold_lost());
        }
        // Not even an answer says that no other put of it is under way.
        self.settled.store(false, Ordering::Release);
        let txn = Txn::new().require(self.condition()).put_ephemeral(&self.key, value);
        match self.queue.registry.commit(txn).await {
            Ok(committed) => Ok(committed.revision),
            Err(Error::Conflict { .. } | Error::SessionExpired { .. } | Error::Refused { .. }) => {
                self.lost.store(true, Ordering::Release);
                Err(self.hold_lost())
            }
            Err(error) => Err(error),
        }
    }

    pub(in crate::recipe) async fn release(mut self) -> Result<()> {
        if self.is_lost() {
            // Nothing of it is left, or soon will be: its session is over. What another holds is not touched.
            return Err(self.hold_lost());
        }
        let session = self.queue.registry.session();
        let sent = self.unsettle();
        let leaving = leave(&self.queue, &self.key, self.session, sent, Retry::Outages);
        let left = tokio::select! {
            biased;
            left = tokio::time::timeout(PATIENCE, leaving) => {
                // It goes on in the background, as after a drop.
                left.unwrap_or_else(|elapsed| {
                    Err(Error::OutcomeUnknown {
                        operation: "a release",
                        source: elapsed.into(),
                    })
                })
            }
            () = session.ended(self.session) => Err(self.hold_lost()),
        };
        self.released = left.is_ok();
        match left? {
            Left::Deleted | Left::Perhaps => Ok(()),
            Left::Absent => Err(self.hold_lost()),
        }
    }

    /// What was sent before this delete: of two, one may be late.
    fn unsettle(&self) -> Sent {
        Sent {
            settled: self.settled.swap(false, Ordering::AcqRel),
            may_create: self.may_create,
        }
    }

    fn hold_lost(&self) -> Error {
        Error::HoldLost {
            key: self.queue.name.clone(),
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if self.released {
            return;
        }
        let sent = self.unsettle();
        leave_in_background(&self.queue, &self.key, self.session, sent);
    }
}
