//! A member: the process that stores, and answers for the group.

#[cfg(test)]
mod alone;
mod answering;
mod awake;
#[cfg(test)]
mod differing;
mod failing;
#[cfg(test)]
mod foreign;
#[cfg(test)]
mod founders;
#[cfg(test)]
mod joiner;
mod keeping;
#[cfg(test)]
mod late;
#[cfg(test)]
mod leading;
mod opening;
mod reaching;
#[cfg(test)]
mod starting;
#[cfg(test)]
mod stopping;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use openraft::Raft;
use openraft::async_runtime::WatchReceiver;
use parking_lot::Mutex;
use registry_api::{BoxError, Error, Namespace, Options, Registry, Result, Watch, WatchRequest};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{Semaphore, oneshot, watch};

use crate::backend::RaftRegistry;
use crate::config::{RaftConfig, Timers};
use crate::directory::Directory;
use crate::expiry::Expiry;
use crate::leader::Readers;
use crate::link::{BACKEND, Gone, Link};
use crate::log::Identity;
use crate::log_store::LogStore;
use crate::members::{self, MemberChange};
use crate::network::Network;
use crate::proto;
use crate::proto::request::Call;
use crate::proto::response::Answer;
use crate::snapshot::Snapshots;
use crate::standing::Standing;
use crate::state_machine::StateMachine;
use crate::status::Status;
use crate::store::Store;
use crate::types::{LogId, StoredMembership, TypeConfig};
use awake::Awake;
use opening::{in_span_of, start, workers};
pub(crate) use reaching::CutOff;

/// How long a member may take to read its data and to lead a group of one.
const START: Duration = Duration::from_secs(60);
/// How long a change of the members may take.
const CHANGE: Duration = Duration::from_secs(30);
/// How long a member that stops waits for what is under way.
const GRACE: Duration = Duration::from_secs(1);
/// How many bytes of changes may be in flight at once; more wait their turn.
const IN_FLIGHT: usize = 64 << 20;
/// How many bytes of entries about sessions' time: a keep-alive and an expiry do not wait behind changes.
const OF_SESSIONS: usize = 1 << 20;

/// A member of the group, in this process.
///
/// It runs on threads of its own, so that a stalled application keeps no other member or session waiting. Dropping it
/// stops it in the background; [`Member::stop`] says when that is done.
#[derive(Debug)]
pub struct Member {
    core: Core,
    name: String,
    ended: watch::Receiver<Option<String>>,
    leadership: watch::Receiver<Option<u64>>,
    address: Option<SocketAddr>,
    running: Option<Running>,
}

/// What a member is made of while it runs.
#[derive(Debug)]
struct Running {
    threads: Threads,
    stop: watch::Sender<bool>,
    server: Option<tokio::task::JoinHandle<()>>,
    directory: Option<Arc<Directory>>,
}

/// The member's threads. Dropped, as with a start that is given up, they end in the background.
#[derive(Debug)]
struct Threads(Option<Runtime>);

impl Threads {
    fn handle(&self) -> Result<&Runtime> {
        self.0.as_ref().ok_or_else(|| unavailable("the member has stopped"))
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

impl Member {
    /// Opens the data directory, or makes it, and starts.
    ///
    /// # Errors
    /// [`Error::Config`] for a bad setting; [`Error::Storage`] for a directory that is damaged, another member's, of a
    /// newer version, or in use by another process, and for an empty one under a name that the group knows: nothing is
    /// changed then. [`Error::Unavailable`] if the address can't be listened on.
    ///
    /// # Cancel safety
    /// Where a group is founded or joined it waits for the others, however long. Dropping the future gives the start up;
    /// what is on disk by then is gone on with by the next.
    pub async fn start(config: &RaftConfig) -> Result<Self> {
        config.check()?;
        if config.is_remote() {
            return Err(Error::Config {
                field: "registry.raft.endpoints".into(),
                reason: "a member has none".into(),
            });
        }
        let mut builder = Builder::new_multi_thread();
        builder
            .worker_threads(workers())
            .thread_name("registry-raft")
            .enable_all();
        in_span_of(&mut builder, config.member_name());
        let threads = Threads(Some(builder.build().map_err(unavailable)?));
        let (config, name) = (config.clone(), config.member_name().to_owned());
        // Opening reads files and waits for disks: that is for the member's own threads.
        let starting = threads.handle()?.spawn(async move { start(&config).await });
        let started = starting.await.map_err(unavailable)??;
        Ok(Self {
            core: started.core,
            name,
            ended: started.ended,
            leadership: started.leadership,
            address: started.address,
            running: Some(Running {
                threads,
                stop: started.stop,
                server: started.server,
                directory: started.directory,
            }),
        })
    }

    /// Its name in the group.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Waits until the member has ended by itself, and tells why: the group has removed it, or its log failed. It answers
    /// nobody any more, and is still to be stopped.
    ///
    /// # Cancel safety
    /// Dropping the future changes nothing.
    pub async fn ended(&self) -> String {
        let mut ended = self.ended.clone();
        match ended.wait_for(Option::is_some).await {
            Ok(reason) => reason.clone().unwrap_or_default(),
            // Nobody can tell any more: it was stopped.
            Err(_) => std::future::pending().await,
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
        Ok(Arc::new(RaftRegistry::open(self.link(), options).await?))
    }

    /// The way to it within this process.
    pub(crate) fn link(&self) -> Arc<dyn Link> {
        Arc::new(self.core.clone())
    }

    #[cfg(test)]
    pub(crate) fn core(&self) -> Core {
        self.core.clone()
    }

    /// A handle that owns this member, which stops when the handle is closed or dropped.
    pub(crate) async fn into_handle(self, options: &Options) -> Result<Arc<dyn Registry>> {
        let handle = RaftRegistry::open(self.link(), options).await?;
        Ok(Arc::new(handle.owning(self)))
    }

    /// How it stands.
    pub fn status(&self) -> Status {
        self.core.status().into()
    }

    /// Tells how it stands as long as it runs, and how it stood last from then on.
    pub fn observer(&self) -> impl Fn() -> Status + Send + Sync + use<> {
        let core = self.core.clone();
        move || core.status().into()
    }

    /// Whether this member is the group's Raft leader: the term it leads in, or `None`.
    ///
    /// It becomes `None` before another member can lead, by this machine's clock, also when nobody can be reached. A
    /// later leader's term is larger: it is a fencing token. A term that this member had before may come back as `Some`
    /// once it is sure again.
    pub fn leadership(&self) -> watch::Receiver<Option<u64>> {
        self.leadership.clone()
    }

    /// As [`Member::leadership`] tells, found out at this moment: a process that stood still does not find itself leading
    /// by what it was told before.
    pub fn leads(&self) -> Option<u64> {
        self.core.leads_surely()
    }

    /// Changes the members of the group, by whichever of them leads. What is so already is no error.
    ///
    /// # Errors
    /// As [`crate::change_members`].
    ///
    /// # Cancel safety
    /// Once begun, the change may be carried out; asking again tells.
    pub async fn change_members(&self, change: MemberChange) -> Result<()> {
        members::ask(&self.core, change, CHANGE).await
    }

    /// Takes a snapshot now and drops the log that it covers, as the member does by itself when the log has grown.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the member has stopped.
    pub async fn snapshot(&self) -> Result<()> {
        self.core.raft.trigger().snapshot().await.map_err(unavailable)
    }

    /// Writes a backup to a file, as [`crate::backup`] does from elsewhere.
    ///
    /// # Errors
    /// As [`crate::backup`].
    pub async fn backup(&self, file: &std::path::Path) -> Result<crate::Backup> {
        let core = self.core.clone();
        let threads = self
            .running
            .as_ref()
            .ok_or_else(|| unavailable("the member has stopped"))?;
        let parts = threads.threads.handle()?.spawn(async move { core.backup().await });
        crate::backup::save(parts.await.map_err(unavailable)??, file, START, |_, _| {}).await
    }

    /// Stops: another member leads first, no request is taken any more, those under way end, the log is flushed and the
    /// directory free.
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
    fn stop(mut self, core: &Core) -> Result<()> {
        self.threads.handle()?.block_on(async {
            core.hand_over().await;
            core.settle().await;
        });
        self.stop.send_replace(true);
        core.store.end_watches();
        // Another process may acknowledge what this one never hears of.
        core.standing().close();
        let closed = self.threads.handle()?.block_on(async {
            if let Some(server) = self.server {
                let grace = tokio::time::timeout(GRACE, server).await;
                tracing::debug!(in_time = grace.is_ok(), "the server has stopped");
            }
            // Ends the member's tasks; an error says that they had ended already.
            let _ = core.raft.shutdown().await;
            core.log.log().close()
        });
        if let Some(runtime) = self.threads.0.take() {
            runtime.shutdown_timeout(Duration::from_secs(1));
        }
        // Only now may another process open it.
        drop(self.directory);
        closed
    }
}

/// What answers requests: shared by the server and by the handles of this process.
#[derive(Clone)]
pub(crate) struct Core {
    identity: Identity,
    raft: Raft<TypeConfig, StateMachine>,
    store: Store,
    log: LogStore,
    snapshots: Arc<Snapshots>,
    network: Network,
    readers: Readers,
    expiry: Arc<Expiry>,
    in_flight: Arc<Semaphore>,
    of_sessions: Arc<Semaphore>,
    backups: Arc<Semaphore>,
    timers: Timers,
    lease_reads: bool,
    /// Until when it elects nobody.
    elects_from: Instant,
    /// Which Raft leader was heard last, and when.
    heard: Arc<Mutex<Option<(u64, Instant)>>>,
    /// Who answered when this member last asked whether it leads.
    answered: Arc<Mutex<BTreeSet<u64>>>,
    awake: Arc<Awake>,
    /// Why the member can't go on.
    failed: watch::Sender<Option<String>>,
    /// Whether this member is cut off from its group, as its last check says.
    cut_off: watch::Sender<bool>,
}

impl std::fmt::Debug for Core {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Core")
            .field("identity", &self.identity)
            .finish_non_exhaustive()
    }
}

impl Core {
    pub(crate) fn identity(&self) -> Identity {
        self.identity
    }

    pub(crate) fn raft(&self) -> &Raft<TypeConfig, StateMachine> {
        &self.raft
    }

    pub(crate) fn store(&self) -> &Store {
        &self.store
    }

    pub(crate) fn standing(&self) -> &Standing {
        self.log.standing()
    }

    /// The last entry of this member's log.
    pub(crate) fn last(&self) -> Option<LogId> {
        self.log.last()
    }

    /// The term that this member has promised itself to.
    pub(crate) fn promised(&self) -> u64 {
        self.log.promised()
    }

    pub(crate) fn answered(&self) -> &Mutex<BTreeSet<u64>> {
        &self.answered
    }

    pub(crate) fn snapshots(&self) -> &Arc<Snapshots> {
        &self.snapshots
    }

    pub(crate) fn network(&self) -> &Network {
        &self.network
    }

    pub(crate) fn backups(&self) -> &Arc<Semaphore> {
        &self.backups
    }

    pub(crate) fn timers(&self) -> Timers {
        self.timers
    }

    pub(crate) fn lease_reads(&self) -> bool {
        self.lease_reads
    }

    pub(crate) fn heard(&self) -> &Mutex<Option<(u64, Instant)>> {
        &self.heard
    }

    pub(crate) fn readers(&self) -> &Readers {
        &self.readers
    }

    /// Refuses a vote as long as this member may have promised its silence to a leader before it was started again.
    pub(crate) fn may_elect(&self) -> std::result::Result<(), tonic::Status> {
        match Instant::now() < self.elects_from {
            true => Err(tonic::Status::unavailable("the member has started a moment ago")),
            false => Ok(()),
        }
    }

    /// The term this member leads in, if it does, as far as the Raft task has told.
    pub(crate) fn leads(&self) -> Option<u64> {
        self.leads_with().map(|(term, _)| term)
    }

    /// The term this member leads in, and the membership that its Raft task goes by.
    pub(crate) fn leads_with(&self) -> Option<(u64, Arc<StoredMembership>)> {
        // What is told before the rest: who waits for this alone must not find it as it was.
        let metrics = self.raft.server_metrics();
        let metrics = metrics.borrow_watched();
        let leads = metrics.current_leader == Some(self.identity.member) && metrics.state.is_leader();
        leads.then(|| (metrics.vote.leader_id().term, metrics.membership_config.clone()))
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

    async fn once_gone(&self, gone: Gone, patience: Duration) -> Result<Option<proto::Page>> {
        Core::once_gone(self, gone, patience).await
    }

    fn endpoint(&self) -> String {
        "this process".into()
    }

    fn cluster(&self) -> Option<[u8; 16]> {
        Some(self.identity.cluster)
    }

    fn apart(&self) -> Arc<dyn Link> {
        Arc::new(self.clone())
    }
}

pub(crate) fn unavailable(cause: impl Into<BoxError>) -> Error {
    Error::Unavailable {
        backend: BACKEND,
        source: cause.into(),
    }
}
