//! Watches over HTTP.

use super::*;

#[tokio::test]
async fn a_watch_is_a_stream_of_events_and_goes_on_where_it_was() {
    let served = Served::start().await;
    served.puts("/w/a", "1").await;
    let mut watching = served.watches("/v1/watch/w/", &[]).await;
    let (kind, event) = watching.next().await;
    assert_eq!(
        (kind.as_str(), &event["entry"]["key"]),
        ("created", &Value::from("/w/a"))
    );
    let (kind, synced) = watching.next().await;
    assert_eq!(kind, "synced");
    let revision = served.puts("/w/a", "2").await;
    served.puts("/elsewhere", "2").await;
    let (kind, event) = watching.next().await;
    assert_eq!((kind.as_str(), &event["revision"]), ("updated", &Value::from(revision)));
    served.asks("/v1/kv/w/a", &["-X", "DELETE"]).await;
    let (kind, event) = watching.next().await;
    assert_eq!(
        (kind.as_str(), &event["entry"]["value"]),
        ("deleted", &Value::from("2"))
    );

    // From a revision on, in either way of saying it.
    let at = synced["revision"].to_string();
    let resumed = format!("/v1/watch/w/a?after={at}");
    for (path, arguments) in [
        (resumed.as_str(), vec![]),
        ("/v1/watch/w/a", vec!["-H".to_owned(), format!("Last-Event-ID: {at}")]),
    ] {
        let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        let mut again = served.watches(path, &arguments).await;
        assert_eq!(again.next().await.0, "updated");
        assert_eq!(again.next().await.0, "deleted");
    }

    // A watch has no end of its own, and is no reason not to stop.
    let mut member = served.member;
    assert!(within(PATIENCE, member.stop()).await.unwrap().success());
    within(PATIENCE, watching.child.wait()).await.unwrap();
}

/// Whatever the last id was that a browser has seen, the events after it are all that it lacks.
#[tokio::test]
async fn a_reader_that_reconnects_goes_on_from_the_last_id() {
    let served = Served::start().await;
    served.puts("/w/b", "1").await;
    served.puts("/w/a", "1").await;
    let mut watching = served.watches("/v1/watch/w/", &[]).await;
    // In the order of the keys, so that none of them is a place to go on from.
    assert_eq!(watching.next_with_id().await.2, None);
    assert_eq!(watching.next_with_id().await.2, None);
    let (_, synced, id) = watching.next_with_id().await;
    assert_eq!(id, synced["revision"].as_u64());
    // Two transactions of three, and one change.
    let command = async |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_registry"));
        command.args(["--config", "registry.toml"]).args(arguments);
        let output = within(PATIENCE, command.current_dir(served.dir.path()).output());
        assert!(output.await.unwrap().status.success());
    };
    for value in ["2", "3"] {
        let puts = ["/w/c", "/w/a", "/w/b"].map(|key| format!("{key}={value}"));
        command(&["txn", "--put", &puts[0], "--put", &puts[1], "--put", &puts[2]]).await;
    }
    let last = served.puts("/w/b", "4").await;
    let mut told = Vec::new();
    for _ in 0..7 {
        let (kind, body, id) = watching.next_with_id().await;
        told.push((kind, body, id));
    }
    for (at, (_, body, id)) in told.iter().enumerate() {
        let expected = matches!(at, 2 | 5 | 6).then(|| body["revision"].as_u64().unwrap());
        assert_eq!(*id, expected, "event {at}: {told:?}");
    }
    assert_eq!(told[6].2, Some(last));
    for (at, (_, _, id)) in told.iter().enumerate() {
        let Some(id) = id else { continue };
        let from = format!("Last-Event-ID: {id}");
        let mut again = served.watches("/v1/watch/w/?reset", &["-H", &from]).await;
        for expected in &told[at + 1..] {
            // With the same ids, too.
            assert_eq!(again.next_with_id().await, *expected, "after {id}");
        }
        assert_eq!(again.next().await.0, "synced", "after {id}");
    }
}

/// As from a store that was emptied: the reader would wait for ever, and be sure that it misses nothing.
#[tokio::test]
async fn a_watch_from_a_revision_still_to_come_is_refused_or_reset() {
    let served = Served::start().await;
    let revision = served.puts("/w/a", "1").await;
    let ahead = revision + 1_000;
    let last = format!("Last-Event-ID: {ahead}");
    for (path, arguments) in [
        (format!("/v1/watch/w/?after={ahead}"), vec![]),
        ("/v1/watch/w/".to_owned(), vec!["-H", last.as_str()]),
    ] {
        let said = served.asks(&path, &arguments).await.refuses(400, "invalid_request");
        assert!(
            said.contains(&ahead.to_string()) && said.contains("still to come"),
            "{said}"
        );
    }
    let mut watching = served.watches("/v1/watch/w/?reset", &["-H", &last]).await;
    assert_eq!(watching.next().await.0, "reset");
    let (kind, event, id) = watching.next_with_id().await;
    assert_eq!(
        (kind.as_str(), &event["entry"]["key"], id),
        ("created", &Value::from("/w/a"), None)
    );
    assert_eq!(watching.next_with_id().await.2, Some(revision));
    // The newest there is is no revision to come.
    let mut watching = served.watches(&format!("/v1/watch/w/?after={revision}"), &[]).await;
    assert_eq!(watching.next_with_id().await.2, Some(revision));
}

/// A restored group can tell nothing of before: who comes back with a revision of then is refused, or begins anew.
#[tokio::test]
async fn a_watch_from_what_is_compacted_is_refused_or_reset() {
    let served = Served::start().await;
    let revision = served.puts("/w/a", "1").await;
    let path = format!("/v1/watch/w/a?after={revision}");
    let Served { dir, mut member, .. } = served;
    let command = async |arguments: [&str; 2]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_registry"));
        command.args(["--config", "registry.toml"]).args(arguments);
        let output = within(PATIENCE, command.current_dir(dir.path()).output())
            .await
            .unwrap();
        assert!(output.status.success(), "{output:?}");
    };
    command(["backup", "one"]).await;
    assert!(within(PATIENCE, member.stop()).await.unwrap().success());
    std::fs::remove_dir_all(dir.path().join("data")).unwrap();
    command(["restore", "one"]).await;
    let served = Served::start_with(dir, String::new()).await;

    served.asks(&path, &[]).await.refuses(410, "compacted");
    let mut watching = served.watches(&format!("{path}&reset"), &[]).await;
    assert_eq!(watching.next().await.0, "reset");
    let (kind, event) = watching.next().await;
    assert_eq!(
        (kind.as_str(), &event["entry"]["value"]),
        ("created", &Value::from("1"))
    );
    assert_eq!(watching.next().await.0, "synced");
    served
        .asks(&format!("{path}&reset=perhaps"), &[])
        .await
        .refuses(400, "invalid_request");
}
