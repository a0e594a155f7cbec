//! Contenders for a lock and candidates of an election, and what they must never see.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use registry_api::{Campaign, Error, Held, Leadership, Registry, Token};

use super::Run;
use crate::{Dice, key};

/// The name of the lock, and of the election.
pub(super) const NAME: &str = "/one";

/// How long a contender waits for its turn before it gives up.
const TURN: Duration = Duration::from_secs(3);

/// A lock held or a leadership.
pub(super) trait Hold {
    fn token(&self) -> Token;
    fn is_lost(&self) -> bool;
}

impl Hold for Held {
    fn token(&self) -> Token {
        self.token()
    }

    fn is_lost(&self) -> bool {
        self.is_lost()
    }
}

impl Hold for Leadership {
    fn token(&self) -> Token {
        self.token()
    }

    fn is_lost(&self) -> bool {
        self.is_lost()
    }
}

/// Where everybody who believes to hold the one thing shows up.
pub(super) struct Arena<T>(Mutex<(Option<Token>, Option<Arc<T>>)>);

impl<T> Default for Arena<T> {
    fn default() -> Self {
        Self(Mutex::new((None, None)))
    }
}

impl<T: Hold> Arena<T> {
    /// Nobody else may be sure of it while this one is (L1, L5, E1), and its token is the largest so far (L3).
    fn enter(&self, hold: T) -> Arc<T> {
        let hold = Arc::new(hold);
        let mut arena = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (newest, before) = &mut *arena;
        let other_is_sure = before.as_ref().is_some_and(|before| !before.is_lost());
        let is_later = Some(hold.token()) > *newest;
        // Looked at last: what is sure now was so when the other was looked at.
        if !hold.is_lost() {
            assert!(
                !other_is_sure,
                "two hold it, with the tokens {newest:?} and {}",
                hold.token()
            );
            assert!(is_later, "token {} after {newest:?}", hold.token());
        }
        if is_later {
            (*newest, *before) = (Some(hold.token()), Some(hold.clone()));
        }
        hold
    }

    /// The hold, to be given back; nothing if somebody looks at it at this moment.
    fn leave(&self, hold: Arc<T>) -> Option<T> {
        let mut arena = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if arena.1.as_ref().is_some_and(|before| Arc::ptr_eq(before, &hold)) {
            arena.1 = None;
        }
        Arc::into_inner(hold)
    }
}

/// A counter in a file that somebody changes who reads it, thinks, and writes it back.
pub(super) struct Counter {
    dir: tempfile::TempDir,
    guard: Mutex<()>,
    written: AtomicU64,
    inside: AtomicU64,
}

impl Default for Counter {
    fn default() -> Self {
        let dir = tempfile::TempDir::new().expect("there is room for a directory");
        std::fs::write(dir.path().join("counter"), "0 0").expect("there is room for a file");
        Self {
            dir,
            guard: Mutex::default(),
            written: AtomicU64::new(0),
            inside: AtomicU64::new(0),
        }
    }
}

impl Counter {
    /// The newest token that it has seen, and the count.
    fn load(&self) -> (i64, u64) {
        let text = std::fs::read_to_string(self.dir.path().join("counter")).expect("it was written");
        let (token, count) = text.split_once(' ').expect("two numbers");
        (token.parse().expect("a number"), count.parse().expect("a number"))
    }

    /// Reads, or with `count` writes, unless it has seen a larger token.
    fn access(&self, token: Token, count: Option<u64>) -> Option<u64> {
        let _guard = self.guard.lock().unwrap_or_else(PoisonError::into_inner);
        let (newest, found) = self.load();
        if token.get() < newest {
            return None;
        }
        let text = format!("{token} {}", count.unwrap_or(found));
        std::fs::write(self.dir.path().join("counter"), text).expect("there is room");
        if count.is_some() {
            self.written.fetch_add(1, Ordering::SeqCst);
        }
        Some(found)
    }

    /// No update was lost.
    pub(super) fn check(&self) {
        assert_eq!(self.load().1, self.written.load(Ordering::SeqCst), "updates were lost");
    }
}

/// Acquires the lock again and again, and counts.
pub(super) async fn contend(
    registry: Arc<dyn Registry>,
    run: Run,
    arena: Arc<Arena<Held>>,
    counter: Arc<Counter>,
    mut dice: Dice,
) {
    let lock = registry.lock(&key(NAME));
    while !run.is_over() {
        let held = match lock.acquire_within(TURN).await {
            Ok(held) => arena.enter(held),
            Err(error) => {
                may_be(&error);
                run.sleep(dice.time(Duration::from_millis(100))).await;
                continue;
            }
        };
        run.counts.one("locks held");
        // Who is late by more than the TTL is here together with the next: what tokens are for.
        if counter.inside.fetch_add(1, Ordering::SeqCst) > 0 {
            run.counts.one("overlaps of holders");
        }
        let count = counter.access(held.token(), None);
        let thinks = if dice.roll(8) == 0 { 3000 } else { 20 };
        run.sleep(dice.time(Duration::from_millis(thinks))).await;
        let written = count.and_then(|count| counter.access(held.token(), Some(count + 1)));
        counter.inside.fetch_sub(1, Ordering::SeqCst);
        if written.is_none() {
            run.counts.one("writes fenced off");
        }
        let left = arena.leave(held);
        if let Some(held) = left.filter(|_| dice.roll(4) > 0)
            && let Err(error) = held.release().await
        {
            may_be(&error);
        }
    }
}

/// Campaigns again and again.
pub(super) async fn campaign(registry: Arc<dyn Registry>, run: Run, arena: Arc<Arena<Leadership>>, mut dice: Dice) {
    let election = registry.election(&key(NAME));
    while !run.is_over() {
        // All publish the same: who leads is told by the token (E5).
        let leadership = match tokio::time::timeout(TURN, election.campaign("candidate")).await {
            Ok(Ok(leadership)) => arena.enter(leadership),
            Ok(Err(error)) => {
                may_be(&error);
                run.sleep(dice.time(Duration::from_millis(100))).await;
                continue;
            }
            Err(_) => continue,
        };
        run.counts.one("leaderships");
        if dice.roll(3) == 0
            && let Err(error) = leadership.publish("leader").await
        {
            may_be(&error);
        }
        run.sleep(dice.time(Duration::from_millis(100))).await;
        let left = arena.leave(leadership);
        if let Some(leadership) = left.filter(|_| dice.roll(4) > 0)
            && let Err(error) = leadership.resign().await
        {
            may_be(&error);
        }
    }
}

/// Observes the election: tokens only grow (E2).
pub(super) async fn observe(mut course: Campaign, run: Run) {
    let mut newest = None;
    let mut stop = run.stop.clone();
    loop {
        let leader = tokio::select! {
            leader = course.next() => leader.expect("an observation goes on").expect("an observation goes on"),
            _ = stop.wait_for(|stop| *stop) => return,
        };
        let Some(leader) = leader else { continue };
        assert!(
            Some(leader.token) >= newest,
            "leader {} was told after {newest:?}",
            leader.token
        );
        newest = Some(leader.token);
        run.counts.one("leaders observed");
    }
}

/// What may be told to one who wants a lock or a leadership while things break.
fn may_be(error: &Error) {
    let may_be = matches!(
        error,
        Error::DeadlineExceeded { .. }
            | Error::SessionExpired { .. }
            | Error::HoldLost { .. }
            | Error::Unavailable { .. }
            | Error::OutcomeUnknown { .. }
    );
    assert!(may_be, "{error:?}");
}
