//! Settings.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use registry_api::{Error, Result};
use serde::Deserialize;
use sqlx::MySqlPool;
use sqlx::mysql::MySqlConnectOptions;

use crate::tables::TablePrefix;

/// Settings of the MySQL backend: the `[registry.mysql]` table.
///
/// `Debug` shows no password.
#[derive(Clone, Debug, Deserialize)]
#[serde(from = "Table")]
#[non_exhaustive]
pub struct MysqlConfig {
    /// Where the tables are.
    pub server: Server,
    /// How many reads may be under way at once, each on a connection of its own.
    pub pool_size: PoolSize,
    /// How often a handle with a watch looks for the changes of others.
    pub poll_interval: PollInterval,
    /// How many revisions are kept for watches to start after.
    pub history: History,
    /// What the names of the tables begin with.
    pub table_prefix: TablePrefix,
    /// Whether tables that are missing are made; otherwise the error says which are.
    pub migrate: bool,
}

impl MysqlConfig {
    /// The tables of that database, everything else as by default.
    pub fn new(url: Url) -> Self {
        Self::on(Server::Url { url, tls: None })
    }

    /// As a guest of an application: on its pool. Keep-alives have one more connection, opened with the pool's options.
    pub fn on_pool(pool: MySqlPool) -> Self {
        Self::on(Server::Pool(pool))
    }

    fn on(server: Server) -> Self {
        Self {
            server,
            pool_size: PoolSize::default(),
            poll_interval: PollInterval::default(),
            history: History::default(),
            table_prefix: TablePrefix::default(),
            migrate: true,
        }
    }
}

/// Where the tables are.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Server {
    /// In the database of this URL.
    Url {
        /// Its address, with user and password.
        url: Url,
        /// How to speak TLS. Without it connections are encrypted where the server offers it, with whoever it is.
        tls: Option<Tls>,
    },
    /// Where the application's own pool leads.
    Pool(MySqlPool),
}

/// `mysql://user:password@host:3306/database`. `Debug` shows neither user nor password.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Url(String);

impl Url {
    /// Takes a URL.
    ///
    /// # Errors
    /// [`Error::Config`] for what is no URL of a database, and for options in it, which are settings here. The URL is
    /// not repeated: it may hold a password.
    pub fn new(url: &str) -> Result<Self> {
        let wrong = |reason: &str| Err(config("registry.mysql.url", reason));
        if !url.starts_with("mysql://") && !url.starts_with("mariadb://") {
            return wrong("it begins with mysql://, as in mysql://user:password@host:3306/database");
        }
        if url.contains(['?', '#']) {
            return wrong("nothing follows the database: TLS is registry.mysql.tls; in a password, write %3F and %23");
        }
        let Ok(options) = url.parse::<MySqlConnectOptions>() else {
            return wrong("it is not of the form mysql://user:password@host:3306/database");
        };
        match options.get_database() {
            Some(_) => Ok(Self(url.into())),
            None => wrong("it names no database, as in mysql://user:password@host:3306/database"),
        }
    }

    pub(crate) fn options(&self) -> Result<MySqlConnectOptions> {
        let options = self.0.parse();
        // Not the cause, which may quote what it could not read.
        options.map_err(|_| config("registry.mysql.url", "it can't be read"))
    }
}

impl fmt::Debug for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = self.0.rsplit_once('@').map_or("...", |(_, place)| place);
        write!(f, "mysql://...@{place}")
    }
}

impl TryFrom<String> for Url {
    type Error = String;

    fn try_from(url: String) -> Result<Self, String> {
        Self::new(&url).map_err(|e| e.to_string())
    }
}

/// Whom to trust, and how to be trusted. Files are PEM, and read when a handle is opened.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "TlsTable")]
pub struct Tls {
    /// The certificates of the authorities that may have signed the server's certificate, which has to name its host.
    pub ca: PathBuf,
    /// The client's own certificate and key, where the server asks for them.
    pub client: Option<Identity>,
}

/// A certificate and its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The file with the certificate, and those between it and the authority.
    pub cert: PathBuf,
    /// The file with its private key.
    pub key: PathBuf,
}

/// How many reads of a handle may be under way at once: 1 to 100, 4 by default. Writes, watches and keep-alives have a
/// connection each beside these.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "u64")]
pub struct PoolSize(usize);

impl PoolSize {
    /// Takes a number.
    ///
    /// # Errors
    /// [`Error::Config`] outside 1 to 100.
    pub fn new(connections: u64) -> Result<Self> {
        let within = usize::try_from(connections).ok().filter(|n| (1..=100).contains(n));
        let outside = || {
            config(
                "registry.mysql.pool_size",
                format!("{connections} is not between 1 and 100"),
            )
        };
        within.map(Self).ok_or_else(outside)
    }

    pub(crate) fn get(self) -> usize {
        self.0
    }
}

impl Default for PoolSize {
    fn default() -> Self {
        Self(4)
    }
}

impl TryFrom<u64> for PoolSize {
    type Error = String;

    fn try_from(connections: u64) -> Result<Self, String> {
        Self::new(connections).map_err(|e| e.to_string())
    }
}

/// How often a handle with a watch asks for the changes of others: 5 ms to 10 s, 50 ms by default. Its own it sees at
/// once; without a watch it does not ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct PollInterval(Duration);

impl PollInterval {
    const BOUNDS: std::ops::RangeInclusive<Duration> = Duration::from_millis(5)..=Duration::from_secs(10);

    /// Takes an interval.
    ///
    /// # Errors
    /// [`Error::Config`] outside 5 ms to 10 s.
    pub fn new(interval: Duration) -> Result<Self> {
        let outside = || {
            config(
                "registry.mysql.poll_interval",
                format!("{interval:?} is not between 5ms and 10s"),
            )
        };
        Self::BOUNDS
            .contains(&interval)
            .then_some(Self(interval))
            .ok_or_else(outside)
    }

    pub(crate) fn get(self) -> Duration {
        self.0
    }
}

impl Default for PollInterval {
    fn default() -> Self {
        Self(Duration::from_millis(50))
    }
}

impl TryFrom<String> for PollInterval {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let interval =
            humantime::parse_duration(&text).map_err(|e| format!("{text:?} is no time such as \"50ms\": {e}"))?;
        Self::new(interval).map_err(|e| e.to_string())
    }
}

/// How many revisions are kept, about: 100 to 10,000,000, 10,000 by default. All handles of a namespace should say the
/// same: the smallest number wins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "u64")]
pub struct History(u64);

impl History {
    /// Takes a number of revisions.
    ///
    /// # Errors
    /// [`Error::Config`] outside 100 to 10,000,000.
    pub fn new(revisions: u64) -> Result<Self> {
        let outside = || {
            config(
                "registry.mysql.history",
                format!("{revisions} is not between 100 and 10000000"),
            )
        };
        (100..=10_000_000)
            .contains(&revisions)
            .then_some(Self(revisions))
            .ok_or_else(outside)
    }

    pub(crate) fn get(self) -> u64 {
        self.0
    }
}

impl Default for History {
    fn default() -> Self {
        Self(10_000)
    }
}

impl TryFrom<u64> for History {
    type Error = String;

    fn try_from(revisions: u64) -> Result<Self, String> {
        Self::new(revisions).map_err(|e| e.to_string())
    }
}

/// The table as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    url: Url,
    tls: Option<Tls>,
    #[serde(default)]
    pool_size: PoolSize,
    #[serde(default)]
    poll_interval: PollInterval,
    #[serde(default)]
    history: History,
    #[serde(default)]
    table_prefix: TablePrefix,
    #[serde(default = "yes")]
    migrate: bool,
}

fn yes() -> bool {
    true
}

impl From<Table> for MysqlConfig {
    fn from(table: Table) -> Self {
        Self {
            server: Server::Url {
                url: table.url,
                tls: table.tls,
            },
            pool_size: table.pool_size,
            poll_interval: table.poll_interval,
            history: table.history,
            table_prefix: table.table_prefix,
            migrate: table.migrate,
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TlsTable {
    ca: PathBuf,
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
}

impl TryFrom<TlsTable> for Tls {
    type Error = &'static str;

    fn try_from(table: TlsTable) -> Result<Self, &'static str> {
        let client = match (table.cert, table.key) {
            (Some(cert), Some(key)) => Some(Identity { cert, key }),
            (None, None) => None,
            (Some(_), None) => return Err("registry.mysql.tls.cert needs registry.mysql.tls.key"),
            (None, Some(_)) => return Err("registry.mysql.tls.key needs registry.mysql.tls.cert"),
        };
        Ok(Self { ca: table.ca, client })
    }
}

pub(crate) fn config(field: &str, reason: impl Into<String>) -> Error {
    Error::Config {
        field: field.into(),
        reason: reason.into(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{from_value, json};

    use super::*;

    fn parse(table: serde_json::Value) -> Result<MysqlConfig, String> {
        from_value(table).map_err(|e| e.to_string())
    }

    #[test]
    fn a_whole_table_is_taken() {
        let config = parse(json!({
            "url": "mysql://app:secret@db:3306/app", "pool_size": 8, "poll_interval": "20ms", "history": 5000,
            "table_prefix": "app_", "migrate": false,
            "tls": { "ca": "ca.pem", "cert": "app.pem", "key": "app.key" },
        }))
        .expect("every setting is right");
        assert_eq!(
            (config.pool_size.get(), config.history.get(), config.migrate),
            (8, 5000, false)
        );
        assert_eq!(config.poll_interval.get(), Duration::from_millis(20));
        assert_eq!(config.table_prefix.as_str(), "app_");
        assert!(matches!(
            config.server,
            Server::Url {
                tls: Some(Tls { client: Some(_), .. }),
                ..
            }
        ));
        let least = parse(json!({ "url": "mysql://db/app" })).expect("a URL is enough");
        assert_eq!(
            (least.pool_size.get(), least.history.get(), least.migrate),
            (4, 10_000, true)
        );
    }

    #[test]
    fn debug_shows_no_password() {
        let config = parse(json!({ "url": "mysql://app:s%40cret@db/app" })).expect("right");
        let shown = format!("{config:?}");
        assert!(shown.contains("@db/app") && !shown.contains("cret"), "{shown}");
    }

    #[test]
    fn wrong_settings_are_refused_by_name() {
        let with = |name: &str, value: serde_json::Value| json!({ "url": "mysql://h/d", name: value });
        for (table, named) in [
            (json!({}), "url"),
            (json!({ "url": "postgres://h/d" }), "registry.mysql.url"),
            (json!({ "url": "mysql://h" }), "names no database"),
            (json!({ "url": "mysql://h/d?ssl-mode=DISABLED" }), "registry.mysql.tls"),
            (with("pool_size", json!(0)), "registry.mysql.pool_size"),
            (with("pool_size", json!(101)), "registry.mysql.pool_size"),
            (with("poll_interval", json!("1ms")), "registry.mysql.poll_interval"),
            (with("poll_interval", json!("often")), "no time such as"),
            (with("history", json!(1)), "registry.mysql.history"),
            (with("table_prefix", json!("a-b")), "registry.mysql.table_prefix"),
            (with("migrate", json!("no")), "boolean"),
            (with("usr", json!("x")), "usr"),
            (with("tls", json!({})), "ca"),
            (with("tls", json!({ "ca": "c", "cert": "c" })), "registry.mysql.tls.key"),
            (with("tls", json!({ "ca": "c", "key": "k" })), "registry.mysql.tls.cert"),
        ] {
            let refused = parse(table.clone()).expect_err(&table.to_string());
            assert!(refused.contains(named), "{table}: {refused}");
        }
    }

    #[test]
    fn a_refusal_repeats_no_password() {
        for url in [
            "mysql://app:secret@db:port/d",
            "mysql://app:secret@db",
            "my://app:secret@db/d",
        ] {
            let refused = parse(json!({ "url": url })).expect_err(url);
            assert!(!refused.contains("secret"), "{refused}");
        }
    }
}
