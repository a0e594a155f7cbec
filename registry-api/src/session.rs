//! The session: how a client's liveness is kept, and how it learns of its end.
//!
//! One clock for every backend (S4). A keep-alive that was *sent* at `t` and answered proves that the store counts the
//! TTL from `t` or later, so the session is surely valid until `t + TTL`, less a margin for the difference between two
//! clocks' rates. When that moment passes without another answer the session is given up, before the store can expire
//! it and whether or not anybody can be reached; it never comes back, and a new one is opened. (Gray and Cheriton,
//! *Leases*, 1989.) What client crates say of their own session states or streams plays no part.
//!
//! Time is the machine's, suspension included (`CLOCK_BOOTTIME`): a virtual machine that was put to sleep for longer
//! than the TTL wakes with its session ended.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::future::BoxFuture;
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::{mpsc, oneshot, watch};

use crate::boot::boottime;
use crate::recipe::{Epochs, Names, Owners};
use crate::{BootInstant, Error, Result};

/// How late the end of a session may be noticed after the machine was suspended.
const MAX_SLEEP: Duration = Duration::from_secs(1);

/// The identity of a session, unlike that of any other of the same store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(pub u64);

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// The state of a handle's session. States come in the order of the variants, then from the start again with a new id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SessionState {
    /// Keep-alives are answered.
    Connected(SessionId),
    /// A keep-alive is overdue; the session is still valid, and may be lost soon.
    Suspended(SessionId),
    /// The session is over, by the handle's own clock or by the store's word. A new one is being opened.
    Expired(SessionId),
    /// The handle was closed.
    Closed(SessionId),
}

impl SessionState {
    /// The session.
    pub fn id(self) -> SessionId {
        match self {
            Self::Connected(id) | Self::Suspended(id) | Self::Expired(id) | Self::Closed(id) => id,
        }
    }

    /// The session, if it has not ended.
    pub fn live(self) -> Option<SessionId> {
        match self {
            Self::Connected(id) | Self::Suspended(id) => Some(id),
            Self::Expired(_) | Self::Closed(_) => None,
        }
    }
}

/// What a store supplies for sessions; [`Session`] does the rest, the same for all.
///
/// The calls are made on the thread that keeps sessions alive, so that a stalled application loses none. What they use
/// (a connection with tasks of its own) has to be made there too, inside these calls.
#[async_trait]
pub trait SessionStore: Send + Sync + 'static {
    /// Opens a session.
    ///
    /// # Errors
    /// [`Error::Unavailable`] to be tried again; anything else when it is of no use.
    async fn open(&self) -> Result<Grant>;

    /// Sends one keep-alive and waits for its answer.
    ///
    /// # Errors
    /// [`Error::SessionExpired`] if the store says that the session is gone; anything else is tried again in time.
    async fn keep_alive(&self, session: SessionId) -> Result<()>;

    /// Ends a session and deletes its keys. One that is gone already is no error.
    ///
    /// # Errors
    /// [`Error::Unavailable`] or [`Error::OutcomeUnknown`].
    async fn close(&self, session: SessionId) -> Result<()>;
}

/// A session that the store granted.
#[derive(Clone, Copy, Debug)]
pub struct Grant {
    /// Its identity.
    pub session: SessionId,
    /// How long it outlives its last keep-alive, as granted.
    pub ttl: Duration,
    /// What the store may count late to the client's disadvantage, beyond the tenth of the TTL that is always kept.
    pub margin: Duration,
}

/// A handle's session, kept alive from a thread of its own.
///
/// Dropping the last handle ends it in the background; [`Session::close`] ends it and says when that is done.
#[derive(Clone)]
pub struct Session {
    clock: Arc<SessionClock>,
    close: mpsc::Sender<(Duration, oneshot::Sender<Result<()>>)>,
    names: Arc<Names>,
    owners: Arc<Owners>,
    epochs: Arc<Epochs>,
}

impl Session {
    /// Opens a session and keeps it, and its successors, alive until the last clone is dropped or closed.
    ///
    /// # Errors
    /// What [`SessionStore::open`] answers; [`Error::Unavailable`] if it does not within `timeout`.
    pub async fn open(backend: &'static str, store: Arc<dyn SessionStore>, timeout: Duration) -> Result<Self> {
        let (close, closing) = mpsc::channel(1);
        let opening = runtime().spawn(async move {
            let sent = boottime();
            let opened = tokio::time::timeout(timeout, store.open()).await;
            let grant = opened.unwrap_or_else(|elapsed| {
                Err(Error::Unavailable {
                    backend,
                    source: elapsed.into(),
                })
            })?;
            let clock = Arc::new(SessionClock::new(grant, sent));
            let keeper = Keeper {
                backend,
                store,
                clock: clock.clone(),
                closing,
            };
            runtime().spawn(keeper.run());
            Ok::<_, Error>(clock)
        });
        let clock = opening.await.map_err(|e| Error::Unavailable {
            backend,
            source: e.into(),
        })??;
        Ok(Self {
            clock,
            close,
            names: Arc::default(),
            owners: Arc::default(),
            epochs: Arc::default(),
        })
    }

    /// The state now.
    pub fn state(&self) -> SessionState {
        *self.clock.state.borrow()
    }

    /// The states as they come. The newest is always seen; one that lasted only shortly may be skipped.
    pub fn states(&self) -> watch::Receiver<SessionState> {
        self.clock.state.subscribe()
    }

    /// The session to put ephemeral keys under.
    ///
    /// # Errors
    /// [`Error::SessionExpired`] until the next one is open; [`Error::Closed`].
    pub fn live(&self) -> Result<SessionId> {
        match self.state() {
            SessionState::Connected(id) | SessionState::Suspended(id) => Ok(id),
            SessionState::Expired(session) => Err(Error::SessionExpired { session }),
            SessionState::Closed(_) => Err(Error::Closed),
        }
    }

    /// Refuses calls on a closed handle.
    ///
    /// # Errors
    /// [`Error::Closed`].
    pub fn check_open(&self) -> Result<()> {
        match self.state() {
            SessionState::Closed(_) => Err(Error::Closed),
            _ => Ok(()),
        }
    }

    /// The TTL that the store granted (S1).
    pub fn ttl(&self) -> Duration {
        Duration::from_nanos(self.clock.ttl.load(Ordering::Acquire))
    }

    /// Returns until when the session is surely valid, as known now, or `None` if it has ended. Keep-alives move it on.
    ///
    /// The moment is one of the clock that counts suspension, as the store's clock does.
    pub fn valid_until(&self, session: SessionId) -> Option<BootInstant> {
        self.clock.valid_until(session)
    }

    /// Whether the session is surely valid at this moment.
    pub fn is_valid(&self, session: SessionId) -> bool {
        self.clock.valid_until(session).is_some()
    }

    /// Waits until the session has ended, by whatever cause.
    ///
    /// # Cancel safety
    /// Leaves nothing behind.
    pub async fn ended(&self, session: SessionId) {
        let mut states = self.states();
        // An error says that the keeper is gone, and the session with it.
        let _ = states.wait_for(|state| state.live() != Some(session)).await;
    }

    /// The store's word that a session is gone, learnt by another call than a keep-alive.
    pub fn told_expired(&self, session: SessionId) {
        self.clock.expire(session);
    }

    /// The names under which this handle's contenders enter queues.
    pub(crate) fn names(&self) -> &Names {
        &self.names
    }

    /// What this handle knows of fencing tokens.
    pub(crate) fn epochs(&self) -> &Epochs {
        &self.epochs
    }

    /// The owners of this handle's reentrant locks.
    pub(crate) fn owners(&self) -> &Owners {
        &self.owners
    }

    /// Ends the session; its keys are gone when this returns `Ok`. A second call does nothing.
    ///
    /// # Errors
    /// [`Error::Unavailable`] or [`Error::OutcomeUnknown`] if the store did not say so within `timeout`.
    pub async fn close(&self, timeout: Duration) -> Result<()> {
        let (done, closed) = oneshot::channel();
        if self.close.send((timeout, done)).await.is_err() {
            return Ok(());
        }
        // The keeper drops the question only when it ends, which is when another `close` was first.
        closed.await.unwrap_or(Ok(()))
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session")
            .field("state", &self.state())
            .field("ttl", &self.ttl())
            .finish()
    }
}

/// Until when the present session is surely valid, and the state that follows from it.
struct SessionClock {
    state: watch::Sender<SessionState>,
    /// The granted TTL, the part of it that is trusted, and the end of validity, in nanoseconds of [`boottime`].
    ttl: AtomicU64,
    trusted: AtomicU64,
    valid_until: AtomicU64,
}

impl SessionClock {
    fn new(grant: Grant, sent: Duration) -> Self {
        let clock = Self {
            state: watch::Sender::new(SessionState::Connected(grant.session)),
            ttl: AtomicU64::new(0),
            trusted: AtomicU64::new(0),
            valid_until: AtomicU64::new(0),
        };
        clock.start(grant, sent);
        clock
    }

    /// Begins a session that was asked for at `sent`.
    fn start(&self, grant: Grant, sent: Duration) {
        let trusted = grant
            .ttl
            .saturating_sub(grant.margin + grant.ttl / 10)
            .max(grant.ttl / 3);
        self.ttl.store(nanos(grant.ttl), Ordering::Release);
        self.trusted.store(nanos(trusted), Ordering::Release);
        self.valid_until.store(nanos(sent + trusted), Ordering::Release);
        self.state.send_replace(SessionState::Connected(grant.session));
    }

    /// When what it counts from, the opening or the last answered keep-alive, was sent.
    fn asked_for(&self) -> Duration {
        let valid_until = self.valid_until.load(Ordering::Acquire);
        Duration::from_nanos(valid_until.saturating_sub(self.trusted.load(Ordering::Acquire)))
    }

    /// Takes the answer to a keep-alive sent at `sent`. An answer that comes after the end changes nothing: a session
    /// once given up stays so, though the store may think otherwise.
    fn answered(&self, session: SessionId, sent: Duration, now: Duration) {
        let valid_until = self.valid_until.load(Ordering::Acquire);
        if nanos(now) >= valid_until {
            return self.expire(session);
        }
        let next = nanos(sent) + self.trusted.load(Ordering::Acquire);
        self.valid_until.store(next.max(valid_until), Ordering::Release);
        self.become_if_live(session, SessionState::Connected(session));
    }

    fn expire(&self, session: SessionId) {
        self.become_if_live(session, SessionState::Expired(session));
    }

    fn become_if_live(&self, session: SessionId, next: SessionState) {
        self.state.send_if_modified(|state| {
            let changed = state.live() == Some(session) && *state != next;
            if changed {
                *state = next;
            }
            changed
        });
    }

    fn valid_until(&self, session: SessionId) -> Option<BootInstant> {
        // Read before the state is: a thread that stood still between the two must not take the next session's for its own.
        let valid_until = Duration::from_nanos(self.valid_until.load(Ordering::Acquire));
        (self.state.borrow().live() == Some(session)).then_some(())?;
        (boottime() < valid_until).then(|| BootInstant::from_boottime(valid_until))
    }
}

/// Keeps one handle's sessions alive, one after the other.
struct Keeper {
    backend: &'static str,
    store: Arc<dyn SessionStore>,
    clock: Arc<SessionClock>,
    closing: mpsc::Receiver<(Duration, oneshot::Sender<Result<()>>)>,
}

/// Closes the session when its keeper ends by whatever cause, a panic of the store's code included: nobody would notice
/// the session's end otherwise.
struct EndsWithKeeper(Arc<SessionClock>);

impl Drop for EndsWithKeeper {
    fn drop(&mut self) {
        self.0.state.send_if_modified(|state| {
            let changed = !matches!(state, SessionState::Closed(_));
            *state = SessionState::Closed(state.id());
            changed
        });
    }
}

/// What ended a session.
enum End {
    Expired,
    Closed(Duration, Option<oneshot::Sender<Result<()>>>),
}

impl Keeper {
    async fn run(mut self) {
        let _ended = EndsWithKeeper(self.clock.clone());
        let mut session = self.clock.state.borrow().id();
        loop {
            let end = match self.keep(session).await {
                End::Expired => self.reopen(session).await,
                closed => Err(closed),
            };
            match end {
                Ok(next) => session = next,
                Err(End::Closed(timeout, done)) => return self.close(session, timeout, done).await,
                Err(End::Expired) => {}
            }
        }
    }

    /// Sends keep-alives until the session ends.
    async fn keep(&mut self, session: SessionId) -> End {
        let ttl = Duration::from_nanos(self.clock.ttl.load(Ordering::Acquire));
        let trusted = Duration::from_nanos(self.clock.trusted.load(Ordering::Acquire));
        let (period, retry) = (
            period(trusted),
            (ttl / 20).clamp(Duration::from_millis(20), Duration::from_secs(1)),
        );
        let mut states = self.clock.state.subscribe();
        // Its validity counts from when it was asked for: a store that took long to open it has used that time up.
        let mut due = self.clock.asked_for() + period;
        let mut beat: Option<(Duration, BoxFuture<'static, Result<()>>)> = None;
        loop {
            let now = boottime();
            let valid_until = Duration::from_nanos(self.clock.valid_until.load(Ordering::Acquire));
            if now >= valid_until {
                self.clock.expire(session);
            }
            if states.borrow_and_update().live() != Some(session) {
                return End::Expired;
            }
            let suspend_at = valid_until.saturating_sub(trusted - suspended_after(trusted));
            if now >= suspend_at {
                self.clock.become_if_live(session, SessionState::Suspended(session));
            }
            if now >= due && beat.is_none() {
                if now > due + period {
                    tracing::warn!(%session, late = ?(now - due), "a keep-alive is late by more than the time between two: was this process stalled?");
                }
                let store = self.store.clone();
                let sending = async move {
                    match tokio::time::timeout(period, store.keep_alive(session)).await {
                        Ok(answer) => answer,
                        Err(elapsed) => Err(Error::Unavailable {
                            backend: "keep-alive",
                            source: elapsed.into(),
                        }),
                    }
                };
                beat = Some((now, Box::pin(sending)));
            }
            let mut wake = if now < suspend_at { suspend_at } else { valid_until };
            if beat.is_none() {
                wake = wake.min(due);
            }
            let answer = async {
                match &mut beat {
                    Some((sent, sending)) => (*sent, sending.await),
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                asked = self.closing.recv() => return Self::closed(asked, ttl),
                (sent, answer) = answer => {
                    beat = None;
                    match answer {
                        Ok(()) => {
                            self.clock.answered(session, sent, boottime());
                            due = sent + period;
                        }
                        Err(Error::SessionExpired { .. }) => self.clock.expire(session),
                        Err(error) => {
                            tracing::debug!(%session, %error, "keep-alive failed, trying again");
                            due = boottime() + retry;
                        }
                    }
                }
                _ = states.changed() => {}
                () = tokio::time::sleep(pause(now, wake)) => {}
            }
        }
    }

    /// Ends the session that was given up, in case the store still holds it, and opens the next.
    async fn reopen(&mut self, given_up: SessionId) -> Result<SessionId, End> {
        let ttl = Duration::from_nanos(self.clock.ttl.load(Ordering::Acquire));
        let mut backoff = Duration::from_millis(20);
        let mut closed = false;
        let store = self.store.clone();
        let patience = ttl.clamp(Duration::from_secs(1), Duration::from_secs(10));
        tracing::warn!(session = %given_up, backend = self.backend, "the session has ended, opening a new one");
        loop {
            let attempt = async {
                // To free its keys early: the store expires it anyway.
                closed = closed || store.close(given_up).await.is_ok();
                let sent = boottime();
                store.open().await.map(|grant| (grant, sent))
            };
            tokio::select! {
                biased;
                asked = self.closing.recv() => return Err(Self::closed(asked, ttl)),
                opened = tokio::time::timeout(patience, attempt) => match opened {
                    Ok(Ok((grant, sent))) => {
                        self.clock.start(grant, sent);
                        if !closed {
                            // The store was still away when it was asked to.
                            runtime().spawn(close_later(self.store.clone(), given_up, ttl));
                        }
                        return Ok(grant.session);
                    }
                    Ok(Err(error)) => tracing::debug!(%error, "no new session yet"),
                    Err(_) => tracing::debug!("no new session yet: no answer"),
                },
            }
            tokio::select! {
                biased;
                asked = self.closing.recv() => return Err(Self::closed(asked, ttl)),
                () = tokio::time::sleep(backoff) => backoff = (backoff * 2).min(Duration::from_secs(1)),
            }
        }
    }

    /// A question to close, or the end of all handles, after which nobody waits for an answer.
    fn closed(asked: Option<(Duration, oneshot::Sender<Result<()>>)>, ttl: Duration) -> End {
        match asked {
            Some((timeout, done)) => End::Closed(timeout, Some(done)),
            None => End::Closed(ttl, None),
        }
    }

    async fn close(mut self, session: SessionId, timeout: Duration, done: Option<oneshot::Sender<Result<()>>>) {
        self.clock.state.send_replace(SessionState::Closed(session));
        let closed = tokio::time::timeout(timeout, self.store.close(session)).await;
        let closed = closed.unwrap_or_else(|e| {
            Err(Error::OutcomeUnknown {
                operation: "close",
                source: e.into(),
            })
        });
        if let Err(error) = &closed {
            tracing::warn!(%session, %error, "the session could not be closed, it ends by its TTL");
        }
        self.closing.close();
        if let Some(done) = done {
            // Nobody may be waiting any more.
            let _ = done.send(closed);
        }
    }
}

/// Ends a session that was given up, retrying until the store has expired it by itself.
async fn close_later(store: Arc<dyn SessionStore>, given_up: SessionId, ttl: Duration) {
    let until = boottime() + 2 * ttl;
    while boottime() < until {
        if matches!(tokio::time::timeout(ttl, store.close(given_up)).await, Ok(Ok(()))) {
            return;
        }
        tokio::time::sleep((ttl / 20).clamp(Duration::from_millis(20), Duration::from_secs(1))).await;
    }
}

/// The time between two keep-alives: 0.37 of the trusted part of the TTL, which is a third of the TTL where a tenth of it is
/// kept as a margin. So a session is suspended only when a keep-alive is late by 0.29 of the trusted part, whatever the margin.
fn period(trusted: Duration) -> Duration {
    trusted * 37 / 100
}

/// How long after the sending of the last answered keep-alive a session is suspended.
fn suspended_after(trusted: Duration) -> Duration {
    trusted * 2 / 3
}

/// How long to sleep until `wake`. A sleep counts waking time only, so it is cut into short ones: after the machine was
/// suspended, the clock is read within [`MAX_SLEEP`].
fn pause(now: Duration, wake: Duration) -> Duration {
    wake.saturating_sub(now).clamp(Duration::from_millis(1), MAX_SLEEP)
}

/// The thread that keeps every session of this process alive, apart from the application's own runtime.
fn runtime() -> &'static Handle {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    let start = || {
        let mut builder = Builder::new_multi_thread();
        builder.worker_threads(1).thread_name("registry-session").enable_all();
        builder
            .build()
            .expect("a process that can't start one thread can't go on")
    };
    RUNTIME.get_or_init(start).handle()
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
