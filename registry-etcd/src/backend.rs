//! The trait over etcd.

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;
use etcd_client::proto::PbTxnOpResponse;
use etcd_client::{DeleteOptions, GetOptions, Txn as Request, TxnOp};
use registry_api::{
    Capabilities, Committed, Entry, Error, Health, Key, List, Options, Page, Prefix, Read, Registry, Result, Revision,
    Session, Txn, Watch, WatchRequest,
};

use crate::commit::commit;
use crate::config::EtcdConfig;
use crate::error::{self, BACKEND, Trouble};
use crate::link::{Leader, Link, Member};
use crate::names::revision;
use crate::session::Leases;
use crate::store::{self, Store};
use crate::{gather, version, watch};

const CAPABILITIES: Capabilities = Capabilities {
    backend: BACKEND,
    every_change: true,
    watch_from_revision: true,
    consistent_pages: true,
    tells_expiry: false,
    atomic_expiry: true,
    atomic_delete_prefix: true,
    fresh_create_revision: true,
    reuses_names: true,
    stale_without_quorum: true,
    lists_along: false,
    max_children: None,
};

/// A handle on etcd.
pub(crate) struct Etcd {
    store: Arc<Store>,
    session: Session,
}

impl Etcd {
    pub(crate) async fn open(config: &EtcdConfig, options: &Options) -> Result<Self> {
        let deadline = tokio::time::Instant::now() + options.connect_timeout;
        config.check()?;
        let dial = store::dialling(config).await?;
        let store = Store::new(config, dial.clone(), options);
        let member = store.requests.member(deadline).await?;
        match &member.version {
            Some(version) => {
                for fault in version::faults(version) {
                    tracing::warn!(
                        endpoint = member.endpoint,
                        version,
                        "this version of etcd has a known fault: {fault}"
                    );
                }
            }
            None => tracing::info!(
                endpoint = member.endpoint,
                "this user may not read etcd's version: known faults are not checked"
            ),
        }
        // Whoever may not read here is told now.
        sign_of_life(&store, deadline).await?;
        let link = Link::new(config, dial, Leader::Required, options, store.history.clone());
        let left = deadline - tokio::time::Instant::now();
        let session = Session::open(BACKEND, Arc::new(Leases::new(link, options.clone())), left).await;
        let session = session.map_err(|error| match error {
            Error::Unavailable { .. } => error::unavailable(Trouble::NoSession {
                endpoint: member.endpoint.clone(),
                cause: error.with_causes(),
            }),
            error => error,
        })?;
        Ok(Self {
            store: Arc::new(store),
            session,
        })
    }

    /// A read that shows nothing older than what this handle has seen. A replica that is behind that is passed over in
    /// favour of the quorum (R4).
    async fn read<T, F>(&self, read: Read, ask: impl Fn(Read) -> F) -> Result<T>
    where
        F: Future<Output = Result<(T, Revision)>>,
    {
        self.session.check_open()?;
        let history = &self.store.history;
        let since = history.now();
        if read == Read::Stale {
            let (answer, at) = ask(Read::Stale).await?;
            if at >= history.now().newest {
                history.saw(since, at);
                return Ok(answer);
            }
        }
        let since = history.now();
        let (answer, at) = ask(Read::Linearizable).await?;
        history.confirmed(since, at);
        Ok(answer)
    }
}

#[async_trait]
impl Registry for Etcd {
    fn capabilities(&self) -> &Capabilities {
        &CAPABILITIES
    }

    fn session(&self) -> &Session {
        &self.session
    }

    async fn get(&self, key: &Key, read: Read) -> Result<Option<Entry>> {
        let deadline = self.store.deadline();
        let names = &self.store.names;
        let get = |read| async move {
            let ask = |member: Arc<Member>| {
                let options = match read {
                    Read::Linearizable => None,
                    Read::Stale => Some(GetOptions::new().with_serializable()),
                };
                let name = names.key(key);
                async move { member.kv().get(name, options).await }
            };
            let mut answer = self.store.requests.read(deadline, ask).await?.0;
            let at = revision(answer.header.map_or(0, |header| header.revision));
            Ok((answer.kvs.pop().and_then(|stored| names.entry(stored)), at))
        };
        self.read(read, get).await
    }

    async fn list(&self, list: List) -> Result<Page> {
        if list.limit == 0 {
            return Err(Error::InvalidRequest("a page holds at least one entry".into()));
        }
        let deadline = self.store.deadline();
        let list = &list;
        self.read(list.read, |read| async move {
            let list = List { read, ..list.clone() };
            let page = self.store.reader(deadline).page(&list).await?;
            let at = page.revision;
            Ok((page, at))
        })
        .await
    }

    async fn children(&self, prefix: &Prefix, read: Read) -> Result<Vec<String>> {
        let deadline = self.store.deadline();
        self.read(read, |read| async move {
            self.store.reader(deadline).children(prefix, read).await
        })
        .await
    }

    async fn count(&self, prefix: &Prefix, read: Read) -> Result<u64> {
        let deadline = self.store.deadline();
        self.read(read, |read| async move {
            self.store.reader(deadline).count(prefix, read).await
        })
        .await
    }

    async fn commit(&self, txn: Txn) -> Result<Committed> {
        self.session.check_open()?;
        txn.check()?;
        let session = match txn.needs_session() {
            true => Some(self.session.live()?),
            false => None,
        };
        let deadline = self.store.deadline();
        let since = self.store.history.now();
        let committed = match gather::may_be_gathered(&txn) {
            true => gather::put(&self.store, deadline, txn).await,
            false => commit(&self.store.requests, &self.store.names, deadline, &txn, session).await,
        };
        match &committed {
            Ok(committed) => self.store.history.confirmed(since, committed.revision),
            Err(Error::SessionExpired { session }) => self.session.told_expired(*session),
            Err(_) => {}
        }
        committed
    }

    async fn delete_prefix(&self, prefix: &Prefix) -> Result<u64> {
        self.session.check_open()?;
        let below = self.store.names.below(prefix);
        let itself = self.store.names.prefix(prefix).map(|name| TxnOp::delete(name, None));
        let range = TxnOp::delete(below.start, Some(DeleteOptions::new().with_range(below.end)));
        let request = Request::new().and_then(itself.into_iter().chain([range]).collect::<Vec<_>>());
        let delete = |member: Arc<Member>| {
            let request = request.clone();
            async move { member.kv().txn(request).await }
        };
        let deadline = self.store.deadline();
        let since = self.store.history.now();
        let response = self
            .store
            .requests
            .write(deadline, "deleting a prefix", None, delete)
            .await?
            .0;
        let at = revision(response.header.map_or(0, |header| header.revision));
        self.store.history.confirmed(since, at);
        let deleted = |answer: PbTxnOpResponse| match answer {
            PbTxnOpResponse::ResponseDeleteRange(deleted) => deleted.deleted.unsigned_abs(),
            _ => 0,
        };
        Ok(response
            .responses
            .into_iter()
            .filter_map(|answer| answer.response)
            .map(deleted)
            .sum())
    }

    fn rollbacks(&self) -> u64 {
        self.store.history.now().number
    }

    async fn watch(&self, request: WatchRequest) -> Result<Watch> {
        self.session.check_open()?;
        watch::start(&self.store, request, self.session.states()).await
    }

    async fn health(&self) -> Result<Health> {
        self.session.check_open()?;
        sign_of_life(&self.store, self.store.deadline()).await
    }

    async fn close(&self) -> Result<()> {
        self.session.close(self.store.request_timeout).await
    }
}

/// A linearizable read of what is no key, and within what a user of the namespace may read.
async fn sign_of_life(store: &Store, deadline: tokio::time::Instant) -> Result<Health> {
    let began = Instant::now();
    let since = store.history.now();
    let ask = |member: Arc<Member>| async move {
        let header = member.sign_of_life(Read::Linearizable).await?;
        Ok((member.endpoint.clone(), header.revision))
    };
    let (endpoint, at) = store.requests.read(deadline, ask).await?;
    store.history.confirmed(since, revision(at));
    Ok(Health {
        endpoint,
        latency: began.elapsed(),
        revision: revision(at),
    })
}

impl fmt::Debug for Etcd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Etcd")
            .field("namespace", &self.store.names.0)
            .field("session", &self.session)
            .finish_non_exhaustive()
    }
}
