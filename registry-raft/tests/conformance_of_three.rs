//! The conformance suite on three members: at the Raft leader, at a follower, and over gRPC.

#![allow(clippy::unwrap_used)]

mod harness;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use async_trait::async_trait;
use harness::Group;
use registry_api::{Namespace, Options, Registry, Result, SessionId, SessionTtl};
use registry_raft::{RaftConfig, Timers};
use registry_tests::{Cluster, Wire};
use tokio::sync::Mutex;

/// Where a handle is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    Leader,
    Follower,
    Remote,
}

const LEADER: u8 = At::Leader as u8;
const FOLLOWER: u8 = At::Follower as u8;
const REMOTE: u8 = At::Remote as u8;

/// A namespace on the group that the tests of a process share. It ends with the last test that runs.
struct Shared<const AT: u8> {
    group: Arc<Group>,
    namespace: Namespace,
}

#[async_trait]
impl<const AT: u8> Cluster for Shared<AT> {
    async fn start() -> Self {
        static RUNNING: Mutex<Weak<Group>> = Mutex::const_new(Weak::new());
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let mut running = RUNNING.lock().await;
        let group = match running.upgrade() {
            Some(group) => group,
            None => {
                let group = Arc::new(Group::start_with(3, |config| config.timers = Timers::Default).await);
                *running = Arc::downgrade(&group);
                group
            }
        };
        let namespace = format!("/test-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let namespace = Namespace::parse(&namespace).unwrap();
        Self { group, namespace }
    }

    fn options(&self) -> Options {
        Options {
            namespace: self.namespace.clone(),
            session_ttl: SessionTtl::new(Duration::from_secs(2)).unwrap(),
            ..Options::default()
        }
    }

    async fn connect_with(&self, options: Options) -> Result<Arc<dyn Registry>> {
        match AT {
            LEADER => self.group.member(self.group.leader().await).connect(&options).await,
            FOLLOWER => self.group.member(self.group.follower().await).connect(&options).await,
            _ => registry_raft::connect(&RaftConfig::remote(self.group.addresses()), &options).await,
        }
    }

    async fn connect_through(&self, _: Options) -> Result<(Arc<dyn Registry>, Wire)> {
        unreachable!("no property of the first list cuts a wire")
    }

    async fn kill(&self) {
        unreachable!("other tests use this group")
    }

    async fn restart(&self) {
        unreachable!("other tests use this group")
    }

    async fn pause(&self) {
        unreachable!("other tests use this group")
    }

    async fn resume(&self) {
        unreachable!("other tests use this group")
    }

    async fn revoke(&self, session: SessionId) {
        let remote = RaftConfig::remote(self.group.addresses());
        registry_raft::end_session(&remote, &self.options(), session)
            .await
            .unwrap();
    }
}

mod at_the_leader {
    use super::*;
    registry_tests::conformance!(Shared<LEADER>, local);
}

mod at_a_follower {
    use super::*;
    registry_tests::conformance!(Shared<FOLLOWER>, local);
}

mod remote {
    use super::*;
    registry_tests::conformance!(Shared<REMOTE>, local);
}
