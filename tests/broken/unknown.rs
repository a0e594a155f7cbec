//! The recipes over a store whose answers are lost.

use std::sync::Arc;
use std::time::Duration;

use registry::raft::{Member, RaftConfig};
use registry::{Error, Key, Options, Read, Registry};
use registry_tests::{key, within};
use tokio::task::JoinSet;

use crate::store::{Broken, Fault};

const PATIENCE: Duration = Duration::from_secs(10);

/// Two handles on one member: one with a fault, one without.
async fn handles(fault: Fault) -> (Arc<dyn Registry>, Arc<dyn Registry>) {
    let member = Member::start(&RaftConfig::in_memory()).await.unwrap();
    let open = async || member.connect(&Options::default()).await.unwrap();
    let (broken, whole) = (Arc::new(Broken::new(open().await, fault)), open().await);
    // The handles of a member keep it running.
    std::mem::forget(member);
    (broken, whole)
}

/// L7. An entry whose answer was lost, and which could not be tried again, is taken back, though the session lives.
#[tokio::test]
async fn an_entry_of_unknown_outcome_is_taken_back() {
    let (broken, whole) = handles(Fault::FirstAnswerIsLost).await;
    let lock = broken.lock(&key("/l"));
    let entered = lock.acquire().await;
    assert!(matches!(entered, Err(Error::Unavailable { .. })), "{entered:?}");
    within(PATIENCE, whole.lock(&key("/l")).acquire())
        .await
        .unwrap()
        .release()
        .await
        .unwrap();
    broken.session().live().unwrap();
}

/// L7. Two of three answers are lost, of what happened and of what did not: each contender is in the queue once, and none is
/// left of those that are done.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_contender_is_in_the_queue_once_whatever_was_tried_again() {
    const CONTENDERS: usize = 8;
    let (broken, whole) = handles(Fault::ManyAnswersAreLost).await;
    let lock = whole.lock(&key("/l"));
    for round in 0..5 {
        let held = lock.acquire().await.unwrap();
        let mut waiting = JoinSet::new();
        for _ in 0..CONTENDERS {
            let broken = broken.clone();
            waiting.spawn(async move {
                let held = broken.lock(&key("/l")).acquire().await?;
                held.release().await
            });
        }
        let mut most = 0;
        within(PATIENCE, async {
            while most < 1 + CONTENDERS {
                most = lock.contenders().await.unwrap().len();
            }
        })
        .await;
        // What was tried again is answered by then.
        held.release().await.unwrap();
        let ended = async {
            while let Some(ended) = waiting.join_next().await {
                ended.unwrap().unwrap();
                most = most.max(lock.contenders().await.unwrap().len());
            }
        };
        within(PATIENCE, ended).await;
        assert_eq!(most, 1 + CONTENDERS, "round {round}: somebody had two places");
        assert_eq!(lock.contenders().await.unwrap(), [], "round {round}");
    }
}

/// S5. Nothing that a registration sent comes after `unregister` has returned.
#[tokio::test]
async fn a_late_put_does_not_outlive_its_registration() {
    let (broken, whole) = handles(Fault::PutsComeLate).await;
    let k: Key = key("/workers/w");
    let registration = broken.register(&k, "1").await.unwrap();
    registration.set("2");
    // The put of the new value is under way by the time the reader of the old one is asked to go.
    tokio::task::yield_now().await;
    registration.unregister().await.unwrap();
    let last = whole.put(&key("/after"), "").await.unwrap();
    assert!(whole.get(&k, Read::Linearizable).await.unwrap().is_none());
    tokio::time::sleep(2 * Broken::LATE).await;
    let after = whole.get(&k, Read::Linearizable).await.unwrap();
    assert!(
        after.is_none(),
        "put at {:?}, after {last}",
        after.map(|entry| entry.mod_revision)
    );
}
