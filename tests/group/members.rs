//! The members of a group, listed and changed by command while it works.

use std::collections::BTreeMap;
use std::time::Duration;

use registry::raft::{self, RaftConfig};
use registry::{Read, WatchRequest, WatchScope};
use registry_tests::{Process, Wire, key, within};
use serde_json::Value;

use crate::harness::{Group, NAMES, PATIENCE, free_address, options, serving};
use crate::{tells, until, value};

/// What `registry members --json` says, by name.
async fn listed(group: &Group, config: &str) -> BTreeMap<String, Value> {
    let said = group.run(config, &["--json", "members"]).await;
    let members = said.lines().map(|line| {
        let line: Value = serde_json::from_str(line).unwrap();
        let member = line["member"].clone();
        (member["name"].as_str().unwrap().to_owned(), member)
    });
    members.collect()
}

/// One that must be refused, with these words.
async fn refused(group: &Group, arguments: &[&str], words: &str) {
    let output = group.command("a", arguments).await;
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {said}");
    let reason = said
        .strip_prefix("registry: invalid request: ")
        .unwrap_or_else(|| panic!("{said}"));
    assert!(!reason.contains("invalid request") && reason.contains(words), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_are_listed_and_changed_by_command() {
    let group = Group::start(3).await;
    let leader = group.leader().await;
    // Whichever is asked: every member with its role, and who it was that answered.
    for name in &NAMES[..3] {
        let said = group.run(name, &["members"]).await;
        assert_eq!(said.lines().count(), 3, "{said}");
        for (at, line) in said.lines().enumerate() {
            let words: Vec<_> = line.split_whitespace().collect();
            let role = if at == leader { "leader" } else { "follower" };
            let address = group.net.address(at).to_string();
            assert_eq!(words[..4], ["member", NAMES[at], role, address.as_str()], "{said}");
            assert_eq!(line.ends_with("(answered)"), NAMES[at] == *name, "{said}");
        }
    }

    // A fourth, which the others reach elsewhere than it listens, is taken in once it is there.
    let listen = free_address();
    let way = Wire::to(listen).await;
    let address = way.address().to_string();
    group.write_joiner("d", listen, &format!("advertise = \"{address}\""));
    refused(&group, &["members", "add", "d", &address], "start it there with `join`").await;
    refused(&group, &["members", "add", "d", "elsewhere"], "no host and port").await;
    refused(&group, &["members", "add", "d d", &address], "is no name").await;
    refused(&group, &["members", "promote", "d"], "there are a, b, c").await;
    let mut d = Group::serve(group.config_file("d")).await;
    group.run("a", &["members", "add", "d", &address]).await;
    let learner = &listed(&group, "b").await["d"];
    assert_eq!(
        (&learner["role"], &learner["address"]),
        (&"learner".into(), &address.clone().into())
    );
    refused(&group, &["members", "add", "e", &address], "member \"d\", not \"e\"").await;

    // A learner serves stale reads and watches; it neither leads nor votes.
    let registry = raft::connect(&RaftConfig::remote([address.clone()]), &options())
        .await
        .unwrap();
    let mut watch = registry
        .watch(WatchRequest::new(key("/k"), WatchScope::Key))
        .await
        .unwrap();
    group.run("a", &["put", "/k", "1"]).await;
    tells(&mut watch, "1").await;
    assert_eq!(value(&registry, "/k", Read::Stale).await.unwrap(), "1");
    refused(&group, &["members", "transfer", "d"], "promote it first").await;
    way.cut();
    for n in 0..30 {
        group.run("a", &["put", "/k", &n.to_string()]).await;
    }
    assert_eq!(
        value(&group.connect(leader).await, "/k", Read::Linearizable)
            .await
            .unwrap(),
        "29"
    );
    until("the learner lacks what it was not sent", || async {
        let status = group.status(leader).await;
        let members = status.map(|status| status.members).unwrap_or_default();
        members
            .iter()
            .any(|member| member.name == "d" && member.lag >= Some(30))
    })
    .await;
    way.mend();
    tells(&mut watch, "29").await;

    // With a vote it can lead; led by it, the group loses it and goes on.
    group.run("c", &["members", "promote", "d"]).await;
    group.run("b", &["members", "transfer", "d"]).await;
    until("it leads", || async {
        listed(&group, "a").await["d"]["role"] == "leader"
    })
    .await;
    let members = listed(&group, "d").await;
    assert!(
        members
            .values()
            .all(|member| member["lag"].is_u64() && member["id"].is_u64())
    );
    group.run("a", &["members", "remove", "d"]).await;
    let ended = within(PATIENCE, d.ended()).await.unwrap();
    assert_eq!(ended.code(), Some(1));
    group.run("a", &["put", "/k", "after"]).await;
    assert_eq!(group.run("c", &["get", "/k"]).await, "after");
    assert_eq!(listed(&group, "a").await.len(), 3);
    refused(&group, &["members", "remove", "d"], "there is no member \"d\"").await;
}

/// A member that starts on an empty disk is told what to do.
async fn refuses_another_disk(group: &Group, name: &str) {
    std::fs::remove_dir_all(group.directory().join(name)).unwrap();
    let output = group.command(name, &["serve"]).await;
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains(&format!("members remove {name}")), "{said}");
}

/// A machine that lost its disk comes back under its name, with the list it founded the group with and with `join`: it is
/// refused, and its vote, which would make a majority, is no vote.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_disk_under_a_known_name_has_no_vote() {
    let mut group = Group::start(3).await;
    group.run("a", &["put", "/k", "1"]).await;
    let listen = group.listen[2];
    for at in [1, 2] {
        group.kill(at).await;
    }
    refuses_another_disk(&group, "c").await;
    // Without a majority nobody is taken in or refused.
    group.write_joiner("c", listen, "");
    std::fs::remove_dir_all(group.directory().join("c")).unwrap();
    let mut waiting = Process::start_unready(serving(&group.config_file("c")));
    let put = group.command("a", &["put", "/k", "2"]).await;
    assert_eq!(put.status.code(), Some(5), "{}", String::from_utf8_lossy(&put.stderr));
    let ended = tokio::time::timeout(Duration::ZERO, waiting.ended()).await;
    assert!(ended.is_err(), "it waits: {ended:?}");
    waiting.kill().await;
    // With the one that has its disk there is a majority again.
    group.restart(&[1]).await;
    assert_eq!(group.run("b", &["get", "/k"]).await, "1");
    refuses_another_disk(&group, "c").await;
}

/// Of the members that one asks to join, one has not heard yet that another of its name is gone: that refuses nobody.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_lags_behind_refuses_no_name() {
    let group = Group::start(3).await;
    group.run("a", &["members", "transfer", "b"]).await;
    let listen = free_address();
    group.write_joiner("d", listen, "");
    let mut d = Group::serve(group.config_file("d")).await;
    until("a knows of d", || async {
        let status = group.status(0).await;
        status.is_some_and(|status| status.members.iter().any(|member| member.name == "d"))
    })
    .await;
    // The first that is asked.
    group.net.isolate(0);
    group.run("b", &["members", "remove", "d"]).await;
    within(PATIENCE, d.ended()).await.unwrap();
    std::fs::remove_dir_all(group.directory().join("d")).unwrap();
    let _d = Group::serve(group.config_file("d")).await;
    assert_eq!(listed(&group, "b").await["d"]["role"], "learner");
}

/// One that serves HTTP has a session there, which a member that was removed can't close: it does not wait for that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removed_member_that_serves_http_stops_as_soon() {
    let long = "[registry]\nrequest_timeout = \"60s\"\nconnect_timeout = \"60s\"";
    let mut group = Group::start_with(3, |_| format!("http = \"{}\"\n{long}", free_address())).await;
    let gone = (group.leader().await + 1) % 3;
    group.run(NAMES[gone], &["put", "/k", "1"]).await;
    group.run(NAMES[gone], &["members", "remove", NAMES[gone]]).await;
    let ended = within(PATIENCE, group.process(gone).ended()).await.unwrap();
    assert_eq!(ended.code(), Some(1));
}
