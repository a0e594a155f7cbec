//! The command as a user runs it: a served member, and every subcommand against it, with wrong inputs too.

// A test may fail.
#![allow(clippy::unwrap_used)]
#![cfg(feature = "raft")]

use std::path::Path;
use std::process::Output;
use std::time::Duration;

use registry_tests::cluster::eventually;
use registry_tests::{Process, process, within};
use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

const PATIENCE: Duration = Duration::from_secs(60);

struct Shell {
    dir: TempDir,
    port: u16,
}

impl Shell {
    fn new() -> Self {
        Self {
            dir: TempDir::new().unwrap(),
            port: process::free_port(),
        }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        self.of(env!("CARGO_BIN_EXE_registry"), arguments)
    }

    /// Another program, in the same surroundings.
    fn of(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(program);
        command
            .args(arguments)
            .current_dir(self.dir.path())
            .env_remove("REGISTRY_CONFIG")
            .kill_on_drop(true);
        command
            .env("REGISTRY__RAFT__LISTEN", format!("127.0.0.1:{}", self.port))
            .env("REGISTRY__SESSION_TTL", "3s");
        command
    }

    async fn serve(&self) -> Process {
        Process::start(self.command(&["serve"]), |line| line.contains("ready").then_some(()))
            .await
            .0
    }

    async fn run(&self, arguments: &[&str]) -> Output {
        within(PATIENCE, self.command(arguments).output()).await.unwrap()
    }

    /// What it prints, having ended with that code.
    async fn says(&self, code: i32, arguments: &[&str]) -> String {
        let output = self.run(arguments).await;
        let (out, err) = (
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
        );
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {out}{err}");
        format!("{out}{err}")
    }

    async fn json(&self, arguments: &[&str]) -> Vec<Value> {
        let said = self.says(0, &[&["--json"], arguments].concat()).await;
        said.lines()
            .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{line}: {e}")))
            .collect()
    }

    /// Starts what goes on until it is told to stop, and waits for its first line.
    async fn starts(
        &self,
        arguments: &[&str],
    ) -> (Child, tokio::io::Lines<BufReader<tokio::process::ChildStdout>>, String) {
        let mut child = self
            .command(arguments)
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let first = line(&mut lines).await;
        (child, lines, first)
    }
}

async fn line(lines: &mut tokio::io::Lines<BufReader<tokio::process::ChildStdout>>) -> String {
    within(PATIENCE, lines.next_line()).await.unwrap().expect("it goes on")
}

async fn interrupt(child: &mut Child) -> Option<i32> {
    let pid = rustix::process::Pid::from_raw(i32::try_from(child.id().unwrap()).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    within(PATIENCE, child.wait()).await.unwrap().code()
}

#[tokio::test]
async fn keys_are_put_read_listed_and_deleted() {
    let shell = Shell::new();
    let _member = shell.serve().await;
    assert_eq!(shell.says(0, &["put", "/app/config", "v1"]).await, "revision 1\n");
    assert_eq!(shell.says(0, &["get", "/app/config"]).await, "v1");
    assert!(
        shell
            .says(4, &["put", "/app/config", "x", "--if-absent"])
            .await
            .contains("is at revision 1")
    );
    assert_eq!(
        shell.says(0, &["put", "/app/config", "v2", "--if-revision", "1"]).await,
        "revision 2\n"
    );
    std::fs::write(shell.dir.path().join("value"), [0, 255, 10]).unwrap();
    shell.says(0, &["put", "/app/bytes", "--file", "value"]).await;
    assert_eq!(shell.run(&["get", "/app/bytes"]).await.stdout, [0, 255, 10]);
    assert_eq!(shell.says(0, &["ls", "/app"]).await, "bytes\nconfig\n");
    assert!(shell.says(0, &["ls", "-l", "-r"]).await.contains("/app/config  v2"));
    let entry = &shell.json(&["get", "/app/bytes"]).await[0];
    assert_eq!(
        (&entry["value_base64"], &entry["mod_revision"]),
        (&Value::from("AP8K"), &Value::from(3))
    );
    assert!(
        shell
            .says(4, &["txn", "--when", "/app/config=1", "--put", "/a=1"])
            .await
            .contains("should be at revision 1")
    );
    shell
        .says(
            0,
            &[
                "txn",
                "--when",
                "/app/config=2",
                "--put",
                "/a=1",
                "--put",
                "/b=2",
                "--delete",
                "/app/bytes",
            ],
        )
        .await;
    shell.says(3, &["get", "/app/bytes"]).await;
    shell.says(3, &["delete", "/none"]).await;
    assert_eq!(shell.says(0, &["delete", "/", "--prefix"]).await, "deleted 3\n");
    assert_eq!(shell.says(0, &["ls"]).await, "");
    assert!(shell.says(0, &["status"]).await.contains("member a"));
    assert_eq!(shell.json(&["status"]).await[1]["status"]["keys"], 0);
}

#[tokio::test]
async fn wrong_inputs_say_what_is_wrong() {
    let shell = Shell::new();
    let mut member = shell.serve().await;
    assert!(shell.says(2, &["get", "app"]).await.contains("a key begins with `/`"));
    assert!(
        shell
            .says(2, &["get", "/a/../b"])
            .await
            .contains("`.` and `..` are no segments")
    );
    std::fs::write(shell.dir.path().join("big"), vec![0; 2_000_000]).unwrap();
    assert!(
        shell
            .says(2, &["put", "/a", "--file", "big"])
            .await
            .contains("2000000 bytes is too large, at most 900000")
    );
    assert!(
        shell
            .says(2, &["put", "/a", "--file", "none"])
            .await
            .contains("none: No such file")
    );
    assert!(
        shell
            .says(2, &["--set", "raft.data=x", "get", "/a"])
            .await
            .contains("unknown field `data`")
    );
    assert!(
        shell
            .says(2, &["--set", "type=foo", "get", "/a"])
            .await
            .contains("this program has: raft")
    );
    assert!(
        shell
            .says(2, &["txn", "--when", "/a=soon", "--put", "/a=1"])
            .await
            .contains("neither absent, present")
    );
    assert!(
        shell
            .says(2, &["txn", "--when", "/a=absent"])
            .await
            .contains("needs an operation")
    );
    assert!(
        shell
            .says(1, &["serve"])
            .await
            .contains("another process has this directory open")
    );
    let elsewhere = ["serve", "--set", "raft.data_dir=elsewhere"];
    let taken = shell.says(5, &elsewhere).await;
    assert!(taken.contains("set registry.raft.listen to another address"), "{taken}");
    let http = ["--set", &format!("raft.http=127.0.0.1:{}", shell.port)];
    let taken = shell.says(5, &[&elsewhere[..], &http].concat()).await;
    assert!(taken.contains("set registry.raft.http to another address"), "{taken}");
    for (code, arguments) in [(3, ["--json", "get", "/none"]), (2, ["--json", "get", "none"])] {
        let error: Value = serde_json::from_str(&shell.says(code, &arguments).await).unwrap();
        assert_eq!(error["code"], code);
    }
    std::fs::write(
        shell.dir.path().join("half.toml"),
        "[registry]\nnamespace = \"/a\"\n[registry.raft\n",
    )
    .unwrap();
    let said = shell.says(2, &["--config", "half.toml", "get", "/a"]).await;
    assert!(said.contains("half.toml") && said.contains("line 3"), "{said}");
    let said = shell.says(2, &["--set", "raft.listen=here", "get", "/a"]).await;
    assert!(said.contains("the settings: registry.raft.listen: \"here\""), "{said}");
    let said = shell.says(2, &["--set", "namespace=a", "get", "/a"]).await;
    assert!(said.contains("bad namespace"), "{said}");
    let said = shell.says(2, &["members", "add", "d", "nowhere"]).await;
    assert!(said.contains("\"nowhere\" is no host and port"), "{said}");
    member.pause();
    let said = shell.says(5, &["--set", "connect_timeout=1s", "get", "/a"]).await;
    assert!(
        said.contains(&format!("127.0.0.1:{}: no answer within", shell.port)),
        "{said}"
    );
    member.resume();
    assert_eq!(member.stop().await.unwrap().code(), Some(0));
    let said = shell.says(5, &["--set", "connect_timeout=1s", "get", "/a"]).await;
    assert!(
        said.contains(&shell.port.to_string()) && said.contains("registry serve"),
        "{said}"
    );
}

#[tokio::test]
async fn settings_come_from_the_file_then_the_environment_then_flags() {
    let shell = Shell::new();
    let _member = shell.serve().await;
    let text =
        "[registry]\nnamespace = \"/other\"\nconnect_timeout = \"1s\"\n[registry.raft]\nlisten = \"127.0.0.1:1\"\n";
    std::fs::write(shell.dir.path().join("other.toml"), text).unwrap();
    let put = ["--config", "other.toml", "put", "/a", "1"];
    shell.says(0, &put).await;
    shell.says(3, &["get", "/a"]).await;
    assert_eq!(shell.says(0, &["--set", "namespace=/other", "get", "/a"]).await, "1");
    let said = shell
        .says(5, &[&["--set", "raft.listen=127.0.0.1:2"], &put[..]].concat())
        .await;
    assert!(said.contains("127.0.0.1:2"), "{said}");
    // The file alone, and the second of a list.
    let mut alone = shell.command(&put);
    let said = within(PATIENCE, alone.env_remove("REGISTRY__RAFT__LISTEN").output())
        .await
        .unwrap();
    assert!(
        String::from_utf8_lossy(&said.stderr).contains("127.0.0.1:1: "),
        "{said:?}"
    );
    let mut list = shell.command(&["get", "/a"]);
    list.env_remove("REGISTRY__RAFT__LISTEN")
        .env("REGISTRY__NAMESPACE", "/other");
    list.env(
        "REGISTRY__RAFT__ENDPOINTS",
        format!("127.0.0.1:1,127.0.0.1:{}", shell.port),
    );
    assert_eq!(within(PATIENCE, list.output()).await.unwrap().stdout, b"1");
}

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
    assert_eq!(said, "/l 1\n");
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
    assert_eq!(interrupt(&mut holder).await, Some(0));
    shell.says(0, &["lock", "/l", "--wait", "10s", "--", "true"]).await;
    assert!(
        shell
            .says(2, &["lock", "/l", "--", "no-such-program"])
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
    // A process that has ended has no command line, or nothing at all.
    let ended = || async {
        std::fs::read(format!("/proc/{deaf}/cmdline"))
            .unwrap_or_default()
            .is_empty()
    };
    eventually(PATIENCE, ended).await;
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

#[tokio::test]
async fn a_reader_that_has_gone_ends_the_command() {
    let shell = Shell::new();
    let _member = shell.serve().await;
    let lines = (0..5_000).map(|n| serde_json::json!({ "key": format!("/{n}"), "value": "x".repeat(100) }));
    let text: String = lines.map(|line| format!("{line}\n")).collect();
    std::fs::write(shell.dir.path().join("some.jsonl"), text).unwrap();
    shell.says(0, &["import", "some.jsonl"]).await;
    // Nobody reads from the beginning.
    for arguments in [&["ls"][..], &["completions", "bash"], &["--json", "status"]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = shell.command(arguments);
        let unread = command
            .stdout(writer)
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let output = within(PATIENCE, unread.wait_with_output()).await.unwrap();
        assert_eq!(
            (output.status.code(), output.stderr),
            (Some(141), Vec::new()),
            "{arguments:?}"
        );
    }
    // More than a pipe holds is still to be printed when its reader goes.
    let (mut export, told, _) = shell.starts(&["export", "/"]).await;
    drop(told);
    assert_eq!(within(PATIENCE, export.wait()).await.unwrap().code(), Some(141));
}

/// The packages that this machine's apt knows, as JSON lines.
async fn packages(path: &Path) -> String {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/packages");
    let output = within(PATIENCE, Command::new(script).output()).await.unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    std::fs::write(path, &output.stdout).unwrap();
    String::from_utf8(output.stdout).unwrap()
}

/// Real input, the description of every Debian package: imported with the member killed in the middle, listed in pages,
/// watched, exported, and compared byte by byte, before and after another kill.
#[tokio::test]
async fn what_is_imported_is_exported_also_after_a_crash_in_the_middle() {
    const LONG: Duration = Duration::from_secs(120);
    let shell = Shell::new();
    let mut member = shell.serve().await;
    let text = packages(&shell.dir.path().join("all.jsonl")).await;
    let mut import = shell.command(&["import", "all.jsonl"]);
    let import = import.stderr(std::process::Stdio::piped()).spawn().unwrap();
    let keys = async || shell.json(&["status"]).await[1]["status"]["keys"].as_u64().unwrap();
    let some = async {
        loop {
            let keys = keys().await;
            if keys > 500 {
                return keys;
            }
        }
    };
    let seen = within(PATIENCE, some).await;
    member.kill().await;
    let import = within(PATIENCE, import.wait_with_output()).await.unwrap();
    let said = String::from_utf8_lossy(&import.stderr);
    assert!(
        !import.status.success() && said.contains("import the file again"),
        "{import:?}"
    );
    // For people: who was asked, and what came between.
    assert!(
        said.contains(&format!("127.0.0.1:{}: ", shell.port)) && !said.contains("code: '"),
        "{said}"
    );

    let mut member = shell.serve().await;
    let left = keys().await;
    assert!(left >= seen, "{seen} keys were seen, {left} are left");
    let imported = within(LONG, shell.command(&["import", "all.jsonl"]).output())
        .await
        .unwrap();
    assert!(imported.status.success(), "{imported:?}");
    let all: Vec<_> = text.lines().filter_map(|line| line.split('"').nth(3)).collect();
    assert_eq!(keys().await as usize, all.len());

    let mut listed = Vec::new();
    loop {
        let mut arguments = vec!["ls", "-r", "/packages", "--limit", "10000"];
        let last = listed.last().cloned();
        arguments.extend(last.iter().flat_map(|last: &String| ["--after", last.as_str()]));
        let page = shell.says(0, &arguments).await;
        if page.is_empty() {
            break;
        }
        listed.extend(page.lines().map(str::to_owned));
    }
    assert!(listed == all, "the pages differ from what was imported");

    let (name, value) = (all[all.len() / 2], shell.says(0, &["get", all[all.len() / 2]]).await);
    let (mut watch, mut told, first) = shell.starts(&["watch", "--key", name]).await;
    assert!(first.starts_with("created"), "{first}");
    assert!(line(&mut told).await.starts_with("synced"));
    for value in ["changed", &value] {
        shell.says(0, &["put", name, value]).await;
        let said = line(&mut told).await;
        assert!(said.starts_with("updated") && said.contains(name), "{said}");
    }
    assert_eq!(interrupt(&mut watch).await, Some(0));

    for _ in 0..2 {
        let exported = shell.run(&["export", "/packages"]).await;
        assert!(
            exported.stdout == text.as_bytes(),
            "the export differs from what was imported"
        );
        member.kill().await;
        member = shell.serve().await;
    }
}

#[tokio::test]
async fn a_bad_line_is_named_and_those_before_it_are_there() {
    let shell = Shell::new();
    let _member = shell.serve().await;
    let good: String = (0..100)
        .map(|n| format!("{{\"key\": \"/ok/{n}\", \"value\": \"1\"}}\n"))
        .collect();
    let bad: [(&[u8], &str); 6] = [
        (b"\n{\"key\": \"bad\", \"value\": \"1\"}\n", "line 102: bad key"),
        (b"{\"key\": \"/a\"}\n", "line 101: a line has either"),
        (
            b"{\"key\": \"/a\", \"value\"\n",
            "line 101: EOF while parsing an object at column ",
        ),
        (b"{\"key\": \"/a\", \"value\": \"\xff\"}\n", "line 101: invalid unicode"),
        (
            b"{\"key\": \"/a\", \"value_base64\": \"?\"}\n",
            "line 101: value_base64: ",
        ),
        (b"{\"key\": \"/a\", \"val\": \"1\"}\n", "line 101: unknown field `val`"),
    ];
    for (bad, said) in bad {
        std::fs::write(shell.dir.path().join("bad.jsonl"), [good.as_bytes(), bad].concat()).unwrap();
        let all = shell.says(2, &["import", "bad.jsonl"]).await;
        assert!(
            all.contains(said) && all.contains("imported 100 keys; import the file again"),
            "{all}"
        );
        assert_eq!(shell.says(0, &["delete", "/", "--prefix"]).await, "deleted 100\n");
    }
}

#[tokio::test]
async fn the_demo_shows_what_it_says() {
    let shell = Shell::new();
    let output = within(
        PATIENCE,
        Command::new(env!("CARGO_BIN_EXE_registry"))
            .arg("demo")
            .current_dir(shell.dir.path())
            .output(),
    )
    .await
    .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && said.contains("All of it was checked"),
        "{output:?}"
    );
    assert_eq!(
        std::fs::read_dir(shell.dir.path()).unwrap().count(),
        0,
        "it leaves nothing behind"
    );
}

/// Neither a process nor a directory is left of a demo that is interrupted, or that nobody reads any more.
#[tokio::test]
async fn a_demo_that_is_cut_short_leaves_nothing_behind() {
    for code in [130, 141] {
        let shell = Shell::new();
        let mut demo = shell.command(&["--json", "demo"]);
        // The settings of the caller are for a store of theirs.
        demo.env("TMPDIR", shell.dir.path()).env("REGISTRY__TYPE", "none");
        let mut demo = demo.stdout(std::process::Stdio::piped()).spawn().unwrap();
        let mut told = BufReader::new(demo.stdout.take().unwrap()).lines();
        let mut shown = async || {
            let line: Value = serde_json::from_str(&line(&mut told).await).unwrap();
            line["shown"].as_str().unwrap().to_owned()
        };
        shown().await;
        let ready = shown().await;
        let addresses = ready.strip_prefix("ready on ").unwrap().split(' ').next().unwrap();
        while !shown().await.contains("/w2") {}
        if code == 130 {
            assert_eq!(interrupt(&mut demo).await, Some(code));
        } else {
            drop(told);
            assert_eq!(within(PATIENCE, demo.wait()).await.unwrap().code(), Some(code));
        }
        for address in addresses.split(',') {
            let refused = tokio::net::TcpStream::connect(address).await.expect_err(address);
            assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
        }
        assert_eq!(std::fs::read_dir(shell.dir.path()).unwrap().count(), 0);
    }
}

/// The commands that a help lists.
fn listed(help: &str) -> Vec<&str> {
    let lines = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let lines = lines.take_while(|line| !line.is_empty());
    let names = lines.filter_map(|line| line.strip_prefix("  ")?.split(' ').next());
    names.filter(|name| !name.is_empty() && *name != "help").collect()
}

#[tokio::test]
async fn every_command_has_an_example_and_completions_are_made() {
    let shell = Shell::new();
    let help = shell.says(0, &["--help"]).await;
    let commands = listed(&help);
    assert!(commands.len() >= 19, "{commands:?}");
    let page = include_str!("../docs/command.md");
    for command in commands {
        assert!(page.contains(&format!("`{command}")), "{command} is not in the book");
        let help = shell.says(0, &[command, "--help"]).await;
        assert!(help.contains("Example"), "{command}");
        for below in listed(&help) {
            let help = shell.says(0, &[command, below, "--help"]).await;
            assert!(help.contains("Example"), "{command} {below}");
        }
    }
    for shell_name in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let script = shell.says(0, &["completions", shell_name]).await;
        assert!(script.contains("registry") && script.contains("if-absent"), "{script}");
        assert_eq!(shell.json(&["completions", shell_name]).await[0]["shell"], shell_name);
    }
}

#[tokio::test]
async fn a_bench_measures_every_kind_of_work_and_leaves_nothing() {
    let shell = Shell::new();
    let _member = shell.serve().await;
    let plot = shell.dir.path().join("bench.svg");
    let plot = plot.to_str().unwrap();
    let bench = [
        "bench",
        "--tasks",
        "1,3",
        "--keys",
        "50",
        "--duration",
        "1s",
        "--warm-up",
        "50ms",
        "--plot",
        plot,
    ];
    let rows = shell.json(&bench).await;
    assert_eq!(rows.len(), 18);
    for row in &rows {
        assert!(row["done"].as_u64() > Some(0), "{row}");
        assert_eq!(row["failures"], 0, "{row}");
        assert!(row["p50_us"].as_f64() <= row["max_us"].as_f64(), "{row}");
    }
    let drawn = std::fs::read_to_string(plot).unwrap();
    assert!(drawn.starts_with("<svg") && drawn.contains("stale-get"), "{drawn}");
    assert_eq!(shell.says(0, &["ls", "/"]).await, "");
    assert!(
        shell
            .says(0, &["bench", "put", "--duration", "100ms", "--warm-up", "0s"])
            .await
            .starts_with("work ")
    );
    assert!(shell.says(2, &["bench", "dance"]).await.contains("possible values"));
}

#[cfg(feature = "mysql")]
#[tokio::test]
async fn the_schema_is_printed_with_the_prefix_that_is_asked_for() {
    let shell = Shell::new();
    let sql = shell.says(0, &["schema", "mysql", "--table-prefix", "app_"]).await;
    assert!(sql.contains("CREATE TABLE IF NOT EXISTS app_entries"), "{sql}");
    assert!(!sql.contains("registry_") && !sql.contains("{prefix}"), "{sql}");
    let refused = shell.says(2, &["schema", "mysql", "--table-prefix", "a;b"]).await;
    assert!(refused.contains("letters, digits"), "{refused}");
}

#[tokio::test]
async fn a_store_is_compared_backed_up_and_restored_into_a_new_directory() {
    let shell = Shell::new();
    let member = shell.serve().await;
    shell.says(0, &["put", "/app/config", "v1"]).await;
    let equal = shell.says(0, &["status", "--verify"]).await;
    assert!(
        equal.contains("member a") && equal.contains("equal at entry"),
        "{equal}"
    );
    let said = shell.says(0, &["backup", "one.backup"]).await;
    assert!(said.contains("one.backup: ") && said.contains("revision 1"), "{said}");
    let json = &shell.json(&["backup", "one.backup"]).await[0];
    assert_eq!(json["backup"]["revision"], 1);
    // A terminal is shown how far it is. The package bsdutils has `script`, which gives it one.
    let typed = format!("'{}' backup one.backup", env!("CARGO_BIN_EXE_registry"));
    let mut terminal = shell.of("script", &["--quiet", "--return", "--command", &typed, "/dev/null"]);
    let shown = within(PATIENCE, terminal.output()).await.unwrap();
    let (bytes, text) = (&json["backup"]["bytes"], String::from_utf8_lossy(&shown.stdout));
    assert!(shown.status.success(), "{text}");
    assert!(text.contains(&format!("{bytes} B/{bytes} B")), "{text}");
    // It is not there, then there is something already, then it is damaged, then it is right.
    let refused = shell.says(2, &["restore", "none.backup"]).await;
    assert!(refused.contains("none.backup: No such file"), "{refused}");
    let refused = shell.says(1, &["restore", "one.backup"]).await;
    assert!(refused.contains("new directory"), "{refused}");
    let file = shell.dir.path().join("one.backup");
    let good = std::fs::read(&file).unwrap();
    std::fs::write(&file, &good[..good.len() - 1]).unwrap();
    let elsewhere = ["restore", "one.backup", "--set", "raft.data_dir=new"];
    let refused = shell.says(1, &elsewhere).await;
    assert!(
        refused.contains("one.backup") && refused.contains("cut short"),
        "{refused}"
    );
    std::fs::write(&file, &good).unwrap();
    drop(member);
    let restored = shell.says(0, &elsewhere).await;
    assert!(restored.contains("registry serve"), "{restored}");
    let serve = shell.command(&["serve", "--set", "raft.data_dir=new"]);
    let _member = Process::start(serve, |line| line.contains("ready").then_some(()))
        .await
        .0;
    assert_eq!(shell.says(0, &["get", "/app/config"]).await, "v1");
    let revision = &shell.json(&["put", "/app/config", "v2"]).await[0]["revision"];
    assert!(revision.as_u64().unwrap() > 1 << 40, "{revision}");
}

#[tokio::test]
async fn what_a_member_tells_has_its_name() {
    let shell = Shell::new();
    let mut serve = shell.command(&["serve", "--set", "raft.member=db-1"]);
    serve
        .env("RUST_LOG", "registry_raft=info")
        .env("NO_COLOR", "1")
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::piped());
    let mut member = serve.spawn().unwrap();
    let mut told = BufReader::new(member.stderr.take().unwrap()).lines();
    // What reads from it keeps trying until it is there; killed, its session expires, of which the member tells.
    let register = ["register", "/app/worker", "1", "--set", "connect_timeout=20s"];
    let (mut worker, _, _) = shell.starts(&register).await;
    worker.kill().await.unwrap();
    let telling = async {
        loop {
            let line = told.next_line().await.unwrap().expect("it goes on");
            if line.contains("sessions have expired") {
                return line;
            }
        }
    };
    let line = within(PATIENCE, telling).await;
    assert!(line.contains("member{name=\"db-1\"}"), "{line}");
}
