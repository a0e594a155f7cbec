//! Etcd as the conformance suite wants it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use async_trait::async_trait;
use registry_api::{Namespace, Options, Registry, Result, SessionId, SessionTtl};
use registry_etcd::{Endpoints, EtcdConfig};
use registry_tests::{Cluster, Members, Wire};
use rustix::process::Signal;
use tokio::sync::Mutex;

use super::Servers;

/// A namespace on the servers that the tests of a process share. They end with the last test that runs.
pub struct Shared<const MEMBERS: usize>(Own<MEMBERS>);

/// Servers of the test's own, to be killed.
pub struct Own<const MEMBERS: usize> {
    servers: Arc<Mutex<Servers>>,
    endpoints: Vec<String>,
    namespace: Namespace,
}

impl<const MEMBERS: usize> Own<MEMBERS> {
    async fn on(servers: Arc<Mutex<Servers>>) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let namespace = format!("/test-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let endpoints = servers.lock().await.endpoints();
        Self {
            servers,
            endpoints,
            namespace: Namespace::parse(&namespace).unwrap(),
        }
    }
}

#[async_trait]
impl<const MEMBERS: usize> Cluster for Own<MEMBERS> {
    async fn start() -> Self {
        Self::on(Arc::new(Mutex::new(Servers::start_fast(MEMBERS).await))).await
    }

    fn options(&self) -> Options {
        Options {
            namespace: self.namespace.clone(),
            session_ttl: SessionTtl::new(Duration::from_secs(1)).unwrap(),
            ..Options::default()
        }
    }

    async fn connect_with(&self, options: Options) -> Result<Arc<dyn Registry>> {
        let config = EtcdConfig::new(Endpoints::new(&self.endpoints)?);
        registry_etcd::connect(&config, &options).await
    }

    async fn connect_through(&self, options: Options) -> Result<(Arc<dyn Registry>, Wire)> {
        let wire = Wire::to(self.endpoints[0].parse().unwrap()).await;
        let config = EtcdConfig::new(Endpoints::new([wire.address().to_string()])?);
        Ok((registry_etcd::connect(&config, &options).await?, wire))
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
        let client = self.servers.lock().await.raw().await;
        client.lease_client().revoke(session.0.cast_signed()).await.unwrap();
    }
}

#[async_trait]
impl<const MEMBERS: usize> Members for Own<MEMBERS> {
    fn members(&self) -> usize {
        MEMBERS
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
        let client = self.servers.lock().await.raw().await;
        let mut kv = client.kv_client();
        // Without a leader there is nobody to trim.
        let Ok(read) = kv.get("trim", None).await else {
            return false;
        };
        kv.compact(read.header().unwrap().revision(), None).await.is_ok()
    }
}

#[async_trait]
impl<const MEMBERS: usize> Cluster for Shared<MEMBERS> {
    async fn start() -> Self {
        static RUNNING: Mutex<Weak<Mutex<Servers>>> = Mutex::const_new(Weak::new());
        let mut running = RUNNING.lock().await;
        let servers = match running.upgrade() {
            Some(servers) => servers,
            None => {
                let servers = Arc::new(Mutex::new(Servers::start_fast(MEMBERS).await));
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
