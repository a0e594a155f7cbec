//! The settings, and the one place that names every backend.

mod source;

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use registry_api::{Error, Namespace, Options, Registry, Result, SessionTtl, TtlBounds};
use serde::{Deserialize, Deserializer};

use source::Sources;

/// The backends that are compiled in, by the words that select them.
pub const BACKENDS: &[&str] = &[
    #[cfg(feature = "raft")]
    "raft",
    #[cfg(feature = "etcd")]
    "etcd",
    #[cfg(feature = "zk")]
    "zk",
    #[cfg(feature = "mysql")]
    "mysql",
];

/// The data directory of the embedded store that is none.
const MEMORY: &str = ":memory:";

/// Every backend there is.
const ALL: [&str; 4] = ["raft", "etcd", "zk", "mysql"];

/// A store, and its settings.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Backend {
    /// The embedded store.
    #[cfg(feature = "raft")]
    Raft(registry_raft::RaftConfig),
    /// etcd.
    #[cfg(feature = "etcd")]
    Etcd(registry_etcd::EtcdConfig),
    /// ZooKeeper.
    #[cfg(feature = "zk")]
    Zk(registry_zk::ZkConfig),
    /// MySQL or MariaDB.
    #[cfg(feature = "mysql")]
    Mysql(registry_mysql::MysqlConfig),
}

/// All settings of a handle: what every backend shares, and the backend.
///
/// `Debug` shows no secret.
#[derive(Clone, Debug)]
pub struct Config {
    /// What does not depend on the store.
    pub options: Options,
    /// The store.
    pub backend: Backend,
}

/// Settings given on the spot, over the file and the environment: names such as `raft.data_dir` with their values.
pub type Overrides = Vec<(String, String)>;

impl Config {
    /// Loads the file (TOML, YAML or JSON by its ending), then the environment (`REGISTRY__TYPE`,
    /// `REGISTRY__RAFT__DATA_DIR`, lists with commas), then the overrides, each over the one before. Without a file: the
    /// defaults, which are one member of the embedded store.
    ///
    /// # Errors
    /// [`Error::Config`] names the setting, the file, variable or override that it comes from, and what is allowed: for a file that can't be read, a key that is
    /// unknown, a value that is out of range, a type that is unknown or not compiled in.
    pub fn load(file: Option<&Path>, overrides: &Overrides) -> Result<Self> {
        Sources::read(file, overrides)?.config()
    }

    /// One member of the embedded store that keeps everything in memory, without a disk or a port: for unit tests.
    #[cfg(feature = "raft")]
    pub fn in_memory() -> Self {
        Self {
            options: Options::default(),
            backend: Backend::Raft(registry_raft::RaftConfig::in_memory()),
        }
    }
}

/// Opens a handle on the store that the config selects.
///
/// # Errors
/// [`Error::Unavailable`] within `connect_timeout`, naming the endpoints and the cause; [`Error::Config`] for settings
/// that contradict each other or that the store does not grant; [`Error::Storage`] for a store that must not be used.
pub async fn connect(config: &Config) -> Result<Arc<dyn Registry>> {
    match &config.backend {
        #[cfg(feature = "raft")]
        Backend::Raft(raft) if raft.http.is_some() && !raft.is_remote() => Err(refused(
            "registry.raft.http",
            "`registry serve` speaks HTTP; a program starts a `raft::Member` and calls `http::serve`".into(),
        )),
        #[cfg(feature = "raft")]
        Backend::Raft(raft) => registry_raft::connect(raft, &config.options).await,
        #[cfg(feature = "etcd")]
        Backend::Etcd(etcd) => registry_etcd::connect(etcd, &config.options).await,
        #[cfg(feature = "zk")]
        Backend::Zk(zk) => registry_zk::connect(zk, &config.options).await,
        #[cfg(feature = "mysql")]
        Backend::Mysql(mysql) => registry_mysql::connect(mysql, &config.options).await,
    }
}

/// A file as it is written.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Document {
    registry: Table,
}

/// The `[registry]` table. Where a backend is not compiled in, its table is passed over: one file serves every build.
#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Table {
    r#type: String,
    namespace: Namespace,
    session_ttl: SessionTtl,
    session_ttl_bounds: TtlBounds,
    #[serde(deserialize_with = "duration")]
    request_timeout: Duration,
    #[serde(deserialize_with = "duration")]
    connect_timeout: Duration,
    raft: RaftTable,
    etcd: EtcdTable,
    zk: ZkTable,
    mysql: MysqlTable,
}

#[cfg(feature = "raft")]
type RaftTable = registry_raft::RaftConfig;
#[cfg(not(feature = "raft"))]
type RaftTable = NotCompiledIn;
#[cfg(feature = "etcd")]
type EtcdTable = Option<registry_etcd::EtcdConfig>;
#[cfg(not(feature = "etcd"))]
type EtcdTable = NotCompiledIn;
#[cfg(feature = "zk")]
type ZkTable = Option<registry_zk::ZkConfig>;
#[cfg(not(feature = "zk"))]
type ZkTable = NotCompiledIn;
#[cfg(feature = "mysql")]
type MysqlTable = Option<registry_mysql::MysqlConfig>;
#[cfg(not(feature = "mysql"))]
type MysqlTable = NotCompiledIn;

/// The table of a backend that this build knows nothing of.
#[cfg(not(all(feature = "raft", feature = "etcd", feature = "zk", feature = "mysql")))]
#[derive(Debug, Default)]
struct NotCompiledIn;

#[cfg(not(all(feature = "raft", feature = "etcd", feature = "zk", feature = "mysql")))]
impl<'de> Deserialize<'de> for NotCompiledIn {
    fn deserialize<D: Deserializer<'de>>(table: D) -> Result<Self, D::Error> {
        serde::de::IgnoredAny::deserialize(table).map(|_| Self)
    }
}

impl Default for Table {
    fn default() -> Self {
        let options = Options::default();
        Self {
            r#type: ALL[0].into(),
            namespace: options.namespace,
            session_ttl: options.session_ttl,
            session_ttl_bounds: options.session_ttl_bounds,
            request_timeout: options.request_timeout,
            connect_timeout: options.connect_timeout,
            raft: RaftTable::default(),
            etcd: EtcdTable::default(),
            zk: ZkTable::default(),
            mysql: MysqlTable::default(),
        }
    }
}

impl Table {
    /// The config, or what is wrong with it.
    fn into_config(self) -> Result<Config, String> {
        let options = Options {
            namespace: self.namespace,
            session_ttl: self.session_ttl,
            session_ttl_bounds: self.session_ttl_bounds,
            request_timeout: self.request_timeout,
            connect_timeout: self.connect_timeout,
        };
        #[cfg(any(feature = "etcd", feature = "zk", feature = "mysql"))]
        let missing = |table: &str| format!("registry.type = {table:?} needs the table [registry.{table}]");
        let backend = match self.r#type.as_str() {
            #[cfg(feature = "raft")]
            "raft" => {
                // Here and not only when it is opened, so that the source is named too.
                self.raft.check().map_err(|error| error.to_string())?;
                Backend::Raft(self.raft)
            }
            #[cfg(feature = "etcd")]
            "etcd" => Backend::Etcd(self.etcd.ok_or_else(|| missing("etcd"))?),
            #[cfg(feature = "zk")]
            "zk" => Backend::Zk(self.zk.ok_or_else(|| missing("zk"))?),
            #[cfg(feature = "mysql")]
            "mysql" => Backend::Mysql(self.mysql.ok_or_else(|| missing("mysql"))?),
            known if ALL.contains(&known) => {
                let reason = format!(
                    "registry.type = {known:?} is not compiled into this program, which has: {}",
                    BACKENDS.join(", ")
                );
                return Err(reason);
            }
            unknown => {
                let reason = format!(
                    "registry.type = {unknown:?} is unknown; this program has: {}",
                    BACKENDS.join(", ")
                );
                return Err(reason);
            }
        };
        Ok(Config { options, backend })
    }
}

/// 1 ms to 1 h, as "5s".
fn duration<'de, D: Deserializer<'de>>(text: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(text)?;
    let wrong = |why: String| serde::de::Error::custom(format!("{text:?} is no time such as \"5s\": {why}"));
    let duration = humantime::parse_duration(&text).map_err(|e| wrong(e.to_string()))?;
    match (Duration::from_millis(1)..=Duration::from_secs(3600)).contains(&duration) {
        true => Ok(duration),
        false => Err(wrong("it is not between 1ms and 1h".into())),
    }
}

fn refused(place: impl fmt::Display, reason: String) -> Error {
    Error::Config {
        field: place.to_string(),
        reason,
    }
}
