//! The walk-through of etcd's raftexample, as the book has it, and the replacement of a dead machine.

use registry_tests::{process, within};

use crate::harness::{Group, PATIENCE};

fn joiner(group: &Group, name: &str, data: &str) {
    let join: Vec<_> = (0..group.size())
        .map(|at| format!("\"{}\"", group.net.address(at)))
        .collect();
    let text = format!(
        "[registry.raft]\nmember = \"{name}\"\ndata_dir = \"{}\"\nlisten = \"127.0.0.1:{}\"\njoin = [{}]\n",
        group.directory().join(data).display(),
        process::free_port(),
        join.join(", ")
    );
    std::fs::write(group.config_file(name), text).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_walk_through_of_raftexample() {
    let mut group = Group::start(3).await;
    // Write a key, and read it.
    group.run("a", &["put", "/my-key", "hello"]).await;
    assert_eq!(group.run("a", &["get", "/my-key"]).await, "hello");

    // Stop one of the three, write, and read it elsewhere.
    let status = group.process(1).stop().await.unwrap();
    assert!(status.success(), "{status}");
    group.run("a", &["put", "/my-key", "foo"]).await;
    assert_eq!(group.run("c", &["get", "/my-key"]).await, "foo");

    // Start it again: it has the new value.
    group.restart(&[1]).await;
    assert_eq!(group.run("b", &["get", "/my-key"]).await, "foo");

    // A fourth member joins, and gets a vote.
    joiner(&group, "d", "d");
    let _d = Group::serve(group.config_file("d")).await;
    group.run("a", &["members", "promote", "d"]).await;
    assert_eq!(group.run("d", &["get", "/my-key"]).await, "foo");
    let members = group.run("d", &["members"]).await;
    assert_eq!(members.lines().count(), 4, "{members}");

    // The third is removed, and stops itself.
    group.run("a", &["members", "remove", "c"]).await;
    let ended = within(PATIENCE, group.process(2).ended()).await.unwrap();
    assert_eq!(ended.code(), Some(1));
    let refused = group.command("c", &["serve"]).await;
    assert_eq!(refused.status.code(), Some(1));
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(said.contains("was removed"), "{said}");
    group.run("a", &["put", "/my-key", "bar"]).await;
    assert_eq!(group.run("d", &["get", "/my-key"]).await, "bar");
    assert_eq!(group.run("a", &["members"]).await.lines().count(), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_machine_is_replaced_by_three_commands() {
    let mut group = Group::start(3).await;
    group.run("a", &["put", "/k", "1"]).await;
    group.kill(2).await;

    group.run("a", &["members", "remove", "c"]).await;
    joiner(&group, "c", "c-on-its-new-machine");
    let _c = Group::serve(group.config_file("c")).await;
    group.run("a", &["members", "promote", "c"]).await;

    assert_eq!(group.run("c", &["get", "/k"]).await, "1");
    // It counts: with another gone there is still a majority.
    group.kill(1).await;
    group.run("a", &["put", "/k", "2"]).await;
    let members = group.run("a", &["members"]).await;
    assert_eq!(
        members.lines().filter(|line| !line.contains("learner")).count(),
        3,
        "{members}"
    );
    assert_eq!(group.run("c", &["get", "/k"]).await, "2");
}
