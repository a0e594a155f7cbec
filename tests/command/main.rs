//! The command as a user runs it: a served member, and every subcommand against it, with wrong inputs too.

// A test may fail.
#![allow(clippy::unwrap_used)]
#![cfg(feature = "raft")]

mod demo;
mod holding;
mod losing;
mod moving;
mod settings;

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

fn signal(child: &Child, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(child.id().unwrap()).unwrap()).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

async fn interrupt(child: &mut Child) -> Option<i32> {
    signal(child, rustix::process::Signal::INT);
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
    assert!(
        said.contains("--set raft.listen: registry.raft.listen: \"here\""),
        "{said}"
    );
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
    let page = include_str!("../../docs/command.md");
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
