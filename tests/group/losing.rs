//! A client that reaches one member alone, which stops: it reports its loss before another client holds.

use std::process::Stdio;
use std::time::Instant;

use registry_tests::within;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use crate::harness::{Group, PATIENCE};

fn client(endpoints: &str, arguments: &[&str]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_registry"));
    command
        .args([
            "--set",
            &format!("raft.endpoints={endpoints}"),
            "--set",
            "session_ttl=3s",
        ])
        .args(arguments)
        .env_remove("REGISTRY_CONFIG")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    command.spawn().unwrap()
}

/// Waits until its first line is printed. Returns when that was.
async fn holds(child: &mut Child) -> Instant {
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    within(PATIENCE, lines.next_line()).await.unwrap().expect("it holds");
    Instant::now()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_is_cut_off_reports_its_loss_before_another_client_holds() {
    let mut group = Group::start(3).await;
    for arguments in [&["lock", "/two/l"][..], &["elect", "/two/e", "--value", "x"]] {
        let leader = group.leader().await;
        let lost = (leader + 1) % 3;
        let rest: Vec<_> = (0..3).filter(|at| *at != lost).map(|at| group.address(at)).collect();
        let mut first = client(&group.address(lost), arguments);
        holds(&mut first).await;
        let mut second = client(&rest.join(","), arguments);
        group.process(lost).pause();
        let (ended, held) = tokio::join!(
            async {
                let ended = within(PATIENCE, first.wait()).await.unwrap();
                (ended.code(), Instant::now())
            },
            holds(&mut second)
        );
        group.process(lost).resume();
        assert_eq!(ended.0, Some(7));
        assert!(
            ended.1 < held,
            "{arguments:?}: both held for {:?}",
            ended.1.duration_since(held)
        );
        second.kill().await.unwrap();
    }
}
