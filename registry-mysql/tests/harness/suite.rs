//! The server as the conformance suite wants it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use async_trait::async_trait;
use registry_api::{Namespace, Options, Registry, Result, SessionId, SessionTtl};
use registry_mysql::MysqlConfig;
use registry_tests::{Cluster, Members, Wire};
use rustix::process::Signal;
use sqlx::Executor;
use tokio::sync::Mutex;

use super::{Product, Server, product, url};

/// A namespace on the server that the tests of a process share. It ends with the last test that runs.
pub struct Shared<const SNAPSHOT_ISOLATION: bool>(Own);

/// A server of the test's own, to be killed.
pub struct Own {
    server: Arc<Mutex<Server>>,
    address: String,
    namespace: Namespace,
}

impl Own {
    async fn on(server: Arc<Mutex<Server>>) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let namespace = format!("/test-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let address = server.lock().await.address();
        Self {
            server,
            address,
            namespace: Namespace::parse(&namespace).unwrap(),
        }
    }
}

#[async_trait]
impl Cluster for Own {
    async fn start() -> Self {
        Self::on(Arc::new(Mutex::new(Server::start().await))).await
    }

    fn options(&self) -> Options {
        Options {
            namespace: self.namespace.clone(),
            session_ttl: SessionTtl::new(Duration::from_secs(1)).unwrap(),
            ..Options::default()
        }
    }

    async fn connect_with(&self, options: Options) -> Result<Arc<dyn Registry>> {
        registry_mysql::connect(&MysqlConfig::new(url(&self.address)), &options).await
    }

    async fn connect_through(&self, options: Options) -> Result<(Arc<dyn Registry>, Wire)> {
        let wire = Wire::to(self.address.parse().unwrap()).await;
        let config = MysqlConfig::new(url(&wire.address().to_string()));
        Ok((registry_mysql::connect(&config, &options).await?, wire))
    }

    async fn kill(&self) {
        self.server.lock().await.kill();
    }

    async fn restart(&self) {
        self.server.lock().await.restart().await;
    }

    async fn pause(&self) {
        self.server.lock().await.signal(Signal::STOP);
    }

    async fn resume(&self) {
        self.server.lock().await.signal(Signal::CONT);
    }

    async fn revoke(&self, session: SessionId) {
        let sql = format!("UPDATE test.registry_sessions SET ttl_ms = 0 WHERE id = {}", session.0);
        self.server.lock().await.run(&sql).await;
    }
}

#[async_trait]
impl Members for Own {
    fn members(&self) -> usize {
        1
    }

    async fn kill_member(&self, _: usize) {
        self.kill().await;
    }

    async fn restart_member(&self, _: usize) {
        self.server.lock().await.spawn();
    }

    async fn pause_member(&self, _: usize) {
        self.pause().await;
    }

    async fn resume_member(&self, _: usize) {
        self.resume().await;
    }

    async fn trim(&self) -> bool {
        let sql = "UPDATE test.registry_namespaces SET compacted = revision; \
                   DELETE c FROM test.registry_changes c JOIN test.registry_namespaces n ON c.namespace = n.id \
                   WHERE c.revision <= n.compacted";
        // A server that does not run has nothing to trim.
        match self.server.lock().await.try_root().await {
            Some(mut root) => root.execute(sqlx::raw_sql(sql)).await.is_ok(),
            None => false,
        }
    }
}

#[async_trait]
impl<const SNAPSHOT_ISOLATION: bool> Cluster for Shared<SNAPSHOT_ISOLATION> {
    async fn start() -> Self {
        static RUNNING: Mutex<Weak<Mutex<Server>>> = Mutex::const_new(Weak::new());
        let mut running = RUNNING.lock().await;
        let server = match running.upgrade() {
            Some(server) => server,
            None => {
                let arguments: &[&str] = match (product(), SNAPSHOT_ISOLATION) {
                    (Product::MariaDb, true) => &["--innodb-snapshot-isolation=ON"],
                    (Product::MariaDb, false) => &["--innodb-snapshot-isolation=OFF"],
                    // It has no such setting.
                    (Product::MySql, _) => &[],
                };
                let server = Arc::new(Mutex::new(Server::start_with(arguments).await));
                *running = Arc::downgrade(&server);
                server
            }
        };
        Self(Own::on(server).await)
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
        panic!("other tests use this server");
    }

    async fn restart(&self) {
        panic!("other tests use this server");
    }

    async fn pause(&self) {
        panic!("other tests use this server");
    }

    async fn resume(&self) {
        panic!("other tests use this server");
    }

    async fn revoke(&self, session: SessionId) {
        self.0.revoke(session).await;
    }
}
