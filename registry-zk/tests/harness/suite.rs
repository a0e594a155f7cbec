//! ZooKeeper as the conformance suite wants it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use async_trait::async_trait;
use registry_api::{Namespace, Options, Registry, Result, SessionId, SessionTtl};

use registry_tests::{Cluster, Members, Wire};
use rustix::process::Signal;
use tokio::sync::Mutex;

use super::{Servers, TTL, config};

/// A namespace on the servers that the tests of a process share. They end with the last test that runs.
pub struct Shared<const SERVERS: usize>(Own<SERVERS>);

/// Servers of the test's own, to be killed.
pub struct Own<const SERVERS: usize> {
    servers: Arc<Mutex<Servers>>,
    addresses: String,
    namespace: Namespace,
}

impl<const SERVERS: usize> Own<SERVERS> {
    async fn on(servers: Arc<Mutex<Servers>>) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let namespace = format!("/test-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let addresses = servers.lock().await.addresses();
        Self {
            servers,
            addresses,
            namespace: Namespace::parse(&namespace).unwrap(),
        }
    }
}

#[async_trait]
impl<const SERVERS: usize> Cluster for Own<SERVERS> {
    async fn start() -> Self {
        Self::on(Arc::new(Mutex::new(Servers::start(SERVERS).await))).await
    }

    fn options(&self) -> Options {
        Options {
            namespace: self.namespace.clone(),
            session_ttl: SessionTtl::new(TTL).unwrap(),
            ..Options::default()
        }
    }

    async fn connect_with(&self, options: Options) -> Result<Arc<dyn Registry>> {
        registry_zk::connect(&config(&self.addresses), &options).await
    }

    async fn connect_through(&self, options: Options) -> Result<(Arc<dyn Registry>, Wire)> {
        let first = self.servers.lock().await.address(0);
        let wire = Wire::to(first.parse().unwrap()).await;
        let config = config(&wire.address().to_string());
        Ok((registry_zk::connect(&config, &options).await?, wire))
    }

    async fn kill(&self) {
        self.servers.lock().await.kill_all();
    }

    async fn restart(&self) {
        let mut servers = self.servers.lock().await;
        servers.kill_all();
        servers.spawn_all();
        servers.ready().await;
    }

    async fn pause(&self) {
        self.servers.lock().await.signal_all(Signal::STOP);
    }

    async fn resume(&self) {
        self.servers.lock().await.signal_all(Signal::CONT);
    }

    async fn revoke(&self, session: SessionId) {
        self.servers.lock().await.close_session(session).await;
    }
}

#[async_trait]
impl<const SERVERS: usize> Members for Own<SERVERS> {
    fn members(&self) -> usize {
        SERVERS
    }

    async fn kill_member(&self, member: usize) {
        self.servers.lock().await.kill(member);
    }

    async fn restart_member(&self, member: usize) {
        self.servers.lock().await.spawn(member);
    }

    async fn pause_member(&self, member: usize) {
        self.servers.lock().await.signal(member, Signal::STOP);
    }

    async fn resume_member(&self, member: usize) {
        self.servers.lock().await.signal(member, Signal::CONT);
    }

    async fn trim(&self) -> bool {
        false
    }
}

#[async_trait]
impl<const SERVERS: usize> Cluster for Shared<SERVERS> {
    async fn start() -> Self {
        static RUNNING: Mutex<Weak<Mutex<Servers>>> = Mutex::const_new(Weak::new());
        let mut running = RUNNING.lock().await;
        let servers = match running.upgrade() {
            Some(servers) => servers,
            None => {
                let servers = Arc::new(Mutex::new(Servers::start(SERVERS).await));
                *running = Arc::downgrade(&servers);
                servers
            }
        };
        Self(Own::on(servers).await)
    }

    fn options(&self) -> Options {
        self.0.options()
    }

    async fn connect_with(&self, options: Options) -> Result<Arc<dyn Registry>> {
        self.0.connect_with(options).await
    }

    async fn connect_through(&self, options: Options) -> Result<(Arc<dyn Registry>, Wire)> {
        self.0.connect_through(options).await
    }

    async fn kill(&self) {
        panic!("other tests use these servers");
    }

    async fn restart(&self) {
        panic!("other tests use these servers");
    }

    async fn pause(&self) {
        panic!("other tests use these servers");
    }

    async fn resume(&self) {
        panic!("other tests use these servers");
    }

    async fn revoke(&self, session: SessionId) {
        self.0.revoke(session).await;
    }
}
