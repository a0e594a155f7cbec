//! What the book has a user type for a group, typed: the walk-through of etcd's raftexample, and the replacement of a dead
//! machine. Commands and config files are read from the book's pages, so what is written there is what was tried.

use std::collections::BTreeMap;
use std::path::Path;

use futures_util::future::join_all;
use registry_tests::{Process, process, within};
use tempfile::TempDir;
use tokio::process::Command;

use crate::harness::{PATIENCE, ready};

const OPERATING: &str = include_str!("../../docs/operating.md");
const RAFT: &str = include_str!("../../docs/backends/raft.md");
const STEP_BY_STEP: &str = "## A group, step by step";

/// The lines of code in one language below a heading, up to the next heading.
fn code<'a>(page: &'a str, heading: &str, language: &str) -> Vec<&'a str> {
    let (mut fence, mut found) = (None, Vec::new());
    for line in page.lines().skip_while(|line| *line != heading).skip(1) {
        match (fence, line.strip_prefix("```")) {
            (None, Some(opened)) => fence = Some(opened),
            (Some(_), Some(_)) => fence = None,
            (None, None) if line.starts_with('#') => break,
            (Some(fence), None) if fence == language => found.push(line),
            _ => {}
        }
    }
    assert!(!found.is_empty(), "there is no {language} below {heading:?}");
    found
}

/// The machines of the book, 10.0.0.1 to 10.0.0.5: each a port and a directory of this one.
struct Site {
    ports: [u16; 5],
    members: BTreeMap<String, Process>,
    /// Removed last, when nobody writes to it any more.
    dir: TempDir,
}

impl Site {
    /// With the configs of three that found a group.
    fn new() -> Self {
        let site = Self {
            dir: TempDir::new().unwrap(),
            ports: std::array::from_fn(|_| process::free_port()),
            members: BTreeMap::new(),
        };
        let founding = code(RAFT, "## Several members", "toml");
        for (name, machine) in [("a", 1), ("b", 2), ("c", 3)] {
            site.write(name, machine, &founding);
        }
        site
    }

    /// Writes a member's config: the book's, but for its name, its directory and the address of its machine.
    fn write(&self, name: &str, machine: usize, lines: &[&str]) {
        let mut text = String::from("[registry]\ntype = \"raft\"\n");
        for line in lines {
            let line = match line.split_once(" = ") {
                Some(("member", _)) => format!("member = \"{name}\""),
                Some(("data_dir", _)) => format!("data_dir = \"machine-{machine}\""),
                Some(("listen", _)) => format!("listen = \"10.0.0.{machine}:7480\""),
                _ => (*line).to_owned(),
            };
            text.push_str(&line);
            text.push('\n');
        }
        for (machine, port) in (1..).zip(self.ports) {
            text = text.replace(&format!("10.0.0.{machine}:7480"), &format!("127.0.0.1:{port}"));
        }
        std::fs::write(self.dir.path().join(format!("{name}.toml")), text).unwrap();
    }

    fn shell(&self, line: &str) -> Command {
        let programs = Path::new(env!("CARGO_BIN_EXE_registry")).parent().unwrap();
        let path = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap());
        let mut command = Command::new("sh");
        command.args(["-c", line]).current_dir(self.dir.path());
        command
            .env("PATH", path)
            .env_remove("REGISTRY_CONFIG")
            .kill_on_drop(true);
        command
    }

    /// Types one line; answers what it printed. What follows a `get` as a comment is what it must print.
    async fn types(&mut self, line: &str) -> String {
        let (command, comment) = line.split_once('#').unwrap_or((line, ""));
        let (command, comment) = (command.trim(), comment.trim());
        if let Some(name) = comment.strip_suffix(": Ctrl-C") {
            let stopped = within(PATIENCE, self.members.remove(name).unwrap().interrupt())
                .await
                .unwrap();
            assert!(stopped.success(), "{line}: {stopped}");
            return String::new();
        }
        if command.starts_with("registry serve ") {
            let name = command.rsplit_once(' ').unwrap().1.trim_end_matches(".toml");
            let names = match comment {
                "on each machine its own" => vec!["a", "b", "c"],
                _ => vec![name],
            };
            let starting = names.iter().map(|each| {
                let line = command.replace(&format!("{name}.toml"), &format!("{each}.toml"));
                ready(self.shell(&format!("exec {line}")))
            });
            let started = join_all(starting).await;
            self.members.extend(names.into_iter().map(str::to_owned).zip(started));
            return String::new();
        }
        let output = within(PATIENCE, self.shell(line).output()).await.unwrap();
        let said = String::from_utf8_lossy(&output.stdout).trim_end().to_owned();
        let complaint = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{line}: {said}{complaint}");
        if command.contains(" get ") {
            assert_eq!(said, comment, "{line}");
        }
        said
    }

    async fn kill(&mut self, name: &str) {
        self.members.remove(name).unwrap().kill().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_walk_through_of_raftexample() {
    let mut site = Site::new();
    site.write("d", 4, &code(OPERATING, STEP_BY_STEP, "toml"));
    let mut said = String::new();
    for line in code(OPERATING, STEP_BY_STEP, "sh") {
        said = site.types(line).await;
    }
    // The last one lists the members. The third is none any more, has stopped itself, and does not come back.
    assert_eq!(said.lines().count(), 3, "{said}");
    assert!(!said.contains("member c"), "{said}");
    let mut third = site.members.remove("c").unwrap();
    let ended = within(PATIENCE, third.ended()).await.unwrap();
    assert_eq!(ended.code(), Some(1));
    let again = site.shell("registry serve --config c.toml").output();
    let again = within(PATIENCE, again).await.unwrap();
    assert_eq!(again.status.code(), Some(1));
    let complaint = String::from_utf8_lossy(&again.stderr);
    assert!(complaint.contains("was removed"), "{complaint}");
    site.types("registry --config b.toml put /my-key three").await;
    site.types("registry --config d.toml get /my-key # three").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_machine_is_replaced_by_three_commands() {
    let commands = code(OPERATING, "### Replacing a dead machine", "sh");
    let [remove, serve, promote] = commands[..] else {
        panic!("{commands:?}")
    };
    let mut site = Site::new();
    site.types("registry serve --config a.toml # on each machine its own")
        .await;
    site.types("registry --config a.toml put /my-key 1").await;
    site.kill("c").await;

    site.types(remove).await;
    site.write("c", 5, &code(OPERATING, STEP_BY_STEP, "toml"));
    site.types(serve).await;
    let said = site.types(promote).await;
    assert_eq!(said.lines().count(), 3, "{said}");
    assert!(!said.contains("learner"), "{said}");

    site.types("registry --config c.toml get /my-key # 1").await;
    // It counts: with another gone there is still a majority.
    site.kill("b").await;
    site.types("registry --config a.toml put /my-key 2").await;
    site.types("registry --config c.toml get /my-key # 2").await;
}
