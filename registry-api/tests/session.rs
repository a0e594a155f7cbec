//! The session's clock and keeper, against a store that answers as it is told.

// A test may fail.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use registry_api::{BootInstant, Error, Grant, Result, Session, SessionId, SessionState, SessionStore};
use tokio::sync::watch;

/// Long enough for a busy machine to keep a session.
const TTL: Duration = Duration::from_secs(2);

/// How the store behaves.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mood {
    Answers,
    Silent,
    Fails,
    SaysGone,
    /// Opens sessions, and closes none.
    ClosesNone,
    Panics,
}

struct Store {
    mood: watch::Sender<Mood>,
    /// How long it takes to open a session.
    opening: Duration,
    opened: AtomicU64,
    beats: watch::Sender<u64>,
    closed: watch::Sender<Vec<SessionId>>,
}

impl Store {
    fn new() -> Arc<Self> {
        Self::that_opens_within(Duration::ZERO)
    }

    fn that_opens_within(opening: Duration) -> Arc<Self> {
        Arc::new(Self {
            mood: watch::Sender::new(Mood::Answers),
            opening,
            opened: AtomicU64::new(0),
            beats: watch::Sender::new(0),
            closed: watch::Sender::new(Vec::new()),
        })
    }

    fn unavailable() -> Error {
        Error::Unavailable {
            backend: "test",
            source: "as told".into(),
        }
    }

    async fn answer(&self) -> Result<()> {
        let mood = *self.mood.borrow();
        match mood {
            Mood::Answers | Mood::SaysGone | Mood::ClosesNone => Ok(()),
            Mood::Panics => panic!("as told"),
            Mood::Silent => std::future::pending().await,
            Mood::Fails => Err(Self::unavailable()),
        }
    }
}

#[async_trait]
impl SessionStore for Store {
    async fn open(&self) -> Result<Grant> {
        self.answer().await?;
        tokio::time::sleep(self.opening).await;
        let session = SessionId(self.opened.fetch_add(1, Ordering::SeqCst) + 1);
        Ok(Grant {
            session,
            ttl: TTL,
            margin: Duration::ZERO,
        })
    }

    async fn keep_alive(&self, session: SessionId) -> Result<()> {
        if *self.mood.borrow() == Mood::SaysGone {
            return Err(Error::SessionExpired { session });
        }
        self.answer().await?;
        self.beats.send_modify(|beats| *beats += 1);
        Ok(())
    }

    async fn close(&self, session: SessionId) -> Result<()> {
        self.answer().await?;
        if *self.mood.borrow() == Mood::ClosesNone {
            return Err(Self::unavailable());
        }
        self.closed.send_modify(|closed| closed.push(session));
        Ok(())
    }
}

async fn open(store: &Arc<Store>) -> Session {
    Session::open("test", store.clone(), TTL).await.unwrap()
}

async fn until(session: &Session, wanted: SessionState) {
    let mut states = session.states();
    let reached = tokio::time::timeout(5 * TTL, states.wait_for(|state| *state == wanted)).await;
    reached
        .unwrap_or_else(|_| panic!("{wanted:?} never came, it is {:?}", session.state()))
        .unwrap();
}

#[tokio::test]
async fn keep_alives_need_no_call_and_keep_the_session() {
    let store = Store::new();
    let session = open(&store).await;
    let first = session.valid_until(SessionId(1)).unwrap();
    store.beats.subscribe().wait_for(|beats| *beats >= 6).await.unwrap();
    assert_eq!(session.state(), SessionState::Connected(SessionId(1)));
    assert!(session.valid_until(SessionId(1)).unwrap() > first + TTL);
}

#[tokio::test]
async fn a_session_that_was_opened_slowly_is_kept() {
    // Less than a third of the TTL is left of what the handle trusts.
    let store = Store::that_opens_within(TTL * 6 / 10);
    let session = open(&store).await;
    let mut beats = store.beats.subscribe();
    let kept = tokio::time::timeout(10 * TTL, beats.wait_for(|beats| *beats >= 3)).await;
    kept.expect("keep-alives in time").unwrap();
    assert_eq!(session.state(), SessionState::Connected(SessionId(1)));
    assert_eq!(store.opened.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn silence_suspends_then_expires_before_the_ttl_and_a_new_session_comes() {
    let store = Store::new();
    let session = open(&store).await;
    for mood in [Mood::Silent, Mood::Fails] {
        let id = session.state().id();
        store.mood.send_replace(mood);
        let silent = BootInstant::now();
        until(&session, SessionState::Suspended(id)).await;
        // The last answered keep-alive was sent before the silence began. (Asked when it is over, it is sure of nothing.)
        let sure = session.valid_until(id);
        assert!(
            sure < Some(silent + TTL),
            "sure of it until {sure:?}, when another may hold what this one held"
        );
        until(&session, SessionState::Expired(id)).await;
        // Told by then, with a TTL more for this machine.
        assert!(
            BootInstant::now() < silent + 2 * TTL,
            "reported after {:?}",
            BootInstant::now().saturating_duration_since(silent)
        );
        assert!(!session.is_valid(id) && session.valid_until(id).is_none() && session.live().is_err());
        store.mood.send_replace(Mood::Answers);
        until(&session, SessionState::Connected(SessionId(id.0 + 1))).await;
        assert!(!session.is_valid(id) && store.closed.borrow().contains(&id));
    }
}

/// leadership#2: the handle's own old session would keep its locks until the store expires it.
#[tokio::test]
async fn a_session_that_was_given_up_is_closed_once_the_store_is_back() {
    let store = Store::new();
    let session = open(&store).await;
    store.mood.send_replace(Mood::Fails);
    until(&session, SessionState::Expired(SessionId(1))).await;
    // The store comes back between the close of the old session and the opening of the next.
    store.mood.send_replace(Mood::ClosesNone);
    until(&session, SessionState::Connected(SessionId(2))).await;
    assert_eq!(*store.closed.borrow(), []);
    store.mood.send_replace(Mood::Answers);
    let mut closed = store.closed.subscribe();
    let done = tokio::time::timeout(TTL, closed.wait_for(|closed| *closed == [SessionId(1)])).await;
    done.expect("the old session is closed").unwrap();
    assert_eq!(session.state(), SessionState::Connected(SessionId(2)));
}

/// A holder is to learn of the end also when the code that keeps its session is broken.
#[tokio::test]
async fn a_keeper_that_panics_ends_the_session() {
    let store = Store::new();
    let session = open(&store).await;
    store.mood.send_replace(Mood::Panics);
    let ended = tokio::time::timeout(5 * TTL, session.ended(SessionId(1))).await;
    ended.expect("it is noticed");
    assert!(!session.is_valid(SessionId(1)));
}

#[tokio::test]
async fn a_short_silence_loses_nothing() {
    let store = Store::new();
    let session = open(&store).await;
    store.mood.send_replace(Mood::Fails);
    until(&session, SessionState::Suspended(SessionId(1))).await;
    store.mood.send_replace(Mood::Answers);
    until(&session, SessionState::Connected(SessionId(1))).await;
    assert_eq!(store.opened.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn the_stores_word_ends_a_session_at_once() {
    let store = Store::new();
    let session = open(&store).await;
    store.mood.send_replace(Mood::SaysGone);
    session.ended(SessionId(1)).await;
    store.mood.send_replace(Mood::Answers);
    let mut states = session.states();
    let next = states
        .wait_for(|state| matches!(state, SessionState::Connected(id) if id.0 > 1))
        .await
        .unwrap()
        .id();
    session.told_expired(SessionId(1));
    assert_eq!(session.state(), SessionState::Connected(next));
    session.told_expired(next);
    assert!(session.state() != SessionState::Connected(next));
}

#[tokio::test]
async fn close_ends_it_once_and_for_good() {
    let store = Store::new();
    let session = open(&store).await;
    session.close(TTL).await.unwrap();
    assert_eq!(*store.closed.borrow(), [SessionId(1)]);
    assert_eq!(session.state(), SessionState::Closed(SessionId(1)));
    assert!(matches!(session.live(), Err(Error::Closed)) && matches!(session.check_open(), Err(Error::Closed)));
    session.close(TTL).await.unwrap();
    assert_eq!(store.closed.borrow().len(), 1);
}

#[tokio::test]
async fn close_that_gets_no_answer_says_so_and_closes_all_the_same() {
    let store = Store::new();
    let session = open(&store).await;
    store.mood.send_replace(Mood::Silent);
    assert!(matches!(
        session.close(TTL / 3).await,
        Err(Error::OutcomeUnknown { .. })
    ));
    assert_eq!(session.state(), SessionState::Closed(SessionId(1)));
}

#[tokio::test]
async fn dropping_the_last_handle_ends_the_session() {
    let store = Store::new();
    let session = open(&store).await;
    drop(session.clone());
    assert!(session.is_valid(SessionId(1)));
    drop(session);
    let mut closed = store.closed.subscribe();
    tokio::time::timeout(5 * TTL, closed.wait_for(|closed| *closed == [SessionId(1)]))
        .await
        .unwrap()
        .unwrap();
}

#[tokio::test]
async fn a_store_that_is_down_is_an_error_in_time() {
    let store = Store::new();
    store.mood.send_replace(Mood::Silent);
    let asked = Instant::now();
    assert!(matches!(
        Session::open("test", store.clone(), TTL).await,
        Err(Error::Unavailable { .. })
    ));
    assert!(asked.elapsed() < 3 * TTL);
}

/// A stalled application loses no session: keep-alives have a thread of their own.
#[tokio::test]
async fn a_blocked_runtime_keeps_its_session() {
    let store = Store::new();
    let session = open(&store).await;
    let beats = *store.beats.borrow();
    std::thread::sleep(2 * TTL);
    assert!(session.is_valid(SessionId(1)));
    assert!(*store.beats.borrow() >= beats + 4);
}
