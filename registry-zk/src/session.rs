//! Sessions are ZooKeeper's own, each with a connection of its own.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::future::{join_all, try_join_all};
use registry_api::{Error, Grant, Result, SessionId, SessionStore};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use zookeeper_client::{
    AddWatchMode, Client, Error as ClientError, SessionInfo, SessionState, StateWatcher, TlsOptions,
};

use crate::config::{Tls, config};
use crate::error::{self, Trouble, Verdict};
use crate::names::{GUARDS, MARK};
use crate::store::{Conn, Slot, Store};

/// What ZooKeeper grants, in words.
const BOUNDS: &str = "ZooKeeper grants 2 to 20 of its ticks: 4 s to 40 s as shipped";
/// How long a server may keep silent before another is tried: a fifth of the TTL, so that the session outlives one that
/// does, within these bounds, and less than it takes to open a handle.
const MIN_SILENCE: Duration = Duration::from_millis(600);
const MAX_SILENCE: Duration = Duration::from_secs(4);
/// The end of a session is not waited for longer than half of this without a connection: the next one is to be opened, for
/// which the clock of sessions has more patience than this.
const MIN_PATIENCE: Duration = Duration::from_secs(1);
const MAX_PATIENCE: Duration = Duration::from_secs(10);
const RETRY: Duration = Duration::from_millis(100);

/// Opens, keeps and closes the sessions of one handle.
pub(crate) struct Sessions {
    store: Arc<Store>,
    held: Mutex<Vec<Held>>,
}

/// How many sessions are held at most: the newest, and those given up that ZooKeeper did not say are over.
const MAX_HELD: usize = 8;

/// A session, until ZooKeeper says that it is over.
#[derive(Clone)]
struct Held {
    session: SessionId,
    /// The connection that keeps it alive; none once it was given up.
    conn: Option<Arc<Conn>>,
    states: StateWatcher,
    /// With which another connection takes it up.
    ticket: SessionInfo,
}

impl Sessions {
    pub(crate) fn new(store: Arc<Store>) -> Self {
        Self {
            store,
            held: Mutex::default(),
        }
    }

    fn held(&self) -> MutexGuard<'_, Vec<Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new session, ready for use.
    async fn dial(&self) -> Result<Client> {
        let client = self.connect(None).await?.map_err(error::read)?;
        prepare(&self.store, &client).await?;
        Ok(client)
    }

    /// A connection with a new session, or with that one.
    async fn connect(&self, ticket: Option<SessionInfo>) -> Result<Result<Client, ClientError>> {
        let ttl = self.store.options.session_ttl.get();
        let silence = (ttl / 5).clamp(MIN_SILENCE, MAX_SILENCE);
        let mut connector = Client::connector()
            .with_session_timeout(ttl)
            .with_connection_timeout(silence.min(self.store.options.connect_timeout / 2))
            .with_fail_eagerly();
        if let Some(ticket) = ticket {
            connector = connector.with_session(ticket);
        }
        if let Some(auth) = &self.store.config.auth {
            connector = connector.with_auth("digest", format!("{}:{}", auth.user, auth.password).as_bytes());
        }
        let servers = self.store.config.servers.to_string();
        Ok(match &self.store.config.tls {
            Some(tls) => {
                connector
                    .with_tls(tls_options(tls).await?)
                    .secure_connect(&servers)
                    .await
            }
            None => connector.connect(&servers).await,
        })
    }

    /// Sees a session to its end. One that no connection has any more is taken up again to be closed: only ZooKeeper says
    /// that it is over, the client's own reckoning does not.
    async fn end(&self, mut held: Held) -> Result<()> {
        let patience = self.store.options.session_ttl.get().clamp(MIN_PATIENCE, MAX_PATIENCE) / 2;
        let connected_by = Instant::now() + patience;
        loop {
            match held.states.peek_state() {
                SessionState::Closed => return Ok(()),
                // Being closed, which is the server's to answer.
                SessionState::SyncConnected | SessionState::ConnectedReadOnly => drop(held.states.changed().await),
                SessionState::Disconnected => {
                    let changed = timeout_at(connected_by, held.states.changed()).await;
                    changed.map_err(|_| error::unavailable(self.store.not_connected()))?;
                }
                SessionState::Expired | SessionState::AuthFailed => {
                    let connected = timeout_at(connected_by, self.connect(Some(held.ticket.clone()))).await;
                    match connected.map_err(|_| error::unavailable(self.store.not_connected()))?? {
                        // Dropped, it closes its session.
                        Ok(client) => held.states = client.state_watcher(),
                        Err(ClientError::SessionExpired) => return Ok(()),
                        Err(failure) => return Err(error::read(failure)),
                    }
                }
            }
        }
    }

    /// What stands in the way, server by server.
    async fn causes(&self, failure: &Error) -> String {
        let try_address = |address: String| async move {
            let cause = match timeout(Duration::from_millis(500), TcpStream::connect(&address)).await {
                Ok(Ok(_)) => "takes connections, but grants no session".to_owned(),
                Ok(Err(error)) => error.to_string(),
                Err(_) => "no answer".to_owned(),
            };
            format!("{address}: {cause}")
        };
        let addresses = self.store.config.servers.addresses().map(str::to_owned);
        let causes = join_all(addresses.map(try_address)).await.join("; ");
        let mut failure: &dyn std::error::Error = failure;
        while let Some(source) = failure.source() {
            failure = source;
        }
        format!("{causes} ({failure})")
    }
}

/// Tries what is needed of the server, and makes what a namespace needs.
async fn prepare(store: &Store, client: &Client) -> Result<()> {
    // First, so that nothing is left on a server that can't serve.
    try_watch(store, client).await?;
    // A server that lags behind the last one must not show the handle an older state.
    client.sync("/").await.map_err(error::read)?;
    match prepare_namespace(store, client).await {
        Err(ClientError::NoNode) => {
            make_chroot(store, client).await.map_err(error::read)?;
            prepare_namespace(store, client).await.map_err(error::read)
        }
        prepared => prepared.map_err(error::read),
    }
}

async fn try_watch(store: &Store, client: &Client) -> Result<()> {
    match client
        .watch(&store.names.sweeper(), AddWatchMode::PersistentRecursive)
        .await
    {
        Ok(_) => Ok(()),
        Err(ClientError::Unimplemented) => Err(error::unsupported(
            "this server: persistent recursive watches come with ZooKeeper 3.6",
        )),
        Err(failure) => Err(error::read(failure)),
    }
}

/// Makes the znodes that a namespace begins with, those that are missing, and the sign of the client's session.
pub(crate) async fn prepare_namespace(store: &Store, client: &Client) -> Result<(), ClientError> {
    let names = &store.names;
    let needed = [
        names.root().to_owned(),
        names.clock(),
        names.sessions(),
        names.guards(),
        names.births(),
    ];
    let found = try_join_all(needed.iter().map(|path| client.check_stat(path))).await?;
    let guards = found[3].map_or(0, |guards| guards.num_children);
    if found.iter().all(Option::is_some) && usize::try_from(guards) == Ok(GUARDS.count()) {
        // Says whether this user may look at all.
        client.get_data(names.root()).await?;
    } else {
        for path in [names.root(), &names.side()] {
            exists_ok(client.create(path, MARK, &store.persistent()).await)?;
        }
        for path in &needed[1..] {
            exists_ok(client.create(path, &[], &store.persistent()).await)?;
        }
        let made = GUARDS.map(|part| async move {
            let made = client.create(&names.guard(part), &[], &store.persistent()).await;
            exists_ok(made)
        });
        try_join_all(made).await?;
    }
    let sign = names.sign(Conn::session_of(client));
    exists_ok(client.create(&sign, &[], &store.ephemeral()).await)
}

fn exists_ok<T>(made: Result<T, ClientError>) -> Result<(), ClientError> {
    match made {
        Ok(_) | Err(ClientError::NodeExists) => Ok(()),
        Err(failure) => Err(failure),
    }
}

async fn make_chroot(store: &Store, client: &Client) -> Result<(), ClientError> {
    let Some(path) = store.config.servers.chroot() else {
        return Ok(());
    };
    match client.clone().chroot("/") {
        Ok(whole) => whole.mkdir(path, &store.persistent()).await,
        Err(_) => Ok(()),
    }
}

async fn tls_options(tls: &Tls) -> Result<TlsOptions> {
    // Where several rustls back ends are compiled in, none is the default.
    if rustls::crypto::CryptoProvider::get_default().is_none() {
        // An error says that another was faster.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    }
    let ca = pem("registry.zk.tls.ca", &tls.ca).await?;
    let wrong = |field: &'static str| move |error: ClientError| config(field, error.to_string());
    let mut options = TlsOptions::new()
        .with_pem_ca(&ca)
        .map_err(wrong("registry.zk.tls.ca"))?;
    if let Some(client) = &tls.client {
        let cert = pem("registry.zk.tls.cert", &client.cert).await?;
        let key = pem("registry.zk.tls.key", &client.key).await?;
        options = options
            .with_pem_identity(&cert, &key)
            .map_err(wrong("registry.zk.tls.cert"))?;
    }
    Ok(options)
}

async fn pem(field: &'static str, path: &std::path::Path) -> Result<String> {
    tokio::fs::read_to_string(path)
        .await
        .map_err(|error| config(field, format!("{}: {error}", path.display())))
}

#[async_trait]
impl SessionStore for Sessions {
    async fn open(&self) -> Result<Grant> {
        // This is the runtime of sessions, which the handle's calls run on as well.
        self.store.runtime();
        // Leaves time to say what is wrong.
        let patience = self.store.options.connect_timeout.mul_f64(0.85);
        let deadline = Instant::now() + patience;
        let mut last = error::unavailable(Trouble::Silent(self.store.config.servers.to_string()));
        let client = loop {
            match timeout_at(deadline, self.dial()).await {
                Ok(Ok(client)) => break client,
                Ok(Err(failure @ Error::Unavailable { .. })) => last = failure,
                Ok(Err(failure)) => return Err(failure),
                Err(_) => {}
            }
            if Instant::now() + RETRY >= deadline {
                return Err(error::unavailable(Trouble::Unreachable(self.causes(&last).await)));
            }
            sleep(RETRY).await;
        };
        // Refused, the client is dropped, which closes its session.
        let ttl = self.store.options.accept_ttl(client.session_timeout(), BOUNDS)?;
        let conn = Arc::new(Conn::new(client));
        let session = conn.session;
        let opened = Held {
            session,
            states: conn.client.state_watcher(),
            ticket: conn.client.session().clone(),
            conn: Some(conn.clone()),
        };
        let mut held = self.held();
        // One that was given up keeps its ticket: it is still to be closed.
        held.iter_mut().for_each(|held| held.conn = None);
        if held.len() >= MAX_HELD {
            held.remove(0);
        }
        held.push(opened);
        drop(held);
        self.store.put(Slot::Open(conn));
        Ok(Grant {
            session,
            ttl,
            // A follower tells the leader of its clients' signs of life twice a tick, and a TTL has at least two ticks: what
            // is lost with a follower is at most a quarter of the TTL, a tenth of which is always kept.
            margin: ttl / 6,
        })
    }

    async fn keep_alive(&self, session: SessionId) -> Result<()> {
        let held = self.held().iter().find(|held| held.session == session).cloned();
        let Some(conn) = held.and_then(|held| held.conn) else {
            return Err(Error::SessionExpired { session });
        };
        // A leader answers a `sync` without its quorum, so one that was replaced and does not know it yet renews a session
        // that the next leader expires. It can't commit a write: when that is answered, no other led before it was sent,
        // and one that does later grants a full TTL from then.
        let sign = self.store.names.sign(session);
        match conn.client.set_data(&sign, &[], None).await {
            // Servers agree on a refusal as they do on a write.
            Ok(_) | Err(ClientError::NoNode | ClientError::QuotaExceeded) => Ok(()),
            Err(failure) => Err(match error::verdict(&failure) {
                Verdict::SessionOver => Error::SessionExpired { session },
                _ => error::unavailable(failure),
            }),
        }
    }

    async fn close(&self, session: SessionId) -> Result<()> {
        // The client closes the session when its last user lets go of it, which calls do as their connection is replaced.
        let give_up = |held: &mut Held| (held.conn.take().is_some(), held.clone());
        let held = self.held().iter_mut().find(|held| held.session == session).map(give_up);
        let Some((is_newest, held)) = held else {
            return Ok(());
        };
        if is_newest {
            self.store.put(Slot::Opening);
        }
        self.end(held).await?;
        self.held().retain(|held| held.session != session);
        Ok(())
    }
}
