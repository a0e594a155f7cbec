//! The epoch of a namespace: the high part of its fencing tokens.
//!
//! Tokens grow with the revisions of the store. A namespace that moves to another store, or whose store is restored from
//! a copy, meets lower revisions. Its epoch is raised then, so that its tokens go on growing.
//!
//! The epoch is a record in the recipes' tree: one key `~/epoch/<epoch>`, which a raise deletes and replaces by another in
//! one transaction. A contender enters a queue on condition that the key of the epoch that its handle knows exists. So of
//! any two contenders the later has the same epoch or a higher one. Its epoch is a part of its key's name, from which
//! every observer computes its token without a further read.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use super::cleanup::Backoff;
use super::queue::PATIENCE;
use crate::{Condition, Depth, Entry, Error, Expect, Key, List, Registry, Result, Revision, Token, Txn};

/// The largest epoch: a token of it is still positive.
const MAX: u32 = i32::MAX.unsigned_abs();
/// 2025-01-01 00:00:00 UTC. Seconds since then are the least epoch after a restore.
const YEAR_2025: Duration = Duration::from_secs(1_735_689_600);

/// Why the epoch of a namespace is raised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Raise {
    /// The namespace moved here from elsewhere, where no token was larger than this one.
    Above(Token),
    /// The store was restored from a copy, or went back otherwise. The epoch becomes larger than the seconds since 2025,
    /// so that two restores of one copy never have the same.
    AfterRestore,
}

/// The epoch of a namespace, and the largest token that can have been given out in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Epoch {
    /// The epoch.
    pub epoch: u32,
    /// The revision of the store, as it was read after the epoch.
    pub revision: Revision,
}

impl Epoch {
    /// A token that is at least as large as every one given out before this was read, in this namespace.
    ///
    /// # Errors
    /// [`Error::TokenOverflow`].
    pub fn highest_token(&self) -> Result<Token> {
        // No token is smaller than 1.
        Token::of(self.epoch, self.revision.max(Revision(1)))
    }

    /// Returns the record that replaces a stored one while a backend restores its store from a copy, at a revision which
    /// no earlier state of the store has reached. Returns `None` if the key is not that of an epoch.
    ///
    /// # Errors
    /// [`Error::TokenOverflow`] if there is no higher epoch, [`Error::InvalidRequest`] if the clock is before 2025.
    pub fn restored(stored: &Key, revision: Revision) -> Result<Option<(Key, String)>> {
        let Some(epoch) = of_key(stored) else { return Ok(None) };
        let restored = Self { epoch, revision }.after_restore()?;
        if restored > MAX {
            return Err(Error::TokenOverflow {
                epoch: restored,
                revision,
            });
        }
        Ok(Some((key(restored), restored.to_string())))
    }

    /// The epoch after a restore that left this one. Earlier raises of a state that is lost exceeded neither the seconds
    /// of their time nor, by much, the revision; so this one exceeds them.
    fn after_restore(&self) -> Result<u32> {
        let epoch = self.epoch.max(seconds_since_2025()?);
        Ok(Self { epoch, ..*self }.highest_token()?.next_epoch())
    }
}

/// Reads the epoch of a handle's namespace; 0 if it was never raised.
///
/// # Errors
/// As [`Registry::list`].
pub(crate) async fn epoch(registry: &dyn Registry) -> Result<Epoch> {
    let epoch = stored(registry).await?.unwrap_or(0);
    let revision = registry.health().await?.revision;
    Ok(Epoch { epoch, revision })
}

/// Raises the epoch of a handle's namespace and returns it, as it is then. Contenders that enter a queue afterwards have
/// larger tokens than every one that the reason names. Those that are in a queue keep theirs.
///
/// # Errors
/// [`Error::TokenOverflow`] if there is no such epoch, [`Error::InvalidRequest`] after a restore if the clock is before
/// 2025; nothing changed then. Else as [`Registry::commit`].
pub(crate) async fn raise_epoch(registry: &dyn Registry, raise: Raise) -> Result<Epoch> {
    let before = epoch(registry).await?;
    let least = match raise {
        Raise::Above(token) if before.highest_token()? >= token => return Ok(before),
        Raise::Above(token) => token.next_epoch(),
        Raise::AfterRestore => before.after_restore()?,
    };
    raise_to(registry, least).await?;
    epoch(registry).await
}

/// Raises the epoch to at least this one.
async fn raise_to(registry: &dyn Registry, least: u32) -> Result<()> {
    let mut backoff = Backoff::default();
    let until = Instant::now() + PATIENCE;
    loop {
        let old = stored(registry).await?;
        if old.is_some_and(|old| old >= least) {
            return Ok(());
        }
        if least > MAX {
            let revision = registry.health().await?.revision;
            return Err(Error::TokenOverflow { epoch: least, revision });
        }
        let txn = match old {
            Some(old) => Txn::new().require(condition(old)).delete(&key(old)),
            None => Txn::new().when(&tree(), Expect::Childless),
        };
        match registry.commit(txn.put(&key(least), least.to_string())).await {
            Ok(_) => {
                tracing::info!(?old, new = least, "raised the epoch of fencing tokens");
                return Ok(());
            }
            // Another client raised it, or this one did without hearing of it: read again.
            Err(error @ (Error::Conflict { .. } | Error::OutcomeUnknown { .. })) if Instant::now() < until => {
                tracing::debug!(%error, "raising the epoch of fencing tokens, retrying");
                backoff.wait().await;
            }
            Err(error) => return Err(error),
        }
    }
}

/// What must hold for a contender that enters in that epoch.
pub(super) fn condition(epoch: u32) -> Condition {
    Condition {
        key: key(epoch),
        expect: Expect::Present,
    }
}

/// The part of a contender's name that says in which epoch it entered.
pub(super) fn named(epoch: u32, name: &str) -> String {
    match epoch {
        0 => name.to_owned(),
        epoch => format!("{epoch}.{name}"),
    }
}

/// The epoch in which the contender of that name entered.
pub(super) fn of_name(name: &str) -> u32 {
    let epoch = name.split_once('.').and_then(|(epoch, _)| epoch.parse().ok());
    epoch.unwrap_or(0)
}

/// The token of the contender whose entry it is.
///
/// # Errors
/// [`Error::TokenOverflow`].
pub(super) fn token(entry: &Entry) -> Result<Token> {
    Token::of(of_name(entry.key.name()), entry.create_revision)
}

/// The key above the one that holds the epoch.
fn tree() -> Key {
    Key::of_recipe("/epoch")
}

fn key(epoch: u32) -> Key {
    Key::of_recipe(&format!("/epoch/{epoch}"))
}

/// The epoch that is stored.
async fn stored(registry: &dyn Registry) -> Result<Option<u32>> {
    let list = List {
        depth: Depth::Children,
        ..List::new(tree())
    };
    let entries = registry.list_all(list).await?;
    Ok(entries.iter().filter_map(|entry| of_key(&entry.key)).max())
}

/// The epoch of a record's key.
fn of_key(key: &Key) -> Option<u32> {
    let epoch: u32 = key.name().parse().ok()?;
    (*key == self::key(epoch)).then_some(epoch)
}

/// What the epoch of a store that is restored now exceeds.
fn seconds_since_2025() -> Result<u32> {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH + YEAR_2025);
    let since = since.map_err(|_| {
        let why = "the clock is before 2025, and the epoch after a restore is counted from then: set the clock";
        Error::InvalidRequest(why.into())
    })?;
    Ok(u32::try_from(since.as_secs()).unwrap_or(u32::MAX))
}

/// What a handle knows of its namespace's epoch and tokens.
#[derive(Debug, Default)]
pub(crate) struct Epochs {
    known: Mutex<Known>,
    /// Whether a contender's token shows that the store went back since the epoch was raised last.
    went_back: AtomicBool,
    /// How many of the [`Registry::rollbacks`] are from before the epoch was raised last.
    rollbacks: AtomicU64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Known {
    epoch: u32,
    /// The largest token that was seen.
    highest: Option<Token>,
}

impl Epochs {
    /// The epoch that is entered in, unless the store says otherwise.
    pub(super) fn epoch(&self) -> u32 {
        self.known().epoch
    }

    /// The largest token that was seen so far: each contender that enters from now on has a larger one.
    pub(super) fn highest(&self) -> Option<Token> {
        self.known().highest
    }

    pub(super) fn saw(&self, token: Token) {
        let mut known = self.known();
        known.highest = known.highest.max(Some(token));
    }

    /// The store lost changes that it had acknowledged: its revisions are given out again.
    pub(crate) fn store_went_back(&self) {
        self.went_back.store(true, Ordering::Release);
    }

    /// Reads the epoch again, and stores one that never was. It is raised first if the store went back.
    pub(super) async fn refresh(&self, registry: &dyn Registry) -> Result<()> {
        let known = self.known().epoch;
        raise_to(registry, 0).await?;
        if stored(registry).await? < Some(known) {
            // Epochs grow, so this is the copy of an earlier state.
            self.store_went_back();
        }
        self.raise_if_due(registry).await?;
        let now = stored(registry).await?;
        self.known().epoch = now.unwrap_or(0);
        Ok(())
    }

    /// Whether the store went back since the epoch was raised last.
    pub(super) fn is_due(&self, registry: &dyn Registry) -> bool {
        self.went_back.load(Ordering::Acquire) || self.rollbacks.load(Ordering::Acquire) != registry.rollbacks()
    }

    /// Raises the epoch if the store went back since it was raised last.
    pub(super) async fn raise_if_due(&self, registry: &dyn Registry) -> Result<()> {
        if !self.is_due(registry) {
            return Ok(());
        }
        let rollbacks = registry.rollbacks();
        let least = self.highest().map_or(0, Token::next_epoch);
        let raised = raise_epoch(registry, Raise::AfterRestore).await?;
        raise_to(registry, least.max(raised.epoch)).await?;
        self.went_back.store(false, Ordering::Release);
        self.rollbacks.store(rollbacks, Ordering::Release);
        self.known().epoch = least.max(raised.epoch);
        Ok(())
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
