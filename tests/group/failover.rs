//! What a handle keeps when its members fail it: its session, however often, and however little time that leaves.

use std::sync::Arc;
use std::time::{Duration, Instant};

use registry::raft::{self, RaftConfig};
use registry::{BootInstant, Options, Registry, SessionId, SessionTtl};
use registry_tests::{key, within};

use crate::harness::{Group, NAMES, PATIENCE, options};

/// Waits until a keep-alive is answered that was sent after now. Answers how long that took.
async fn kept_alive(registry: &Arc<dyn Registry>, session: SessionId) -> Duration {
    let began = BootInstant::now();
    let valid = || {
        registry
            .session()
            .valid_until(session)
            .expect("the session is not lost")
    };
    // It is counted from the sending on.
    while valid() <= began + registry.session().ttl() * 9 / 10 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    BootInstant::now().saturating_duration_since(began)
}

/// The next leader is killed as soon as it has done something, for two TTLs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leaders_that_live_for_a_moment_each_keep_a_session() {
    let mut group = Group::start(3).await;
    let registry = group.connect_all().await;
    let session = registry.session().live().unwrap();
    let held = registry.lock(&key("/l")).acquire().await.unwrap();
    let (began, mut kills) = (Instant::now(), 0);
    while began.elapsed() < 2 * registry.session().ttl() {
        let leader = group.leader().await;
        group.kill(leader).await;
        kills += 1;
        registry.put(&key("/a"), kills.to_string()).await.unwrap();
        assert_eq!(
            registry.session().live().unwrap(),
            session,
            "lost at the {kills}th kill"
        );
        group.restart(&[leader]).await;
    }
    println!("{kills} leaders killed in {:?}", began.elapsed());
    assert!(!held.is_lost());
    held.release().await.unwrap();
    registry.close().await.unwrap();
}

/// The Raft leader is cut off from the others, not from its handles, and goes on to take itself for the leader: who writes
/// leaves it, and who opens a handle does not stay there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_is_cut_off_is_left_by_its_handles() {
    let group = Group::start(3).await;
    let leader = group.leader().await;
    let members = RaftConfig::remote((0..3).map(|step| group.address((leader + step) % 3)));
    let registry = raft::connect(&members, &options()).await.unwrap();
    group.net.isolate(leader);
    registry.put(&key("/a"), "after").await.unwrap();
    let opened = raft::connect(&members, &options()).await.unwrap();
    opened.put(&key("/b"), "after").await.unwrap();
    group.net.mend();
    opened.close().await.unwrap();
    registry.close().await.unwrap();
}

/// The member that a handle asks stands still: no connection breaks. Another is asked in time for a short TTL too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_stands_still_costs_no_session() {
    let mut group = Group::start_with(3, |_| "timers = \"fast\"".into()).await;
    let leader = group.leader().await;
    let short = Options {
        session_ttl: SessionTtl::new(Duration::from_secs(6)).unwrap(),
        ..options()
    };
    // The others come after it.
    let endpoints = (0..3).map(|step| group.listen[(leader + step) % 3].to_string());
    let registry = raft::connect(&RaftConfig::remote(endpoints), &short).await.unwrap();
    let session = registry.session().live().unwrap();
    within(PATIENCE, kept_alive(&registry, session)).await;
    group.process(leader).pause();
    let took = within(PATIENCE, kept_alive(&registry, session)).await;
    println!("kept alive {took:?} after {} stood still", NAMES[leader]);
    group.process(leader).resume();
    registry.close().await.unwrap();
}
