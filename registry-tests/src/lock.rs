//! L: locks.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use registry_api::{Error, Lock, Raise, Read, Registry, Result, Token, Txn};
use tokio::runtime::Runtime;

use crate::cluster::eventually;
use crate::{Cluster, key, within};

const PATIENCE: Duration = Duration::from_secs(10);

/// Waits until so many are in the queue.
async fn queued(lock: &Lock, contenders: usize) {
    eventually(PATIENCE, || async move {
        lock.contenders().await.is_ok_and(|queue| queue.len() == contenders)
    })
    .await;
}

/// L1. At most one live session holds a lock.
pub async fn one_holds_at_a_time(cluster: &impl Cluster) -> Result<()> {
    let holders = Arc::new(AtomicU32::new(0));
    let mut tasks = Vec::new();
    for _ in 0..6 {
        let (registry, holders) = (cluster.connect().await?, holders.clone());
        tasks.push(tokio::spawn(async move {
            for _ in 0..5 {
                let held = registry.lock(&key("/l")).acquire().await?;
                assert_eq!(holders.fetch_add(1, Ordering::SeqCst), 0, "two hold it");
                registry.put(&key("/work"), held.token().to_string()).await?;
                assert_eq!(holders.fetch_sub(1, Ordering::SeqCst), 1);
                held.release().await?;
            }
            registry.close().await
        }));
    }
    for task in tasks {
        within(2 * PATIENCE, task).await.expect("it does not panic")?;
    }
    Ok(())
}

/// L1. Waiters get the lock in the order they asked.
pub async fn waiters_come_in_their_order(cluster: &impl Cluster) -> Result<()> {
    let registry = cluster.connect().await?;
    let lock = registry.lock(&key("/l"));
    let held = lock.acquire().await?;
    let order = Arc::new(std::sync::Mutex::new(Vec::new()));
    let mut waiters = Vec::new();
    for waiter in 0..8 {
        let (order, lock) = (order.clone(), lock.clone());
        waiters.push(tokio::spawn(async move {
            let held = lock.acquire().await?;
            order.lock().expect("nobody panics with it").push(waiter);
            held.release().await
        }));
        queued(&registry.lock(&key("/l")), waiter + 2).await;
    }
    held.release().await?;
    for waiter in waiters {
        within(PATIENCE, waiter).await.expect("it does not panic")?;
    }
    assert_eq!(
        *order.lock().expect("nobody panics with it"),
        (0..8).collect::<Vec<_>>()
    );
    registry.close().await
}

/// L2. `try_acquire` takes a free lock, and does not wait for a taken one nor leave anything in its queue.
pub async fn try_acquire_never_waits(cluster: &impl Cluster) -> Result<()> {
    let registry = cluster.connect().await?;
    let lock = registry.lock(&key("/l"));
    let held = lock.try_acquire().await?.expect("it is free");
    assert!(lock.try_acquire().await?.is_none());
    assert_eq!(lock.contenders().await?.len(), 1);
    held.release().await?;
    lock.try_acquire().await?.expect("it is free again").release().await?;
    registry.close().await
}

/// L2. One that gives up at its deadline leaves the queue.
pub async fn a_deadline_leaves_the_queue(cluster: &impl Cluster) -> Result<()> {
    let registry = cluster.connect().await?;
    let lock = registry.lock(&key("/l"));
    let held = lock.acquire().await?;
    let waited = Duration::from_millis(300);
    let asked = Instant::now();
    assert!(matches!(
        lock.acquire_within(waited).await,
        Err(Error::DeadlineExceeded { .. })
    ));
    assert!(asked.elapsed() >= waited);
    queued(&lock, 1).await;
    held.release().await?;
    lock.acquire_within(PATIENCE).await?.release().await?;
    registry.close().await
}

/// L2. One that is dropped while it waits leaves the queue, and those behind it move up.
pub async fn a_dropped_wait_leaves_the_queue(cluster: &impl Cluster) -> Result<()> {
    let registry = cluster.connect().await?;
    let lock = registry.lock(&key("/l"));
    let held = lock.acquire().await?;
    let waiting = |lock: Lock| tokio::spawn(async move { lock.acquire().await });
    let first = waiting(lock.clone());
    queued(&lock, 2).await;
    let second = waiting(lock.clone());
    queued(&lock, 3).await;
    first.abort();
    queued(&lock, 2).await;
    held.release().await?;
    within(PATIENCE, second)
        .await
        .expect("it does not panic")?
        .release()
        .await?;
    // A future that never ran, or was dropped at any step, leaves nothing either.
    for polls in 0..6 {
        let mut acquiring = Box::pin(lock.acquire());
        for _ in 0..polls {
            if futures_util::poll!(&mut acquiring).is_ready() {
                break;
            }
            tokio::task::yield_now().await;
        }
        drop(acquiring);
    }
    queued(&lock, 0).await;
    registry.close().await
}

/// L2, L6. A wait and a hold that are dropped on a thread without a runtime leave the queue.
pub async fn dropping_outside_a_runtime_leaves_the_queue(cluster: &impl Cluster) -> Result<()> {
    let registry = cluster.connect().await?;
    let lock = registry.lock(&key("/l"));
    let held = lock.acquire().await?;
    let acquiring = |lock: Lock| Box::pin(async move { lock.acquire().await });
    let mut waiting = acquiring(lock.clone());
    tokio::select! {
        _ = &mut waiting => panic!("it is held"),
        () = queued(&lock, 2) => {}
    }
    drop_outside(waiting);
    queued(&lock, 1).await;
    // One that is dropped at any step of entering leaves nothing either.
    for polls in 0..6 {
        let mut acquiring = acquiring(lock.clone());
        for _ in 0..polls {
            if futures_util::poll!(&mut acquiring).is_ready() {
                break;
            }
            tokio::task::yield_now().await;
        }
        drop_outside(acquiring);
    }
    queued(&lock, 1).await;
    drop_outside(held);
    queued(&lock, 0).await;
    lock.acquire_within(PATIENCE).await?.release().await?;
    registry.close().await
}

fn drop_outside<T: Send + 'static>(dropped: T) {
    let dropping = std::thread::spawn(move || drop(dropped));
    dropping.join().expect("a drop does not panic");
}

/// L2, L6. What was acquired and waited for on a runtime that nobody drives any more is left all the same.
pub async fn a_runtime_that_stopped_frees_its_locks(cluster: &impl Cluster) -> Result<()> {
    let other = cluster.connect().await?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = Stopped(Some(runtime.expect("a runtime can be built")));
    let queue = &other.lock(&key("/l"));
    let on_its_own = || {
        runtime.block_on(async {
            let registry = cluster.connect().await?;
            let session = registry.session().live()?;
            let held = registry.lock(&key("/l")).acquire().await?;
            let lock = registry.lock(&key("/l"));
            let mut waiting = Box::pin(async move { lock.acquire().await });
            tokio::select! {
                _ = &mut waiting => panic!("it is held"),
                () = queued(queue, 2) => {}
            }
            let registration = registry.register(&key("/w"), "").await?;
            Result::<_, Error>::Ok((registry, session, held, waiting, registration))
        })
    };
    let scoped = || std::thread::scope(|threads| threads.spawn(on_its_own).join().expect("it does not panic"));
    let (registry, session, held, waiting, registration) = tokio::task::block_in_place(scoped)?;
    drop((waiting, held, registration));
    let others = &other;
    // A request may have to find out first that its connection is not served any more.
    eventually(4 * PATIENCE, || async move {
        let queue = others.lock(&key("/l")).contenders().await;
        let registered = others.get(&key("/w"), Read::Linearizable).await;
        queue.is_ok_and(|queue| queue.is_empty()) && registered.is_ok_and(|entry| entry.is_none())
    })
    .await;
    assert_eq!(registry.session().live()?, session, "they did not go with the session");
    tokio::task::block_in_place(|| runtime.block_on(registry.close()))?;
    other.close().await
}

/// A runtime that is driven only now and then, and can be dropped on a thread of another.
struct Stopped(Option<Runtime>);

impl Stopped {
    fn block_on<F: Future>(&self, future: F) -> F::Output {
        self.0.as_ref().expect("it is dropped last").block_on(future)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// L3. Each hold has a fencing token, larger than every earlier holder's, also when the queue was empty in between.
pub async fn tokens_only_grow(cluster: &impl Cluster) -> Result<()> {
    let (one, other) = (cluster.connect().await?, cluster.connect().await?);
    let mut last = None;
    for n in 0..6 {
        let registry = if n % 2 == 0 { &one } else { &other };
        let held = registry.lock(&key("/l")).acquire().await?;
        assert!(Some(held.token()) > last);
        last = Some(held.token());
        let holder = other.lock(&key("/l")).holder().await?;
        assert_eq!(
            holder.map(|holder| holder.token),
            last,
            "every observer computes the same"
        );
        held.release().await?;
    }
    other.close().await?;
    one.close().await
}

/// L3. Tokens go on growing when the epoch of the namespace is raised, as it is after a move to another store: above
/// whatever was given out there, for all handles, and in the order of the queue.
pub async fn tokens_grow_over_a_raised_epoch(cluster: &impl Cluster) -> Result<()> {
    let (one, other) = (cluster.connect().await?, cluster.connect().await?);
    let lock = one.lock(&key("/l"));
    let mut last = lock.acquire().await?;
    for round in 0..4 {
        assert!(one.epoch().await?.highest_token()? >= last.token());
        // The one waits in the queue when the epoch is raised, the other enters after.
        let waiting = |registry: &Arc<dyn Registry>| {
            let lock = registry.lock(&key("/l"));
            tokio::spawn(async move { lock.acquire().await })
        };
        let early = waiting(&other);
        queued(&lock, 2).await;
        let (elsewhere, raise) = match round % 2 {
            0 => {
                let elsewhere = Token::new(last.token().get() + (round << 33) + 1).expect("it is positive");
                (elsewhere, Raise::Above(elsewhere))
            }
            _ => (last.token(), Raise::AfterRestore),
        };
        // One handle raises it, and others find out.
        let raised = [&one, &other][round as usize / 2].raise_epoch(raise).await?;
        assert!(raised.highest_token()? >= elsewhere);
        let late = waiting(&one);
        queued(&lock, 3).await;
        let order: Vec<_> = other
            .lock(&key("/l"))
            .contenders()
            .await?
            .iter()
            .map(|c| c.token)
            .collect();
        assert!(order.is_sorted() && order[0] == last.token(), "{order:?}");
        last.release().await?;
        let early = within(PATIENCE, early).await.expect("it does not panic")?;
        early.release().await?;
        last = within(PATIENCE, late).await.expect("it does not panic")?;
        assert!(last.token() > elsewhere, "{} after {elsewhere}", last.token());
        assert_eq!(order[2], last.token(), "every observer computes the same");
        let writes = Txn::new().require(last.condition()).put(&key("/work"), "");
        one.commit(writes).await?;
    }
    assert!(lock.try_acquire().await?.is_none());
    last.release().await?;
    lock.try_acquire().await?.expect("it is free").release().await?;
    let election = other.election(&key("/e"));
    let leadership = election.campaign("").await?;
    assert_eq!(
        election.leader().await?.map(|leader| leader.token),
        Some(leadership.token())
    );
    let mut observed = one.election(&key("/e")).observe().await?;
    let leader = within(PATIENCE, observed.next())
        .await
        .expect("an observation goes on")?;
    assert_eq!(leader.map(|leader| leader.token), Some(leadership.token()));
    leadership.resign().await?;
    // A handle that knows of no raise enters an empty queue.
    one.lock(&key("/empty")).acquire().await?.release().await?;
    let raised = other.raise_epoch(Raise::AfterRestore).await?;
    let held = one.lock(&key("/empty")).acquire().await?;
    assert!(held.token() > raised.highest_token()?, "{} in {raised:?}", held.token());
    held.release().await?;
    // An epoch that makes tokens of more than 63 bits is refused, and changes nothing.
    let before = one.epoch().await?;
    let refused = one
        .raise_epoch(Raise::Above(Token::new(i64::MAX).expect("it is positive")))
        .await;
    assert!(matches!(refused, Err(Error::TokenOverflow { .. })), "{refused:?}");
    assert_eq!(one.epoch().await?.epoch, before.epoch);
    other.close().await?;
    one.close().await
}

/// L3. A lock's condition makes the store itself refuse the writes of one who lost it.
pub async fn a_lost_lock_writes_nothing(cluster: &impl Cluster) -> Result<()> {
    let (one, other) = (cluster.connect().await?, cluster.connect().await?);
    let held = one.lock(&key("/l")).acquire().await?;
    let condition = held.condition();
    one.commit(Txn::new().require(condition.clone()).put(&key("/work"), "held"))
        .await?;
    held.release().await?;
    let next = other.lock(&key("/l")).acquire().await?;
    let late = one
        .commit(Txn::new().require(condition).put(&key("/work"), "late"))
        .await;
    assert!(matches!(late, Err(Error::Conflict { .. })), "{late:?}");
    other
        .commit(Txn::new().require(next.condition()).put(&key("/work"), "next"))
        .await?;
    assert_eq!(
        one.get(&key("/work"), Read::Linearizable)
            .await?
            .expect("it is there")
            .value,
        "next"
    );
    next.release().await?;
    other.close().await?;
    one.close().await
}

/// L4. Two acquires by one handle are two contenders.
pub async fn one_handle_is_two_contenders(cluster: &impl Cluster) -> Result<()> {
    let registry = cluster.connect().await?;
    let held = registry.lock(&key("/l")).acquire().await?;
    let again = registry
        .lock(&key("/l"))
        .acquire_within(Duration::from_millis(200))
        .await;
    assert!(matches!(again, Err(Error::DeadlineExceeded { .. })), "{again:?}");
    held.release().await?;
    registry.close().await
}

/// L4. A reentrant lock is acquired again by its owner, and freed by the last release.
pub async fn a_reentrant_lock_counts(cluster: &impl Cluster) -> Result<()> {
    let (one, other) = (cluster.connect().await?, cluster.connect().await?);
    let lock = one.reentrant_lock(&key("/l"));
    let first = lock.acquire("owner").await?;
    let second = within(PATIENCE, lock.acquire("owner")).await?;
    assert_eq!((second.token(), second.count()), (first.token(), 2));
    first.release().await?;
    assert!(
        other.lock(&key("/l")).try_acquire().await?.is_none(),
        "one release of two frees nothing"
    );
    let stranger = tokio::time::timeout(Duration::from_millis(200), lock.acquire("stranger")).await;
    assert!(stranger.is_err());
    // curator#75: another object of the same lock and handle shares the count.
    let another = one.reentrant_lock(&key("/l"));
    let third = within(PATIENCE, another.acquire("owner")).await?;
    assert_eq!((third.token(), third.count()), (second.token(), 2));
    third.release().await?;
    second.release().await?;
    within(PATIENCE, lock.acquire("stranger")).await?.release().await?;
    other.lock(&key("/l")).acquire_within(PATIENCE).await?.release().await?;
    other.close().await?;
    one.close().await
}

/// L4, L5. redisson#2807: a reentrant lock whose key another client removed is not acquired with the old token, and the
/// release of the old hold says that it was lost.
pub async fn a_removed_reentrant_lock_is_lost(cluster: &impl Cluster) -> Result<()> {
    let (one, other) = (cluster.connect().await?, cluster.connect().await?);
    let lock = one.reentrant_lock(&key("/l"));
    let first = lock.acquire("owner").await?;
    other.delete(&first.held().condition().key).await?;
    let next = other.lock(&key("/l")).acquire_within(PATIENCE).await?;
    let again = tokio::time::timeout(Duration::from_millis(300), lock.acquire("owner")).await;
    assert!(again.is_err(), "acquired while another holds it: {again:?}");
    let released = first.release().await;
    assert!(matches!(released, Err(Error::HoldLost { .. })), "{released:?}");
    let token = next.token();
    next.release().await?;
    let again = within(PATIENCE, lock.acquire("owner")).await?;
    assert!(again.token() > token);
    again.release().await?;
    other.close().await?;
    one.close().await
}

/// L5. A release that finds the lock's key removed says that the lock was lost.
pub async fn a_release_that_finds_nothing_says_so(cluster: &impl Cluster) -> Result<()> {
    let (one, other) = (cluster.connect().await?, cluster.connect().await?);
    let held = one.lock(&key("/l")).acquire().await?;
    other.delete(&held.condition().key).await?;
    let next = other.lock(&key("/l")).acquire_within(PATIENCE).await?;
    let released = held.release().await;
    assert!(matches!(released, Err(Error::HoldLost { .. })), "{released:?}");
    assert_eq!(one.lock(&key("/l")).contenders().await?.len(), 1);
    next.release().await?;
    other.close().await?;
    one.close().await
}

/// L6. Dropping the guard releases soon after; `release` is done when it returns.
pub async fn dropping_releases(cluster: &impl Cluster) -> Result<()> {
    let registry = cluster.connect().await?;
    let lock = registry.lock(&key("/l"));
    drop(lock.acquire().await?);
    lock.acquire_within(PATIENCE).await?.release().await?;
    assert!(lock.holder().await?.is_none());
    registry.close().await
}

/// S3, L6. Closing a handle releases what it holds.
pub async fn closing_releases(cluster: &impl Cluster) -> Result<()> {
    let (one, other) = (cluster.connect().await?, cluster.connect().await?);
    let held = one.lock(&key("/l")).acquire().await?;
    one.close().await?;
    assert!(held.is_lost() && held.valid_until().is_none());
    within(PATIENCE, held.lost()).await;
    other
        .lock(&key("/l"))
        .try_acquire()
        .await?
        .expect("it is free")
        .release()
        .await?;
    other.close().await
}

/// L5. A holder learns that another hand removed its key.
pub async fn removed_by_another_hand_is_lost(cluster: &impl Cluster) -> Result<()> {
    let (one, other) = (cluster.connect().await?, cluster.connect().await?);
    let held = one.lock(&key("/l")).acquire().await?;
    let waiter = tokio::spawn({
        let lock = other.lock(&key("/l"));
        async move { lock.acquire().await }
    });
    queued(&one.lock(&key("/l")), 2).await;
    other.delete(&held.condition().key).await?;
    within(PATIENCE, held.lost()).await;
    assert!(held.is_lost(), "once lost, lost for ever");
    let next = within(PATIENCE, waiter).await.expect("it does not panic")?;
    assert!(next.token() > held.token());
    next.release().await?;
    other.close().await?;
    one.close().await
}

/// L5. The release of a lost lock changes nothing that is another's.
pub async fn release_of_a_lost_lock_touches_nothing(cluster: &impl Cluster) -> Result<()> {
    let (one, other) = (cluster.connect().await?, cluster.connect().await?);
    let held = one.lock(&key("/l")).acquire().await?;
    other.delete(&held.condition().key).await?;
    within(PATIENCE, held.lost()).await;
    let next = other.lock(&key("/l")).acquire_within(PATIENCE).await?;
    assert!(matches!(held.release().await, Err(Error::HoldLost { .. })));
    let holder = one.lock(&key("/l")).holder().await?.expect("the next one holds it");
    assert_eq!(holder.token, next.token());
    next.release().await?;
    other.close().await?;
    one.close().await
}

/// L8. A contender may leave a label; the holder and the queue can be read by anyone.
pub async fn labels_are_seen(cluster: &impl Cluster) -> Result<()> {
    let (one, other) = (cluster.connect().await?, cluster.connect().await?);
    let held = one.lock(&key("/l")).label("first").acquire().await?;
    let waiter = tokio::spawn({
        let lock = one.lock(&key("/l")).label("second");
        async move { lock.acquire().await }
    });
    let lock = other.lock(&key("/l"));
    queued(&lock, 2).await;
    let contenders = lock.contenders().await?;
    assert_eq!(
        contenders.iter().map(|c| &c.value[..]).collect::<Vec<_>>(),
        [b"first", &b"second"[..]]
    );
    assert_eq!(
        (contenders[0].token, contenders[0].session),
        (held.token(), Some(one.session().live()?))
    );
    held.release().await?;
    within(PATIENCE, waiter)
        .await
        .expect("it does not panic")?
        .release()
        .await?;
    other.close().await?;
    one.close().await
}

/// L1. Locks whose names lie within each other are apart.
pub async fn locks_below_locks_are_apart(cluster: &impl Cluster) -> Result<()> {
    let registry = cluster.connect().await?;
    let outer = registry.lock(&key("/l")).acquire().await?;
    let inner = registry
        .lock(&key("/l/m"))
        .try_acquire()
        .await?
        .expect("it is another lock");
    let like = registry
        .lock(&key("/l!"))
        .try_acquire()
        .await?
        .expect("it is another lock");
    assert_eq!(registry.lock(&key("/l")).contenders().await?.len(), 1);
    for held in [outer, inner, like] {
        held.release().await?;
    }
    registry.close().await
}

/// A handle's lock, for other properties.
pub(crate) async fn acquire(registry: &Arc<dyn Registry>, name: &str) -> Result<registry_api::Held> {
    registry.lock(&key(name)).acquire_within(PATIENCE).await
}
