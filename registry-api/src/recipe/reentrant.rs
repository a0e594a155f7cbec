//! A lock that one owner may acquire several times.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::Mutex as AsyncMutex;

use super::lock::{Held, Lock};
use crate::{Key, Registry, Result, Token};

/// A lock with a count: its owner may acquire it again while holding it, and the last release frees it (L4).
///
/// The owner is named, and is neither a thread nor a task: two acquires are of one owner when they say so. Owners of
/// other processes, and of other handles, are other contenders, whatever their names. The handle keeps the count: all
/// `ReentrantLock`s of one name and one handle share it.
#[derive(Clone, Debug)]
pub struct ReentrantLock {
    registry: Arc<dyn Registry>,
    lock: Lock,
    name: Key,
}

/// The owners of a handle's reentrant locks, by lock and owner.
#[derive(Debug, Default)]
pub(crate) struct Owners(Mutex<HashMap<(Key, String), Arc<Slot>>>);

type Slot = AsyncMutex<Weak<Held>>;

impl Owners {
    fn slot(&self, lock: &Key, owner: &str) -> Arc<Slot> {
        let mut owners = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Owners that hold nothing and wait for nothing are forgotten.
        owners
            .retain(|_, slot| Arc::strong_count(slot) > 1 || slot.try_lock().is_ok_and(|held| held.strong_count() > 0));
        owners.entry((lock.clone(), owner.into())).or_default().clone()
    }
}

impl ReentrantLock {
    /// The lock of that name. It is the same lock as [`Lock::new`] has under that name.
    pub fn new(registry: Arc<dyn Registry>, name: &Key) -> Self {
        Self {
            lock: Lock::new(registry.clone(), name),
            name: name.clone(),
            registry,
        }
    }

    /// Waits for the lock, unless the owner holds it already.
    ///
    /// For an owner that holds it, one linearizable read verifies that the lock's key is still there. A lock that the
    /// owner has lost is acquired as a new contender, with a new token.
    ///
    /// # Errors
    /// As [`Lock::acquire`].
    ///
    /// # Cancel safety
    /// As [`Lock::acquire`].
    pub async fn acquire(&self, owner: &str) -> Result<ReentrantHeld> {
        let slot = self.registry.session().owners().slot(&self.name, owner);
        let mut slot_held = slot.lock().await;
        if let Some(held) = slot_held.upgrade()
            && held.is_there().await?
        {
            return Ok(ReentrantHeld { held });
        }
        let held = Arc::new(self.lock.clone().label(owner.to_owned()).acquire().await?);
        *slot_held = Arc::downgrade(&held);
        Ok(ReentrantHeld { held })
    }
}

/// One of an owner's acquires. The lock is freed when the last of them is released or dropped.
#[derive(Debug)]
pub struct ReentrantHeld {
    held: Arc<Held>,
}

impl ReentrantHeld {
    /// The hold that all of the owner's acquires share.
    pub fn held(&self) -> &Held {
        &self.held
    }

    /// The fencing token of the shared hold.
    pub fn token(&self) -> Token {
        self.held.token()
    }

    /// How many acquires of the owner are not released yet, this one included.
    pub fn count(&self) -> usize {
        Arc::strong_count(&self.held)
    }

    /// Takes this acquire back; the last one frees the lock, which is then done when it returns.
    ///
    /// # Errors
    /// As [`Held::release`], from the last release only.
    pub async fn release(self) -> Result<()> {
        match Arc::into_inner(self.held) {
            Some(held) => held.release().await,
            None => Ok(()),
        }
    }
}
