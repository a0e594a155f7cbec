//! A member: the process that stores, and answers for the group.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use openraft::async_runtime::WatchReceiver;
use openraft::error::{ClientWriteError, LinearizableReadError, RaftError};
use openraft::{Raft, ReadPolicy, SnapshotPolicy};
use registry_api::{BoxError, Error, Namespace, Options, Registry, Result, SessionId, Watch, WatchRequest};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{Semaphore, oneshot, watch};

use crate::backend::RaftRegistry;
use crate::command::{Change, Command, Reply};
use crate::config::RaftConfig;
use crate::directory::Directory;
use crate::expiry::{self, Expiry};
use crate::link::{BACKEND, Link};
use crate::log_store::LogStore;
use crate::network::Alone;
use crate::proto;
use crate::proto::registry_server::RegistryServer;
use crate::proto::request::Call;
use crate::proto::response::Answer;
use crate::remote::MAX_MESSAGE;
use crate::service::Service;
use crate::snapshot::Snapshots;
use crate::state_machine::StateMachine;
use crate::status::Status;
use crate::store::Store;
use crate::types::{Peer, TypeConfig};
use crate::watchers::Target;

/// How long a member may take to read its data and to lead a group of one.
const START: Duration = Duration::from_secs(60);
/// How many bytes of changes may be on their way at once; more wait their turn.
const IN_FLIGHT: usize = 64 << 20;
const HOUSEKEEPING: Duration = Duration::from_millis(500);

/// A member of the group, in this process.
///
/// It runs on threads of its own, so that a stalled application keeps no other member or session waiting. Dropping it
/// stops it in the background; [`Member::stop`] says when that is done.
#[derive(Debug)]
pub struct Member {
    core: Core,
    address: Option<SocketAddr>,
    running: Option<Running>,
}

/// What a member is made of while it runs.
#[derive(Debug)]
struct Running {
    runtime: Runtime,
    stop: watch::Sender<bool>,
    server: Option<tokio::task::JoinHandle<()>>,
    directory: Option<Directory>,
}

impl Member {
    /// Opens the data directory, or makes it, and starts.
    ///
    /// # Errors
    /// [`Error::Config`] for a bad setting; [`Error::Storage`] for a directory that is damaged, another member's, of a
    /// newer version, or in use by another process: nothing is changed then. [`Error::Unavailable`] if the address
    /// can't be listened on.
    pub async fn start(config: &RaftConfig) -> Result<Self> {
        config.check()?;
        if config.is_remote() {
            return Err(Error::Config {
                field: "registry.raft.endpoints".into(),
                reason: "a member has none".into(),
            });
        }
        let mut builder = Builder::new_multi_thread();
        builder.worker_threads(2).thread_name("registry-raft").enable_all();
        let runtime = builder.build().map_err(unavailable)?;
        let config = config.clone();
        // Opening reads files and waits for disks: that is for the member's own threads.
        let starting = runtime.spawn(async move { start(&config).await });
        let started = starting.await.map_err(unavailable);
        match started.and_then(|started| started) {
            Ok((core, address, stop, server, directory)) => Ok(Self {
                core,
                address,
                running: Some(Running {
                    runtime,
                    stop,
                    server,
                    directory,
                }),
            }),
            Err(error) => {
                runtime.shutdown_background();
                Err(error)
            }
        }
    }

    /// Where it answers remote handles; `None` in memory.
    pub fn address(&self) -> Option<SocketAddr> {
        self.address
    }

    /// Opens a handle on this member.
    ///
    /// # Errors
    /// As [`crate::connect`].
    pub async fn connect(&self, options: &Options) -> Result<Arc<dyn Registry>> {
        Ok(Arc::new(
            RaftRegistry::open(Arc::new(self.core.clone()), options).await?,
        ))
    }

    /// A handle that owns this member, which stops when the handle is closed or dropped.
    pub(crate) async fn into_handle(self, options: &Options) -> Result<Arc<dyn Registry>> {
        let handle = RaftRegistry::open(Arc::new(self.core.clone()), options).await?;
        Ok(Arc::new(handle.owning(self)))
    }

    /// How it stands.
    pub fn status(&self) -> Status {
        self.core.status().into()
    }

    /// Takes a snapshot now and drops the log that it covers, as the member does by itself when the log has grown.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the member has stopped.
    pub async fn snapshot(&self) -> Result<()> {
        self.core.raft.trigger().snapshot().await.map_err(unavailable)
    }

    /// Stops: no request is taken any more, those under way end, the log is flushed and the directory free.
    ///
    /// # Errors
    /// [`Error::Storage`] if the log could not be closed; what was acknowledged is durable all the same.
    pub async fn stop(mut self) -> Result<()> {
        let Some(running) = self.running.take() else {
            return Ok(());
        };
        let core = self.core.clone();
        let (done, stopped) = oneshot::channel();
        // A runtime can't end on a thread of its own, nor on one that runs another.
        let stop = move || {
            // Nobody may be waiting any more.
            let _ = done.send(running.stop(&core));
        };
        std::thread::Builder::new()
            .name("registry-stop".into())
            .spawn(stop)
            .map_err(unavailable)?;
        stopped.await.map_err(unavailable)?
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        if let Some(running) = self.running.take() {
            let core = self.core.clone();
            let stop = move || {
                // Nobody is there to be told; what was acknowledged is durable.
                let _ = running.stop(&core);
            };
            // Without a thread to be had, the process is at its end anyway.
            let _ = std::thread::Builder::new().name("registry-stop".into()).spawn(stop);
        }
    }
}

impl Running {
    fn stop(self, core: &Core) -> Result<()> {
        self.stop.send_replace(true);
        core.store.end_watches();
        let closed = self.runtime.block_on(async {
            if let Some(server) = self.server {
                let grace = tokio::time::timeout(Duration::from_secs(1), server).await;
                tracing::debug!(in_time = grace.is_ok(), "the server has stopped");
            }
            // Ends the member's tasks; an error says that they had ended already.
            let _ = core.raft.shutdown().await;
            core.log.log().close()
        });
        self.runtime.shutdown_timeout(Duration::from_secs(1));
        // Only now may another process open it.
        drop(self.directory);
        closed
    }
}

type Started = (
    Core,
    Option<SocketAddr>,
    watch::Sender<bool>,
    Option<tokio::task::JoinHandle<()>>,
    Option<Directory>,
);

async fn start(config: &RaftConfig) -> Result<Started> {
    let directory = config
        .directory()
        .map(|path| Directory::open(path, config.member_name()))
        .transpose()?;
    let identity = directory
        .as_ref()
        .map_or_else(crate::log::Identity::random, |directory| directory.identity());
    let listener = match config.directory() {
        Some(_) => Some(listen(config.address()?).await?),
        None => None,
    };
    let address = listener
        .as_ref()
        .map(|listener| listener.local_addr().map_err(unavailable))
        .transpose()?;
    let log = match &directory {
        Some(directory) => LogStore::open(
            &directory.log(),
            identity,
            crate::log::Options::default(),
            crate::log::abort(),
        )?,
        None => LogStore::in_memory(),
    };
    let snapshots = Arc::new(Snapshots::open(
        directory.as_ref().map(|directory| directory.snapshots()),
        identity,
    )?);
    let store = Store::default();
    let machine = StateMachine::open(store.clone(), snapshots.clone())?;
    let raft_config = openraft::Config {
        cluster_name: "registry".into(),
        heartbeat_interval: 100,
        election_timeout_min: 300,
        election_timeout_max: 600,
        snapshot_policy: SnapshotPolicy::Never,
        // What a snapshot covers is dropped from the log: a group of one has nobody who lags behind.
        max_in_snapshot_log_to_keep: 0,
        purge_batch_size: 1,
        // A state machine in memory must not be led before it has caught up.
        enable_leader_restore: Some(false),
        enable_pre_vote: Some(true),
        quorum_loss_probe_interval: Some(1200),
        broadcast_submitted_on_append: Some(true),
        ..openraft::Config::default()
    };
    let raft_config = raft_config.validate().map_err(|e| Error::Config {
        field: "registry.raft".into(),
        reason: e.to_string(),
    })?;
    let raft = Raft::new(identity.member, raft_config.into(), Alone, log.clone(), machine)
        .await
        .map_err(unavailable)?;
    let core = Core {
        id: identity.member,
        raft,
        store,
        log,
        snapshots,
        expiry: Arc::default(),
        in_flight: Arc::new(Semaphore::new(IN_FLIGHT)),
    };
    core.found(config, address).await?;
    if let Some(directory) = &directory {
        directory.founded()?;
    }
    let (stop, stopping) = watch::channel(false);
    tokio::spawn(core.clone().keep_time(stopping.clone()));
    tokio::spawn(core.clone().keep_house(config.snapshot_log_bytes(), stopping.clone()));
    let server = listener.map(|listener| tokio::spawn(serve(core.clone(), listener, stopping)));
    Ok((core, address, stop, server, directory))
}

async fn listen(address: SocketAddr) -> Result<tokio::net::TcpListener> {
    if !address.ip().is_loopback() {
        tracing::warn!(%address, "listening beyond loopback without TLS: anybody who reaches this address reads and writes");
    }
    let listening = tokio::net::TcpListener::bind(address).await;
    listening.map_err(|e| unavailable(std::io::Error::new(e.kind(), format!("can't listen on {address}: {e}"))))
}

async fn serve(core: Core, listener: tokio::net::TcpListener, mut stopping: watch::Receiver<bool>) {
    let service = RegistryServer::new(Service { core })
        .max_decoding_message_size(MAX_MESSAGE)
        .max_encoding_message_size(MAX_MESSAGE);
    let stop = async move {
        // An error says that the member is gone.
        let _ = stopping.wait_for(|stop| *stop).await;
    };
    let incoming = tonic::transport::server::TcpIncoming::from(listener).with_nodelay(Some(true));
    let served = tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(10)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .add_service(service)
        .serve_with_incoming_shutdown(incoming, stop)
        .await;
    if let Err(error) = served {
        tracing::error!(%error, "the server has ended, remote handles get no answer any more");
    }
}

/// What answers requests: shared by the server and by the handles of this process.
#[derive(Clone)]
pub(crate) struct Core {
    id: u64,
    raft: Raft<TypeConfig, StateMachine>,
    store: Store,
    log: LogStore,
    snapshots: Arc<Snapshots>,
    expiry: Arc<Expiry>,
    in_flight: Arc<Semaphore>,
}

impl std::fmt::Debug for Core {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Core").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Core {
    /// Makes the group if it is not made yet, and waits until this member leads and holds all that was acknowledged.
    async fn found(&self, config: &RaftConfig, address: Option<SocketAddr>) -> Result<()> {
        if !self.raft.is_initialized().await.map_err(unavailable)? {
            let address = address.map_or_else(String::new, |address| address.to_string());
            let peer = Peer {
                name: config.member_name().into(),
                address,
            };
            let members = BTreeMap::from([(self.id, peer)]);
            self.raft.initialize(members).await.map_err(unavailable)?;
        }
        // A group of one need not wait for the silence of a leader that it would hear.
        self.raft.trigger().elect(false).await.map_err(unavailable)?;
        let deadline = Instant::now() + START;
        while let Err(error) = self.barrier().await {
            if Instant::now() > deadline {
                return Err(error);
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    }

    /// Answers a call within `patience`.
    pub(crate) async fn serve(&self, call: Call, patience: Duration) -> Result<Answer> {
        let write = matches!(call, Call::Command(_));
        match tokio::time::timeout(patience, self.answer(call)).await {
            Ok(answer) => answer,
            Err(elapsed) if write => Err(Error::OutcomeUnknown {
                operation: "a write",
                source: elapsed.into(),
            }),
            Err(elapsed) => Err(unavailable(elapsed)),
        }
    }

    async fn answer(&self, call: Call) -> Result<Answer> {
        Ok(match call {
            Call::Get(get) => {
                self.fresh(get.stale).await?;
                Answer::Get(self.store.get(&get.key))
            }
            Call::List(list) => {
                self.fresh(list.stale).await?;
                Answer::Page(self.store.list(&list))
            }
            Call::Children(children) => {
                self.fresh(children.stale).await?;
                Answer::Children(self.store.children(&children.prefix))
            }
            Call::Count(count) => {
                self.fresh(count.stale).await?;
                Answer::Count(self.store.count(&count.prefix))
            }
            Call::Command(command) => Answer::Reply(self.propose(command).await?),
            Call::KeepAlive(keep_alive) => {
                self.keep_alive(SessionId(keep_alive.session)).await?;
                Answer::Done(proto::Unit {})
            }
            Call::Status(_) => Answer::Status(self.status()),
        })
    }

    /// Waits until the local state holds all that was acknowledged, unless the reader does not care.
    async fn fresh(&self, stale: bool) -> Result<()> {
        if stale { Ok(()) } else { self.barrier().await }
    }

    async fn barrier(&self) -> Result<()> {
        match self.raft.ensure_linearizable(ReadPolicy::ReadIndex).await {
            Ok(_) => Ok(()),
            Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(_))) => {
                Err(unavailable("there is no Raft leader"))
            }
            Err(error) => Err(unavailable(error)),
        }
    }

    /// Has a command committed and applied.
    async fn propose(&self, command: Command) -> Result<Reply> {
        let proposal = command.encode();
        let size = u32::try_from(proposal.0.len().clamp(1, IN_FLIGHT)).unwrap_or(u32::MAX);
        let _permit = self.in_flight.acquire_many(size).await.map_err(unavailable)?;
        match self.raft.client_write(proposal).await {
            Ok(written) => Ok(written.data),
            Err(RaftError::APIError(ClientWriteError::ForwardToLeader(_))) => {
                Err(unavailable("there is no Raft leader"))
            }
            Err(RaftError::APIError(
                error @ (ClientWriteError::ChangeMembershipError(_) | ClientWriteError::PreconditionFailed(_)),
            )) => Err(unavailable(error)),
            // It was appended, and another leader's log went over it, or a snapshot that may hold it.
            Err(RaftError::APIError(error @ ClientWriteError::LogEntryDiscarded(_))) => Err(Error::OutcomeUnknown {
                operation: "a write",
                source: error.into(),
            }),
            Err(RaftError::Fatal(fatal)) => Err(Error::OutcomeUnknown {
                operation: "a write",
                source: fatal.into(),
            }),
        }
    }

    async fn keep_alive(&self, session: SessionId) -> Result<()> {
        let known = || match self.store.read(|inner| inner.state.sessions.contains_key(&session.0)) {
            true => Ok(()),
            false => Err(Error::SessionExpired { session }),
        };
        // Only a leader that still leads may promise a TTL: a deposed one's successor counts already.
        self.barrier().await?;
        known()?;
        self.expiry.extend(session, Instant::now())?;
        known()
    }

    pub(crate) async fn watch(
        &self,
        namespace: &Namespace,
        request: WatchRequest,
        patience: Duration,
    ) -> Result<Watch> {
        match tokio::time::timeout(patience, self.barrier()).await {
            Ok(fresh) => fresh?,
            Err(elapsed) => return Err(unavailable(elapsed)),
        }
        self.store.watch(Target {
            namespace: namespace.clone(),
            request,
            after: 0,
        })
    }

    fn status(&self) -> proto::StatusAnswer {
        let (leader, term, applied) = {
            let metrics = self.raft.metrics();
            let metrics = metrics.borrow_watched();
            (
                metrics.current_leader,
                metrics.current_term,
                metrics.last_applied.map_or(0, |applied| applied.index),
            )
        };
        self.store.read(|inner| {
            let member = |(id, peer): (&u64, &Peer)| proto::MemberStatus {
                id: *id,
                name: peer.name.clone(),
                address: peer.address.clone(),
                role: if leader == Some(*id) { "leader" } else { "follower" }.into(),
                matched: applied,
            };
            proto::StatusAnswer {
                members: inner.membership.nodes().map(member).collect(),
                keys: inner.state.tree.len() as u64,
                sessions: inner.state.sessions.len() as u64,
                revision: inner.state.revision,
                compacted: inner.history.compacted(),
                log_bytes: self.log.log().bytes(),
                snapshot_bytes: self.snapshots.bytes(),
                term,
                applied,
                watches: self.store.watches() as u64,
                answered_by: self.id,
            }
        })
    }

    /// The term this member leads in, if it does.
    fn leads(&self) -> Option<u64> {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        (metrics.current_leader == Some(self.id) && metrics.state.is_leader()).then_some(metrics.current_term)
    }

    /// Expires sessions as long as this member leads.
    async fn keep_time(self, mut stopping: watch::Receiver<bool>) {
        let mut tick = tokio::time::interval(expiry::TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                // An error says that the member is gone.
                _ = stopping.changed() => return,
            }
            let Some(term) = self.leads() else {
                self.expiry.rest();
                continue;
            };
            let sessions = self.store.read(|inner| {
                let ttls = inner
                    .state
                    .sessions
                    .iter()
                    .map(|(id, session)| (*id, Duration::from_millis(session.ttl_ms)));
                ttls.collect::<Vec<_>>()
            });
            let due = self.expiry.due(term, Instant::now(), sessions.into_iter());
            for sessions in due.chunks(expiry::BATCH) {
                tokio::spawn(self.clone().expire(sessions.to_vec(), term));
            }
        }
    }

    async fn expire(self, sessions: Vec<u64>, term: u64) {
        tracing::info!(count = sessions.len(), "sessions have expired");
        let expire = Change::Expire(proto::ExpireSessions {
            sessions: sessions.clone(),
            term,
        });
        if let Err(error) = self.propose(Command::new(expire)).await {
            tracing::warn!(%error, "sessions could not be expired, trying again");
        }
        self.expiry.settled(&sessions);
    }

    /// Takes a snapshot when the log has grown.
    async fn keep_house(self, snapshot_log_bytes: u64, mut stopping: watch::Receiver<bool>) {
        let mut tick = tokio::time::interval(HOUSEKEEPING);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                // An error says that the member is gone.
                _ = stopping.changed() => return,
            }
            // As much log again as the snapshot is large: what is written for snapshots is bounded by what is logged.
            let enough = snapshot_log_bytes.max(self.snapshots.bytes());
            if self.log.log().bytes() > enough
                && !self.snapshots.is_writing()
                && let Err(error) = self.raft.trigger().snapshot().await
            {
                tracing::warn!(%error, "no snapshot could be taken");
            }
        }
    }
}

#[async_trait::async_trait]
impl Link for Core {
    async fn call(&self, call: Call, patience: Duration) -> Result<Answer> {
        self.serve(call, patience).await
    }

    async fn watch(&self, namespace: &Namespace, request: WatchRequest, patience: Duration) -> Result<Watch> {
        Core::watch(self, namespace, request, patience).await
    }

    fn endpoint(&self) -> String {
        "this process".into()
    }

    fn apart(&self) -> Arc<dyn Link> {
        Arc::new(self.clone())
    }
}

fn unavailable(cause: impl Into<BoxError>) -> Error {
    Error::Unavailable {
        backend: BACKEND,
        source: cause.into(),
    }
}
