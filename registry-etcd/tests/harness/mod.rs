//! Real etcd members on loopback.

#![allow(missing_docs, unreachable_pub, dead_code, clippy::unwrap_used)]

pub mod streams;
pub mod suite;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use etcd_client::{Certificate, Client, ConnectOptions, Identity, TlsOptions};
use registry_api::{Options, Registry, SessionTtl};
use registry_etcd::{Endpoints, EtcdConfig};
use registry_tests::Wire;
use registry_tests::certificate::certificate;
use registry_tests::process::free_port;
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Ends with the test: members are killed, their data is deleted.
pub struct Servers {
    members: Vec<Member>,
    /// How clients speak to it.
    scheme: &'static str,
    arguments: Vec<String>,
    data: tempfile::TempDir,
}

struct Member {
    name: String,
    data: PathBuf,
    client: u16,
    peer: u16,
    /// Where the other members find it, if not there.
    advertised: Option<u16>,
    process: Option<Child>,
}

impl Member {
    fn peer_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.advertised.unwrap_or(self.peer))
    }
}

impl Servers {
    pub async fn start(members: usize) -> Self {
        Self::start_with(members, &[]).await
    }

    /// Members that elect fast, and so grant a TTL of a second.
    pub async fn start_fast(members: usize) -> Self {
        Self::start_with(members, &["--heartbeat-interval=50", "--election-timeout=500"]).await
    }

    pub async fn start_with(members: usize, arguments: &[&str]) -> Self {
        let mut cluster = Self::new(members);
        cluster.arguments = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        cluster.started().await
    }

    /// Members that reach each other over wires: each member's is the one that the others dial.
    pub async fn start_over_wires(members: usize) -> (Self, Vec<Wire>) {
        let mut cluster = Self::new(members);
        cluster.arguments = ["--heartbeat-interval=50", "--election-timeout=500"]
            .map(Into::into)
            .into();
        let mut wires = Vec::new();
        for member in &mut cluster.members {
            let wire = Wire::to(format!("127.0.0.1:{}", member.peer).parse().unwrap()).await;
            member.advertised = Some(wire.address().port());
            wires.push(wire);
        }
        (cluster.started().await, wires)
    }

    /// Adds a member without a vote; its number.
    pub async fn add_learner(&mut self) -> usize {
        let number = self.members.len();
        let member = Member {
            name: format!("m{number}"),
            data: self.data.path().join(number.to_string()),
            client: free_port(),
            peer: free_port(),
            advertised: None,
            process: None,
        };
        let added = Command::new("etcdctl")
            .env("ETCDCTL_API", "3")
            .args([
                "--endpoints",
                &self.endpoint(0),
                "member",
                "add",
                &member.name,
                "--learner",
            ])
            .args(["--peer-urls", &member.peer_url()])
            .output()
            .expect("etcdctl is missing: apt-get install etcd-client");
        assert!(added.status.success(), "{added:?}");
        self.members.push(member);
        self.arguments.push("--initial-cluster-state=existing".into());
        self.spawn(number);
        self.arguments.pop();
        until("the learner has a leader", async || {
            let Ok(client) = Client::connect([self.endpoint(number)], None).await else {
                return false;
            };
            let status = client.maintenance_client().status().await;
            status.is_ok_and(|status| status.is_learner() && status.leader() != 0)
        })
        .await;
        number
    }

    /// Stops the only member, does something to its files, and starts it again.
    pub async fn restart_with(&mut self, change: impl FnOnce(&Self, &Path)) {
        self.kill(0);
        change(self, &self.members[0].data);
        self.spawn(0);
        self.ready().await;
    }

    /// Replaces the files of the only member by those of a snapshot.
    pub async fn restore(&mut self, snapshot: &Path) {
        let change = |cluster: &Self, data: &Path| {
            std::fs::remove_dir_all(data).unwrap();
            let member = &cluster.members[0];
            let restored = Command::new("etcdctl")
                .env("ETCDCTL_API", "3")
                .args(["snapshot", "restore"])
                .arg(snapshot)
                .args(["--name", &member.name])
                .args(["--initial-cluster", &format!("{}={}", member.name, member.peer_url())])
                .args(["--initial-advertise-peer-urls", &member.peer_url()])
                .arg("--data-dir")
                .arg(data)
                .output()
                .expect("etcdctl is missing: apt-get install etcd-client");
            assert!(restored.status.success(), "{restored:?}");
        };
        self.restart_with(change).await;
    }

    /// One member that speaks TLS alone.
    pub async fn start_with_tls() -> Self {
        Self::new_with_tls(1).started().await
    }

    /// Members that speak TLS, and only with clients whose certificate the authority signed.
    pub async fn start_with_mutual_tls(members: usize) -> Self {
        let mut cluster = Self::new_with_tls(members);
        let ca = format!("--trusted-ca-file={}", cluster.file("ca.pem").display());
        cluster.arguments.extend([ca, "--client-cert-auth".into()]);
        cluster.started().await
    }

    fn new_with_tls(members: usize) -> Self {
        let mut cluster = Self::new(members);
        cluster.scheme = "https";
        for name in ["ca", "server", "client"] {
            certificate(cluster.data.path(), name);
        }
        let file = |name: &str| cluster.file(name).display().to_string();
        cluster.arguments = vec![
            format!("--cert-file={}", file("server.pem")),
            format!("--key-file={}", file("server.key")),
        ];
        cluster
    }

    async fn started(mut self) -> Self {
        self.spawn_all();
        self.ready().await;
        self
    }

    fn new(members: usize) -> Self {
        let data = tempfile::tempdir().unwrap();
        let members = (0..members).map(|number| Member {
            name: format!("m{number}"),
            data: data.path().join(number.to_string()),
            client: free_port(),
            peer: free_port(),
            advertised: None,
            process: None,
        });
        Self {
            members: members.collect(),
            scheme: "http",
            arguments: Vec::new(),
            data,
        }
    }

    /// A file beside the members' data.
    pub fn file(&self, name: &str) -> PathBuf {
        self.data.path().join(name)
    }

    pub fn kill_all(&mut self) {
        for number in 0..self.members.len() {
            self.kill(number);
        }
    }

    pub fn signal_all(&self, signal: Signal) {
        for process in self.members.iter().filter_map(|member| member.process.as_ref()) {
            kill_process(Pid::from_child(process), signal).unwrap();
        }
    }

    pub fn signal(&self, number: usize, signal: Signal) {
        let process = self.members[number].process.as_ref().unwrap();
        kill_process(Pid::from_child(process), signal).unwrap();
    }

    pub fn spawn_all(&mut self) {
        for member in 0..self.members.len() {
            self.spawn(member);
        }
    }

    pub fn spawn(&mut self, number: usize) {
        let all = self.members.iter().map(|m| format!("{}={}", m.name, m.peer_url()));
        let all = all.collect::<Vec<_>>().join(",");
        let member = &mut self.members[number];
        let client = format!("{}://127.0.0.1:{}", self.scheme, member.client);
        let peer = format!("http://127.0.0.1:{}", member.peer);
        let process = Command::new("etcd")
            .args(["--name", &member.name, "--initial-cluster", &all])
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer])
            .args(["--initial-advertise-peer-urls", &member.peer_url()])
            .args(["--logger=zap", "--log-outputs=stderr"])
            .args(&self.arguments)
            .arg("--data-dir")
            .arg(&member.data)
            .stderr(Stdio::null())
            .spawn();
        member.process = Some(process.expect("etcd is missing: apt-get install etcd-server"));
    }

    /// Waits until every member that runs answers and knows a leader.
    pub async fn ready(&self) {
        for member in self.members.iter().filter(|member| member.process.is_some()) {
            let client = self.client(&format!("127.0.0.1:{}", member.client)).await;
            let began = Instant::now();
            while !answers(&client).await {
                assert!(began.elapsed() < Duration::from_secs(30), "etcd is not ready in 30 s");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }

    pub fn kill(&mut self, number: usize) {
        if let Some(mut process) = self.members[number].process.take() {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }

    pub fn endpoint(&self, number: usize) -> String {
        format!("127.0.0.1:{}", self.members[number].client)
    }

    pub fn endpoints(&self) -> Vec<String> {
        (0..self.members.len()).map(|number| self.endpoint(number)).collect()
    }

    pub async fn leader(&self) -> usize {
        let leader = self.leader_as_known_to(0..self.members.len()).await;
        leader.expect("there is a leader")
    }

    /// The leader, if it is one of these.
    pub async fn leader_as_known_to(&self, members: impl IntoIterator<Item = usize>) -> Option<usize> {
        for number in members {
            let status = self
                .client(&self.endpoint(number))
                .await
                .maintenance_client()
                .status()
                .await
                .unwrap();
            if status.leader() == status.header().unwrap().member_id() {
                return Some(number);
            }
        }
        None
    }

    /// Has the leader hand over to the next member.
    pub async fn move_leader(&self) {
        let leader = self.leader().await;
        let next = self.client(&self.endpoint((leader + 1) % self.members.len())).await;
        let status = next.maintenance_client().status().await.unwrap();
        let next = status.header().unwrap().member_id();
        let leader = self.client(&self.endpoint(leader)).await;
        leader.maintenance_client().move_leader(next).await.unwrap();
    }

    /// A figure of the first member's own account.
    pub async fn metric(&self, name: &str) -> f64 {
        let mut stream = TcpStream::connect(self.endpoint(0)).await.unwrap();
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let line = answer
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap().parse().unwrap()
    }

    /// A client that goes straight to a member.
    pub async fn raw(&self) -> Client {
        self.client(&self.endpoint(0)).await
    }

    async fn client(&self, endpoint: &str) -> Client {
        Client::connect([endpoint], Some(self.dial())).await.unwrap()
    }

    /// How members are dialled.
    pub fn dial(&self) -> ConnectOptions {
        let dial = ConnectOptions::new();
        if self.scheme == "http" {
            return dial;
        }
        let read = |name| std::fs::read(self.file(name)).unwrap();
        let tls = TlsOptions::new().ca_certificate(Certificate::from_pem(read("ca.pem")));
        dial.with_tls(tls.identity(Identity::from_pem(read("client.pem"), read("client.key"))))
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        self.kill_all();
    }
}

async fn answers(client: &Client) -> bool {
    let mut kv = client.kv_client();
    let get = kv.get("ready", None);
    matches!(tokio::time::timeout(Duration::from_secs(1), get).await, Ok(Ok(_)))
}

pub const TTL: Duration = Duration::from_secs(3);

pub async fn connect(endpoints: &[String]) -> Arc<dyn Registry> {
    connect_with_ttl(endpoints, TTL).await
}

pub async fn connect_with_ttl(endpoints: &[String], ttl: Duration) -> Arc<dyn Registry> {
    let config = EtcdConfig::new(Endpoints::new(endpoints).unwrap());
    let options = Options {
        session_ttl: SessionTtl::new(ttl).unwrap(),
        request_timeout: Duration::from_secs(3),
        ..Options::default()
    };
    registry_etcd::connect(&config, &options).await.unwrap()
}

/// Waits for what stays true once it is.
pub async fn until(what: &str, holds: impl AsyncFn() -> bool) {
    let began = Instant::now();
    while !holds().await {
        assert!(began.elapsed() < Duration::from_secs(30), "not in 30 s: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
