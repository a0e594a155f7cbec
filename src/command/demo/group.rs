//! The group of the demo: a member in this process, and two in processes of their own.

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use registry::raft::{Member, MemberChange, RaftConfig, Timers};
use tokio::process::{Child, Command};

use super::{Failure, PATIENCE};

/// The members, by name. The first is in this process.
const NAMES: [&str; 3] = ["a", "b", "c"];

/// Three members on loopback, their data in one directory.
#[derive(Debug)]
pub(super) struct Group {
    here: Member,
    /// What the other members were started with, and their processes.
    others: Vec<(Served, Child)>,
    addresses: Vec<String>,
}

#[derive(Debug)]
struct Served {
    name: &'static str,
    settings: Vec<String>,
}

impl Group {
    /// Founds the group in an empty directory.
    pub(super) async fn found(dir: &Path) -> Result<Self, Failure> {
        let addresses = free_addresses().map_err(|error| Failure::io("no port of 127.0.0.1", &error))?;
        let mut config = RaftConfig::default();
        config.member = Some(NAMES[0].into());
        config.data_dir = Some(dir.join(NAMES[0]));
        config.timers = Timers::Fast;
        config.cluster = NAMES.map(String::from).into_iter().zip(addresses.clone()).collect();
        let others = NAMES[1..]
            .iter()
            .map(|name| {
                let served = Served::new(name, dir, &config);
                served.start().map(|process| (served, process))
            })
            .collect::<Result<_, _>>()?;
        let here = within("the members did not find each other", Member::start(&config)).await??;
        Ok(Self {
            here,
            others,
            addresses,
        })
    }

    /// The member in this process.
    pub(super) fn here(&self) -> &Member {
        &self.here
    }

    /// Where the members answer.
    pub(super) fn addresses(&self) -> &[String] {
        &self.addresses
    }

    /// Kills the Raft leader, which is made one of the other processes first. Tells its name and when it was killed.
    pub(super) async fn kill_leader(&mut self) -> Result<(&'static str, Instant), Failure> {
        if self.leader().await? == NAMES[0] {
            let name = NAMES[1].into();
            self.here.change_members(MemberChange::Transfer { name }).await?;
        }
        let leader = self.leader().await?;
        let found = self.others.iter_mut().find(|(served, _)| served.name == leader);
        let (served, process) =
            found.ok_or_else(|| Failure::new(1, format!("{leader} leads, and is not to be killed")))?;
        Ok((served.name, kill(process).await?))
    }

    /// Starts a member that was killed again, on its directory. Tells where it answers.
    pub(super) fn restart(&mut self, name: &str) -> Result<String, Failure> {
        for (index, (served, process)) in self.others.iter_mut().enumerate() {
            if served.name == name {
                *process = served.start()?;
                return Ok(self.addresses[index + 1].clone());
            }
        }
        Err(Failure::new(1, format!("there is no member {name}")))
    }

    /// The name of the Raft leader, as soon as there is one.
    pub(super) async fn leader(&self) -> Result<String, Failure> {
        let known = async {
            loop {
                if let Some(leader) = self.here.status().leader() {
                    return leader.name.clone();
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        within("no Raft leader was elected", known).await
    }

    /// Stops all of it.
    pub(super) async fn stop(self) -> Result<(), Failure> {
        self.here.stop().await?;
        for (_, mut process) in self.others {
            kill(&mut process).await?;
        }
        Ok(())
    }
}

impl Served {
    /// The settings that a user would give to `registry serve`.
    fn new(name: &'static str, dir: &Path, group: &RaftConfig) -> Self {
        let mut settings = vec![
            format!("raft.member={name}"),
            format!("raft.data_dir={}", dir.join(name).display()),
            "raft.timers=fast".into(),
        ];
        settings.extend(
            group
                .cluster
                .iter()
                .map(|(member, at)| format!("raft.cluster.{member}={at}")),
        );
        Self { name, settings }
    }

    fn start(&self) -> Result<Child, Failure> {
        let set = self.settings.iter().flat_map(|setting| ["--set", setting.as_str()]);
        spawn(["serve"].into_iter().chain(set))
    }
}

/// Addresses of loopback that were free a moment ago.
fn free_addresses() -> std::io::Result<Vec<String>> {
    let held: Vec<_> = NAMES
        .iter()
        .map(|_| TcpListener::bind("127.0.0.1:0"))
        .collect::<Result<_, _>>()?;
    let address = |listener: &TcpListener| listener.local_addr().map(|at: SocketAddr| at.to_string());
    held.iter().map(address).collect()
}

/// This program in a process of its own, which dies with this one.
pub(super) fn spawn<'a>(arguments: impl IntoIterator<Item = &'a str>) -> Result<Child, Failure> {
    let program = std::env::current_exe().map_err(|error| Failure::io("this program's file", &error))?;
    let mut command = Command::new(program);
    for (name, _) in std::env::vars_os() {
        // The settings of whoever calls are for a registry of theirs.
        if name.to_string_lossy().starts_with("REGISTRY_") {
            command.env_remove(name);
        }
    }
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true);
    command
        .spawn()
        .map_err(|error| Failure::io("can't start a process", &error))
}

/// SIGKILL; tells when.
pub(super) async fn kill(process: &mut Child) -> Result<Instant, Failure> {
    let killed = Instant::now();
    let gone = process.kill().await;
    gone.map_err(|error| Failure::io("can't kill a process", &error))?;
    Ok(killed)
}

/// What comes within the demo's patience.
pub(super) async fn within<T>(otherwise: &str, what: impl Future<Output = T>) -> Result<T, Failure> {
    let what = tokio::time::timeout(PATIENCE, what).await;
    what.map_err(|_| Failure::new(1, otherwise))
}
