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
use crate::names::{newest, revision};
use crate::session::Sessions;
use crate::store::{Slot, Store};
use crate::walk::entries;
use crate::{sweep, watch};

const CAPABILITIES: Capabilities = Capabilities {
    backend: BACKEND,
    every_change: false,
    watch_from_revision: false,
    consistent_pages: false,
    tells_expiry: false,
    atomic_expiry: true,
    atomic_delete_prefix: false,
    fresh_create_revision: false,
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
        tokio::spawn(sweep::run(store.clone(), session.states()));
        let zk = Arc::new(Self {
            store: store.clone(),
            session,
        });
        tokio::spawn(hear_of_ends(Arc::downgrade(&zk), store, zk.session.states()));
        Ok(zk)
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
        self.session.check_open()?;
        let path = self.store.names.path(key);
        let Some(found) = self.store.get(&path, read).await? else {
            return Ok(None);
        };
        self.store.saw(newest(&found.stat));
        Ok(entries(&self.store.names, vec![(path, found)]).pop())
    }

    async fn list(&self, list: List) -> Result<Page> {
        self.session.check_open()?;
        if list.limit == 0 {
            return Err(Error::InvalidRequest("a page holds at least one entry".into()));
        }
        self.store.page(&list).await
    }

    async fn children(&self, prefix: &Prefix, read: Read) -> Result<Vec<String>> {
        self.session.check_open()?;
        self.store.children(prefix, read).await
    }

    async fn count(&self, prefix: &Prefix, read: Read) -> Result<u64> {
        self.session.check_open()?;
        self.store.count(prefix, read).await
    }

    async fn commit(&self, txn: Txn) -> Result<Committed> {
        self.session.check_open()?;
        txn.check()?;
        let session = match txn.needs_session() {
            true => Some(self.session.live()?),
            false => None,
        };
        let committed = self.store.commit(&txn, session).await;
        if let Err(Error::SessionExpired { session }) = &committed {
            self.session.told_expired(*session);
        }
        committed
    }

    async fn delete_prefix(&self, prefix: &Prefix) -> Result<u64> {
        self.session.check_open()?;
        self.store.delete_prefix(prefix).await
    }

    async fn watch(&self, request: WatchRequest) -> Result<Watch> {
        self.session.check_open()?;
        watch::start(&self.store, request, self.session.states()).await
    }

    async fn health(&self) -> Result<Health> {
        self.session.check_open()?;
        let began = Instant::now();
        let store = &self.store;
        let ask = |conn: Arc<crate::store::Conn>| async move {
            let synced = conn.client.sync(store.names.root());
            let now = store.now(&conn.client).await?;
            synced.await?;
            Ok(now)
        };
        let now = store.read(store.deadline(), ask).await?;
        Ok(Health {
            // Which of them it is, the client does not say.
            endpoint: store.config.servers.to_string(),
            latency: began.elapsed(),
            revision: revision(now),
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
