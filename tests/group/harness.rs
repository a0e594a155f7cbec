//! A group whose members are processes, each killed with the test.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::Arc;
use std::time::Duration;

use registry::raft::{self, RaftConfig, Status};
use registry::{Options, Registry, SessionTtl};
use registry_tests::{Net, Process, process, within};
use tempfile::TempDir;
use tokio::process::Command;

pub(crate) const PATIENCE: Duration = Duration::from_secs(40);
pub(crate) const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];

pub(crate) struct Group {
    pub(crate) net: Arc<Net>,
    pub(crate) listen: Vec<SocketAddr>,
    processes: Vec<Option<Process>>,
    program: fn(&Path) -> Command,
    /// Removed last, when nobody writes to it any more.
    dir: TempDir,
}

impl Group {
    pub(crate) async fn start(size: usize) -> Self {
        Self::start_with(size, |_| String::new()).await
    }

    /// As [`Group::start`], with more lines in the table of each member.
    pub(crate) async fn start_with(size: usize, settings: impl Fn(usize) -> String) -> Self {
        Self::start_program(size, settings, serving).await
    }

    /// As [`Group::start_with`], of another program than `registry serve`, which gets the config file.
    pub(crate) async fn start_program(
        size: usize,
        settings: impl Fn(usize) -> String,
        program: fn(&Path) -> Command,
    ) -> Self {
        let listen: Vec<_> = (0..size).map(|_| free_address()).collect();
        let net = Arc::new(Net::before(&listen).await);
        let dir = TempDir::new().unwrap();
        let list: String = (0..size)
            .map(|at| format!("{} = \"{}\"\n", NAMES[at], net.address(at)))
            .collect();
        for (at, listen) in listen.iter().enumerate() {
            let name = NAMES[at];
            let data = dir.path().join(name);
            let text = format!(
                "[registry.raft]\nmember = \"{name}\"\ndata_dir = \"{}\"\nlisten = \"{listen}\"\n\
                 {}\n[registry.raft.cluster]\n{list}",
                data.display(),
                settings(at)
            );
            std::fs::write(dir.path().join(format!("{name}.toml")), text).unwrap();
        }
        let mut group = Self {
            dir,
            net,
            listen,
            processes: (0..size).map(|_| None).collect(),
            program,
        };
        group.restart(&(0..size).collect::<Vec<_>>()).await;
        group
    }

    pub(crate) fn size(&self) -> usize {
        self.processes.len()
    }

    pub(crate) fn config_file(&self, name: &str) -> PathBuf {
        self.dir.path().join(format!("{name}.toml"))
    }

    /// Writes the config of one more, which joins these.
    pub(crate) fn write_joiner(&self, name: &str, listen: SocketAddr, settings: &str) {
        let join: Vec<_> = (0..self.size())
            .map(|at| format!("\"{}\"", self.net.address(at)))
            .collect();
        let text = format!(
            "[registry.raft]\nmember = \"{name}\"\ndata_dir = \"{}\"\nlisten = \"{listen}\"\njoin = [{}]\n{settings}\n",
            self.dir.path().join(name).display(),
            join.join(", ")
        );
        std::fs::write(self.config_file(name), text).unwrap();
    }

    pub(crate) fn directory(&self) -> PathBuf {
        self.dir.path().into()
    }

    /// Starts these members, all at once, and waits until each is ready.
    pub(crate) async fn restart(&mut self, members: &[usize]) {
        let starting = members
            .iter()
            .map(|at| ready((self.program)(&self.config_file(NAMES[*at]))));
        let started = futures_util::future::join_all(starting).await;
        for (at, process) in members.iter().zip(started) {
            self.net.runs(*at, process.id());
            self.processes[*at] = Some(process);
        }
    }

    /// Starts one, and waits for nothing: it may not find the others.
    pub(crate) fn start_unready(&mut self, at: usize) {
        let process = Process::start_unready((self.program)(&self.config_file(NAMES[at])));
        self.net.runs(at, process.id());
        self.processes[at] = Some(process);
    }

    pub(crate) async fn serve(config: PathBuf) -> Process {
        ready(serving(&config)).await
    }

    pub(crate) async fn kill(&mut self, at: usize) {
        self.net.runs(at, None);
        self.processes[at].take().unwrap().kill().await;
    }

    pub(crate) fn process(&mut self, at: usize) -> &mut Process {
        self.processes[at].as_mut().unwrap()
    }

    /// The numbers of the processes that run.
    pub(crate) fn process_ids(&self) -> Vec<u32> {
        self.processes.iter().flatten().filter_map(Process::id).collect()
    }

    /// Where a member answers.
    pub(crate) fn address(&self, at: usize) -> String {
        self.listen[at].to_string()
    }

    /// A handle on one member alone.
    pub(crate) async fn connect(&self, at: usize) -> Arc<dyn Registry> {
        raft::connect(&self.remote(at), &options()).await.unwrap()
    }

    /// A handle that knows all members.
    pub(crate) async fn connect_all(&self) -> Arc<dyn Registry> {
        let remote = RaftConfig::remote(self.listen.iter().map(ToString::to_string));
        raft::connect(&remote, &options()).await.unwrap()
    }

    pub(crate) fn remote(&self, at: usize) -> RaftConfig {
        RaftConfig::remote([self.address(at)])
    }

    /// How one member sees the group; nothing if it does not answer.
    pub(crate) async fn status(&self, at: usize) -> Option<Status> {
        let quick = Options {
            connect_timeout: Duration::from_secs(5),
            ..options()
        };
        raft::status(&self.remote(at), &quick).await.ok()
    }

    /// Who leads, as these members see it, once they see the same one of `among`.
    pub(crate) async fn leader_of(&self, who: &[usize], among: &[usize]) -> usize {
        let agreed = async {
            loop {
                let mut leaders = Vec::new();
                for at in who {
                    let status = self.status(*at).await;
                    let leader = status
                        .as_ref()
                        .and_then(Status::leader)
                        .map(|leader| leader.name.clone());
                    leaders.push(leader.and_then(|name| NAMES.iter().position(|other| *other == name)));
                }
                if let Some(leader) = leaders[0].filter(|leader| among.contains(leader))
                    && leaders.iter().all(|other| *other == Some(leader))
                {
                    return leader;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        within(PATIENCE, agreed).await
    }

    pub(crate) async fn leader(&self) -> usize {
        let running: Vec<_> = (0..self.size()).filter(|at| self.processes[*at].is_some()).collect();
        self.leader_of(&running, &running).await
    }

    /// Runs the command with a member's settings.
    pub(crate) async fn command(&self, config: &str, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_registry"));
        command.arg("--config").arg(self.config_file(config)).args(arguments);
        command.env_remove("REGISTRY_CONFIG").kill_on_drop(true);
        within(PATIENCE, command.output()).await.unwrap()
    }

    /// As [`Group::command`], for one that must succeed; answers what it printed.
    pub(crate) async fn run(&self, config: &str, arguments: &[&str]) -> String {
        let output = self.command(config, arguments).await;
        let (out, err) = (
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
        );
        assert!(output.status.success(), "{arguments:?}: {out}{err}");
        out.trim_end().into()
    }
}

pub(crate) fn serving(config: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_registry"));
    command
        .arg("serve")
        .arg("--config")
        .arg(config)
        .env_remove("REGISTRY_CONFIG");
    command
}

pub(crate) fn free_address() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], process::free_port()))
}

pub(crate) async fn ready(command: Command) -> Process {
    Process::start(command, |line| line.contains("ready").then_some(()))
        .await
        .0
}

pub(crate) fn options() -> Options {
    Options {
        session_ttl: SessionTtl::new(Duration::from_secs(10)).unwrap(),
        request_timeout: Duration::from_secs(10),
        connect_timeout: Duration::from_secs(20),
        ..Options::default()
    }
}
