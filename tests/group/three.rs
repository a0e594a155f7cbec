//! What the suite has break, on three members, each a process of its own: one fault after the other, and everything at once.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures_util::future::join_all;
use registry::raft::{self, MemberChange, RaftConfig};
use registry::{Error, Options, Registry, Result, SessionId, SessionTtl};
use registry_tests::torture::Usage;
use registry_tests::{Cluster, Members, Net, Process, System, Wire, cluster, key, within};
use tokio::process::Command;
use tokio::sync::Mutex;

use crate::harness::{self, Group};

/// How many members there are.
const MEMBERS: usize = 3;
/// How much log makes a member take a snapshot.
const SNAPSHOT_LOG_BYTES: usize = 1 << 20;
/// Whoever is to join may need the group whole for that, and it seldom is.
const PATIENCE: Duration = Duration::from_secs(120);
/// The name of each member that comes and goes.
const GUEST: &str = "d";

/// Members whose leader answers reads by its lease, or asks the others each time.
struct Three<const LEASE_READS: bool> {
    group: Mutex<Group>,
    net: Arc<Net>,
    addresses: Vec<String>,
    systems: Vec<System>,
    guests: AtomicU64,
}

fn settings(lease_reads: bool) -> String {
    format!("snapshot_log_bytes = {SNAPSHOT_LOG_BYTES}\nlease_reads = {lease_reads}")
}

fn system(config: &Path) -> System {
    System::told_by(&config.with_extension("system"))
}

/// A member with a wall clock of its own.
fn serving(config: &Path) -> Command {
    let mut command = harness::serving(config);
    system(config).give_to(&mut command);
    command
}

impl<const LEASE_READS: bool> Three<LEASE_READS> {
    fn remote(&self) -> RaftConfig {
        RaftConfig::remote(self.addresses.clone())
    }

    async fn all<F: Future<Output = ()>>(&self, each: impl Fn(usize) -> F) {
        join_all((0..MEMBERS).map(each)).await;
    }

    /// Changes the members, however often that has to be asked for.
    async fn change(&self, change: MemberChange) {
        let began = Instant::now();
        cluster::eventually(PATIENCE, || async {
            match raft::change_members(&self.remote(), &self.options(), change.clone()).await {
                Ok(()) => true,
                // Nobody of that name is there: the guest is not yet, or not any more, and the answer was lost.
                Err(Error::InvalidRequest(_)) => matches!(change, MemberChange::Remove { .. }),
                Err(Error::Unavailable { .. } | Error::OutcomeUnknown { .. } | Error::DeadlineExceeded { .. }) => false,
                Err(error) => panic!("{change:?}, after {:?}: {error:?}", began.elapsed()),
            }
        })
        .await;
    }
}

#[async_trait]
impl<const LEASE_READS: bool> Cluster for Three<LEASE_READS> {
    async fn start() -> Self {
        let group = Group::start_program(MEMBERS, |_| settings(LEASE_READS), serving).await;
        Self {
            net: group.net.clone(),
            systems: ["a", "b", "c"].map(|name| system(&group.config_file(name))).into(),
            addresses: group.listen.iter().map(ToString::to_string).collect(),
            group: Mutex::new(group),
            guests: AtomicU64::new(0),
        }
    }

    fn options(&self) -> Options {
        Options {
            session_ttl: SessionTtl::new(Duration::from_secs(2)).unwrap(),
            ..Options::default()
        }
    }

    async fn connect_with(&self, options: Options) -> Result<Arc<dyn Registry>> {
        raft::connect(&self.remote(), &options).await
    }

    async fn connect_through(&self, options: Options) -> Result<(Arc<dyn Registry>, Wire)> {
        let wire = Wire::to(self.addresses[0].parse().unwrap()).await;
        let remote = RaftConfig::remote([wire.address().to_string()]);
        Ok((raft::connect(&remote, &options).await?, wire))
    }

    async fn kill(&self) {
        self.all(|member| self.kill_member(member)).await;
    }

    async fn restart(&self) {
        self.group.lock().await.restart(&(0..MEMBERS).collect::<Vec<_>>()).await;
    }

    async fn pause(&self) {
        self.all(|member| self.pause_member(member)).await;
    }

    async fn resume(&self) {
        self.all(|member| self.resume_member(member)).await;
    }

    async fn revoke(&self, session: SessionId) {
        raft::end_session(&self.remote(), &self.options(), session)
            .await
            .unwrap();
    }
}

#[async_trait]
impl<const LEASE_READS: bool> Members for Three<LEASE_READS> {
    fn members(&self) -> usize {
        MEMBERS
    }

    async fn kill_member(&self, member: usize) {
        self.group.lock().await.kill(member).await;
    }

    async fn restart_member(&self, member: usize) {
        self.group.lock().await.start_unready(member);
    }

    async fn pause_member(&self, member: usize) {
        self.group.lock().await.process(member).pause();
    }

    async fn resume_member(&self, member: usize) {
        self.group.lock().await.process(member).resume();
    }

    async fn trim(&self) -> bool {
        let Ok(registry) = self.connect().await else {
            return false;
        };
        let mut trimmed = true;
        for _ in 0..3 {
            let put = registry.put(&key("/ballast/3"), vec![0; SNAPSHOT_LOG_BYTES / 2]).await;
            trimmed &= put.is_ok();
        }
        // One that can't be closed ends by its TTL.
        let _ = registry.close().await;
        trimmed
    }

    async fn set_clock(&self, member: usize, seconds: i64) -> bool {
        self.systems[member].set_clock(seconds);
        true
    }

    async fn have_a_guest(&self) -> bool {
        let (config, data) = {
            let group = self.group.lock().await;
            group.write_joiner(GUEST, harness::free_address(), &settings(LEASE_READS));
            (group.config_file(GUEST), group.directory().join(GUEST))
        };
        let name = GUEST.to_owned();
        let mut guest = Process::start_unready(harness::serving(&config));
        self.change(MemberChange::Promote { name: name.clone() }).await;
        // One in two dies with its vote.
        if self.guests.fetch_add(1, Ordering::Relaxed) % 2 == 1 {
            guest.kill().await;
        }
        self.change(MemberChange::Remove { name }).await;
        // It hears of it from the others.
        within(PATIENCE, guest.ended()).await.unwrap();
        std::fs::remove_dir_all(data).unwrap();
        true
    }

    fn net(&self) -> Option<&Net> {
        Some(&self.net)
    }

    async fn usage(&self) -> Option<Usage> {
        let group = self.group.lock().await;
        Some(Usage::of(group.process_ids(), &group.directory()))
    }
}

mod faults {
    use super::*;
    registry_tests::properties!(faults tests_of, Three<false>);
}

registry_tests::torture!(Three<false>);

mod lease_reads {
    use super::*;
    registry_tests::torture!(Three<true>);
}
