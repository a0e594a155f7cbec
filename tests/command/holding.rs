//! What goes on until it is told to stop: ephemeral keys, locks, leaderships and registrations.

use super::*;

#[tokio::test]
async fn what_is_ephemeral_goes_with_its_command() {
    let shell = Shell::new();
    let _member = shell.serve().await;
    let (mut watch, mut told, first) = shell.starts(&["watch", "/w"]).await;
    assert!(first.starts_with("synced"));
    let (mut put, _, _) = shell.starts(&["put", "/w/put", "1", "--ephemeral"]).await;
    assert!(line(&mut told).await.starts_with("created 1 /w/put  1"));
    let (mut register, _, said) = shell.starts(&["register", "/w/registered", "2"]).await;
    assert_eq!(said, "/w/registered: registered");
    assert!(line(&mut told).await.contains("/w/registered"));
    let taken = shell.says(4, &["register", "/w/registered", "3"]).await;
    assert!(
        taken.contains("belongs to session") && taken.contains("--take-over"),
        "{taken}"
    );
    assert_eq!(interrupt(&mut put).await, Some(0));
    assert!(line(&mut told).await.starts_with("expired"));
    assert_eq!(interrupt(&mut register).await, Some(0));
    assert!(line(&mut told).await.starts_with("deleted"));
    let (mut killed, _, _) = shell.starts(&["put", "/w/killed", "3", "--ephemeral"]).await;
    assert!(line(&mut told).await.contains("/w/killed"));
    killed.kill().await.unwrap();
    assert!(line(&mut told).await.starts_with("expired"));
    assert_eq!(interrupt(&mut watch).await, Some(0));
}

#[tokio::test]
async fn a_command_runs_under_a_lock_and_a_leadership() {
    let shell = Shell::new();
    let _member = shell.serve().await;
    let said = shell
        .says(
            9,
            &[
                "lock",
                "/l",
                "--",
                "sh",
                "-c",
                "echo $REGISTRY_NAME $REGISTRY_TOKEN; exit 9",
            ],
        )
        .await;
    assert_eq!(said, "/l 2\n", "the first revision is that of the epoch's record");
    let (mut holder, _, said) = shell.starts(&["lock", "/l", "--label", "me"]).await;
    assert!(said.starts_with("holding /l with token"), "{said}");
    assert!(shell.says(0, &["lock", "/l", "--show"]).await.contains("holds"));
    assert!(
        shell
            .says(5, &["lock", "/l", "--try", "--", "true"])
            .await
            .contains("/l is taken")
    );
    assert!(
        shell
            .says(5, &["lock", "/l", "--wait", "200ms", "--", "true"])
            .await
            .contains("not within")
    );
    // It has left the queue when it has ended.
    let queue = shell.says(0, &["lock", "/l", "--show"]).await;
    assert_eq!(queue.lines().count(), 1, "{queue}");
    assert_eq!(interrupt(&mut holder).await, Some(0));
    shell.says(0, &["lock", "/l", "--wait", "1s", "--", "true"]).await;
    assert!(
        shell
            .says(127, &["lock", "/l", "--", "no-such-program"])
            .await
            .contains("no-such-program")
    );
    assert!(
        shell
            .says(3, &["lock", "/l", "--show"])
            .await
            .contains("nobody holds /l")
    );

    let (mut observer, mut told, first) = shell.starts(&["elect", "/e", "--observe"]).await;
    assert_eq!(first, "no leader");
    let (mut leader, _, _) = shell.starts(&["elect", "/e", "--value", "me"]).await;
    assert!(line(&mut told).await.ends_with("  me"));
    assert_eq!(interrupt(&mut leader).await, Some(0));
    assert_eq!(line(&mut told).await, "no leader");
    assert_eq!(
        shell
            .says(0, &["elect", "/e", "--value", "x", "--", "echo", "led"])
            .await,
        "led\n"
    );
    assert_eq!(interrupt(&mut observer).await, Some(0));
}

/// A command that tries to read from the terminal that another process group has would be stopped, and hold its lock for
/// ever. The package bsdutils has `script`, which gives it a terminal.
#[tokio::test]
async fn a_command_under_a_lock_reads_a_pipe_and_is_not_stopped_by_a_terminal() {
    let shell = Shell::new();
    let _member = shell.serve().await;
    let held = format!("'{}' lock /l -- cat", env!("CARGO_BIN_EXE_registry"));
    let mut terminal = shell.of("script", &["--quiet", "--return", "--command", &held, "/dev/null"]);
    let (keyboard, nobody_types) = std::io::pipe().unwrap();
    let ended = within(PATIENCE, terminal.stdin(keyboard).output()).await.unwrap();
    assert_eq!(ended.status.code(), Some(0), "{ended:?}");
    drop(nobody_types);
    let piped = within(
        PATIENCE,
        shell.of("sh", &["-c", &format!("echo piped | {held}")]).output(),
    );
    assert_eq!(piped.await.unwrap().stdout, b"piped\n");
}

/// With all that it has started, though that does not listen to SIGTERM.
#[tokio::test]
async fn a_lost_lock_ends_its_command() {
    let shell = Shell::new();
    let mut member = shell.serve().await;
    let deaf = "trap '' TERM; echo $$; while :; do sleep 0.1; done";
    let (mut holder, _, deaf) = shell
        .starts(&["lock", "/l", "--", "sh", "-c", "sh -c \"$0\" & wait", deaf])
        .await;
    member.kill().await;
    let ended = within(PATIENCE, holder.wait()).await.unwrap();
    assert_eq!(ended.code(), Some(7));
    eventually(PATIENCE, || async { has_ended(&deaf) }).await;
}

/// A process that has ended has no command line, or nothing at all.
pub(super) fn has_ended(pid: &str) -> bool {
    let line = std::fs::read(format!("/proc/{pid}/cmdline"));
    line.unwrap_or_default().is_empty()
}

/// Its command goes before the lock does. Under `nohup` the signal stays ignored.
#[tokio::test]
async fn a_terminal_that_is_closed_ends_a_command_with_its_lock() {
    let shell = Shell::new();
    let _member = shell.serve().await;
    let (mut holder, _, command) = shell
        .starts(&["lock", "/l", "--", "sh", "-c", "echo $$; exec sleep 1000"])
        .await;
    signal(&holder, rustix::process::Signal::HUP);
    within(PATIENCE, holder.wait()).await.unwrap();
    assert!(has_ended(&command));
    shell.says(0, &["lock", "/l", "--try", "--", "true"]).await;

    let held = format!("exec '{}' lock /l", env!("CARGO_BIN_EXE_registry"));
    let mut holder = shell.of("nohup", &["sh", "-c", &held]);
    let mut holder = holder.stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(holder.stdout.take().unwrap()).lines();
    assert!(line(&mut lines).await.starts_with("holding /l"));
    let status = std::fs::read_to_string(format!("/proc/{}/status", holder.id().unwrap())).unwrap();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap();
    assert!(ignored.ends_with(['1', '3', '5', '7', '9', 'b', 'd', 'f']), "{ignored}");
    assert_eq!(interrupt(&mut holder).await, Some(0));
}

#[tokio::test]
async fn a_registration_is_told_lost_and_comes_back() {
    let shell = Shell::new();
    let mut member = shell.serve().await;
    let (mut register, mut told, said) = shell.starts(&["register", "/w", "1"]).await;
    assert_eq!(said, "/w: registered");
    member.kill().await;
    assert_eq!(line(&mut told).await, "/w: lost, putting it back");
    let _member = shell.serve().await;
    assert_eq!(line(&mut told).await, "/w: registered");
    assert_eq!(shell.says(0, &["get", "/w"]).await, "1");
    assert_eq!(interrupt(&mut register).await, Some(0));
    shell.says(3, &["get", "/w"]).await;
}
