//! The embedded store as the suite tests it: a member in this process, and one in a process of its own.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use registry::raft::{self, Member, RaftConfig};
use registry::{Options, Registry, Result, SessionId, SessionTtl};
use registry_tests::torture::Usage;
use registry_tests::{Cluster, Members, Process, TTL, Wire, key, process};
use tempfile::TempDir;
use tokio::process::Command;
use tokio::sync::Mutex;

/// How much log makes a served member take a snapshot.
const SNAPSHOT_LOG_BYTES: usize = 1 << 20;

fn options() -> Options {
    Options {
        session_ttl: SessionTtl::new(TTL).expect("the suite's TTL is one"),
        ..Options::default()
    }
}

/// Handles in the process of a member that keeps everything in memory.
// Not every test has a use for both.
#[allow(dead_code)]
pub(crate) struct InProcess {
    member: Member,
}

#[async_trait]
impl Cluster for InProcess {
    async fn start() -> Self {
        Self {
            member: Member::start(&RaftConfig::in_memory()).await.expect("it needs nothing"),
        }
    }

    fn options(&self) -> Options {
        options()
    }

    async fn connect_with(&self, options: Options) -> Result<Arc<dyn Registry>> {
        self.member.connect(&options).await
    }

    async fn connect_through(&self, _: Options) -> Result<(Arc<dyn Registry>, Wire)> {
        unreachable!("there is no wire within a process")
    }

    async fn kill(&self) {
        unreachable!("its process is the test's")
    }

    async fn restart(&self) {
        unreachable!("its process is the test's")
    }

    async fn pause(&self) {
        unreachable!("its process is the test's")
    }

    async fn resume(&self) {
        unreachable!("its process is the test's")
    }

    async fn revoke(&self, _: SessionId) {
        unreachable!("sessions end by their handles alone")
    }
}

/// Handles over gRPC on a member in a process of its own, with its data on disk.
pub(crate) struct Served {
    port: u16,
    process: Mutex<Process>,
    /// Removed last, when nobody writes to it any more.
    dir: TempDir,
}

impl Served {
    pub(crate) fn address(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.port))
    }

    // Not every test looks that closely.
    #[allow(dead_code)]
    pub(crate) async fn process_id(&self) -> u32 {
        self.process.lock().await.id().expect("it runs")
    }

    async fn serve(dir: PathBuf, port: u16) -> Process {
        let mut command = Command::new(env!("CARGO_BIN_EXE_registry"));
        command.arg("serve").env_remove("REGISTRY_CONFIG");
        command.args(["--set", &format!("raft.data_dir={}", dir.display())]);
        command.args(["--set", &format!("raft.listen=127.0.0.1:{port}")]);
        // Small, so that snapshots are taken and the log is trimmed while the tests run.
        command.args(["--set", &format!("raft.snapshot_log_bytes={SNAPSHOT_LOG_BYTES}")]);
        Process::start(command, |line| line.contains("ready").then_some(()))
            .await
            .0
    }
}

#[async_trait]
impl Cluster for Served {
    async fn start() -> Self {
        let dir = TempDir::new().expect("there is room for a directory");
        let port = process::free_port();
        let process = Mutex::new(Self::serve(dir.path().join("data"), port).await);
        Self { dir, port, process }
    }

    fn options(&self) -> Options {
        options()
    }

    async fn connect_with(&self, options: Options) -> Result<Arc<dyn Registry>> {
        raft::connect(&RaftConfig::remote([self.address().to_string()]), &options).await
    }

    async fn connect_through(&self, options: Options) -> Result<(Arc<dyn Registry>, Wire)> {
        let wire = Wire::to(self.address()).await;
        let remote = RaftConfig::remote([wire.address().to_string()]);
        Ok((raft::connect(&remote, &options).await?, wire))
    }

    async fn kill(&self) {
        self.process.lock().await.kill().await;
    }

    async fn restart(&self) {
        *self.process.lock().await = Self::serve(self.dir.path().join("data"), self.port).await;
    }

    async fn pause(&self) {
        self.process.lock().await.pause();
    }

    async fn resume(&self) {
        self.process.lock().await.resume();
    }

    async fn revoke(&self, session: SessionId) {
        let remote = RaftConfig::remote([self.address().to_string()]);
        raft::end_session(&remote, &options(), session)
            .await
            .expect("the member answers");
    }
}

#[async_trait]
impl Members for Served {
    fn members(&self) -> usize {
        1
    }

    async fn kill_member(&self, _: usize) {
        self.kill().await;
    }

    async fn restart_member(&self, _: usize) {
        self.restart().await;
    }

    async fn pause_member(&self, _: usize) {
        self.pause().await;
    }

    async fn resume_member(&self, _: usize) {
        self.resume().await;
    }

    async fn trim(&self) -> bool {
        let registry = self.connect().await.expect("the member runs");
        for _ in 0..3 {
            let put = registry.put(&key("/ballast/3"), vec![0; SNAPSHOT_LOG_BYTES / 2]).await;
            put.expect("the member runs");
        }
        registry.close().await.expect("the member runs");
        true
    }

    async fn usage(&self) -> Option<Usage> {
        Some(Usage::of(self.process.lock().await.id(), self.dir.path()))
    }
}
