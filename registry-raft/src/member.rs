//! A member: the process that stores, and answers for the group.

#[cfg(test)]
mod alone;
#[cfg(test)]
mod differing;
#[cfg(test)]
mod foreign;
#[cfg(test)]
mod late;
#[cfg(test)]
mod starting;
#[cfg(test)]
mod stopping;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use openraft::async_runtime::WatchReceiver;
use openraft::error::{ClientWriteError, InitializeError, RaftError};
use openraft::{Membership, Raft, SnapshotPolicy};
use parking_lot::Mutex;
use registry_api::{BoxError, Error, Namespace, Options, Registry, Result, SessionId, Watch, WatchRequest};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{Semaphore, oneshot, watch};
use tonic::service::Routes;

use crate::alone::Alone;
use crate::backend::RaftRegistry;
use crate::command::{Change, Command, Outcome, Reply};
use crate::config::{RaftConfig, Timers};
use crate::directory::Directory;
use crate::expiry::{self, Expiry, Known};
use crate::founding::Door;
use crate::leader::{self, Leader, Readers};
use crate::link::{BACKEND, Link};
use crate::log::Identity;
use crate::log_store::LogStore;
use crate::members::{self, MemberChange};
use crate::network::Network;
use crate::peer_service::PeerService;
use crate::proto;
use crate::proto::registry::peer::v1::peers_server::PeersServer;
use crate::proto::registry_server::RegistryServer;
use crate::proto::request::Call;
use crate::proto::response::Answer;
use crate::service::Service;
use crate::snapshot::Snapshots;
use crate::state_machine::StateMachine;
use crate::status::Status;
use crate::store::Store;
use crate::transport::{MAX_MESSAGE, Transport};
use crate::types::{Peer, TypeConfig};
use crate::watchers::Target;

/// How long a member may take to read its data and to lead a group of one.
const START: Duration = Duration::from_secs(60);
/// How long one of many waits at its start for a Raft leader.
const QUORUM: Duration = Duration::from_secs(10);
/// How long a change of the members may take.
const CHANGE: Duration = Duration::from_secs(30);
/// How long the Raft leader may take to say how the members stand.
const STATUS: Duration = Duration::from_millis(500);
/// For how long who leads is asked again that does not do what it is asked, and the pause before it.
const SUCCESSION: Duration = Duration::from_millis(100);
const PAUSE: Duration = Duration::from_millis(4);
/// How many bytes of log that a snapshot covers are kept for members that lag behind.
const KEPT: u64 = 32 << 20;
/// How long a member that stops waits for what is under way.
const GRACE: Duration = Duration::from_secs(1);
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
        core.alone().note(None);
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

/// How many threads a member works with: a few of the processors' share, for a program that has its own work. On the smallest
/// machines that is one: what one thread hands to another waits for that to wake.
fn workers() -> usize {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    (processors / 2).clamp(1, 4)
}

/// What happens on the member's threads is told with its name: they do nothing else.
fn in_span_of(builder: &mut Builder, name: &str) {
    thread_local! {
        static SPAN: RefCell<Option<tracing::span::EnteredSpan>> = const { RefCell::new(None) };
    }
    // Of the highest level, so that no filter leaves it out of what it lets through.
    let span = tracing::error_span!("member", name);
    builder.on_thread_start(move || SPAN.set(Some(span.clone().entered())));
    builder.on_thread_stop(|| drop(SPAN.take()));
}

struct Started {
    core: Core,
    address: Option<SocketAddr>,
    ended: watch::Receiver<Option<String>>,
    leadership: watch::Receiver<Option<u64>>,
    stop: watch::Sender<bool>,
    server: Option<tokio::task::JoinHandle<()>>,
    directory: Option<Arc<Directory>>,
}

async fn start(config: &RaftConfig) -> Result<Started> {
    let transport = Transport::new(config)?;
    let alone = config.cluster.is_empty() && config.join.is_empty();
    let first = if alone { Identity::random } else { Identity::of_no_group };
    let directory = config
        .directory()
        .map(|path| Directory::open(path, config.member_name(), first).map(Arc::new))
        .transpose()?;
    let listener = match config.directory() {
        Some(_) => Some(transport.listen("listen", config.address()?).await?),
        None => None,
    };
    let address = listener
        .as_ref()
        .map(|listener| listener.local_addr().map_err(unavailable))
        .transpose()?;
    let mut identity = directory.as_ref().map_or_else(first, |directory| directory.identity());
    let door = Door::new(
        identity.member,
        config.member_name(),
        &config.cluster,
        transport.clone(),
    );
    let (stop, stopping) = watch::channel(false);
    // The others greet it, and vote, before it can answer anybody else.
    let server = listener.map(|listener| {
        let serving = serve(door.clone(), transport.clone(), listener, stopping.clone());
        tokio::spawn(serving)
    });
    if let Some(directory) = directory.as_ref().filter(|_| !identity.has_group()) {
        let group = match config.join.is_empty() {
            true => door.found().await?,
            false => door.group_at(&config.join).await?,
        };
        directory.belongs_to(group.cluster)?;
        identity = directory.identity();
    }
    let log = match &directory {
        Some(directory) => LogStore::open(
            &directory.log(),
            identity,
            crate::log::Options::default(),
            crate::log::abort(),
        )?,
        None => LogStore::in_memory(identity.member),
    };
    let snapshots = Arc::new(Snapshots::open(
        directory.as_ref().map(|directory| directory.snapshots()),
        identity,
    )?);
    let store = Store::default();
    let machine = StateMachine::open(store.clone(), snapshots.clone())?;
    let network = Network::new(identity, transport);
    let raft_config = raft_config(config)?;
    let raft = Raft::new(
        identity.member,
        raft_config.into(),
        network.clone(),
        log.clone(),
        machine,
    )
    .await
    .map_err(unavailable)?;
    let (membership, term) = recovered(&raft).await?;
    // Nobody else reaches the log yet.
    log.alone().note(Some(&membership));
    let elects_from = elects_from(&membership, term, identity.member, config.timers);
    let (readers, waiting) = leader::readers();
    let core = Core {
        identity,
        raft,
        store,
        log,
        snapshots,
        network,
        readers,
        expiry: Arc::default(),
        in_flight: Arc::new(Semaphore::new(IN_FLIGHT)),
        backups: Arc::new(Semaphore::new(1)),
        timers: config.timers,
        lease_reads: config.lease_reads,
        elects_from,
        handing_over: watch::channel(false).0,
        heard: Arc::default(),
    };
    tokio::spawn(core.clone().serve_readers(waiting));
    match core.may_elect() {
        Ok(()) => core.raft.runtime_config().elect(true),
        Err(_) => drop(tokio::spawn(core.clone().elect_later(stopping.clone()))),
    }
    door.open(core.clone());
    core.begin(config, &door, address).await?;
    core.compare_list(&config.cluster);
    if let Some(directory) = &directory {
        directory.founded()?;
    }
    tokio::spawn(core.clone().keep_time(stopping.clone()));
    let (end, ended) = watch::channel(None);
    tokio::spawn(core.clone().keep_house(config.snapshot_log_bytes(), stopping.clone()));
    let (lead, leadership) = watch::channel(None);
    tokio::spawn(core.clone().keep_leadership(lead, stopping.clone()));
    tokio::spawn(core.clone().keep_company(door, directory.clone(), end, stopping));
    Ok(Started {
        core,
        address,
        ended,
        leadership,
        stop,
        server,
        directory,
    })
}

fn raft_config(config: &RaftConfig) -> Result<openraft::Config> {
    let (heartbeat, least, most) = config.timers.millis();
    let raft_config = openraft::Config {
        cluster_name: "registry".into(),
        heartbeat_interval: heartbeat,
        election_timeout_min: least,
        election_timeout_max: most,
        snapshot_policy: SnapshotPolicy::Never,
        // The log is purged by its bytes, which openraft does not count.
        max_in_snapshot_log_to_keep: u64::MAX,
        // A state machine in memory must not be led before it has caught up.
        enable_leader_restore: Some(false),
        enable_pre_vote: Some(true),
        // It elects from when it may.
        enable_elect: false,
        // A Raft leader that a majority does not hear must not keep the others from electing another.
        quorum_loss_probe_interval: Some(2 * most),
        broadcast_submitted_on_append: Some(true),
        ..openraft::Config::default()
    };
    raft_config.validate().map_err(|e| Error::Config {
        field: "registry.raft".into(),
        reason: e.to_string(),
    })
}

/// What is in the log: the membership and the term. Metrics say neither before openraft's own task has run.
async fn recovered(raft: &Raft<TypeConfig, StateMachine>) -> Result<(Membership<u64, Peer>, u64)> {
    let recovered = raft.with_raft_state(|state| {
        let membership = state.membership_state.effective().membership().clone();
        (membership, state.vote_ref().leader_id().term)
    });
    recovered.await.map_err(unavailable)
}

/// From when on a member that starts may elect. It has forgotten when it last heard a Raft leader, who counts on its silence:
/// it is taken to have heard one just now. Who has never heard any, or has no others, need not wait.
fn elects_from(membership: &Membership<u64, Peer>, term: u64, member: u64, timers: Timers) -> Instant {
    let others = membership.voter_ids().any(|voter| voter != member);
    let heard_one = term > 0 && others;
    Instant::now() + Duration::from_millis(if heard_one { timers.millis().2 } else { 0 })
}

async fn serve(
    door: Door,
    transport: Transport,
    listener: tokio::net::TcpListener,
    mut stopping: watch::Receiver<bool>,
) {
    let peers = PeersServer::new(PeerService { door: door.clone() })
        .max_decoding_message_size(MAX_MESSAGE)
        .max_encoding_message_size(MAX_MESSAGE);
    let service = Service {
        door,
        stopping: stopping.clone(),
    };
    let service = RegistryServer::new(service)
        .max_decoding_message_size(MAX_MESSAGE)
        .max_encoding_message_size(MAX_MESSAGE);
    let stop = async move {
        // An error says that the member is gone.
        let _ = stopping.wait_for(|stop| *stop).await;
    };
    let routes = Routes::new(service).add_service(peers);
    transport.serve(listener, routes, stop).await;
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
    backups: Arc<Semaphore>,
    timers: Timers,
    lease_reads: bool,
    /// Until when it elects nobody.
    elects_from: Instant,
    /// Whether another is about to lead.
    handing_over: watch::Sender<bool>,
    /// Which Raft leader was heard last, and when.
    heard: Arc<Mutex<Option<(u64, Instant)>>>,
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

    pub(crate) fn alone(&self) -> &Alone {
        self.log.alone()
    }

    pub(crate) fn snapshots(&self) -> &Snapshots {
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

    pub(crate) fn handing_over(&self) -> &watch::Sender<bool> {
        &self.handing_over
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

    /// Lets it elect from then on; members that were started at once, one after the other.
    async fn elect_later(self, mut stopping: watch::Receiver<bool>) {
        let (_, least, most) = self.timers.millis();
        let drawn = uuid::Uuid::new_v4().as_u64_pair().0 % (most - least);
        let from = self.elects_from + Duration::from_millis(drawn);
        tokio::select! {
            () = tokio::time::sleep_until(from.into()) => self.raft.runtime_config().elect(true),
            // An error says that the member is gone.
            _ = stopping.wait_for(|stop| *stop) => {}
        }
    }

    /// Makes the group if it is not made yet, or is taken in, and waits until this member holds all that was
    /// acknowledged. Where there is no quorum, it goes on after a while: what needs none is served.
    async fn begin(&self, config: &RaftConfig, door: &Door, address: Option<SocketAddr>) -> Result<()> {
        let advertised = address.map_or_else(String::new, |address| config.advertised(address));
        let peer = Peer {
            name: config.member_name().into(),
            address: advertised,
        };
        if !self.raft.is_initialized().await.map_err(unavailable)? {
            match (config.cluster.is_empty(), config.join.is_empty()) {
                (true, true) => {
                    let members = BTreeMap::from([(self.identity.member, peer)]);
                    self.raft.initialize(members).await.map_err(unavailable)?;
                }
                (false, _) => self.found(door).await?,
                (true, false) => self.join(&config.join, &peer).await?,
            }
        }
        let metrics = self.raft.metrics().borrow_watched().clone();
        let voters = metrics.membership_config.membership().voter_ids().collect::<Vec<_>>();
        let alone = voters == [self.identity.member];
        // One alone need not wait for the silence of a leader that it would hear, and of many one goes first.
        if alone || (metrics.current_term == 0 && voters.first() == Some(&self.identity.member)) {
            self.raft.trigger().elect(false).await.map_err(unavailable)?;
        }
        let patience = if alone { START } else { QUORUM };
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match tokio::time::timeout(left, self.barrier()).await {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(_)) => tokio::time::sleep(Duration::from_millis(5)).await,
                Err(_) if alone => return Err(unavailable("it does not come to lead itself")),
                Err(_) => {
                    tracing::warn!("there is no Raft leader yet: only stale reads are answered");
                    return Ok(());
                }
            }
        }
    }

    /// Founds the group that the whole list knows of.
    async fn found(&self, door: &Door) -> Result<()> {
        let group = door.found().await?;
        if group.cluster != self.identity.cluster {
            return Err(Error::Config {
                field: "registry.raft.cluster".into(),
                reason: "the group that the others found is another one; one of them has lost its data".into(),
            });
        }
        match self.raft.initialize(group.members).await {
            // Another that founds the same group has come first, and leads or was voted for.
            Ok(()) | Err(RaftError::APIError(InitializeError::NotAllowed(_))) => Ok(()),
            Err(error) => Err(unavailable(error)),
        }
    }

    /// Answers a call within `patience`, here or by the Raft leader.
    pub(crate) async fn serve(&self, call: Call, patience: Duration) -> Result<Answer> {
        let write = matches!(call, Call::Command(_) | Call::Members(_));
        self.within(patience, write, self.answer(call, Instant::now() + patience))
            .await
    }

    /// Answers a call that another member has passed on: it goes no further.
    pub(crate) async fn serve_here(&self, call: Call, patience: Duration) -> Result<Answer> {
        let write = matches!(call, Call::Command(_) | Call::Members(_));
        self.within(patience, write, self.answer_here(call)).await
    }

    /// The answer, if it comes in time; if not, why it did not, as far as that is known here.
    async fn within(
        &self,
        patience: Duration,
        write: bool,
        answer: impl Future<Output = Result<Answer>>,
    ) -> Result<Answer> {
        if let Ok(answer) = tokio::time::timeout(patience, answer).await {
            return answer;
        }
        let source = match self.present_leader() {
            Some(_) => format!("not done within {patience:?}"),
            None => "the member hears no Raft leader that has a majority".to_owned(),
        };
        Err(match write {
            true => Error::OutcomeUnknown {
                operation: "a write",
                source: source.into(),
            },
            false => unavailable(source),
        })
    }

    async fn answer(&self, call: Call, until: Instant) -> Result<Answer> {
        match call {
            Call::Command(_) | Call::KeepAlive(_) | Call::Members(_) => self.answer_by_leader(call, until).await,
            Call::Status(_) => {
                let left = until.saturating_duration_since(Instant::now());
                Ok(Answer::Status(self.status_of_all(left).await))
            }
            _ => self.answer_here(call).await,
        }
    }

    /// Has it done by whoever leads. One that is about to be followed by another refuses what it is asked, and so does one
    /// that no majority has heard yet: whoever leads in a moment is asked again.
    async fn answer_by_leader(&self, call: Call, until: Instant) -> Result<Answer> {
        let patience = Instant::now() + SUCCESSION;
        loop {
            let leader = self.leader().await?;
            let done = match leader {
                Leader::This => self.answer_here(call.clone()).await,
                Leader::Other(..) => {
                    let left = until.saturating_duration_since(Instant::now());
                    self.forward(&leader, call.clone(), left).await
                }
            };
            let nothing_done = matches!(done, Err(Error::Unavailable { .. }));
            if !nothing_done || Instant::now() > patience {
                return done;
            }
            // Another may lead sooner.
            let _ = tokio::time::timeout(PAUSE, self.deposed(&leader)).await;
        }
    }

    /// How it stands, with what the Raft leader knows of each member and how far each has applied the log, as far as they
    /// answer soon.
    async fn status_of_all(&self, patience: Duration) -> proto::StatusAnswer {
        let mut status = self.status();
        let patience = patience.min(STATUS);
        let (_, membership) = self.membership();
        let others = membership.nodes().filter(|(id, _)| **id != self.identity.member);
        let asking = others.map(|(id, peer)| async move {
            let call = Call::Status(proto::StatusRequest {});
            let asked = self.ask(*id, peer, call, patience, std::future::pending());
            match tokio::time::timeout(patience, asked).await {
                Ok(Ok(Answer::Status(status))) => Some(status),
                _ => None,
            }
        });
        let answered: Vec<_> = join_all(asking).await.into_iter().flatten().collect();
        let of = |id| answered.iter().find(|answer| answer.answered_by == id);
        if let Some(Leader::Other(leader, _)) = self.known_leader()
            && let Some(leader) = of(leader)
        {
            status.members.clone_from(&leader.members);
        }
        for member in &mut status.members {
            member.applied = match member.id == status.answered_by {
                true => Some(status.applied),
                false => of(member.id).map(|answer| answer.applied),
            };
        }
        status
    }

    async fn answer_here(&self, call: Call) -> Result<Answer> {
        Ok(match call {
            Call::Get(get) => {
                self.fresh(get.stale, get.at_least).await?;
                Answer::Get(self.store.get(&get.key))
            }
            Call::List(list) => {
                self.fresh(list.stale, list.at_least).await?;
                Answer::Page(self.store.list(&list))
            }
            Call::Children(children) => {
                self.fresh(children.stale, children.at_least).await?;
                Answer::Children(self.store.children(&children.prefix, &children.from))
            }
            Call::Count(count) => {
                self.fresh(count.stale, count.at_least).await?;
                Answer::Count(self.store.count(&count.prefix))
            }
            Call::Command(command) => Answer::Reply(self.propose(command).await?),
            Call::KeepAlive(keep_alive) => {
                self.keep_alive(SessionId(keep_alive.session)).await?;
                Answer::Done(proto::Unit {})
            }
            Call::Members(change) => {
                self.change_members(change).await?;
                Answer::Done(proto::Unit {})
            }
            Call::Status(_) => Answer::Status(self.status()),
            Call::Digest(digest) => self.digest(digest.index).await?,
        })
    }

    /// Waits until the local state holds all that was acknowledged or, for a reader who does not care, what it has seen.
    async fn fresh(&self, stale: bool, at_least: u64) -> Result<()> {
        if !stale {
            return self.up_to_date().await;
        }
        let mut applied = self.raft.data_metrics();
        while self.store.read(|inner| inner.state.revision) < at_least {
            applied.changed().await.map_err(unavailable)?;
        }
        Ok(())
    }

    /// Where the Raft leader answers, if it is another member; empty otherwise.
    pub(crate) fn leader_elsewhere(&self) -> String {
        match self.known_leader() {
            Some(Leader::Other(_, peer)) => peer.address,
            Some(Leader::This) | None => String::new(),
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

    /// Waits until what this member has proposed is answered. What it could not commit itself before it handed over, the
    /// next Raft leader does, who must reach it for that.
    async fn settle(&self) {
        let all = u32::try_from(IN_FLIGHT).unwrap_or(u32::MAX);
        // Whoever comes later goes on with what is let go of here.
        let settled = tokio::time::timeout(GRACE, self.in_flight.acquire_many(all)).await;
        tracing::debug!(in_time = settled.is_ok(), "what was proposed is answered");
    }

    async fn keep_alive(&self, session: SessionId) -> Result<()> {
        let known = || match self.store.read(|inner| inner.state.sessions.contains_key(&session.0)) {
            true => Ok(()),
            false => Err(Error::SessionExpired { session }),
        };
        // Only a leader that still leads may promise a TTL: a deposed one's successor counts already.
        self.barrier().await?;
        known()?;
        // Counted anew first, so that nothing older is noted after what follows.
        let noted = self.expiry.extend(session, Instant::now())?;
        let silent = self.store.read(|inner| {
            let known = inner.state.sessions.get(&session.0);
            known.is_some_and(|known| known.silent_ms > 0)
        });
        if noted || silent {
            // In the log before it is promised: another leader would grant it less.
            let heard = self.propose(Command::new(Change::Heard(session.0))).await?;
            if let Some(Outcome::SessionExpired(_)) = heard.result {
                return Err(Error::SessionExpired { session });
            }
        }
        known()
    }

    pub(crate) async fn watch(
        &self,
        namespace: &Namespace,
        request: WatchRequest,
        patience: Duration,
    ) -> Result<Watch> {
        match tokio::time::timeout(patience, self.up_to_date()).await {
            Ok(fresh) => fresh?,
            Err(_) => return Err(unavailable("the member does not begin the watch in time")),
        }
        self.store.watch(Target {
            namespace: namespace.clone(),
            request,
            after: 0,
        })
    }

    fn status(&self) -> proto::StatusAnswer {
        let metrics = self.raft.metrics().borrow_watched().clone();
        let applied = metrics.last_applied.map_or(0, |applied| applied.index);
        let covered = metrics.snapshot.map(|snapshot| snapshot.index);
        let membership = metrics.membership_config.membership();
        let voters: Vec<_> = membership.voter_ids().collect();
        let leader = self.present_leader();
        let member = |(id, peer): (&u64, &Peer)| {
            let matched = match &metrics.replication {
                Some(_) if *id == self.identity.member => metrics.last_log_index,
                Some(replication) => replication.get(id).copied().flatten().map(|matched| matched.index),
                None => None,
            };
            let role = match (leader == Some(*id), voters.contains(id)) {
                (true, _) => "leader",
                (false, true) => "follower",
                (false, false) => "learner",
            };
            proto::MemberStatus {
                id: *id,
                name: peer.name.clone(),
                address: peer.address.clone(),
                role: role.into(),
                matched,
                lag: matched.map(|matched| metrics.last_log_index.unwrap_or(0).saturating_sub(matched)),
                applied: (*id == self.identity.member).then_some(applied),
            }
        };
        let mut members: Vec<_> = membership.nodes().map(member).collect();
        members.sort_by(|one, other| one.name.cmp(&other.name));
        self.store.read(|inner| proto::StatusAnswer {
            members,
            keys: inner.state.tree.len() as u64,
            sessions: inner.state.sessions.len() as u64,
            revision: inner.state.revision,
            compacted: inner.history.compacted(),
            log_bytes: self.log.log().bytes_after(covered),
            snapshot_bytes: self.snapshots.bytes(),
            term: metrics.current_term,
            applied,
            watches: self.store.watches() as u64,
            answered_by: self.identity.member,
        })
    }

    /// The term this member leads in, if it does.
    pub(crate) fn leads(&self) -> Option<u64> {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        (metrics.current_leader == Some(self.identity.member) && metrics.state.is_leader())
            .then_some(metrics.current_term)
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
                let known = inner.state.sessions.iter().map(|(id, session)| Known {
                    session: *id,
                    ttl: Duration::from_millis(session.ttl_ms),
                    silent: Duration::from_millis(session.silent_ms),
                    heard: session.heard,
                    keys: session.keys.len(),
                });
                known.collect::<Vec<_>>()
            });
            let due = self.expiry.due(term, Instant::now(), sessions.into_iter());
            for sessions in due.expired {
                tokio::spawn(self.clone().expire(sessions, term));
            }
            for silent in due.silent.chunks(expiry::BATCH) {
                tokio::spawn(self.clone().note_silences(silent.to_vec(), term));
            }
        }
    }

    async fn note_silences(self, silent: Vec<(Known, Duration)>, term: u64) {
        let silences = silent.iter().map(|(known, silent)| proto::Silence {
            session: known.session,
            silent_ms: u64::try_from(silent.as_millis()).unwrap_or(u64::MAX),
            heard: known.heard,
        });
        let silences = Change::Silences(proto::Silences {
            term,
            silences: silences.collect(),
        });
        let turn = self.expiry.turn().await;
        let noted = self.propose(Command::new(silences)).await;
        drop(turn);
        if let Err(error) = noted {
            tracing::debug!(%error, "the next Raft leader will not know that sessions are silent");
        }
    }

    async fn expire(self, sessions: Vec<u64>, term: u64) {
        let expire = Change::Expire(proto::ExpireSessions {
            sessions: sessions.clone(),
            term,
        });
        let turn = self.expiry.turn().await;
        let expired = self.propose(Command::new(expire)).await;
        drop(turn);
        match expired {
            Ok(_) => tracing::info!(count = sessions.len(), "sessions have expired"),
            // Without a majority it is so ten times a second.
            Err(error) => tracing::debug!(%error, "sessions could not be expired, trying again"),
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
            let (covered, alone) = {
                let metrics = self.raft.metrics();
                let metrics = metrics.borrow_watched();
                let covered = metrics.snapshot.map(|snapshot| snapshot.index);
                (covered, metrics.membership_config.membership().nodes().count() <= 1)
            };
            self.purge(covered, if alone { 0 } else { KEPT.min(snapshot_log_bytes / 2) })
                .await;
            if self.log.log().bytes_after(covered) > enough
                && !self.snapshots.is_writing()
                && let Err(error) = self.raft.trigger().snapshot().await
            {
                tracing::warn!(%error, "no snapshot could be taken");
            }
        }
    }

    /// Drops the log that a snapshot covers, but for the newest bytes.
    async fn purge(&self, covered: Option<u64>, keep: u64) {
        let point = covered.and_then(|covered| self.log.log().purge_point(covered, keep));
        if let Some(point) = point
            && let Err(error) = self.raft.trigger().purge_log(point).await
        {
            tracing::warn!(%error, "the log could not be purged");
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

pub(crate) fn unavailable(cause: impl Into<BoxError>) -> Error {
    Error::Unavailable {
        backend: BACKEND,
        source: cause.into(),
    }
}
