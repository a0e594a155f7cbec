//! Locks.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use super::queue::{Contender, Hold, Queue, QueueKind};
use crate::{BootInstant, Condition, Error, Key, Registry, Result, Token};

/// An exclusive lock, held by at most one live session (L1).
///
/// Waiters queue by the create revision of their entry and each watches only the one before it, so a release wakes one
/// waiter (the lock recipe of the ZooKeeper documentation, without the herd).
///
/// A holder that was paused for longer than its TTL may still believe it holds the lock. Send [`Held::token`] with every
/// write to what the lock protects, and refuse a token lower than one seen; or add [`Held::condition`] to transactions
/// on the registry itself, which then refuses them.
///
/// ```no_run
/// # use std::sync::Arc;
/// # use registry_api::{Key, Registry, Result, Txn};
/// # async fn example(registry: Arc<dyn Registry>) -> Result<()> {
/// let held = registry.lock(&Key::parse("/jobs/compact")?).label("host-7").acquire().await?;
/// registry.commit(Txn::new().require(held.condition()).put(&Key::parse("/jobs/done")?, "yes")).await?;
/// held.release().await
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Lock {
    queue: Queue,
    label: Bytes,
}

impl Lock {
    /// The lock of that name. Nothing is sent.
    pub fn new(registry: Arc<dyn Registry>, name: &Key) -> Self {
        Self {
            queue: Queue::new(registry, QueueKind::Lock, name),
            label: Bytes::new(),
        }
    }

    /// What this contender leaves for others to read: a host, a process, a purpose (L8).
    #[must_use]
    pub fn label(mut self, label: impl Into<Bytes>) -> Self {
        self.label = label.into();
        self
    }

    /// Waits for the lock. Two acquires by one handle are two contenders (L4).
    ///
    /// # Errors
    /// [`Error::SessionExpired`] if the session ended while waiting: the place in the queue is gone with it.
    /// [`Error::HoldLost`] if another hand removed the place. [`Error::Unavailable`] if the store could not be reached
    /// to enter the queue; once in it, an outage is waited out as long as the session lives. [`Error::OutcomeUnknown`] if
    /// no answer to the entry came for half a minute; what it may have left in the queue is taken back in the background.
    ///
    /// # Cancel safety
    /// Dropping the future leaves the queue, at the latest when the session ends.
    pub async fn acquire(&self) -> Result<Held> {
        Ok(Held(self.queue.wait(self.label.clone()).await?))
    }

    /// Waits for the lock for so long and no longer.
    ///
    /// # Errors
    /// [`Error::DeadlineExceeded`] if it was not free in time; the queue is left. Else as [`Lock::acquire`].
    ///
    /// # Cancel safety
    /// As [`Lock::acquire`].
    pub async fn acquire_within(&self, deadline: Duration) -> Result<Held> {
        let exceeded = Err(Error::DeadlineExceeded { waited: deadline });
        tokio::time::timeout(deadline, self.acquire()).await.unwrap_or(exceeded)
    }

    /// Takes the lock if nobody holds it or waits for it.
    ///
    /// # Errors
    /// As [`Lock::acquire`].
    ///
    /// # Cancel safety
    /// As [`Lock::acquire`].
    pub async fn try_acquire(&self) -> Result<Option<Held>> {
        Ok(self.queue.try_enter(self.label.clone()).await?.map(Held))
    }

    /// Who holds the lock now.
    ///
    /// # Errors
    /// As [`Registry::list`].
    pub async fn holder(&self) -> Result<Option<Contender>> {
        Ok(self.contenders().await?.into_iter().next())
    }

    /// The holder, then the waiters in their order.
    ///
    /// # Errors
    /// As [`Registry::list`].
    pub async fn contenders(&self) -> Result<Vec<Contender>> {
        self.queue.entries().await?.into_iter().map(Contender::of).collect()
    }
}

/// A lock that is held.
///
/// Dropping it releases the lock soon after, in the background, retried until done or the session ends (L6).
#[derive(Debug)]
pub struct Held(Hold);

impl Held {
    /// The lock's name.
    pub fn name(&self) -> &Key {
        self.0.name()
    }

    /// The fencing token: larger than that of every earlier holder of this lock (L3), also after the namespace has moved
    /// to another store.
    pub fn token(&self) -> Token {
        self.0.token()
    }

    /// What a transaction requires so that the store refuses it once the lock is lost.
    pub fn condition(&self) -> Condition {
        self.0.condition()
    }

    /// Until when the lock is surely held, as known now; `None` if it is lost. Keep-alives move it on (L5).
    pub fn valid_until(&self) -> Option<BootInstant> {
        self.0.valid_until()
    }

    /// Whether the lock is still held, as a linearizable read of its key says.
    pub(super) async fn is_there(&self) -> Result<bool> {
        self.0.is_there().await
    }

    /// Whether the lock was lost. A lost lock never comes back.
    ///
    /// This is judged by the session's clock alone, and nothing is sent. [`Held::lost`] also notices that another client
    /// removed the lock's key, and so does a release.
    pub fn is_lost(&self) -> bool {
        self.0.is_lost()
    }

    /// Waits until the lock is lost: the session ended, or another hand removed the lock's key.
    ///
    /// It is told before the store can give the lock to another for want of keep-alives.
    ///
    /// # Cancel safety
    /// Leaves nothing behind.
    pub async fn lost(&self) {
        self.0.lost().await;
    }

    /// Releases the lock; done when it returns (L6).
    ///
    /// # Errors
    /// [`Error::HoldLost`] if it was lost before: the session ended, or another client removed the lock's key, which the
    /// release finds missing. Nothing of another contender's was changed. [`Error::OutcomeUnknown`] if no answer came for
    /// half a minute. After an error the release is retried in the background until it is done or the session ends.
    ///
    /// # Cancel safety
    /// Dropping the future releases in the background.
    pub async fn release(self) -> Result<()> {
        self.0.release().await
    }
}
