//! The recipes over a store whose answers are lost.

use std::sync::Arc;
use std::time::Duration;

use registry::raft::{Member, RaftConfig};
use registry::{Error, Key, List, Options, Prefix, Raise, Read, Registry, Token};
use registry_tests::cluster::eventually;
use registry_tests::{key, within};
use tokio::task::JoinSet;

use crate::store::{Broken, Fault};

const PATIENCE: Duration = Duration::from_secs(60);

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
    // The namespace has an epoch, so that the first request is the entry.
    whole.lock(&key("/l")).acquire().await.unwrap().release().await.unwrap();
    let lock = broken.lock(&key("/l"));
    let entered = lock.acquire().await;
    // Not that nothing has changed.
    assert!(matches!(entered, Err(Error::OutcomeUnknown { .. })), "{entered:?}");
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

/// L3. A handle that is given a revision again, as by a store that was restored from a copy, enters again in a new epoch,
/// whose tokens are larger than all that can have been given out.
#[tokio::test]
async fn a_store_that_went_back_gives_larger_tokens() {
    let (broken, whole) = handles(Fault::RevisionIsStuck).await;
    let lock = broken.lock(&key("/l"));
    let mut last = None;
    for round in 0..3 {
        let held = within(PATIENCE, lock.acquire()).await.unwrap();
        assert!(Some(held.token()) > last, "{} after {last:?}", held.token());
        if round > 0 {
            let epoch = held.token().get() >> 32;
            assert!(epoch > 58_000_000, "{epoch} is no time: two restores may have the same");
        }
        last = Some(held.token());
        held.release().await.unwrap();
        // The place that had the token again was left.
        let queue = whole.lock(&key("/l"));
        eventually(PATIENCE, || async { queue.contenders().await.unwrap().is_empty() }).await;
    }
    assert!(whole.epoch().await.unwrap().epoch > 58_000_000);
}

/// L3. A handle that knows of a higher epoch than the store has deals with the copy of an earlier state.
#[tokio::test]
async fn an_epoch_that_is_lost_is_noticed() {
    let (broken, whole) = handles(Fault::AnswersAreRight).await;
    let raised = broken
        .raise_epoch(Raise::Above(Token::new(5 << 32).unwrap()))
        .await
        .unwrap();
    assert_eq!(raised.epoch, 6);
    let lock = broken.lock(&key("/l"));
    let before = lock.acquire().await.unwrap();
    assert_eq!(before.token().get() >> 32, 6);
    before.release().await.unwrap();
    // The copy is of before the raise.
    let epoch = Prefix::from_store("~/epoch").unwrap();
    let stored = whole.list_all(List::new(epoch)).await.unwrap();
    whole.delete(&stored[0].key).await.unwrap();
    let after = within(PATIENCE, lock.acquire()).await.unwrap();
    assert!(after.token().get() >> 32 > 58_000_000, "{}", after.token());
    after.release().await.unwrap();
}

/// L7. The first put of a contender is held up somewhere, a second one takes effect, and the first lands after the release.
#[tokio::test]
async fn a_put_that_lands_after_its_contender_left_is_deleted() {
    let (broken, whole) = handles(Fault::FirstPutLandsLate).await;
    let lock = whole.lock(&key("/l"));
    lock.acquire().await.unwrap().release().await.unwrap();
    broken
        .lock(&key("/l"))
        .acquire()
        .await
        .unwrap()
        .release()
        .await
        .unwrap();
    eventually(PATIENCE, || async { lock.holder().await.unwrap().is_some() }).await;
    within(PATIENCE, lock.acquire()).await.unwrap().release().await.unwrap();
    broken.session().live().unwrap();
}

/// L7. The same in a namespace whose epoch is not stored yet, so that the first put lands once the second has stored it.
#[tokio::test]
async fn a_first_put_that_lands_late_is_deleted() {
    let (broken, whole) = handles(Fault::FirstPutLandsLate).await;
    let lock = whole.lock(&key("/l"));
    broken
        .lock(&key("/l"))
        .acquire()
        .await
        .unwrap()
        .release()
        .await
        .unwrap();
    eventually(PATIENCE, || async { lock.holder().await.unwrap().is_some() }).await;
    within(PATIENCE, lock.acquire()).await.unwrap().release().await.unwrap();
    broken.session().live().unwrap();
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
