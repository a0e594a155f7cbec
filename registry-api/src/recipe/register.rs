//! An ephemeral key that comes back.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::cleanup::{Backoff, Retry, until_done};
use super::queue::PATIENCE;
use crate::{
    Error, Event, Existing, Expect, Key, Kind, Read, Refusal, Registry, Result, Revision, SessionId, SessionState, Txn,
    Watch, WatchItem, WatchRequest, WatchScope, spawn,
};

/// A key that says "this process is alive": ephemeral, and put back by itself after the session expired (S5), or
/// after another hand deleted it.
///
/// While the session is lost the key may be gone for a while, and watchers see that. A key that another session holds
/// meanwhile is not taken from it: [`Registration::state`] tells [`Registered::Refused`], and it is tried again.
///
/// Dropping it deletes the key in the background, retried until that is done or the session ends;
/// [`Registration::unregister`] says when it is done. The key is kept by a thread of this crate, so a registration needs
/// no runtime of the caller's once it is made.
#[derive(Debug)]
pub struct Registration {
    key: Key,
    value: watch::Sender<Bytes>,
    state: watch::Receiver<Registered>,
    task: JoinHandle<Result<()>>,
}

/// How a registration stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Registered {
    /// The key is there, put by this session at this revision.
    There(SessionId, Revision),
    /// The key is not there, and is being put.
    Lost,
    /// The key is another's, or its place is taken; it is tried again.
    Refused,
}

impl Registration {
    pub(crate) async fn start(
        registry: Arc<dyn Registry>,
        key: &Key,
        value: Bytes,
        existing: Existing,
    ) -> Result<Self> {
        let mut keeper = Keeper {
            registry,
            key: key.clone(),
            owner: None,
            tried: None,
        };
        let there = keeper.put(&value, existing).await?;
        let (value, values) = watch::channel(value);
        let (states, state) = watch::channel(there);
        let task = spawn(keeper.keep(values, states));
        Ok(Self {
            key: key.clone(),
            value,
            state,
            task,
        })
    }

    /// As `register` on the trait object, but takes the key from whoever holds it: for a process that restarts before
    /// its predecessor's session has expired (K7).
    ///
    /// # Errors
    /// As [`Registry::commit`].
    pub async fn taking_over(registry: &Arc<dyn Registry>, key: &Key, value: impl Into<Bytes>) -> Result<Self> {
        Self::start(registry.clone(), key, value.into(), Existing::TakeOver).await
    }

    /// The key.
    pub fn key(&self) -> &Key {
        &self.key
    }

    /// Changes the value. It is put soon after; values that follow fast on each other may be skipped, the newest is not.
    pub fn set(&self, value: impl Into<Bytes>) {
        self.value.send_replace(value.into());
    }

    /// How it stands, to be read and watched.
    pub fn state(&self) -> watch::Receiver<Registered> {
        self.state.clone()
    }

    /// Deletes the key, if it is still the one that was put; done when it returns.
    ///
    /// # Errors
    /// [`Error::OutcomeUnknown`] if the store did not say so for half a minute. The delete is then retried in the
    /// background until it is done or the session ends.
    ///
    /// # Cancel safety
    /// Dropping the future deletes the key in the background.
    pub async fn unregister(self) -> Result<()> {
        let Self { value, task, .. } = self;
        // The keeper ends the put that it is at, and then deletes: nothing it sent comes after.
        drop(value);
        match tokio::time::timeout(PATIENCE, task).await {
            // It neither panics nor is aborted.
            Ok(ended) => ended.unwrap_or(Err(Error::Closed)),
            Err(elapsed) => Err(Error::OutcomeUnknown {
                operation: "unregistering",
                source: elapsed.into(),
            }),
        }
    }
}

/// Keeps the key there; ends when the handle is closed, or when the registration is dropped and the key deleted.
struct Keeper {
    registry: Arc<dyn Registry>,
    key: Key,
    /// The session that last put the key.
    owner: Option<SessionId>,
    /// The session that last sent a put of the key, whatever became of it.
    tried: Option<SessionId>,
}

impl Keeper {
    async fn keep(mut self, mut values: watch::Receiver<Bytes>, states: watch::Sender<Registered>) -> Result<()> {
        let mut sessions = self.registry.session().states();
        let mut watch = None;
        let mut backoff = Backoff::default();
        loop {
            tokio::select! {
                changed = values.changed() => if changed.is_err() { return self.leave().await },
                () = ended(&mut sessions, self.owner) => {}
                () = removed(&*self.registry, &self.key, self.owner, &mut watch) => {
                    // The watch may report the end of an earlier session's key after this session put it.
                    if self.is_there().await {
                        continue;
                    }
                }
            }
            loop {
                let value = values.borrow_and_update().clone();
                match self.put(&value, Existing::Keep).await {
                    Ok(there) => {
                        tell(&states, there);
                        backoff = Backoff::default();
                        break;
                    }
                    Err(error) => {
                        tracing::debug!(key = %self.key, %error, "not registered yet");
                        let refused = matches!(error, Error::Refused { .. } | Error::Conflict { .. });
                        tell(&states, if refused { Registered::Refused } else { Registered::Lost });
                        // The key went with the session.
                        if matches!(error, Error::Closed) {
                            return Ok(());
                        }
                    }
                }
                tokio::select! {
                    () = backoff.wait() => {}
                    // A new session is not kept waiting. An error says that the handle is gone, as the put will.
                    _ = sessions.changed() => {}
                    changed = values.changed() => if changed.is_err() { return self.leave().await },
                }
            }
        }
    }

    /// Puts the key; one that the handle's own earlier session left behind is taken over.
    async fn put(&mut self, value: &Bytes, existing: Existing) -> Result<Registered> {
        let session = self.registry.session().live()?;
        self.tried = Some(session);
        let put = |existing| Txn::new().put_as(&self.key, value.clone(), Kind::Ephemeral, existing);
        let committed = match self.registry.commit(put(existing)).await {
            Err(Error::Refused {
                refusal: Refusal::OwnedBy(owner),
                ..
            }) if self.owner == Some(owner) => {
                let left = self.registry.get(&self.key, Read::Linearizable).await?;
                let expect = match left.filter(|entry| entry.session == Some(owner)) {
                    Some(entry) => Expect::ModRevision(entry.mod_revision),
                    None => Expect::Absent,
                };
                self.registry
                    .commit(put(Existing::TakeOver).when(&self.key, expect))
                    .await?
            }
            committed => committed?,
        };
        self.owner = Some(session);
        Ok(Registered::There(session, committed.revision))
    }

    /// Whether the key is there under the session that last put it. Unknown counts as no.
    async fn is_there(&self) -> bool {
        let entry = self.registry.get(&self.key, Read::Linearizable).await;
        entry.is_ok_and(|entry| entry.is_some_and(|entry| entry.session == self.owner))
    }

    /// Deletes the key if it is this handle's, retrying until that is done or the session has ended: one put by the
    /// session known for it, or by an attempt of unknown outcome under the present one.
    async fn leave(self) -> Result<()> {
        let Some(session) = self.tried else {
            return Ok(());
        };
        let keeper = &self;
        let left = until_done(&*self.registry, session, Retry::Everything, || keeper.delete()).await;
        match left {
            // The key goes with the session.
            Err(Error::Closed) => Ok(()),
            left => left,
        }
    }

    async fn delete(&self) -> Result<()> {
        let Some(entry) = self.registry.get(&self.key, Read::Linearizable).await? else {
            return Ok(());
        };
        let present = self.registry.session().live().ok();
        if entry.session.is_none() || (entry.session != self.owner && entry.session != present) {
            return Ok(());
        }
        let expect = Expect::CreateRevision(entry.create_revision);
        match self.registry.delete_if(&self.key, expect).await {
            // Recreated by another client meanwhile, or deleted with the session.
            Ok(_) | Err(Error::Conflict { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// Waits until the key is gone or another's. The watch is kept from call to call.
async fn removed(registry: &dyn Registry, key: &Key, owner: Option<SessionId>, watch: &mut Option<Watch>) {
    let mut backoff = Backoff::default();
    loop {
        let mut there = watch.is_some();
        let watching = match watch {
            Some(watching) => watching,
            None => match registry.watch(WatchRequest::new(key, WatchScope::Key)).await {
                Ok(new) => watch.insert(new),
                Err(_) => {
                    backoff.wait().await;
                    continue;
                }
            },
        };
        while let Some(Ok(item)) = watching.next().await {
            match item {
                WatchItem::Reset => there = false,
                WatchItem::Synced(_) => {}
                WatchItem::Changes(events) => {
                    let newest = events.last().filter(|event| !matches!(event, Event::Deleted { .. }));
                    there = newest.is_some_and(|event| event.entry().session == owner);
                }
            }
            if !there {
                return;
            }
        }
        *watch = None;
        backoff.wait().await;
    }
}

/// Tells how it stands, if that is news.
fn tell(states: &watch::Sender<Registered>, now: Registered) {
    states.send_if_modified(|state| std::mem::replace(state, now) != now);
}

/// Waits until the session that put the key has ended.
async fn ended(sessions: &mut watch::Receiver<SessionState>, owner: Option<SessionId>) {
    // An error says that the handle is gone, and its session with it.
    let _ = sessions.wait_for(|state| state.live() != owner).await;
}
