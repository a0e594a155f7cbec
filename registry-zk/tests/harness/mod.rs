//! Real ZooKeeper servers on loopback.

#![allow(missing_docs, unreachable_pub, dead_code, clippy::unwrap_used)]

pub mod gate;
pub mod meter;
pub mod old;
pub mod suite;
pub mod tls;
pub mod wire;

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use registry_api::{Options, Registry, SessionId, SessionTtl};
use registry_tests::Wire;
use registry_tests::process::{free_port, zookeeper_class_path};
use registry_zk::ZkConfig;
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use wire::Answer;
use zookeeper_client::{Acls, Client, CreateMode, CreateOptions};

/// What tests ask for: twelve ticks, so that a session outlives what else the machine does.
pub const TTL: Duration = Duration::from_secs(3);
/// A mark, as other tests of the mapping know it.
pub const MARK: &[u8] = b"\0registry\0/";

/// Ends with the test: servers are killed, their data is deleted.
pub struct Servers {
    servers: Vec<Server>,
    data: tempfile::TempDir,
    /// The most bytes of a request, where it is not what it is as shipped.
    max_buffer: Option<usize>,
}

struct Server {
    data: PathBuf,
    client: u16,
    process: Option<Child>,
}

impl Servers {
    /// One server, or an ensemble.
    pub async fn start(servers: usize) -> Self {
        Self::start_with(servers, "").await
    }

    /// With further lines of configuration.
    pub async fn start_with(servers: usize, lines: &str) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), servers, lines).await
    }

    /// One that takes requests of so many bytes.
    pub async fn start_small(max_buffer: usize) -> Self {
        let mut servers = Self::prepared_in(tempfile::tempdir().unwrap(), 1, "");
        servers.max_buffer = Some(max_buffer);
        servers.run().await
    }

    /// With their data there.
    pub async fn start_in(data: tempfile::TempDir, servers: usize, lines: &str) -> Self {
        Self::prepared_in(data, servers, lines).run().await
    }

    /// An ensemble with a wire to each server, which its followers are connected by.
    pub async fn start_wired(servers: usize, lines: &str) -> (Self, Vec<Wire>) {
        let ports = free_ports(servers);
        let mut wires = Vec::new();
        for (_, peer, _) in &ports {
            wires.push(Wire::to(([127, 0, 0, 1], *peer).into()).await);
        }
        let ways: Vec<_> = wires.iter().map(|wire| wire.address().port()).collect();
        let servers = Self::prepared(tempfile::tempdir().unwrap(), &ports, &ways, lines);
        (servers.run().await, wires)
    }

    fn prepared_in(data: tempfile::TempDir, servers: usize, lines: &str) -> Self {
        let ports = free_ports(servers);
        let ways: Vec<_> = ports.iter().map(|(_, peer, _)| *peer).collect();
        Self::prepared(data, &ports, &ways, lines)
    }

    /// `ways` are the ports at which a server's followers reach it.
    fn prepared(data: tempfile::TempDir, ports: &[(u16, u16, u16)], ways: &[u16], lines: &str) -> Self {
        let ensemble = |of: usize| -> String {
            let line = |(id, ((_, peer, election), way)): (usize, (&(u16, u16, u16), &u16))| {
                let peer = if id == of { peer } else { way };
                format!("server.{id}=127.0.0.1:{peer}:{election}\n")
            };
            match ports.len() {
                1 => String::new(),
                _ => (1..).zip(ports.iter().zip(ways)).map(line).collect(),
            }
        };
        let mut started = Vec::new();
        for (id, (client, ..)) in (1..).zip(ports) {
            let dir = data.path().join(id.to_string());
            fs::create_dir(&dir).unwrap();
            fs::write(dir.join("myid"), format!("{id}\n")).unwrap();
            let config = format!(
                "tickTime=250\ninitLimit=40\nsyncLimit=8\nmaxSessionTimeout=60000\ndataDir={}\nclientPort={client}\n\
                 clientPortAddress=127.0.0.1\nadmin.enableServer=false\n4lw.commands.whitelist=*\nmaxClientCnxns=0\n\
                 {}{lines}",
                dir.display(),
                ensemble(id)
            );
            fs::write(dir.join("zoo.cfg"), config).unwrap();
            started.push(Server {
                data: dir,
                client: *client,
                process: None,
            });
        }
        Self {
            servers: started,
            data,
            max_buffer: None,
        }
    }

    async fn run(mut self) -> Self {
        self.spawn_all();
        self.ready().await;
        self
    }

    pub fn spawn_all(&mut self) {
        for number in 0..self.servers.len() {
            self.spawn(number);
        }
    }

    pub fn spawn(&mut self, number: usize) {
        let server = &mut self.servers[number];
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(server.data.join("log"))
            .unwrap();
        let process = Command::new("java")
            .args(["-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"])
            .args(self.max_buffer.map(|bytes| format!("-Djute.maxbuffer={bytes}")))
            .arg("-cp")
            .arg(zookeeper_class_path())
            .arg("org.apache.zookeeper.server.quorum.QuorumPeerMain")
            .arg(server.data.join("zoo.cfg"))
            .stdout(Stdio::null())
            .stderr(log)
            .spawn();
        server.process = Some(process.expect("java is missing: apt-get install default-jre-headless"));
    }

    pub fn kill(&mut self, number: usize) {
        if let Some(mut process) = self.servers[number].process.take() {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }

    pub fn kill_all(&mut self) {
        for number in 0..self.servers.len() {
            self.kill(number);
        }
    }

    pub fn signal(&self, number: usize, signal: Signal) {
        if let Some(process) = &self.servers[number].process {
            kill_process(Pid::from_child(process), signal).unwrap();
        }
    }

    pub fn signal_all(&self, signal: Signal) {
        for number in 0..self.servers.len() {
            self.signal(number, signal);
        }
    }

    /// Waits until every server that runs serves.
    pub async fn ready(&self) {
        let began = Instant::now();
        for server in self.servers.iter().filter(|server| server.process.is_some()) {
            while mode(server.client).await.is_none() {
                assert!(
                    began.elapsed() < Duration::from_secs(40),
                    "ZooKeeper is not ready in 40 s: {}",
                    fs::read_to_string(server.data.join("log")).unwrap()
                );
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }

    /// Whether a server answers its clients: it leads, follows, or is the only one.
    pub async fn serves(&self, number: usize) -> bool {
        mode(self.servers[number].client).await.is_some()
    }

    /// The number of the server that leads.
    pub async fn leader(&self) -> usize {
        for (number, server) in self.servers.iter().enumerate() {
            if mode(server.client).await.as_deref() == Some("leader") {
                return number;
            }
        }
        panic!("no leader");
    }

    pub fn address(&self, number: usize) -> String {
        format!("127.0.0.1:{}", self.servers[number].client)
    }

    pub fn addresses(&self) -> String {
        let all: Vec<_> = (0..self.servers.len()).map(|number| self.address(number)).collect();
        all.join(",")
    }

    /// A file beside the servers' data.
    pub fn file(&self, name: &str) -> PathBuf {
        self.data.path().join(name)
    }

    /// A client that goes straight to a server.
    pub async fn raw(&self) -> Client {
        Client::connect(&self.addresses()).await.unwrap()
    }

    /// What a server says to one of the words it knows.
    pub async fn ask(&self, number: usize, word: &str) -> String {
        ask(self.servers[number].client, word).await.unwrap()
    }

    /// The same of a server that may not answer: nothing, then.
    pub async fn ask_if_up(&self, number: usize, word: &str) -> String {
        ask(self.servers[number].client, word).await.unwrap_or_default()
    }

    /// Closes a session as its owner would, again and again until a server says that it is over: the owner is at work,
    /// and whoever connects last has the session's only connection.
    pub async fn close_session(&self, session: SessionId) {
        let began = Instant::now();
        loop {
            for server in &self.servers {
                let closing = wire::close_session(server.client, session);
                let closing = tokio::time::timeout(Duration::from_secs(2), closing);
                if closing.await.is_ok_and(|answer| answer == Some(Answer::Over)) {
                    return;
                }
            }
            assert!(
                began.elapsed() < Duration::from_secs(20),
                "no server closes session {session}"
            );
        }
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        self.kill_all();
    }
}

/// For each server: for clients, for its followers, for elections.
fn free_ports(servers: usize) -> Vec<(u16, u16, u16)> {
    (0..servers).map(|_| (free_port(), free_port(), free_port())).collect()
}

/// What a server is, once it serves.
async fn mode(port: u16) -> Option<String> {
    let answer = ask(port, "srvr").await?;
    let mode = answer.lines().find_map(|line| line.strip_prefix("Mode: "))?;
    Some(mode.to_owned())
}

async fn ask(port: u16, word: &str) -> Option<String> {
    let asking = async {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await.ok()?;
        stream.write_all(word.as_bytes()).await.ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.ok()?;
        Some(answer)
    };
    tokio::time::timeout(Duration::from_secs(2), asking).await.ok()?
}

pub fn anyone() -> CreateOptions<'static> {
    CreateMode::Persistent.with_acls(Acls::anyone_all())
}

pub fn config(servers: &str) -> ZkConfig {
    ZkConfig::new(registry_zk::Servers::new(servers).unwrap())
}

pub fn options() -> Options {
    Options {
        session_ttl: SessionTtl::new(TTL).unwrap(),
        ..Options::default()
    }
}

pub async fn connect(servers: &str) -> Arc<dyn Registry> {
    connect_with_ttl(servers, TTL).await
}

pub async fn connect_with_ttl(servers: &str, ttl: Duration) -> Arc<dyn Registry> {
    let options = Options {
        session_ttl: SessionTtl::new(ttl).unwrap(),
        ..options()
    };
    registry_zk::connect(&config(servers), &options).await.unwrap()
}

/// Asks again until the answer is yes.
pub async fn until(what: &str, limit: Duration, mut ask: impl AsyncFnMut() -> bool) {
    let asking = async {
        while !ask().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let asked = tokio::time::timeout(limit, asking).await;
    asked.unwrap_or_else(|_| panic!("not within {limit:?}: {what}"));
}
