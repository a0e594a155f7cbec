//! The trait over ZooKeeper.

use std::fmt;
use std::sync::{Arc, Weak};
use std::time::Instant;

use async_trait::async_trait;
use registry_api::{
    Capabilities, Committed, Entry, Error, Health, Key, List, Options, Page, Prefix, Read, Registry, Result, Session,
    SessionState, Txn, Watch, WatchRequest,
};

use tokio::sync::watch::Receiver;

use crate::config::ZkConfig;
use crate::error::BACKEND;
use crate::names::newest;
use crate::session::Sessions;
use crate::store::{Slot, Store};
use crate::walk::entries;
use crate::{sweep, version, watch};

const CAPABILITIES: Capabilities = Capabilities {
    backend: BACKEND,
    every_change: false,
    watch_from_revision: false,
    consistent_pages: false,
    tells_expiry: false,
    atomic_expiry: true,
    atomic_delete_prefix: false,
    fresh_create_revision: true,
    reuses_names: false,
    stale_without_quorum: false,
    lists_along: false,
    max_children: None,
};

/// A handle on ZooKeeper.
pub(crate) struct Zk {
    store: Arc<Store>,
    session: Session,
}

impl Zk {
    pub(crate) async fn open(config: &ZkConfig, options: &Options) -> Result<Arc<Self>> {
        let store = Arc::new(Store::new(config, options));
        let sessions = Arc::new(Sessions::new(store.clone()));
        let session = Session::open(BACKEND, sessions, options.connect_timeout).await?;
        store.spawn(version::warn(store.clone()));
        store.spawn(sweep::run(store.clone(), session.states()));
        let zk = Arc::new(Self {
            store: store.clone(),
            session,
        });
        store.spawn(hear_of_ends(Arc::downgrade(&zk), store.clone(), zk.session.states()));
        Ok(zk)
    }

    /// Runs a call on the store as a task (see [`Store::call`]).
    async fn call<T, F>(&self, operation: &'static str, call: impl FnOnce(Arc<Store>) -> F) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        self.session.check_open()?;
        self.store.call(operation, call(self.store.clone())).await
    }
}

/// Gives a session up as soon as its connection has heard of its end, which is long before the next keep-alive would.
async fn hear_of_ends(zk: Weak<Zk>, store: Arc<Store>, mut states: Receiver<SessionState>) {
    let hear = async {
        loop {
            let conn = store.over().await;
            let Some(zk) = zk.upgrade() else { return };
            zk.session.told_expired(conn.session);
            drop(zk);
            store.replaced(&conn).await;
        }
    };
    tokio::select! {
        () = hear => {}
        // An error says that the handle is gone.
        _ = states.wait_for(|state| matches!(state, SessionState::Closed(_))) => {}
    }
}

#[async_trait]
impl Registry for Zk {
    fn capabilities(&self) -> &Capabilities {
        &CAPABILITIES
    }

    fn session(&self) -> &Session {
        &self.session
    }

    async fn get(&self, key: &Key, read: Read) -> Result<Option<Entry>> {
        let path = self.store.names.path(key);
        let get = async move |store: Arc<Store>| {
            let Some(found) = store.get(&path, read).await? else {
                return Ok(None);
            };
            store.saw(newest(&found.stat));
            Ok(entries(&store.names, vec![(path, found)]).pop())
        };
        self.call("get", get).await
    }

    async fn list(&self, list: List) -> Result<Page> {
        self.session.check_open()?;
        if list.limit == 0 {
            return Err(Error::InvalidRequest("a page holds at least one entry".into()));
        }
        self.call("list", |store| async move { store.page(&list).await }).await
    }

    async fn children(&self, prefix: &Prefix, read: Read) -> Result<Vec<String>> {
        let prefix = prefix.clone();
        self.call("children", |store| async move { store.children(&prefix, read).await })
            .await
    }

    async fn count(&self, prefix: &Prefix, read: Read) -> Result<u64> {
        let prefix = prefix.clone();
        self.call("count", |store| async move { store.count(&prefix, read).await })
            .await
    }

    async fn commit(&self, txn: Txn) -> Result<Committed> {
        self.session.check_open()?;
        txn.check()?;
        let session = match txn.needs_session() {
            true => Some(self.session.live()?),
            false => None,
        };
        let committed = self
            .call(
                "a transaction",
                |store| async move { store.commit(&txn, session).await },
            )
            .await;
        if let Err(Error::SessionExpired { session }) = &committed {
            self.session.told_expired(*session);
        }
        committed
    }

    async fn delete_prefix(&self, prefix: &Prefix) -> Result<u64> {
        let prefix = prefix.clone();
        self.call("deleting a prefix", |store| async move {
            store.delete_prefix(&prefix).await
        })
        .await
    }

    fn rollbacks(&self) -> u64 {
        self.store.rollbacks()
    }

    async fn watch(&self, request: WatchRequest) -> Result<Watch> {
        let states = self.session.states();
        self.call(
            "watch",
            |store| async move { watch::start(&store, request, states).await },
        )
        .await
    }

    async fn health(&self) -> Result<Health> {
        let began = Instant::now();
        let revision = self.call("health", |store| async move { store.health().await }).await?;
        Ok(Health {
            // The client does not say which of them it is connected to.
            endpoint: self.store.config.servers.to_string(),
            latency: began.elapsed(),
            revision,
        })
    }

    async fn close(&self) -> Result<()> {
        // Calls under way end, and let go of the connection.
        self.store.put(Slot::Closed);
        self.session.close(self.store.options.request_timeout).await
    }
}

impl fmt::Debug for Zk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Zk")
            .field("servers", &self.store.config.servers)
            .field("namespace", &self.store.options.namespace)
            .field("session", &self.session)
            .finish_non_exhaustive()
    }
}
