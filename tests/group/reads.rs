//! Linearizable reads at a leader that loses its leadership, by ReadIndex and by its lease (`lease_reads`), and at one whose
//! followers answer late.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use registry::{Error, Options, Read, Registry};
use registry_tests::key;
use tokio::sync::watch;

use crate::harness::{Group, options};
use crate::until;

/// Counts the keys at one member until it is told to stop. No answer may be older than what was acknowledged before it was
/// asked for; how many there were is told.
async fn read_on(
    registry: Arc<dyn Registry>,
    acknowledged: Arc<AtomicU64>,
    answers: watch::Sender<u64>,
    mut stop: watch::Receiver<bool>,
) {
    while !*stop.borrow_and_update() {
        let before = acknowledged.load(Ordering::Acquire);
        match registry.count(&key("/n").into(), Read::Linearizable).await {
            Ok(count) => {
                assert!(count >= before, "{count} were counted, {before} acknowledged before");
                answers.send_modify(|answers| *answers += 1);
            }
            Err(Error::Unavailable { .. } | Error::DeadlineExceeded { .. }) => {}
            Err(error) => panic!("{error:?}"),
        }
    }
}

/// The leader is cut off from the others or stopped, not from those who read at it; another is elected, and puts are
/// acknowledged there. Twice each. Tells how many reads the old leader answered from then on, all of them right.
async fn reads_while_another_comes_to_lead(lease_reads: bool) -> u64 {
    let mut group = Group::start_with(3, |_| format!("lease_reads = {lease_reads}")).await;
    let acknowledged = Arc::new(AtomicU64::new(0));
    let quick = Options {
        request_timeout: Duration::from_millis(500),
        ..options()
    };
    let all = group.connect_all().await;
    // A key each, so that a try of unknown outcome that comes late changes nothing.
    let put = async || {
        let number = acknowledged.load(Ordering::Acquire) + 1;
        until("it is put", || async {
            all.put(&key(&format!("/n/{number}")), "").await.is_ok()
        })
        .await;
        acknowledged.store(number, Ordering::Release);
    };
    let mut alone = 0;
    for round in 1..=4 {
        let old = group.leader().await;
        let others: Vec<_> = (0..3).filter(|at| *at != old).collect();
        let at_old = registry::raft::connect(&group.remote(old), &quick).await.unwrap();
        let (answers, mut answered) = watch::channel(0);
        let (stop, stopped) = watch::channel(false);
        let reading = tokio::spawn(read_on(at_old, acknowledged.clone(), answers, stopped));
        answered.wait_for(|answers| *answers > 100).await.unwrap();
        let so_far = *answered.borrow();
        match round % 2 {
            0 => group.process(old).pause(),
            _ => group.net.isolate(old),
        }
        group.leader_of(&others, &others).await;
        for _ in 0..20 {
            put().await;
        }
        alone += *answered.borrow() - so_far;
        match round % 2 {
            0 => group.process(old).resume(),
            _ => group.net.mend(),
        }
        // It reads what the others put, once it follows them.
        let so_far = *answered.borrow_and_update();
        answered.wait_for(|answers| *answers > so_far + 10).await.unwrap();
        stop.send_replace(true);
        reading.await.unwrap();
        let back = group.connect(old).await;
        let count = back.count(&key("/n").into(), Read::Linearizable).await.unwrap();
        assert_eq!(count, 20 * round);
        back.close().await.unwrap();
    }
    all.close().await.unwrap();
    alone
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_is_cut_off_answers_nothing_that_is_over() {
    reads_while_another_comes_to_lead(false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_ends_before_another_can_lead() {
    let alone = reads_while_another_comes_to_lead(true).await;
    assert!(alone > 10, "a leader that is cut off never answered: there is no lease");
}

/// The leader asks one of the two first, the one that answered last. Each of them in turn stands still, for less time than
/// the leader would wait for its answer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_that_stands_still_holds_no_read_up() {
    let mut group = Group::start(3).await;
    let leader = group.leader().await;
    let quick = Options {
        request_timeout: Duration::from_millis(500),
        ..options()
    };
    let reader = registry::raft::connect(&group.remote(leader), &quick).await.unwrap();
    // The machine may be late, and another may come to lead: then once more.
    until("a read is answered whoever of the two stands still", async || {
        let mut answered = true;
        for still in [(leader + 1) % 3, (leader + 2) % 3] {
            group.process(still).pause();
            answered &= reader.get(&key("/a"), Read::Linearizable).await.is_ok();
            group.process(still).resume();
            until("it is read", async || {
                reader.get(&key("/a"), Read::Linearizable).await.is_ok()
            })
            .await;
        }
        answered
    })
    .await;
    reader.close().await.unwrap();
}
