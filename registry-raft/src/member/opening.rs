//! Opens what a member is made of, and sets it going.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use openraft::async_runtime::WatchReceiver;
use openraft::error::{InitializeError, RaftError};
use openraft::{Raft, SnapshotPolicy};
use registry_api::{Error, Result};
use tokio::runtime::Builder;
use tokio::sync::{Semaphore, watch};
use tonic::service::Routes;

use super::{Core, IN_FLIGHT, OF_SESSIONS, START, unavailable};
use crate::config::{RaftConfig, Timers};
use crate::directory::{Directory, storage};
use crate::founding::Door;
use crate::leader;
use crate::log::Identity;
use crate::log_store::LogStore;
use crate::network::Network;
use crate::peer_service::PeerService;
use crate::proto::registry::peer::v1::peers_server::PeersServer;
use crate::proto::registry_server::RegistryServer;
use crate::service::Service;
use crate::snapshot::Snapshots;
use crate::state_machine::StateMachine;
use crate::store::Store;
use crate::transport::{MAX_MESSAGE, Transport};
use crate::types::{Peer, StoredMembership, TypeConfig};

/// How long one of many waits at its start for a Raft leader.
const QUORUM: Duration = Duration::from_secs(10);

pub(super) struct Started {
    pub(super) core: Core,
    pub(super) address: Option<SocketAddr>,
    pub(super) ended: watch::Receiver<Option<String>>,
    pub(super) leadership: watch::Receiver<Option<u64>>,
    pub(super) stop: watch::Sender<bool>,
    pub(super) server: Option<tokio::task::JoinHandle<()>>,
    pub(super) directory: Option<Arc<Directory>>,
}

pub(super) async fn start(config: &RaftConfig) -> Result<Started> {
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
    let own = address.map(|address| config.advertised(address));
    if let Some(own) = &own {
        door.locate(own);
    }
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
    if let Some(directory) = &directory {
        directory.founded()?;
    }
    let snapshots = Arc::new(Snapshots::open(
        directory.as_ref().map(|directory| directory.snapshots()),
        identity,
    )?);
    let store = Store::default();
    let machine = StateMachine::open(store.clone(), snapshots.clone())?;
    if let Some(directory) = &directory {
        check_covered(&directory.snapshots(), &log, &store)?;
    }
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
    log.standing().note_membership(Some(membership.clone()));
    let elects_from = elects_from(&membership, term, identity.member);
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
        of_sessions: Arc::new(Semaphore::new(OF_SESSIONS)),
        backups: Arc::new(Semaphore::new(1)),
        timers: config.timers,
        lease_reads: config.lease_reads,
        elects_from,
        heard: Arc::default(),
        answered: Arc::default(),
        awake: Arc::default(),
        failed: watch::channel(None).0,
        cut_off: watch::channel(false).0,
    };
    let (end, ended) = watch::channel(None);
    tokio::spawn(core.clone().end_on_failure(end, stopping.clone()));
    let server = server.map(|server| core.keep_running("the server", server));
    let awake = core.awake.clone();
    core.keep("the clock", async move { awake.keep().await });
    core.keep("the reader", core.clone().serve_readers(waiting));
    match core.may_elect() {
        Ok(()) => core.raft.runtime_config().elect(true),
        Err(_) => core.keep("the start of elections", core.clone().elect_later(stopping.clone())),
    }
    door.open(core.clone());
    if let Some(own) = own {
        let keeping = core
            .clone()
            .keep_addresses(door.clone(), config.clone(), own, stopping.clone());
        core.keep("the addresses of the members", keeping);
    }
    core.begin(config, &door, address).await?;
    core.compare_list(&config.cluster);
    core.keep("the expiry of sessions", core.clone().keep_time(stopping.clone()));
    let keeping = core.clone().keep_house(config.snapshot_log_bytes(), stopping.clone());
    core.keep("the snapshots", keeping);
    core.keep("the watches of handles", core.clone().keep_reaching(stopping.clone()));
    let leadership = core.standing().leadership();
    let lease = core.clone().keep_lease()?;
    core.keep("the leadership", core.clone().keep_leadership(lease, stopping.clone()));
    let keeping = core.clone().keep_company(door, directory.clone(), stopping);
    core.keep("the membership", keeping);
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

pub(super) fn raft_config(config: &RaftConfig) -> Result<openraft::Config> {
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

/// Checks that what the log lacks is in the snapshot.
fn check_covered(snapshots: &Path, log: &LogStore, store: &Store) -> Result<()> {
    let purged = log.log().state.lock().purged.map(|purged| purged.index);
    let covered = store.read(|inner| inner.applied.map(|applied| applied.index));
    match purged.filter(|_| purged > covered) {
        None => Ok(()),
        Some(purged) => Err(storage(
            snapshots,
            format!(
                "the snapshot that holds the entries up to {purged} is missing, which the log does not hold any more; \
                 nothing was changed: put the file back from a copy, or restore a backup into a new directory"
            ),
        )),
    }
}

/// What is in the log: the membership and the term. Metrics say neither before openraft's own task has run.
pub(super) async fn recovered(raft: &Raft<TypeConfig, StateMachine>) -> Result<(StoredMembership, u64)> {
    let recovered = raft.with_raft_state(|state| {
        let membership = (**state.membership_state.effective()).clone();
        (membership, state.vote_ref().leader_id().term)
    });
    recovered.await.map_err(unavailable)
}

/// From when on a member that starts may elect. It has forgotten when it last heard a Raft leader, who counts on its silence:
/// it is taken to have heard one just now, with the longest timers there are: it may have run with others before. A member
/// that has never heard a leader, or is the only voter, need not wait.
pub(super) fn elects_from(membership: &StoredMembership, term: u64, member: u64) -> Instant {
    let others = membership.membership().voter_ids().any(|voter| voter != member);
    let heard_one = term > 0 && others;
    Instant::now() + Duration::from_millis(if heard_one { Timers::longest_silence() } else { 0 })
}

pub(super) async fn serve(
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

impl Core {
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
        if group.has_log {
            // The group runs. Its first entry is the Raft leader's to replicate: the members may have changed since.
            return Ok(());
        }
        match self.raft.initialize(group.members).await {
            // Another that founds the same group has come first, and leads or was voted for.
            Ok(()) | Err(RaftError::APIError(InitializeError::NotAllowed(_))) => Ok(()),
            Err(error) => Err(unavailable(error)),
        }
    }
}

/// How many threads a member works with: a few of the processors' share, for a program that has its own work. On the smallest
/// machines that is one: what one thread hands to another waits for that to wake.
pub(super) fn workers() -> usize {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    (processors / 2).clamp(1, 4)
}

/// What happens on the member's threads is told with its name: they do nothing else.
pub(super) fn in_span_of(builder: &mut Builder, name: &str) {
    thread_local! {
        static SPAN: RefCell<Option<tracing::span::EnteredSpan>> = const { RefCell::new(None) };
    }
    // Of the highest level, so that no filter leaves it out of what it lets through.
    let span = tracing::error_span!("member", name);
    builder.on_thread_start(move || SPAN.set(Some(span.clone().entered())));
    builder.on_thread_stop(|| drop(SPAN.take()));
}

#[cfg(test)]
mod tests {
    use openraft::storage::RaftLogStorage;

    use super::*;
    use crate::types::LogId;

    #[tokio::test]
    async fn a_snapshot_that_the_log_needs_is_missed_by_name() {
        let mut log = LogStore::in_memory(1);
        let (store, place) = (Store::default(), Path::new("data/snapshots"));
        check_covered(place, &log, &store).unwrap();
        log.purge(LogId::new_term_index(1, 7)).await.unwrap();
        let missing = check_covered(place, &log, &store).unwrap_err().to_string();
        assert!(
            missing.contains("data/snapshots") && missing.contains("up to 7"),
            "{missing}"
        );
        store.apply(|applier| applier.blank(LogId::new_term_index(1, 7)));
        check_covered(place, &log, &store).unwrap();
    }
}
