//! What is near the bounds of a request.

use registry_api::WatchItem;

use super::*;
use crate::harness::meter::Meter;

#[tokio::test(flavor = "multi_thread")]
async fn a_key_with_fifty_thousand_children_lists() {
    const CHILDREN: usize = 50_000;
    let servers = Servers::start(1).await;
    let raw = servers.raw().await;
    let registry = connect(&servers.addresses()).await;
    // Their names alone are larger than a request may be.
    let name = |number: usize| format!("a-child-with-a-long-name-{number:06}");
    raw.create("/registry/many", b"", &anyone()).await.unwrap();
    for chunk in (0..CHILDREN).collect::<Vec<_>>().chunks(1000) {
        let mut multi = raw.new_multi_writer();
        for number in chunk {
            let path = format!("/registry/many/{}", name(*number));
            multi.add_create(&path, b"v", &anyone()).unwrap();
        }
        multi.commit().await.unwrap();
    }
    // With the time that a handle has if nothing else is said.
    let (config, options) = (config(&servers.addresses()), Options::default());
    let usual = registry_zk::connect(&config, &options).await.unwrap();
    let names = children(&usual, "/many").await;
    assert!(names.iter().map(String::len).sum::<usize>() > 1 << 20);
    assert_eq!(names, (0..CHILDREN).map(name).collect::<Vec<_>>());
    let many = Prefix::parse("/many").unwrap();
    let listed = usual.list_all(List::new(key("/many"))).await.unwrap();
    assert_eq!(listed.len(), CHILDREN + 1);
    assert_eq!(
        usual.count(&many, Read::Linearizable).await.unwrap(),
        CHILDREN as u64 + 1
    );
    usual.close().await.unwrap();
    let mut watch = registry
        .watch(WatchRequest::new(key("/many"), WatchScope::Children))
        .await
        .unwrap();
    let mut told = 0;
    let reading = async {
        loop {
            match watch.next().await.unwrap().unwrap() {
                WatchItem::Changes(events) => told += events.len(),
                WatchItem::Synced(_) => return,
                WatchItem::Reset => panic!("nothing was reset"),
            }
        }
    };
    tokio::time::timeout(PATIENCE, reading).await.unwrap();
    assert_eq!(told, CHILDREN);
    drop(watch);
    assert_eq!(registry.delete_prefix(&many).await.unwrap(), CHILDREN as u64 + 1);
    assert_eq!(nodes(&raw).await, Vec::<String>::new());
    registry.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn large_values_come_in_pages_that_fit() {
    let servers = Servers::start(1).await;
    let registry = connect(&servers.addresses()).await;
    let large = vec![b'x'; registry_api::MAX_VALUE];
    for number in 0..20 {
        let path = key(&format!("/large/{number:02}"));
        registry.put(&path, large.clone()).await.unwrap();
    }
    let entries = registry.list_all(List::new(key("/large"))).await.unwrap();
    assert_eq!(entries.len(), 20);
    assert!(entries.iter().all(|entry| entry.value == large));
    // A transaction of the largest size, whose parents are all missing and take more than it does, is cut into requests
    // that fit.
    let below = format!("/{}", "s".repeat(30)).repeat(31);
    let deep = |number: usize| key(&format!("/{number:02}{below}"));
    let txn = (0..64).fold(Txn::new(), |txn, number| txn.put(&deep(number), vec![b'y'; 12_000]));
    registry.commit(txn).await.unwrap();
    assert_eq!(
        registry.count(&Prefix::root(), Read::Linearizable).await.unwrap(),
        20 + 64
    );
    registry.close().await.unwrap();
}

/// Keep-alives wait behind a response on the same connection, so none is larger than a few MiB, and a page reads no more than
/// it has room for: whatever the values are, and whichever come first.
#[tokio::test(flavor = "multi_thread")]
async fn no_response_is_larger_than_a_few_mebibytes() {
    const SMALL: usize = 40;
    const LARGE: usize = 64;
    const MOST: usize = 8 << 20;
    let servers = Servers::start(1).await;
    let meter = Meter::to(servers.address(0)).await;
    let (registry, other) = (connect(&meter.address).await, connect(&servers.addresses()).await);
    let value = vec![b'x'; registry_api::MAX_VALUE];
    let small = |number: usize| key(&format!("/many/a{number:02}"));
    let large = |number: usize| key(&format!("/many/b{number:02}"));
    let puts = (0..SMALL).fold(Txn::new(), |txn, number| txn.put(&small(number), "1"));
    other.commit(puts).await.unwrap();
    for number in 0..LARGE {
        other.put(&large(number), value.clone()).await.unwrap();
    }
    meter.take();
    let behind_the_small_ones = List {
        after: Some(small(SMALL - 1)),
        ..List::new(key("/many"))
    };
    for list in [List::new(key("/many")), behind_the_small_ones] {
        let page = registry.list(list).await.unwrap();
        assert!(page.next.is_some() && page.entries.len() < LARGE + SMALL);
        let (largest, total) = meter.take();
        assert!(largest < MOST && total < 5 * MOST, "{largest} bytes, {total} in all");
    }
    assert_eq!(
        registry.count(&Prefix::root(), Read::Linearizable).await.unwrap(),
        (SMALL + LARGE) as u64
    );
    let (largest, total) = meter.take();
    assert!(largest < MOST && total < 5 * MOST, "{largest} bytes, {total} in all");

    let request = WatchRequest::new(key("/many"), WatchScope::Subtree);
    let mut watch = registry.watch(request).await.unwrap();
    let mut picture = Picture::default();
    picture
        .until(&mut watch, |picture| picture.synced.is_some())
        .await
        .unwrap();
    assert_eq!(picture.entries.len(), SMALL + LARGE);
    let (largest, _) = meter.take();
    assert!(largest < MOST, "{largest} bytes");
    // The watch hears of many changes at a time.
    meter.hold(true);
    for number in 0..LARGE {
        other.put(&large(number), vec![b'y'; 800_000]).await.unwrap();
    }
    meter.hold(false);
    let changed = |picture: &Picture| {
        picture
            .entries
            .values()
            .filter(|entry| entry.value.len() == 800_000)
            .count()
    };
    picture
        .until(&mut watch, |picture| changed(picture) == LARGE)
        .await
        .unwrap();
    let (largest, _) = meter.take();
    assert!(largest < MOST, "{largest} bytes");
    registry.close().await.unwrap();
    other.close().await.unwrap();
}

/// A delete takes along the parents that it empties. Where all of them do not fit into a request, they are left to the
/// sweep, and the transaction is carried out. A chroot is in front of each path of the request.
#[tokio::test(flavor = "multi_thread")]
async fn deletes_whose_parents_do_not_fit_leave_them_to_the_sweep() {
    let servers = Servers::start(1).await;
    for (chroot, segments, length) in [
        (String::new(), 31, 31),
        (format!("/{}", "c".repeat(200)).repeat(3), 20, 24),
    ] {
        let registry = connect(&format!("{}{chroot}", servers.addresses())).await;
        let session = registry.session().state().id();
        let below = format!("/{}", "s".repeat(length)).repeat(segments);
        let deep = |number: usize| key(&format!("/{number:02}{below}"));
        let puts = (0..64).fold(Txn::new(), |txn, number| txn.put(&deep(number), "y"));
        registry.commit(puts).await.unwrap();
        let deletes = (0..64).fold(Txn::new(), |txn, number| txn.delete(&deep(number)));
        let committed = registry.commit(deletes).await.unwrap();
        assert_eq!(committed.changed, [true; 64]);
        assert_eq!(registry.count(&Prefix::root(), Read::Linearizable).await.unwrap(), 0);
        until("the parents are gone", 6 * SOON, async || {
            children(&registry, "/").await.is_empty()
        })
        .await;
        assert_eq!(registry.session().state().id(), session);
        registry.close().await.unwrap();
    }
}

/// Birth znodes have names of up to three times the key's. What is too large with them is refused before it is sent.
#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_that_is_too_large_for_a_request_is_refused_by_name() {
    let servers = Servers::start(1).await;
    let registry = connect(&servers.addresses()).await;
    let percents = format!("/{}", "%".repeat(240)).repeat(4);
    let long = |number: usize| key(&format!("/{number:02}{percents}"));
    let child = |number: usize| key(&format!("{}/x", long(number)));
    for numbers in (0..63).collect::<Vec<_>>().chunks(16) {
        let puts = numbers
            .iter()
            .fold(Txn::new(), |txn, number| txn.put(&child(*number), ""));
        registry.commit(puts).await.unwrap();
    }
    // Each of these is put over a placeholder, and gets a birth znode.
    let puts = |value: usize| {
        let txn = Txn::new().put(&key("/value"), vec![b'v'; value]);
        (0..63).fold(txn, |txn, number| txn.put(&long(number), "v"))
    };
    let refused = registry.commit(puts(830_000)).await;
    assert!(
        matches!(refused, Err(Error::TooLarge { size, limit: 1_000_000, .. }) if size > 1_000_000),
        "{refused:?}"
    );
    assert_eq!(get(&registry, "/value").await, None);
    registry.commit(puts(700_000)).await.unwrap();
    assert_eq!(get(&registry, "/value").await.unwrap().value.len(), 700_000);
    // They are deleted with their birth znodes.
    assert_eq!(registry.delete_prefix(&Prefix::root()).await.unwrap(), 63 + 63 + 1);
    registry.close().await.unwrap();
}

/// A server that takes less than it does as shipped closes the connection on a larger request: what became of that is not
/// known, and the handle goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_takes_less_leaves_the_outcome_unknown() {
    let servers = Servers::start_small(100_000).await;
    let options = Options {
        request_timeout: Duration::from_secs(5),
        ..options()
    };
    let registry = registry_zk::connect(&config(&servers.addresses()), &options)
        .await
        .unwrap();
    registry.put(&key("/fits"), vec![b'x'; 90_000]).await.unwrap();
    let refused = registry.put(&key("/large"), vec![b'x'; 110_000]).await;
    assert!(matches!(refused, Err(Error::OutcomeUnknown { .. })), "{refused:?}");
    assert_eq!(get(&registry, "/large").await, None);
    assert_eq!(get(&registry, "/fits").await.unwrap().value.len(), 90_000);
    registry.put(&key("/fits"), "less").await.unwrap();
    // A page of more than that is read in answers, which it does not bound.
    for number in 0..20 {
        let path = key(&format!("/many/{number}"));
        registry.put(&path, vec![b'x'; 90_000]).await.unwrap();
    }
    let listed = registry.list_all(List::new(key("/many"))).await.unwrap();
    assert_eq!(listed.len(), 20);
    registry.close().await.unwrap();
}
