//! Calls of several requests that are cut off between two of them.

use registry_api::{Prefix, Txn};

use super::*;
use crate::harness::gate::Gate;

const TIME: Duration = Duration::from_secs(2);

/// A handle behind a gate. Its session and its patience with a silent server are long, so that the connection outlives the
/// calls.
async fn behind(gate: &Gate) -> Arc<dyn Registry> {
    let options = Options {
        request_timeout: TIME,
        session_ttl: SessionTtl::new(Duration::from_secs(40)).unwrap(),
        connect_timeout: Duration::from_secs(30),
        ..Options::default()
    };
    registry_zk::connect(&config(&gate.address), &options).await.unwrap()
}

/// `delete_prefix` is several transactions. Once one was carried out, no error says that nothing changed.
#[tokio::test(flavor = "multi_thread")]
async fn a_prefix_that_is_deleted_in_part_is_an_unknown_outcome() {
    let servers = Servers::start(1).await;
    let gate = Gate::to(servers.address(0)).await;
    let (other, raw) = (connect(&servers.addresses()).await, servers.raw().await);
    for chunk in (0..400).collect::<Vec<_>>().chunks(50) {
        let put = |txn: Txn, number: &usize| txn.put(&key(&format!("/many/{number:03}")), "");
        other.commit(chunk.iter().fold(Txn::new(), put)).await.unwrap();
    }
    let registry = behind(&gate).await;
    // The first transaction passes. The second finds a key below one that it deletes, so that all is read again; that is
    // never answered.
    gate.hold_after(1);
    let many = Prefix::parse("/many").unwrap();
    let deleting = {
        let (registry, many) = (registry.clone(), many.clone());
        tokio::spawn(async move { registry.delete_prefix(&many).await })
    };
    gate.arrived().await;
    raw.create("/registry/many/001/below", b"", &harness::anyone())
        .await
        .unwrap();
    gate.open_and_close();
    let failed = deleting.await.unwrap();
    let left = other.count(&many, Read::Linearizable).await.unwrap();
    assert!(0 < left && left < 400, "{left} are left");
    assert!(matches!(failed, Err(Error::OutcomeUnknown { .. })), "{failed:?}");
}

/// Nothing was deleted, and the error says so.
#[tokio::test(flavor = "multi_thread")]
async fn a_prefix_of_which_nothing_is_deleted_is_unavailable() {
    let servers = Servers::start(1).await;
    let wire = wire_to(&servers, 0).await;
    let options = Options {
        request_timeout: TIME,
        ..options()
    };
    let registry = registry_zk::connect(&config(&wire.address().to_string()), &options)
        .await
        .unwrap();
    registry.put(&key("/many/1"), "").await.unwrap();
    wire.refuse();
    let failed = registry.delete_prefix(&Prefix::parse("/many").unwrap()).await;
    assert!(matches!(failed, Err(Error::Unavailable { .. })), "{failed:?}");
}

/// What is done after the last transaction, for the parents that it emptied, takes no longer than the call may.
#[tokio::test(flavor = "multi_thread")]
async fn emptied_parents_are_not_waited_for_beyond_the_deadline() {
    let servers = Servers::start(1).await;
    let gate = Gate::to(servers.address(0)).await;
    let other = connect(&servers.addresses()).await;
    other.put(&key("/p/q/r"), "").await.unwrap();
    let registry = behind(&gate).await;
    gate.hold_after(0);
    let began = Instant::now();
    let deleting = {
        let registry = registry.clone();
        tokio::spawn(async move { registry.delete_prefix(&Prefix::parse("/p/q").unwrap()).await })
    };
    gate.arrived().await;
    gate.open_and_close();
    assert_eq!(deleting.await.unwrap().unwrap(), 1);
    // A server that is silent is left after 4 s.
    assert!(began.elapsed() < TIME + Duration::from_secs(1), "{:?}", began.elapsed());
    // The sweep does the rest.
    until("the parent is gone", PATIENCE, async || {
        other
            .children(&Prefix::root(), Read::Linearizable)
            .await
            .unwrap()
            .is_empty()
    })
    .await;
}

/// Servers end a session by one transaction with all its keys' names in it. Where that is larger than they take, they stop,
/// and do not start again (ZOOKEEPER-4306).
#[tokio::test(flavor = "multi_thread")]
async fn a_session_has_no_more_ephemeral_keys_than_a_server_can_end() {
    const NAMES: usize = 64;
    let mut servers = Servers::start(1).await;
    let long = Duration::from_secs(40);
    let registry = connect_with_ttl(&servers.addresses(), long).await;
    let other = connect(&servers.addresses()).await;
    // 850 bytes each, with the namespace.
    let below = format!("/{}", "e".repeat(200)).repeat(4);
    let path = |batch: usize, number: usize| key(&format!("{below}/{batch:04}-{number:031}"));
    let put = async |batch: usize, count: usize| {
        let txn = (0..count).fold(Txn::new(), |txn, number| txn.put_ephemeral(&path(batch, number), ""));
        registry.commit(txn).await
    };
    let mut batch = 0;
    let refused = loop {
        match put(batch, NAMES).await {
            Ok(_) => batch += 1,
            Err(error) => break error,
        }
        assert!(batch < 20, "{batch} batches of {NAMES} names of 850 bytes");
    };
    assert!(
        matches!(refused, Error::TooLarge { size, limit: 800_000, .. } if size > 800_000),
        "{refused:?}"
    );
    assert!(batch * NAMES * 850 > 700_000, "{batch} batches");
    // Single ones fill what is left, and are refused as well. A put over one that is there is not.
    let mut singles = 0;
    while put(1000 + singles, 1).await.is_ok() {
        singles += 1;
    }
    assert!(matches!(put(5000, 1).await, Err(Error::TooLarge { .. })));
    put(0, 1).await.unwrap();
    // Locks are ephemeral keys too.
    registry.put(&key("/persistent"), "").await.unwrap();
    // What is deleted makes room, whoever deletes it.
    assert!(registry.delete(&path(0, 0)).await.unwrap());
    put(1000 + singles, 1).await.unwrap();
    assert!(matches!(put(5000, 1).await, Err(Error::TooLarge { .. })));
    assert!(other.delete(&path(0, 1)).await.unwrap());
    put(5000, 1).await.unwrap();
    assert!(matches!(put(5001, 1).await, Err(Error::TooLarge { .. })));
    registry.close().await.unwrap();
    servers.kill(0);
    servers.spawn(0);
    servers.ready().await;
    other.wait_connected(PATIENCE).await.unwrap();
    assert_eq!(other.count(&Prefix::root(), Read::Linearizable).await.unwrap(), 1);
}

/// A failed transaction takes a zxid and a place in every server's log, and its answer takes time that the next holder
/// waits. So a release that has met waiters expects them the next time.
#[tokio::test(flavor = "multi_thread")]
async fn a_release_with_waiters_is_one_transaction() {
    const ROUNDS: usize = 8;
    let servers = Servers::start(1).await;
    // So long that no keep-alive, which is a transaction as well, comes in between.
    let open = async || connect_with_ttl(&servers.addresses(), Duration::from_secs(60)).await;
    let (registry, waiters) = (open().await, open().await);
    let raw = servers.raw().await;
    let zxid = async || raw.set_data("/registry~/clock", b"", None).await.unwrap().mzxid;
    let lock = key("/lock");
    let queue = "/registry~/lock/1/lock";
    let mut holds = Vec::new();
    for place in 1..=ROUNDS {
        let waiter = registry.clone();
        let lock = lock.clone();
        holds.push(tokio::spawn(async move { waiter.lock(&lock).acquire().await.unwrap() }));
        until("it is in the queue", PATIENCE, async || {
            raw.list_children(queue).await.is_ok_and(|there| there.len() == place)
        })
        .await;
    }
    let last = tokio::spawn(async move {
        let held = waiters.lock(&lock).acquire().await.unwrap();
        (waiters, held)
    });
    until("the last is in the queue", PATIENCE, async || {
        raw.list_children(queue).await.unwrap().len() == ROUNDS + 1
    })
    .await;
    let mut spent = Vec::new();
    for hold in holds {
        let held = within(PATIENCE, hold).await.unwrap();
        let before = zxid().await;
        held.release().await.unwrap();
        // One of them is the reading itself.
        spent.push(zxid().await - before - 1);
    }
    // The first is one that fails, and one without the queue's directory.
    assert_eq!(spent[0], 2, "{spent:?}");
    assert!(spent[1..].iter().all(|spent| *spent == 1), "{spent:?}");
    let (waiters, held) = within(PATIENCE, last).await.unwrap();
    held.release().await.unwrap();
    // The last takes the directory along, here and where the queue was crowded when it was left before.
    assert!(raw.check_stat(queue).await.unwrap().is_none());
    let held = registry.lock(&key("/lock")).acquire().await.unwrap();
    held.release().await.unwrap();
    assert!(raw.check_stat(queue).await.unwrap().is_none());
    waiters.close().await.unwrap();
    registry.close().await.unwrap();
}
