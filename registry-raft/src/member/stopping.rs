//! A member that stops while what it has proposed is not answered yet.

use super::*;

/// What it handed over uncommitted is told to it by the next Raft leader, who has to reach it: it listens on, for a while.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_waits_for_what_it_proposed_until_its_grace_is_over() {
    let member = Member::start(&RaftConfig::in_memory()).await.unwrap();
    let _proposed = member.core.in_flight.clone().acquire_owned().await.unwrap();
    let began = Instant::now();
    member.stop().await.unwrap();
    assert!(began.elapsed() >= GRACE, "{:?}", began.elapsed());
}
