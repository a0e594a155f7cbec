//! What the suite has break, on three members, each a process of its own: one fault after the other, and everything at once.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::future::join_all;
use registry::raft::{self, RaftConfig};
use registry::{Options, Registry, Result, SessionId, SessionTtl};
use registry_tests::torture::Usage;
use registry_tests::{Cluster, Members, Net, Wire, key};
use tokio::sync::Mutex;

use crate::harness::Group;

/// How many members there are.
const MEMBERS: usize = 3;
/// How much log makes a member take a snapshot.
const SNAPSHOT_LOG_BYTES: usize = 1 << 20;

struct Three {
    group: Mutex<Group>,
    net: Arc<Net>,
    addresses: Vec<String>,
}

impl Three {
    fn remote(&self) -> RaftConfig {
        RaftConfig::remote(self.addresses.clone())
    }

    async fn all<F: Future<Output = ()>>(&self, each: impl Fn(usize) -> F) {
        join_all((0..MEMBERS).map(each)).await;
    }
}

#[async_trait]
impl Cluster for Three {
    async fn start() -> Self {
        let group = Group::start_with(MEMBERS, |_| format!("snapshot_log_bytes = {SNAPSHOT_LOG_BYTES}")).await;
        Self {
            net: group.net.clone(),
            addresses: group.listen.iter().map(ToString::to_string).collect(),
            group: Mutex::new(group),
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
impl Members for Three {
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
    registry_tests::properties!(faults tests_of, Three);
}

registry_tests::torture!(Three);
