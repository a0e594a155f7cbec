//! Members in the test's process, on directories and addresses of their own.

#![allow(dead_code, unreachable_pub)]

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use registry_api::{Options, Registry, SessionTtl};
use registry_raft::{Member, RaftConfig, Timers};
use registry_tests::process::free_port;
use tempfile::TempDir;

pub const PATIENCE: Duration = Duration::from_secs(30);
const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];

/// A group whose members run in this process.
pub struct Group {
    pub configs: Vec<RaftConfig>,
    pub members: Vec<Option<Member>>,
    dir: Option<TempDir>,
}

impl Group {
    /// Addresses and directories for so many, none of them started.
    pub fn new(size: usize) -> Self {
        let dir = TempDir::new().expect("there is room for a directory");
        let list: Vec<_> = NAMES[..size]
            .iter()
            .map(|name| ((*name).to_owned(), format!("127.0.0.1:{}", free_port())))
            .collect();
        let config = |name: &str| {
            let mut config = RaftConfig::default();
            config.member = Some(name.into());
            config.data_dir = Some(dir.path().join(name));
            config.cluster = list.iter().cloned().collect();
            config.timers = Timers::Fast;
            config
        };
        Self {
            configs: NAMES[..size].iter().map(|name| config(name)).collect(),
            members: (0..size).map(|_| None).collect(),
            dir: Some(dir),
        }
    }

    /// A group of so many, founded.
    pub async fn start(size: usize) -> Self {
        Self::start_with(size, |_| {}).await
    }

    /// As [`Group::start`], with other settings.
    pub async fn start_with(size: usize, set: impl Fn(&mut RaftConfig)) -> Self {
        let mut group = Self::new(size);
        group.configs.iter_mut().for_each(set);
        let starting = group.configs.iter().map(Member::start);
        let started = futures_util::future::join_all(starting).await;
        group.members = started
            .into_iter()
            .map(|member| Some(member.expect("it starts")))
            .collect();
        group
    }

    pub fn directory(&self) -> PathBuf {
        self.dir.as_ref().expect("it is there until the end").path().into()
    }

    pub fn member(&self, at: usize) -> &Member {
        self.members[at].as_ref().expect("it runs")
    }

    pub fn addresses(&self) -> Vec<String> {
        let founders = self.configs.iter().filter(|config| config.join.is_empty());
        founders
            .map(|config| config.cluster[config.member.as_deref().unwrap_or("a")].clone())
            .collect()
    }

    pub async fn stop(&mut self, at: usize) {
        self.members[at]
            .take()
            .expect("it runs")
            .stop()
            .await
            .expect("it stops");
    }

    pub async fn restart(&mut self, at: usize) {
        self.members[at] = Some(Member::start(&self.configs[at]).await.expect("it starts"));
    }

    /// Which member leads, once one does that still runs.
    pub async fn leader(&self) -> usize {
        let asking = async {
            loop {
                let running = self.members.iter().enumerate();
                let mut running = running.filter_map(|(at, member)| Some((at, member.as_ref()?)));
                if let Some((at, _)) = running.find(|(_, member)| {
                    let status = member.status();
                    status
                        .members
                        .iter()
                        .any(|m| m.role == "leader" && m.id == status.answered_by)
                }) {
                    return at;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        registry_tests::within(PATIENCE, asking).await
    }

    pub async fn follower(&self) -> usize {
        let leader = self.leader().await;
        let others = (0..self.members.len()).find(|at| *at != leader && self.members[*at].is_some());
        others.expect("there is another")
    }

    /// Starts one more member, which joins at the others' addresses. Answers its place.
    pub async fn join(&mut self, name: &str, set: impl Fn(&mut RaftConfig)) -> usize {
        let mut config = RaftConfig::default();
        config.member = Some(name.into());
        config.data_dir = Some(self.directory().join(format!("{name}-{}", self.configs.len())));
        config.listen = Some(format!("127.0.0.1:{}", free_port()));
        config.join = self.addresses();
        config.timers = Timers::Fast;
        set(&mut config);
        let member = registry_tests::within(PATIENCE, Member::start(&config))
            .await
            .expect("it joins");
        self.configs.push(config);
        self.members.push(Some(member));
        self.members.len() - 1
    }

    /// The role of a member, as that member sees it.
    pub fn role(&self, at: usize) -> String {
        let status = self.member(at).status();
        let own = status.members.iter().find(|member| member.id == status.answered_by);
        own.map_or_else(|| "none".into(), |member| member.role.clone())
    }

    pub async fn connect(&self, at: usize) -> Arc<dyn Registry> {
        self.member(at).connect(&options()).await.expect("it connects")
    }
}

impl Drop for Group {
    /// The directories go when nobody writes to them any more.
    fn drop(&mut self) {
        let members: Vec<_> = self.members.iter_mut().filter_map(Option::take).collect();
        let dir = self.dir.take();
        let stopping = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let runtime = runtime.expect("a runtime can be made");
            for stopped in runtime.block_on(futures_util::future::join_all(members.into_iter().map(Member::stop))) {
                if let Err(error) = stopped {
                    eprintln!("a member did not stop: {error}");
                }
            }
            drop(dir);
        });
        if stopping.join().is_err() {
            eprintln!("the members could not be stopped");
        }
    }
}

/// A short TTL, and time enough for an election.
pub fn options() -> Options {
    Options {
        session_ttl: SessionTtl::new(Duration::from_secs(5)).expect("it is one"),
        request_timeout: Duration::from_secs(10),
        connect_timeout: Duration::from_secs(10),
        ..Options::default()
    }
}
