//! Losses are reported before any request to a store that may be unreachable, and exit codes say what is true.

use std::process::Stdio;
use std::time::Instant;

use tokio::io::AsyncReadExt;

use super::*;

/// The TTL of [`Shell`], after which another client may hold what was held, and what a busy machine may add.
const TTL: Duration = Duration::from_secs(3);
const SLACK: Duration = Duration::from_secs(1);

async fn stderr_of(child: &mut Child) -> String {
    let mut said = String::new();
    let mut stderr = child.stderr.take().unwrap();
    within(PATIENCE, stderr.read_to_string(&mut said)).await.unwrap();
    said
}

impl Shell {
    /// As [`Shell::starts`], with standard error kept.
    async fn holds(&self, arguments: &[&str]) -> Child {
        let mut command = self.command(arguments);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        line(&mut lines).await;
        child
    }
}

#[tokio::test]
async fn a_loss_is_reported_before_the_session_can_expire_though_the_server_is_gone() {
    let shell = Shell::new();
    let mut member = shell.serve().await;
    let mut holders = Vec::new();
    for (arguments, lost) in [
        (&["lock", "/l"][..], "the lock /l was lost"),
        (&["elect", "/e", "--value", "x"], "the leadership of /e was lost"),
        (&["put", "/p", "x", "--ephemeral"], "/p is deleted with it"),
    ] {
        holders.push((shell.holds(arguments).await, lost));
    }
    member.kill().await;
    let killed = Instant::now();
    for (mut holder, lost) in holders {
        let said = stderr_of(&mut holder).await;
        assert_eq!(within(PATIENCE, holder.wait()).await.unwrap().code(), Some(7), "{said}");
        let after = killed.elapsed();
        assert!(said.contains(lost), "{said}");
        assert!(
            after < TTL + SLACK,
            "{lost}: the process ended {after:?} after the server"
        );
    }
}

/// Before the command is ended, which may take as long as it likes to be killed.
#[tokio::test]
async fn a_loss_is_reported_before_the_command_is_ended() {
    let shell = Shell::new();
    let mut member = shell.serve().await;
    let deaf = "trap '' TERM; echo on; while :; do sleep 0.1; done";
    let mut holder = shell.holds(&["--json", "lock", "/l", "--", "sh", "-c", deaf]).await;
    let mut told = BufReader::new(holder.stderr.take().unwrap()).lines();
    member.kill().await;
    let killed = Instant::now();
    let reported = async {
        loop {
            let line = told.next_line().await.unwrap().expect("it reports the loss");
            if line.starts_with('{') {
                return serde_json::from_str::<Value>(&line).unwrap();
            }
        }
    };
    let reported = within(PATIENCE, reported).await;
    let after = killed.elapsed();
    assert!(after < TTL + SLACK, "reported {after:?} after the server was killed");
    assert_eq!(reported["code"], 7);
    let reason = reported["error"].as_str().unwrap();
    assert_eq!(reason, "the lock /l was lost, ending the command");
    assert_eq!(within(PATIENCE, holder.wait()).await.unwrap().code(), Some(7));
    let rest = within(PATIENCE, told.next_line()).await.unwrap();
    assert!(
        rest.as_ref().is_none_or(|line| !line.starts_with('{')),
        "reported twice: {rest:?}"
    );
}

/// The store can't be reached when the command ends, and the lock is valid: the command's code is the result.
#[tokio::test]
async fn the_code_of_a_command_that_ended_under_its_lock_is_passed_on() {
    for code in [0, 42] {
        let shell = Shell::new();
        let mut member = shell.serve().await;
        let script = format!("echo on; while [ ! -e go ]; do sleep 0.02; done; exit {code}");
        let mut holder = shell.holds(&["lock", "/l", "--", "sh", "-c", &script]).await;
        member.kill().await;
        std::fs::write(shell.dir.path().join("go"), "").unwrap();
        let said = stderr_of(&mut holder).await;
        assert_eq!(
            within(PATIENCE, holder.wait()).await.unwrap().code(),
            Some(code),
            "{said}"
        );
        assert!(
            said.contains("warning") && said.contains("once the session has expired"),
            "{said}"
        );
    }
}

/// The store says, when the lock is to be released, that it was deleted before: the command's code is not the result. The holder
/// stands still meanwhile, so that it finds the end of its command first.
#[tokio::test]
async fn a_command_whose_lock_was_removed_is_no_success() {
    let shell = Shell::new();
    let _member = shell.serve().await;
    let options = registry::Options::default();
    let remote = registry::raft::RaftConfig::remote([format!("127.0.0.1:{}", shell.port)]);
    let registry = registry::raft::connect(&remote, &options).await.unwrap();
    let lock = registry.lock(&"/l".parse().unwrap());
    for round in 0..4 {
        let script = format!("echo $$; while [ ! -e go{round} ]; do sleep 0.02; done");
        let mut holder = shell.command(&["--set", "session_ttl=60s", "lock", "/l", "--", "sh", "-c", &script]);
        let mut holder = holder.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(holder.stdout.take().unwrap()).lines();
        let command = line(&mut lines).await;
        signal(&holder, rustix::process::Signal::STOP);
        let session = lock.holder().await.unwrap().unwrap().session.unwrap();
        registry::raft::end_session(&remote, &options, session).await.unwrap();
        std::fs::write(shell.dir.path().join(format!("go{round}")), "").unwrap();
        eventually(PATIENCE, || async { holding::has_ended(&command) }).await;
        signal(&holder, rustix::process::Signal::CONT);
        let said = stderr_of(&mut holder).await;
        assert_eq!(within(PATIENCE, holder.wait()).await.unwrap().code(), Some(7), "{said}");
    }
    registry.close().await.unwrap();
}

/// Ctrl-C begins a release, which lasts as long as the session when the store is gone; once more ends it.
#[tokio::test]
async fn a_second_interrupt_ends_a_release_that_reaches_nobody() {
    for arguments in [
        &["lock", "/l"][..],
        &["elect", "/e", "--value", "x"],
        &["register", "/r", "x"],
        &["put", "/p", "x", "--ephemeral"],
    ] {
        let shell = Shell::new();
        let mut member = shell.serve().await;
        let long = ["--set", "session_ttl=60s", "--set", "request_timeout=60s"];
        let mut holder = shell.holds(&[&long[..], arguments].concat()).await;
        member.kill().await;
        let stopped = Instant::now();
        let interrupting = async {
            while holder.try_wait().unwrap().is_none() {
                signal(&holder, rustix::process::Signal::INT);
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        within(PATIENCE, interrupting).await;
        let said = stderr_of(&mut holder).await;
        assert_eq!(holder.wait().await.unwrap().code(), Some(130), "{arguments:?}: {said}");
        assert!(said.contains("stopped again"), "{said}");
        assert!(stopped.elapsed() < Duration::from_secs(10), "{arguments:?}");
    }
}

/// What can't be printed is not kept: nobody would know of it.
#[tokio::test]
async fn nothing_is_held_when_nobody_reads_the_output() {
    let shell = Shell::new();
    let _member = shell.serve().await;
    for arguments in [
        &["lock", "/l"][..],
        &["elect", "/e", "--value", "x"],
        &["put", "/p", "x", "--ephemeral"],
        &["register", "/r", "x"],
    ] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut unread = shell.command(&[&["--set", "session_ttl=60s"], arguments].concat());
        let unread = unread.stdout(writer).stderr(Stdio::piped()).spawn().unwrap();
        let ended = within(PATIENCE, unread.wait_with_output()).await.unwrap();
        assert_eq!(ended.status.code(), Some(141), "{arguments:?}: {ended:?}");
        assert_eq!(ended.stderr, b"", "{arguments:?}");
    }
    shell.says(3, &["lock", "/l", "--show"]).await;
    shell.says(0, &["lock", "/l", "--try", "--", "true"]).await;
    assert_eq!(shell.says(0, &["ls"]).await, "");
    let mut waiting = shell.command(&["elect", "/e", "--value", "x", "--", "true"]);
    assert!(within(PATIENCE, waiting.output()).await.unwrap().status.success());
}

/// As a shell says it; and the lock is free.
#[tokio::test]
async fn a_command_that_can_not_be_started_has_the_code_of_a_shell() {
    let shell = Shell::new();
    let _member = shell.serve().await;
    std::fs::write(shell.dir.path().join("data"), "no program").unwrap();
    let long = ["--set", "session_ttl=60s"];
    for (code, program) in [(127, "no-such-program"), (126, "./data")] {
        for held in [&["lock", "/l"][..], &["elect", "/e", "--value", "x"]] {
            let said = shell.says(code, &[&long[..], held, &["--", program]].concat()).await;
            assert!(said.contains(program), "{said}");
        }
        shell.says(3, &["lock", "/l", "--show"]).await;
    }
}
