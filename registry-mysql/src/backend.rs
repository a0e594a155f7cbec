//! The trait over MySQL.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use async_trait::async_trait;
use registry_api::{
    Capabilities, Committed, Entry, Error, Health, Key, List, Namespace, Options, Page, Prefix, Read, Registry, Result,
    Session, Txn, Watch, WatchRequest,
};

use crate::config::MysqlConfig;
use crate::error::BACKEND;
use crate::gather::{Job, Writes};
use crate::line::Lines;
use crate::session::Sessions;
use crate::store::Store;
use crate::{poll, sweep, watch};

const CAPABILITIES: Capabilities = Capabilities {
    backend: BACKEND,
    every_change: true,
    watch_from_revision: true,
    consistent_pages: true,
    tells_expiry: true,
    atomic_expiry: true,
    atomic_delete_prefix: true,
    fresh_create_revision: true,
    reuses_names: true,
    stale_without_quorum: false,
    lists_along: false,
    max_children: None,
};

/// A handle on MySQL.
pub(crate) struct Mysql {
    store: Arc<Store>,
    writes: Writes,
    session: Session,
    namespace: Namespace,
}

impl Mysql {
    pub(crate) async fn open(config: &MysqlConfig, options: &Options) -> Result<Self> {
        let deadline = tokio::time::Instant::now() + options.connect_timeout;
        let store = Arc::new(Store::open(config, options, deadline).await?);
        let sessions = Sessions {
            lines: Lines::new(store.lines.route.apart(), 2),
            tables: store.tables.clone(),
            client: store.client,
            ttl: options.session_ttl.get(),
            request_timeout: options.request_timeout,
        };
        let left = deadline - tokio::time::Instant::now();
        let session = Session::open(BACKEND, Arc::new(sessions), left).await?;
        registry_api::spawn(poll::run(store.clone(), session.states()));
        registry_api::spawn(sweep::run(store.clone(), session.states()));
        Ok(Self {
            writes: Writes::start(store.clone()),
            store,
            session,
            namespace: options.namespace.clone(),
        })
    }

    /// One primary answers every read, so a stale one is no older than any other.
    fn begin(&self) -> Result<tokio::time::Instant> {
        self.session.check_open()?;
        Ok(self.store.deadline())
    }
}

#[async_trait]
impl Registry for Mysql {
    fn capabilities(&self) -> &Capabilities {
        &CAPABILITIES
    }

    fn session(&self) -> &Session {
        &self.session
    }

    async fn get(&self, key: &Key, _read: Read) -> Result<Option<Entry>> {
        self.store.get(key, self.begin()?).await
    }

    async fn list(&self, list: List) -> Result<Page> {
        if list.limit == 0 {
            return Err(Error::InvalidRequest("a page holds at least one entry".into()));
        }
        self.store.page(&list, self.begin()?).await
    }

    async fn children(&self, prefix: &Prefix, _read: Read) -> Result<Vec<String>> {
        self.store.children(prefix, self.begin()?).await
    }

    async fn count(&self, prefix: &Prefix, _read: Read) -> Result<u64> {
        self.store.count(prefix, self.begin()?).await
    }

    async fn commit(&self, txn: Txn) -> Result<Committed> {
        let deadline = self.begin()?;
        txn.check()?;
        let session = match txn.needs_session() {
            true => Some(self.session.live()?),
            false => None,
        };
        let written = self.writes.write(Job::Txn(txn), session, deadline).await;
        if let Err(Error::SessionExpired { session }) = &written {
            self.session.told_expired(*session);
        }
        Ok(written?.committed)
    }

    async fn delete_prefix(&self, prefix: &Prefix) -> Result<u64> {
        let deadline = self.begin()?;
        let written = self
            .writes
            .write(Job::DeletePrefix(prefix.clone()), None, deadline)
            .await?;
        Ok(written.deleted)
    }

    fn rollbacks(&self) -> u64 {
        self.store.rollbacks.load(Ordering::Relaxed)
    }

    async fn watch(&self, request: WatchRequest) -> Result<Watch> {
        self.session.check_open()?;
        watch::start(&self.store, request, self.session.states()).await
    }

    async fn health(&self) -> Result<Health> {
        let deadline = self.begin()?;
        let began = Instant::now();
        let revision = self.store.revision(deadline).await?;
        Ok(Health {
            endpoint: self.store.lines.route.endpoint.clone(),
            latency: began.elapsed(),
            revision,
        })
    }

    async fn close(&self) -> Result<()> {
        self.session.close(self.store.request_timeout).await
    }
}

impl fmt::Debug for Mysql {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mysql")
            .field("namespace", &self.namespace)
            .field("session", &self.session)
            .finish_non_exhaustive()
    }
}
