//! The servers that are compared: processes on loopback, with the durability they are shipped with.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use registry_api::{BoxError, Options, Registry, SessionTtl};
use registry_raft::{Member, MemberChange, RaftConfig};
use registry_tests::process::{free_port, zookeeper_class_path};
use registry_tests::{Process, within};
use tempfile::TempDir;
use tokio::process::Command;

use crate::client::Client;

const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];
const PATIENCE: Duration = Duration::from_secs(120);
const PAUSE: Duration = Duration::from_millis(10);

/// One server or an ensemble, killed when it is dropped.
pub(crate) struct Servers {
    kind: Kind,
    ports: Vec<[u16; 3]>,
    processes: Vec<Process>,
    /// The member that leads, where it lives in this process.
    member: Option<Member>,
    /// Removed last, when nobody writes to it any more.
    dir: TempDir,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The member that leads lives in this process.
    Embedded,
    /// The same, with lease reads.
    Leased,
    /// All members have processes of their own.
    Remote,
    Etcd,
    Zk,
}

impl Kind {
    pub(crate) const ALL: [Self; 5] = [Self::Embedded, Self::Leased, Self::Remote, Self::Etcd, Self::Zk];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Embedded => "embedded",
            Self::Leased => "lease reads",
            Self::Remote => "remote",
            Self::Etcd => "etcd",
            Self::Zk => "ZooKeeper",
        }
    }
}

impl Servers {
    pub(crate) async fn start(kind: Kind, size: usize) -> Result<Self, BoxError> {
        let mut servers = Self {
            kind,
            dir: TempDir::new()?,
            ports: (0..size).map(|_| [free_port(), free_port(), free_port()]).collect(),
            processes: Vec::new(),
            member: None,
        };
        servers.spawn().await?;
        Ok(servers)
    }

    /// Kills them all, and starts them again.
    pub(crate) async fn restart(&mut self) -> Result<(), BoxError> {
        for process in &mut self.processes {
            process.kill().await;
        }
        self.processes.clear();
        self.spawn().await
    }

    async fn spawn(&mut self) -> Result<(), BoxError> {
        let size = self.ports.len();
        match self.kind {
            Kind::Embedded | Kind::Leased => {
                let others = (1..size).map(|at| self.start_member(at));
                let config = self.config(0);
                let (member, others) = tokio::join!(Member::start(&config), futures_util::future::join_all(others));
                self.processes = others;
                self.member = Some(member?);
                self.lead().await
            }
            Kind::Remote => {
                let all = (0..size).map(|at| self.start_member(at));
                self.processes = futures_util::future::join_all(all).await;
                Ok(())
            }
            Kind::Etcd => {
                self.processes = (0..size).map(|at| Process::start_unready(self.etcd(at))).collect();
                Ok(())
            }
            Kind::Zk => {
                for at in 0..size {
                    let command = self.zookeeper(at)?;
                    self.processes.push(Process::start_unready(command));
                }
                Ok(())
            }
        }
    }

    /// A connection, once they answer.
    pub(crate) async fn connect(&self) -> Result<Client, BoxError> {
        self.connect_with(Duration::from_secs(30)).await
    }

    /// The same, with a session of that TTL where the client opens one.
    pub(crate) async fn connect_with(&self, ttl: Duration) -> Result<Client, BoxError> {
        let (options, addresses) = (options(ttl), self.addresses());
        match self.kind {
            Kind::Embedded | Kind::Leased => {
                let member = self.member.as_ref().ok_or("the member does not run")?;
                Ok(Client::Ours(member.connect(&options).await?))
            }
            Kind::Remote => Ok(Client::Ours(remote(&addresses, ttl).await?)),
            Kind::Etcd => {
                // Each of them: a request goes to any.
                for address in &addresses {
                    within(PATIENCE, etcd_answers(address)).await;
                }
                let client = etcd_client::Client::connect(&addresses, None).await?;
                Ok(Client::Etcd(Arc::new(client)))
            }
            Kind::Zk => {
                let connector = zookeeper_client::Client::connector().with_session_timeout(ttl);
                let connected = async {
                    loop {
                        match connector.clone().connect(&addresses.join(",")).await {
                            Ok(client) => return client,
                            Err(_) => tokio::time::sleep(PAUSE).await,
                        }
                    }
                };
                Ok(Client::Zk(within(PATIENCE, connected).await))
            }
        }
    }

    pub(crate) fn addresses(&self) -> Vec<String> {
        let address = |ports: &[u16; 3]| format!("127.0.0.1:{}", ports[0]);
        self.ports.iter().map(address).collect()
    }

    /// The number of the first server's process.
    pub(crate) fn process(&self) -> Result<u32, BoxError> {
        let first = self.processes.first().and_then(Process::id);
        first.ok_or_else(|| "no process runs".into())
    }

    fn config(&self, at: usize) -> RaftConfig {
        let mut config = config(at, self.dir.path(), &self.addresses());
        config.lease_reads = self.kind == Kind::Leased;
        config
    }

    async fn start_member(&self, at: usize) -> Process {
        let mut command = Command::new(std::env::current_exe().expect("this program has a file"));
        command.args(["member", &at.to_string()]).arg(self.dir.path());
        command.args(self.addresses());
        let ready = |line: &str| (line == "ready").then_some(());
        Process::start(command, ready).await.0
    }

    /// Makes the member of this process the one that leads.
    async fn lead(&self) -> Result<(), BoxError> {
        let member = self.member.as_ref().ok_or("the member does not run")?;
        let mut leadership = member.leadership();
        if leadership.borrow_and_update().is_none() {
            let name = NAMES[0].to_owned();
            member.change_members(MemberChange::Transfer { name }).await?;
            within(PATIENCE, leadership.wait_for(Option::is_some)).await?;
        }
        Ok(())
    }

    fn etcd(&self, at: usize) -> Command {
        let [client, peer, _] = self.ports[at];
        let (client, peer) = (format!("http://127.0.0.1:{client}"), format!("http://127.0.0.1:{peer}"));
        let all = self.ports.iter().zip(NAMES);
        let all = all.map(|([_, peer, _], name)| format!("{name}=http://127.0.0.1:{peer}"));
        let mut command = Command::new("etcd");
        command.args(["--name", NAMES[at]]);
        command.args(["--initial-cluster", &all.collect::<Vec<_>>().join(",")]);
        command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
        command
            .args(["--logger=zap", "--log-outputs=stderr"])
            .stderr(Stdio::null());
        command.arg("--data-dir").arg(self.dir.path().join(NAMES[at]));
        command
    }

    fn zookeeper(&self, at: usize) -> Result<Command, BoxError> {
        let dir = self.dir.path().join(NAMES[at]);
        std::fs::create_dir_all(&dir)?;
        std::fs::write(dir.join("myid"), format!("{}\n", at + 1))?;
        let mut text = format!(
            "tickTime=2000\ninitLimit=10\nsyncLimit=5\ndataDir={}\nclientPort={}\nclientPortAddress=127.0.0.1\n\
             admin.enableServer=false\nmaxClientCnxns=0\n",
            dir.display(),
            self.ports[at][0]
        );
        if self.ports.len() > 1 {
            for (id, [_, peer, election]) in (1..).zip(&self.ports) {
                text += &format!("server.{id}=127.0.0.1:{peer}:{election}\n");
            }
        }
        std::fs::write(dir.join("zoo.cfg"), text)?;
        let mut command = Command::new("java");
        command.arg("-cp").arg(zookeeper_class_path());
        command.arg("org.apache.zookeeper.server.quorum.QuorumPeerMain");
        command.arg(dir.join("zoo.cfg")).stderr(Stdio::null());
        Ok(command)
    }
}

async fn etcd_answers(address: &str) {
    loop {
        if let Ok(client) = etcd_client::Client::connect([address], None).await {
            let mut kv = client.kv_client();
            let asked = tokio::time::timeout(Duration::from_secs(1), kv.get("ready", None));
            if matches!(asked.await, Ok(Ok(_))) {
                return;
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// A remote handle on these members.
pub(crate) async fn remote(addresses: &[String], ttl: Duration) -> Result<Arc<dyn Registry>, BoxError> {
    let config = RaftConfig::remote(addresses.iter().cloned());
    Ok(registry_raft::connect(&config, &options(ttl)).await?)
}

fn options(ttl: Duration) -> Options {
    Options {
        session_ttl: SessionTtl::new(ttl).expect("it is one"),
        request_timeout: Duration::from_secs(30),
        connect_timeout: PATIENCE,
        ..Options::default()
    }
}

fn config(at: usize, dir: &Path, addresses: &[String]) -> RaftConfig {
    let mut config = RaftConfig::default();
    config.member = Some(NAMES[at].into());
    config.data_dir = Some(dir.join(NAMES[at]));
    config.listen = Some(addresses[at].clone());
    if addresses.len() > 1 {
        let list = NAMES.iter().map(ToString::to_string).zip(addresses.iter().cloned());
        config.cluster = list.collect::<BTreeMap<_, _>>();
    }
    config
}

/// A member in a process of its own, until that is killed.
pub(crate) async fn member(arguments: &[String]) -> Result<(), BoxError> {
    let [at, dir, addresses @ ..] = arguments else {
        return Err("member NUMBER DIRECTORY ADDRESS...".into());
    };
    let config = config(at.parse()?, &PathBuf::from(dir), addresses);
    let member = Member::start(&config).await?;
    println!("ready");
    Err(member.ended().await.into())
}
