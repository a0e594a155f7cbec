//! A real server on loopback: MariaDB or MySQL.
//!
//! Its programs are those of the folder in `REGISTRY_MYSQL_BIN`, or of `PATH`; MariaDB's if both are there.

#![allow(missing_docs, unreachable_pub, dead_code, clippy::unwrap_used)]

pub mod suite;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use registry_api::{Key, Options, Registry, Result, SessionTtl};
use registry_mysql::{MysqlConfig, Url};
use registry_tests::process::free_port;
use rustix::process::{Pid, Signal, kill_process};
use sqlx::mysql::MySqlConnectOptions;
use sqlx::{AssertSqlSafe, ConnectOptions, Executor, MySqlConnection, Row};

const MISSING: &str =
    "no server: apt-get install mariadb-server, or let REGISTRY_MYSQL_BIN be a folder with one's programs";

/// Whose server it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Product {
    MariaDb,
    MySql,
}

impl Product {
    fn server(self) -> &'static str {
        match self {
            Self::MariaDb => "mariadbd",
            Self::MySql => "mysqld",
        }
    }

    fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::MariaDb => &["--innodb-log-file-size=8M"],
            Self::MySql => &[
                "--innodb-redo-log-capacity=64M",
                "--mysqlx=OFF",
                "--secure-file-priv=NULL",
            ],
        }
    }
}

pub fn product() -> Product {
    let is_there = |folder: &Path| folder.join("mariadbd").exists();
    let mariadb = match std::env::var_os("REGISTRY_MYSQL_BIN") {
        Some(folder) => is_there(Path::new(&folder)),
        None => std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()).any(|folder| is_there(&folder)),
    };
    if mariadb { Product::MariaDb } else { Product::MySql }
}

fn program(name: &str) -> Command {
    match std::env::var_os("REGISTRY_MYSQL_BIN") {
        Some(folder) => Command::new(Path::new(&folder).join(name)),
        None => Command::new(name),
    }
}

/// What makes a folder of data. Nothing in it has to survive a crash.
fn install(data: &Path) -> Command {
    let mut install = match product() {
        Product::MariaDb => {
            let mut install = program("mariadb-install-db");
            install.args([
                "--no-defaults",
                "--auth-root-authentication-method=normal",
                "--skip-test-db",
            ]);
            install
        }
        Product::MySql => {
            let mut install = program("mysqld");
            install.args(["--no-defaults", "--initialize-insecure", "--innodb-doublewrite=OFF"]);
            install
        }
    };
    install
        .args(product().arguments())
        .args(["--user=root", "--innodb-flush-log-at-trx-commit=0"])
        .arg(format!("--datadir={}", data.display()));
    install
}

/// Ends with the test: the process is killed, its data is deleted.
pub struct Server {
    port: u16,
    arguments: Vec<String>,
    process: Option<Child>,
    data: tempfile::TempDir,
}

impl Server {
    pub async fn start() -> Self {
        Self::start_with(&[]).await
    }

    pub async fn start_with(arguments: &[&str]) -> Self {
        let data = tempfile::tempdir().unwrap();
        let installed = install(&data.path().join("data"))
            // One that starts deletes the temporary tables of others in its folder for them.
            .env("TMPDIR", data.path())
            .output()
            .expect(MISSING);
        assert!(
            installed.status.success(),
            "{}{}",
            String::from_utf8_lossy(&installed.stdout),
            String::from_utf8_lossy(&installed.stderr)
        );
        let mut server = Self {
            port: 0,
            arguments: arguments.iter().map(|argument| (*argument).to_owned()).collect(),
            process: None,
            data,
        };
        // Another may take the port between its choice and its use.
        for _ in 0..5 {
            server.port = free_port();
            server.spawn();
            if server.is_ready().await {
                server.run("CREATE DATABASE IF NOT EXISTS test").await;
                if product() == Product::MySql {
                    // Its root is one of the socket only.
                    server
                        .run("CREATE USER root@'127.0.0.1'; GRANT ALL ON *.* TO root@'127.0.0.1' WITH GRANT OPTION")
                        .await;
                }
                return server;
            }
        }
        panic!("the server does not start: {}", server.log());
    }

    /// A file beside the server's data.
    pub fn file(&self, name: &str) -> PathBuf {
        self.data.path().join(name)
    }

    /// Copies a folder of data, of a server that does not run.
    pub fn copy(&self, from: &str, to: &str) {
        let copied = Command::new("cp")
            .arg("-a")
            .args([self.file(from), self.file(to)])
            .status();
        assert!(copied.unwrap().success());
    }

    /// Puts another folder of data in the place of one, of a server that does not run.
    pub fn swap(&self, data: &str, other: &str) {
        std::fs::remove_dir_all(self.file(data)).unwrap();
        std::fs::rename(self.file(other), self.file(data)).unwrap();
    }

    pub fn spawn(&mut self) {
        let file = |name: &str| self.file(name).display().to_string();
        let log = std::fs::File::create(self.file("log")).unwrap();
        let process = program(product().server())
            .args([
                "--no-defaults",
                "--user=root",
                "--bind-address=127.0.0.1",
                "--max-connections=2000",
            ])
            .args(product().arguments())
            .args(["--innodb-buffer-pool-size=64M", "--skip-name-resolve"])
            .arg(format!("--datadir={}", file("data")))
            .arg(format!("--socket={}", file("socket")))
            .arg(format!("--pid-file={}", file("pid")))
            .arg(format!("--port={}", self.port))
            .args(&self.arguments)
            .env("TMPDIR", self.data.path())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn();
        self.process = Some(process.expect(MISSING));
    }

    /// Waits until it answers; `false` if it has ended instead.
    pub async fn is_ready(&mut self) -> bool {
        let began = Instant::now();
        while self.try_root().await.is_none() {
            let process = self.process.as_mut().unwrap();
            if process.try_wait().unwrap().is_some() {
                return false;
            }
            assert!(
                began.elapsed() < Duration::from_secs(60),
                "not ready in 60 s: {}",
                self.log()
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        true
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.file("log")).unwrap_or_default()
    }

    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }

    /// Shuts it down, as an operator does.
    pub async fn stop(&mut self) {
        self.signal(Signal::TERM);
        let mut process = self.process.take().unwrap();
        tokio::task::spawn_blocking(move || process.wait())
            .await
            .unwrap()
            .unwrap();
    }

    /// Whether it has ended by itself.
    pub fn has_ended(&mut self) -> bool {
        self.process
            .as_mut()
            .is_none_or(|process| process.try_wait().unwrap().is_some())
    }

    /// For the next start.
    pub fn add_argument(&mut self, argument: &str) {
        self.arguments.push(argument.to_owned());
    }

    pub async fn restart(&mut self) {
        self.kill();
        self.spawn();
        assert!(self.is_ready().await, "it does not start again: {}", self.log());
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(self.process.as_ref().unwrap()), signal).unwrap();
    }

    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    async fn try_root(&self) -> Option<MySqlConnection> {
        let options = MySqlConnectOptions::new().username("root").socket(self.file("socket"));
        let connecting = options.connect();
        tokio::time::timeout(Duration::from_secs(5), connecting)
            .await
            .ok()?
            .ok()
    }

    /// A connection of root's, past every proxy and bound.
    pub async fn root(&self) -> MySqlConnection {
        self.try_root().await.unwrap()
    }

    /// Runs a statement as root.
    pub async fn run(&self, sql: &str) {
        self.root()
            .await
            .execute(sqlx::raw_sql(AssertSqlSafe(sql)))
            .await
            .unwrap();
    }
}

impl Server {
    /// Ends the connections of a user; those of an application's pool and of handles.
    pub async fn kill_connections(&self, user: &str) {
        let kill = format!(
            "SELECT CONCAT('KILL ', id) FROM information_schema.processlist WHERE user = '{user}' AND db = 'test'"
        );
        let mut root = self.root().await;
        for row in root.fetch_all(sqlx::raw_sql(AssertSqlSafe(kill))).await.unwrap() {
            let kill: String = row.try_get_unchecked(0).unwrap();
            // It may be gone already.
            let _ = root.execute(sqlx::raw_sql(AssertSqlSafe(kill))).await;
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Makes `name.pem` and `name.key`, signed by the authority `ca`, or by itself if it is that.
pub fn certificate(folder: &Path, name: &str, subject: &str) {
    let file = |name: &str, ending: &str| folder.join(format!("{name}.{ending}"));
    let mut openssl = Command::new("openssl");
    openssl
        .args([
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
        ])
        .args(["-days", "2", "-subj", subject, "-keyout"])
        .arg(file(name, "key"))
        .arg("-out")
        .arg(file(name, "pem"));
    if name != "ca" {
        openssl
            .arg("-CA")
            .arg(file("ca", "pem"))
            .arg("-CAkey")
            .arg(file("ca", "key"))
            .args([
                "-addext",
                "subjectAltName=IP:127.0.0.1",
                "-addext",
                "basicConstraints=critical,CA:FALSE",
            ]);
    }
    let made = openssl.output().expect("openssl is missing: apt-get install openssl");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
}

pub fn url(address: &str) -> Url {
    Url::new(&format!("mysql://root@{address}/test")).unwrap()
}

pub const TTL: Duration = Duration::from_secs(3);

pub fn options() -> Options {
    Options {
        session_ttl: SessionTtl::new(TTL).unwrap(),
        request_timeout: Duration::from_secs(3),
        ..Options::default()
    }
}

pub async fn connect(address: &str) -> Arc<dyn Registry> {
    try_connect(address).await.unwrap()
}

pub async fn try_connect(address: &str) -> Result<Arc<dyn Registry>> {
    registry_mysql::connect(&MysqlConfig::new(url(address)), &options()).await
}

pub fn key(path: &str) -> Key {
    Key::parse(path).unwrap()
}

/// Waits for what stays true once it is.
pub async fn until(what: &str, holds: impl AsyncFn() -> bool) {
    let began = Instant::now();
    while !holds().await {
        assert!(began.elapsed() < Duration::from_secs(30), "not in 30 s: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The causes of an error, in one line.
pub fn causes(error: &registry_api::Error) -> String {
    let mut line = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        line = format!("{line}: {error}");
        cause = error.source();
    }
    line
}

pub async fn within<T>(limit: Duration, what: &str, wait: impl Future<Output = T>) -> T {
    let waited = tokio::time::timeout(limit, wait).await;
    waited.unwrap_or_else(|_| panic!("not within {limit:?}: {what}"))
}
