//! What the server and the way to it do to a handle, and what the handle makes of it.

#![allow(clippy::unwrap_used)]

mod harness;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use harness::{Server, TTL, causes, connect, key, options, try_connect, until, url, within};
use registry_api::{
    DeleteCause, Error, Event, Expect, Kind, Options, Prefix, Read, Registry, Txn, Watch, WatchFrom, WatchItem,
    WatchRequest, WatchScope,
};
use registry_mysql::{History, MysqlConfig};
use registry_tests::Wire;
use registry_tests::watch::{Picture, same_as_store};
use sqlx::{Executor, Row};

const PATIENCE: Duration = Duration::from_secs(20);

async fn watch_all(registry: &Arc<dyn Registry>) -> Watch {
    let everything = WatchRequest::new(Prefix::root(), WatchScope::Subtree);
    registry.watch(everything).await.unwrap()
}

async fn value(registry: &Arc<dyn Registry>, path: &str) -> Option<String> {
    let entry = registry.get(&key(path), Read::Linearizable).await.unwrap();
    entry.map(|entry| String::from_utf8(entry.value.to_vec()).unwrap())
}

/// A handle whose requests may take long.
async fn connect_patiently(server: &Server) -> Arc<dyn Registry> {
    let patient = Options {
        request_timeout: Duration::from_secs(30),
        ..options()
    };
    registry_mysql::connect(&MysqlConfig::new(url(&server.address())), &patient)
        .await
        .unwrap()
}

/// Waits until somebody waits for a lock. (By the counter: the server renews `innodb_trx` only when nobody has read it for
/// 100 ms, so who asks for it more often sees what was true when he began.)
async fn until_waiting(server: &Server) {
    until("somebody waits for a lock", async || {
        waits_for_locks(server).await != "0"
    })
    .await;
}

async fn waits_for_locks(server: &Server) -> String {
    let waits = sqlx::raw_sql("SHOW GLOBAL STATUS LIKE 'Innodb_row_lock_current_waits'");
    let rows = server.root().await.fetch_all(waits).await.unwrap();
    rows[0].try_get_unchecked(1).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_are_killed_are_replaced_without_the_callers_notice() {
    let server = Server::start().await;
    let registry = connect(&server.address()).await;
    let session = registry.session().live().unwrap();
    let mut watch = watch_all(&registry).await;
    let mut picture = Picture::default();
    for round in 0..20 {
        let path = format!("/k/{}", round % 3);
        registry.put(&key(&path), round.to_string()).await.unwrap();
        server.kill_connections("root").await;
        assert_eq!(value(&registry, &path).await, Some(round.to_string()));
    }
    registry.put(&key("/end"), "").await.unwrap();
    let end = key("/end");
    picture
        .until(&mut watch, |picture| picture.entries.contains_key(&end))
        .await
        .unwrap();
    same_as_store(&*registry, "/", &picture).await.unwrap();
    assert_eq!(registry.session().live().unwrap(), session);
    registry.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn commits_without_an_answer_are_settled_and_count_once() {
    let server = Server::start().await;
    let wire = Wire::to(server.address().parse().unwrap()).await;
    let registry = connect(&wire.address().to_string()).await;
    let counter = key("/counter");
    registry.put(&counter, "0").await.unwrap();
    let answered = Arc::new(AtomicU64::new(0));
    let writers = (0..8).map(|writer| {
        let (registry, counter, answered) = (registry.clone(), counter.clone(), answered.clone());
        tokio::spawn(async move {
            let mut counted = 0;
            for n in 0..60 {
                let entry = registry.get(&counter, Read::Linearizable).await.unwrap().unwrap();
                let next = std::str::from_utf8(&entry.value).unwrap().parse::<u64>().unwrap() + 1;
                let once = key(&format!("/once/{writer}/{n}"));
                let txn = Txn::new()
                    .when(&counter, Expect::ModRevision(entry.mod_revision))
                    .when(&once, Expect::Absent)
                    .put(&counter, next.to_string())
                    .put(&once, "");
                let commit = registry.commit(txn).await;
                answered.fetch_add(1, Ordering::Relaxed);
                match commit {
                    Ok(_) => counted += 1,
                    Err(Error::Conflict { key, .. }) => assert_eq!(key, counter, "it was applied, and tried again"),
                    Err(error) => panic!("{}", causes(&error)),
                }
            }
            counted
        })
    });
    let writers: Vec<_> = writers.collect();
    let cutting = tokio::spawn(async move {
        let mut cuts = 0;
        loop {
            wire.refuse();
            tokio::time::sleep(Duration::from_millis(5)).await;
            wire.mend();
            cuts += 1;
            // Connections are made and used between two cuts, however slow the machine is; the next one comes in the middle
            // of something.
            let before = answered.load(Ordering::Relaxed);
            while answered.load(Ordering::Relaxed) == before {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            tokio::time::sleep(Duration::from_millis(cuts % 7)).await;
        }
    });
    let mut counted = 0;
    for writer in writers {
        counted += within(Duration::from_secs(50), "the writers", writer).await.unwrap();
    }
    cutting.abort();
    let direct = connect(&server.address()).await;
    assert_eq!(value(&direct, "/counter").await, Some(counted.to_string()));
    let once = direct
        .count(&Prefix::from(key("/once")), Read::Linearizable)
        .await
        .unwrap();
    assert_eq!(once, counted);
    assert!(counted >= 60, "{counted}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lock_that_another_holds_for_long_means_that_nothing_happened() {
    let server = Server::start_with(&["--innodb-lock-wait-timeout=1"]).await;
    let registry = connect(&server.address()).await;
    registry.put(&key("/a"), "before").await.unwrap();
    let mut root = server.root().await;
    root.execute(sqlx::raw_sql(
        "USE test; BEGIN; SELECT * FROM registry_namespaces FOR UPDATE",
    ))
    .await
    .unwrap();
    // Longer than the server waits (1205), and than the request may take.
    let refused = registry.put(&key("/a"), "blocked").await.unwrap_err();
    assert!(matches!(refused, Error::Unavailable { .. }), "{}", causes(&refused));
    assert!(causes(&refused).contains("1205"), "{}", causes(&refused));
    // One that is let go in time: the waits that ran out meanwhile were tried again.
    let patient = connect_patiently(&server).await;
    let waiting = tokio::spawn(async move { patient.put(&key("/b"), "waited").await });
    for _ in 0..3 {
        until_waiting(&server).await;
        tokio::time::sleep(Duration::from_millis(700)).await;
    }
    until_waiting(&server).await;
    root.execute(sqlx::raw_sql("ROLLBACK")).await.unwrap();
    within(PATIENCE, "the put", waiting).await.unwrap().unwrap();
    assert_eq!(value(&registry, "/a").await, Some("before".into()));
    registry.close().await.unwrap();
}

/// A statement waits in the server also when its client has given up: not for long, or those that retry take all connections.
#[tokio::test(flavor = "multi_thread")]
async fn a_statement_that_nobody_waits_for_ends() {
    let server = Server::start().await;
    let short = Options {
        request_timeout: Duration::from_secs(1),
        ..options()
    };
    let config = MysqlConfig::new(url(&server.address()));
    let registry = registry_mysql::connect(&config, &short).await.unwrap();
    let mut root = server.root().await;
    let hold = "USE test; BEGIN; SELECT * FROM registry_namespaces FOR UPDATE";
    root.execute(sqlx::raw_sql(hold)).await.unwrap();
    registry.put(&key("/a"), "blocked").await.unwrap_err();
    drop(registry);
    assert_ne!(waits_for_locks(&server).await, "0");
    until("no statement waits", async || waits_for_locks(&server).await == "0").await;
    root.execute(sqlx::raw_sql("ROLLBACK")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadlock_is_tried_again() {
    let server = Server::start().await;
    let registry = connect_patiently(&server).await;
    registry.put(&key("/a"), "before").await.unwrap();
    for n in 0..50 {
        registry.put(&key(&format!("/many/{n}")), "").await.unwrap();
    }
    // An operator who takes the locks in another order: the rows, then the counter; and who changed more, so that the
    // server undoes the put.
    let mut root = server.root().await;
    root.execute(sqlx::raw_sql(
        "USE test; BEGIN; SELECT * FROM registry_entries FOR UPDATE; UPDATE registry_changes SET session = 7",
    ))
    .await
    .unwrap();
    let waiting = tokio::spawn({
        let registry = registry.clone();
        async move { registry.put(&key("/a"), "after").await }
    });
    until_waiting(&server).await;
    let operator = root
        .execute(sqlx::raw_sql("SELECT * FROM registry_namespaces FOR UPDATE; COMMIT"))
        .await;
    assert!(operator.is_ok(), "{operator:?}");
    within(PATIENCE, "the put", waiting).await.unwrap().unwrap();
    assert_eq!(value(&registry, "/a").await, Some("after".into()));
    let found = "SHOW ENGINE INNODB STATUS";
    let status = server.root().await.fetch_all(sqlx::raw_sql(found)).await.unwrap();
    let status: String = status[0].try_get_unchecked(2).unwrap();
    assert!(status.contains("LATEST DETECTED DEADLOCK"), "{status}");
    registry.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn small_packets_are_refused_at_connect() {
    let server = Server::start_with(&["--max-allowed-packet=2M"]).await;
    let refused = try_connect(&server.address()).await.unwrap_err();
    assert!(
        matches!(&refused, Error::Config { field, .. } if field.contains("max_allowed_packet")),
        "{refused:?}"
    );
    assert!(refused.to_string().contains("4194304"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_largest_transactions_fit_into_the_smallest_packets() {
    let server = Server::start_with(&["--max-allowed-packet=4M"]).await;
    let registry = connect(&server.address()).await;
    let deep = |n: usize| key(&format!("/{n}{}", "/some-longer-segment-of-a-name".repeat(30)));
    let value = vec![0xff; registry_api::MAX_TXN / 64 - 1900];
    let largest = (0..64).fold(Txn::new(), |txn, n| {
        txn.put(&deep(n), value.clone()).when(&deep(100 + n), Expect::Absent)
    });
    registry.commit(largest).await.unwrap();
    registry
        .put(&key("/one"), vec![0; registry_api::MAX_VALUE])
        .await
        .unwrap();
    // Many at once are more than one packet takes, and go as several.
    let many = (0..16).map(|n| {
        let registry = registry.clone();
        tokio::spawn(async move { registry.put(&key(&format!("/many/{n}")), vec![1; 400_000]).await })
    });
    for put in many.collect::<Vec<_>>() {
        put.await.unwrap().unwrap();
    }
    // Pages of large values are read in bounded answers.
    let listed = registry
        .list_all(registry_api::List::new(Prefix::root()))
        .await
        .unwrap();
    assert_eq!(listed.len(), 64 + 1 + 16);
    registry.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_that_lags_behind_the_history_bridges_the_gap() {
    let server = Server::start().await;
    let wire = Wire::to(server.address().parse().unwrap()).await;
    let mut config = MysqlConfig::new(url(&server.address()));
    config.history = History::new(100).unwrap();
    let other = registry_mysql::connect(&config, &options()).await.unwrap();
    let registry = connect(&wire.address().to_string()).await;
    let first = other.put(&key("/w/old"), "").await.unwrap();
    other.put(&key("/w/stays"), "1").await.unwrap();
    let mut watch = watch_all(&registry).await;
    let mut picture = Picture::default();
    picture
        .until(&mut watch, |picture| picture.entries.len() == 2)
        .await
        .unwrap();
    wire.refuse();
    other.delete(&key("/w/old")).await.unwrap();
    for n in 0..500 {
        other.put(&key("/w/busy"), n.to_string()).await.unwrap();
    }
    until("the log is trimmed", async || {
        let from = WatchRequest {
            from: WatchFrom::After(first),
            ..WatchRequest::new(Prefix::root(), WatchScope::Subtree)
        };
        matches!(other.watch(from).await, Err(Error::Compacted { .. }))
    })
    .await;
    let kept = "SELECT COUNT(*) FROM test.registry_changes";
    let mut root = server.root().await;
    let rows = root.fetch_all(sqlx::raw_sql(kept)).await.unwrap();
    let kept: u64 = rows[0].try_get_unchecked(0).unwrap();
    assert!((100..=501).contains(&kept), "{kept}");
    wire.mend();
    let end = key("/w/end");
    other.put(&end, "").await.unwrap();
    picture
        .until(&mut watch, |picture| picture.entries.contains_key(&end))
        .await
        .unwrap();
    same_as_store(&*other, "/", &picture).await.unwrap();
    // One that asked for a reset gets all anew.
    let from = WatchRequest {
        from: WatchFrom::AfterOrReset(first),
        ..WatchRequest::new(Prefix::root(), WatchScope::Subtree)
    };
    let mut reset = other.watch(from).await.unwrap();
    assert!(matches!(
        within(PATIENCE, "a reset", reset.next()).await.unwrap().unwrap(),
        WatchItem::Reset
    ));
    other.close().await.unwrap();
}

/// The log is trimmed by statements that may stop in the middle: a reader must not take what is left of a revision for the
/// whole.
#[tokio::test(flavor = "multi_thread")]
async fn a_revision_that_is_half_trimmed_is_told_as_a_whole_or_not_at_all() {
    let server = Server::start().await;
    let wire = Wire::to(server.address().parse().unwrap()).await;
    let registry = connect(&wire.address().to_string()).await;
    let other = connect(&server.address()).await;
    let before = other.put(&key("/before"), "").await.unwrap();
    // A watch that stands before the revision that is trimmed.
    let mut running = watch_all(&registry).await;
    let mut picture = Picture::default();
    picture
        .until(&mut running, |picture| picture.synced.is_some())
        .await
        .unwrap();
    wire.refuse();
    let txn = (0..60).fold(Txn::new(), |txn, n| txn.put(&key(&format!("/many/{n}")), ""));
    let many = other.commit(txn).await.unwrap().revision;
    let half = format!(
        "USE test; UPDATE registry_namespaces SET compacted = {many}; \
         DELETE FROM registry_changes WHERE revision <= {many} ORDER BY revision, position LIMIT 36"
    );
    server.run(&half).await;
    let from = WatchRequest {
        from: WatchFrom::AfterOrReset(before),
        ..WatchRequest::new(Prefix::root(), WatchScope::Subtree)
    };
    let mut reset = other.watch(from.clone()).await.unwrap();
    assert!(matches!(
        within(PATIENCE, "a reset", reset.next()).await.unwrap().unwrap(),
        WatchItem::Reset
    ));
    let after = WatchRequest {
        from: WatchFrom::After(before),
        ..from
    };
    assert!(matches!(other.watch(after).await, Err(Error::Compacted { .. })));
    wire.mend();
    picture
        .until(&mut running, |picture| picture.entries.len() == 61)
        .await
        .unwrap();
    same_as_store(&*other, "/", &picture).await.unwrap();
    other.close().await.unwrap();
}

/// What is trimmed is trimmed in whole revisions.
#[tokio::test(flavor = "multi_thread")]
async fn a_trimmed_log_begins_with_a_whole_revision() {
    let server = Server::start().await;
    let mut config = MysqlConfig::new(url(&server.address()));
    config.history = History::new(100).unwrap();
    let registry = registry_mysql::connect(&config, &options()).await.unwrap();
    let mut rows = Box::pin(async {
        loop {
            for n in 0.. {
                // Revisions of 61 rows, of which a thousand end within one.
                let txn = (0..61).fold(Txn::new(), |txn, m| txn.put(&key(&format!("/k/{m}")), n.to_string()));
                registry.commit(txn).await.unwrap();
            }
        }
    });
    let partial = "SELECT COUNT(*) FROM (SELECT COUNT(*) AS size FROM test.registry_changes GROUP BY revision) AS r WHERE size <> 61";
    let compacted = "SELECT compacted FROM test.registry_namespaces";
    let mut root = server.root().await;
    let mut looks = Box::pin(async {
        let mut compactions = std::collections::BTreeSet::new();
        while compactions.len() < 4 {
            let found = root.fetch_all(sqlx::raw_sql(partial)).await.unwrap();
            assert_eq!(found[0].try_get_unchecked::<u64, _>(0).unwrap(), 0);
            let found = root.fetch_all(sqlx::raw_sql(compacted)).await.unwrap();
            compactions.insert(found[0].try_get_unchecked::<u64, _>(0).unwrap());
        }
    });
    tokio::select! {
        () = &mut rows => {}
        () = within(Duration::from_secs(40), "it is trimmed", &mut looks) => {}
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_went_back_in_time_is_noticed_by_watches() {
    let mut server = Server::start().await;
    let wire = Wire::to(server.address().parse().unwrap()).await;
    let registry = connect(&wire.address().to_string()).await;
    registry.put(&key("/kept"), "1").await.unwrap();
    let mut watch = watch_all(&registry).await;
    let mut picture = Picture::default();
    picture
        .until(&mut watch, |picture| picture.synced.is_some())
        .await
        .unwrap();
    let mut known = Vec::new();
    // A copy, as a replica that lags has it.
    server.kill();
    server.copy("data", "replica");
    server.spawn();
    assert!(server.is_ready().await);
    registry.wait_connected(PATIENCE).await.unwrap();
    registry.put(&key("/lost"), "1").await.unwrap();
    registry.put(&key("/kept"), "2").await.unwrap();
    let next = async |watch: &mut Watch, known: &mut Vec<String>| match within(PATIENCE, "an item", watch.next())
        .await
        .unwrap()
        .unwrap()
    {
        WatchItem::Changes(events) => known.extend(events.iter().map(|event| match event {
            Event::Created(entry) => format!("created {} {:?}", entry.key, entry.value),
            Event::Updated(entry) => format!("updated {} {:?}", entry.key, entry.value),
            Event::Deleted { last, .. } => format!("deleted {} {:?}", last.key, last.value),
        })),
        WatchItem::Synced(_) | WatchItem::Reset => {}
    };
    while known.last().is_none_or(|last| last != "updated /kept b\"2\"") {
        next(&mut watch, &mut known).await;
    }
    known.clear();
    // The replica takes over. Others get ahead of the lost revisions before the watch looks.
    wire.refuse();
    server.kill();
    server.swap("data", "replica");
    server.spawn();
    assert!(server.is_ready().await);
    let other = connect(&server.address()).await;
    for n in 0..3 {
        other.put(&key("/new"), n.to_string()).await.unwrap();
    }
    wire.mend();
    while known
        .last()
        .is_none_or(|last| !last.starts_with("created /new") && last != "updated /new b\"2\"")
    {
        next(&mut watch, &mut known).await;
    }
    assert!(known.contains(&"deleted /lost b\"1\"".into()), "{known:?}");
    assert!(known.contains(&"created /kept b\"1\"".into()), "{known:?}");
    // L3. The handle never saw a token, and raises their epoch all the same: to the seconds since 2025.
    let held = within(PATIENCE, "a lock", registry.lock(&key("/l")).acquire())
        .await
        .unwrap();
    assert!(held.token().get() >> 32 > 58_000_000, "{}", held.token());
    other.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_session_puts_nothing_and_its_keys_go_at_one_revision() {
    let server = Server::start().await;
    let wire = Wire::to(server.address().parse().unwrap()).await;
    let (paused, other) = (
        connect(&wire.address().to_string()).await,
        connect(&server.address()).await,
    );
    for n in 0..5 {
        paused.put_ephemeral(&key(&format!("/e/{n}")), "").await.unwrap();
    }
    // Taken over by a live session, it is not the old one's any more.
    other.take_over(&key("/e/0"), "mine", Kind::Ephemeral).await.unwrap();
    let mut watch = watch_all(&other).await;
    let session = paused.session().live().unwrap();
    wire.cut();
    let gone = async {
        loop {
            let item = watch.next().await.unwrap().unwrap();
            if let WatchItem::Changes(events) = item
                && matches!(events[0], Event::Deleted { .. })
            {
                return events;
            }
        }
    };
    let events = within(4 * TTL, "the session's end", gone).await;
    assert_eq!(events.len(), 4);
    for event in &events {
        assert!(
            matches!(
                event,
                Event::Deleted {
                    cause: DeleteCause::SessionEnded,
                    ..
                }
            ),
            "{event:?}"
        );
        assert_eq!(event.revision(), events[0].revision());
        assert_eq!(event.entry().session, Some(session));
    }
    wire.mend();
    until("there is a new session", async || {
        paused.session().live().is_ok_and(|now| now != session)
    })
    .await;
    paused.put_ephemeral(&key("/e/1"), "new").await.unwrap();
    assert_eq!(value(&other, "/e/0").await, Some("mine".into()));
    other.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_named_and_nothing_is_lost() {
    // A table space that may not grow: to a writer the same as a disk that is full, without a disk to fill.
    let bounded = "--innodb-data-file-path=ibdata1:12M:autoextend:max:64M";
    let mut server = Server::start_with(&["--innodb-file-per-table=OFF", bounded]).await;
    let registry = connect(&server.address()).await;
    let mut put = Vec::new();
    let refused = loop {
        let path = format!("/f/{}", put.len());
        match registry.put(&key(&path), vec![b'x'; 800_000]).await {
            Ok(_) => put.push(path),
            Err(error) => break error,
        }
        assert!(put.len() < 1000, "it never fills up");
    };
    // MariaDB 11.8 aborts when a rollback finds no room. It gets some, and has to have what it acknowledged.
    let aborts = !causes(&refused).contains("1114");
    if aborts {
        // It writes the trace of its stack first.
        let began = Instant::now();
        while !server.has_ended() {
            assert!(began.elapsed() < PATIENCE, "it runs: {}", causes(&refused));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        server.add_argument("--innodb-data-file-path=ibdata1:12M:autoextend");
        server.restart().await;
        registry.wait_connected(PATIENCE).await.unwrap();
    } else {
        assert!(matches!(refused, Error::Unavailable { .. }), "{refused:?}");
    }
    // What was acknowledged is there, and what was refused is not.
    let entries = registry
        .list_all(registry_api::List::new(Prefix::root()))
        .await
        .unwrap();
    let unknown = usize::from(matches!(refused, Error::OutcomeUnknown { .. }));
    assert!(
        (put.len()..=put.len() + unknown).contains(&entries.len()),
        "{} of {}",
        entries.len(),
        put.len()
    );
    if aborts {
        return;
    }
    // Reads go on, and so does the session.
    assert!(registry.health().await.is_ok());
    assert!(registry.session().live().is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_handle_sends_one_request_in_each_poll_interval() {
    const INTERVAL: Duration = Duration::from_millis(50);
    let server = Server::start().await;
    let registry = connect(&server.address()).await;
    let mut watches = Vec::new();
    for n in 0..20 {
        let request = WatchRequest::new(Prefix::from(key(&format!("/idle/{n}"))), WatchScope::Key);
        let mut watch = registry.watch(request).await.unwrap();
        while !matches!(watch.next().await.unwrap().unwrap(), WatchItem::Synced(_)) {}
        watches.push(watch);
    }
    let mut root = server.root().await;
    let mut questions = async || -> u64 {
        let asked = sqlx::raw_sql("SHOW GLOBAL STATUS LIKE 'Questions'");
        let rows = root.fetch_all(asked).await.unwrap();
        rows[0].try_get_unchecked::<String, _>(1).unwrap().parse().unwrap()
    };
    let (first, began) = (questions().await, Instant::now());
    let (mut asked, mut ours) = (0, 0);
    within(PATIENCE, "two hundred statements", async {
        while asked < 200 {
            tokio::time::sleep(2 * INTERVAL).await;
            ours += 1;
            asked = questions().await - first - ours;
        }
    })
    .await;
    // A request is two statements: one reads, one checks that the server is the primary. Keep-alives and reads of the
    // sessions are some more.
    let intervals = began.elapsed().as_secs_f64() / INTERVAL.as_secs_f64();
    assert!(
        asked as f64 <= 2.0 * 1.25 * intervals + 10.0,
        "{asked} statements in {intervals:.0} intervals"
    );
}
