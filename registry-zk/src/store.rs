//! What all calls on a handle share: the connection of the present session, and how it is asked.

use std::future::Future;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use registry_api::{BoxError, Error, Options, Result, Revision, SessionId};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout_at};
use zookeeper_client::{Acls, Client, CreateMode, CreateOptions, Error as ClientError, SessionState};

use crate::config::{ReadMode, ZkConfig};
use crate::ephemerals::Ephemerals;
use crate::error::{self, Trouble, Verdict};
use crate::facts::{Crowded, Facts};
use crate::names::{Names, revision};

const MIN_BACKOFF: Duration = Duration::from_millis(5);
const MAX_BACKOFF: Duration = Duration::from_millis(320);

/// The connection to ZooKeeper and what was learnt of it.
pub(crate) struct Store {
    pub(crate) names: Names,
    pub(crate) config: ZkConfig,
    pub(crate) options: Options,
    pub(crate) facts: Facts,
    pub(crate) crowded: Crowded,
    pub(crate) ephemerals: Ephemerals,
    slot: watch::Sender<Slot>,
    /// The newest change this handle has seen.
    seen: AtomicI64,
    /// How often a watch found that the servers were restored from an older copy.
    rollbacks: AtomicU64,
    /// The runtime of the thread that keeps sessions.
    runtime: OnceLock<Handle>,
}

/// A task of [`Store::spawn`], which ends when this is dropped.
struct Call<T>(JoinHandle<T>);

impl<T> Drop for Call<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// The connection that calls use.
#[derive(Clone)]
pub(crate) enum Slot {
    /// None yet, or none again.
    Opening,
    Open(Arc<Conn>),
    /// None any more.
    Closed,
}

/// ZooKeeper's session, with the connection that is its own.
pub(crate) struct Conn {
    pub(crate) client: Client,
    pub(crate) session: SessionId,
}

impl Conn {
    pub(crate) fn new(client: Client) -> Self {
        let session = Self::session_of(&client);
        Self { client, session }
    }

    pub(crate) fn session_of(client: &Client) -> SessionId {
        SessionId(client.session_id().0.cast_unsigned())
    }
}

impl Store {
    /// Nothing is sent.
    pub(crate) fn new(config: &ZkConfig, options: &Options) -> Self {
        Self {
            names: Names::new(options.namespace.clone()),
            config: config.clone(),
            options: options.clone(),
            facts: Facts::default(),
            crowded: Crowded::default(),
            ephemerals: Ephemerals::default(),
            slot: watch::Sender::new(Slot::Opening),
            seen: AtomicI64::new(0),
            rollbacks: AtomicU64::new(0),
            runtime: OnceLock::new(),
        }
    }

    /// The runtime that sessions are opened on: the first caller's, which is [`crate::session::Sessions`].
    pub(crate) fn runtime(&self) -> &Handle {
        self.runtime.get_or_init(Handle::current)
    }

    /// Runs a task of the handle's own. It does not depend on the runtime of the program, which may not be driven.
    pub(crate) fn spawn<T: Send + 'static>(&self, task: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
        self.runtime().spawn(task)
    }

    /// Runs a call as a task, and cancels it when the caller drops the future.
    ///
    /// ZooKeeper's client closes a session only when nothing uses its connection any more. A call that the caller
    /// keeps and does not poll must not use it for ever, so the caller only waits for a task that does.
    pub(crate) async fn call<T: Send + 'static>(
        &self,
        operation: &'static str,
        call: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        let mut call = Call(self.spawn(call));
        match (&mut call.0).await {
            Ok(result) => result,
            Err(ended) if ended.is_panic() => std::panic::resume_unwind(ended.into_panic()),
            Err(ended) => Err(error::unknown(operation, ended)),
        }
    }

    pub(crate) fn deadline(&self) -> Instant {
        Instant::now() + self.options.request_timeout
    }

    pub(crate) fn saw(&self, zxid: i64) {
        self.seen.fetch_max(zxid, Ordering::AcqRel);
    }

    /// The servers were restored from an older copy.
    pub(crate) fn went_back(&self, to: i64) {
        self.seen.store(to, Ordering::Release);
        self.rollbacks.fetch_add(1, Ordering::AcqRel);
    }

    pub(crate) fn rollbacks(&self) -> u64 {
        self.rollbacks.load(Ordering::Acquire)
    }

    pub(crate) fn seen(&self) -> i64 {
        self.seen.load(Ordering::Acquire)
    }

    /// Who may do what with the nodes that are made.
    pub(crate) fn acls(&self) -> Acls<'static> {
        match self.config.auth {
            Some(_) => Acls::creator_all(),
            None => Acls::anyone_all(),
        }
    }

    pub(crate) fn persistent(&self) -> CreateOptions<'static> {
        CreateMode::Persistent.with_acls(self.acls())
    }

    pub(crate) fn ephemeral(&self) -> CreateOptions<'static> {
        CreateMode::Ephemeral.with_acls(self.acls())
    }

    /// Gives calls a connection, or none. A closed store stays closed.
    pub(crate) fn put(&self, next: Slot) {
        self.slot.send_if_modified(|slot| {
            let open = !matches!(slot, Slot::Closed);
            if open {
                *slot = next;
            }
            open
        });
    }

    /// The connection, once it is there and connected.
    pub(crate) async fn conn(&self, deadline: Instant) -> Result<Arc<Conn>> {
        if let Slot::Open(conn) = &*self.slot.borrow()
            && conn.client.state() == SessionState::SyncConnected
        {
            return Ok(conn.clone());
        }
        timeout_at(deadline, self.connected())
            .await
            .unwrap_or_else(|_| Err(error::unavailable(self.not_connected())))
    }

    /// Waits for a connection.
    pub(crate) async fn connected(&self) -> Result<Arc<Conn>> {
        let mut slots = self.slot.subscribe();
        loop {
            let slot = slots.borrow_and_update().clone();
            match slot {
                Slot::Closed => return Err(Error::Closed),
                Slot::Opening => drop(slots.changed().await),
                Slot::Open(conn) => {
                    let mut states = conn.client.state_watcher();
                    match conn.client.state() {
                        SessionState::SyncConnected => return Ok(conn),
                        _ => {
                            drop(conn);
                            tokio::select! {
                                _ = states.changed() => {}
                                _ = slots.changed() => {}
                            }
                        }
                    }
                }
            }
        }
    }

    /// Waits until the connection that calls use will never connect again: ZooKeeper has said that its session is over, or
    /// was not heard of for longer than that can live.
    pub(crate) async fn over(&self) -> Arc<Conn> {
        let mut slots = self.slot.subscribe();
        loop {
            let slot = slots.borrow_and_update().clone();
            let Slot::Open(conn) = slot else {
                drop(slots.changed().await);
                continue;
            };
            let mut states = conn.client.state_watcher();
            match conn.client.state() {
                SessionState::Expired | SessionState::AuthFailed | SessionState::Closed => return conn,
                _ => {
                    drop(conn);
                    tokio::select! {
                        _ = states.changed() => {}
                        _ = slots.changed() => {}
                    }
                }
            }
        }
    }

    /// Waits until calls use another connection than this one.
    pub(crate) async fn replaced(&self, conn: &Arc<Conn>) {
        let mut slots = self.slot.subscribe();
        let other = |slot: &Slot| !matches!(slot, Slot::Open(open) if Arc::ptr_eq(open, conn));
        // An error says that the store is gone.
        let _ = slots.wait_for(other).await;
    }

    /// One request: `None` if there is no answer by the deadline. Ends when the connection is given up, which cannot close
    /// as long as it is used.
    pub(crate) async fn ask<T, E: From<ClientError>>(
        &self,
        conn: &Arc<Conn>,
        deadline: Instant,
        request: impl Future<Output = Result<T, E>>,
    ) -> Option<Result<T, E>> {
        tokio::select! {
            biased;
            answer = request => Some(answer),
            () = self.replaced(conn) => Some(Err(ClientError::ConnectionLoss.into())),
            () = tokio::time::sleep_until(deadline) => None,
        }
    }

    /// Reads: asked again until there is an answer, or the time is up.
    pub(crate) async fn read<T, F>(&self, deadline: Instant, request: impl Fn(Arc<Conn>) -> F) -> Result<T>
    where
        F: Future<Output = Result<T, ClientError>>,
    {
        let mut backoff = Backoff::default();
        loop {
            let conn = self.conn(deadline).await?;
            let failure: BoxError = match self.ask(&conn, deadline, request(conn.clone())).await {
                Some(Ok(answer)) => return Ok(answer),
                Some(Err(error)) => match error::verdict(&error) {
                    Verdict::Unknown | Verdict::NotApplied | Verdict::SessionOver => error.into(),
                    _ => return Err(error::read(error)),
                },
                None => self.silent().into(),
            };
            drop(conn);
            if !backoff.wait_until(deadline).await {
                return Err(error::unavailable(failure));
            }
        }
    }

    /// Asks the server for a linearizable answer: the newest revision of the namespace.
    pub(crate) async fn health(&self) -> Result<Revision> {
        let now = self
            .read(self.deadline(), |conn| async move {
                let synced = conn.client.sync(self.names.root());
                let now = self.now(&conn.client).await?;
                synced.await?;
                Ok(now)
            })
            .await?;
        Ok(revision(now))
    }

    /// What makes the reads after it on the same connection linearizable. It is sent when this returns, and is to be
    /// awaited with them.
    pub(crate) fn fresh<'c>(
        &'c self,
        conn: &'c Conn,
    ) -> impl Future<Output = Result<(), ClientError>> + Send + use<'c> {
        let clock = self.names.clock();
        let sync = match self.config.read {
            ReadMode::Sync => Some(conn.client.sync(self.names.root())),
            ReadMode::Write => None,
        };
        let write = match self.config.read {
            ReadMode::Sync => None,
            ReadMode::Write => Some(conn.client.set_data(&clock, &[], None)),
        };
        // A future that borrows the path would not outlive this call.
        let write = write.map(|write| async move { write.await.map(drop) });
        async move {
            match (sync, write) {
                (Some(sync), _) => sync.await,
                (_, Some(write)) => write.await,
                (None, None) => Ok(()),
            }
        }
    }

    pub(crate) fn not_connected(&self) -> Trouble {
        Trouble::NotConnected(self.config.servers.to_string())
    }

    pub(crate) fn silent(&self) -> Trouble {
        Trouble::Silent(self.config.servers.to_string())
    }
}

/// Waits that double, from 5 ms to 320 ms.
#[derive(Debug)]
pub(crate) struct Backoff(Duration);

impl Default for Backoff {
    fn default() -> Self {
        Self(MIN_BACKOFF)
    }
}

impl Backoff {
    /// Waits once; `false` if the time is up before.
    pub(crate) async fn wait_until(&mut self, deadline: Instant) -> bool {
        if Instant::now() + self.0 >= deadline {
            return false;
        }
        self.wait().await;
        true
    }

    pub(crate) async fn wait(&mut self) {
        sleep(self.0).await;
        self.0 = (self.0 * 2).min(MAX_BACKOFF);
    }
}
