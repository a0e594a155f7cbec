//! Connections to the server: opened when they are needed, kept for the next, closed when anything is wrong with them.
//!
//! A request is a list of statements that go to the server in one piece and come back as one answer, so a transaction
//! that needs no judgement in the middle costs one round trip and can't be left open by a client that stops. Only a line
//! whose answer was read to its end goes back to the others; one that is dropped before (by a deadline, by a caller that
//! went away, by an error) is closed, and the server undoes what was open on it.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use registry_api::Result;
use sqlx::mysql::{MySqlConnectOptions, MySqlRow, MySqlSslMode};
use sqlx::pool::PoolConnection;
use sqlx::{
    AssertSqlSafe, ConnectOptions, Connection as _, Decode, Either, Executor, MySql, MySqlConnection, MySqlPool, Row,
    Type,
};
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep_until, timeout, timeout_at};

use crate::config::{self, MysqlConfig, Server, Tls};
use crate::error::{Trouble, Verdict};
use crate::settings::{self, Settings};

/// How long a connection may be unused before it is not used again. Gateways forget connections that are idle for some
/// minutes (350 s at AWS, 4 min at Azure) and tell neither end; the server's own `wait_timeout` closes them too.
const MAX_IDLE: Duration = Duration::from_secs(30);

/// Where lines lead.
#[derive(Clone, Debug)]
pub(crate) struct Route {
    source: Source,
    pub(crate) endpoint: String,
    /// How long the server may be silent in the middle of an answer.
    patience: Duration,
    /// TLS is required by our settings.
    encrypted: bool,
    /// The known faults of the server's version were logged.
    warned: Arc<AtomicBool>,
}

#[derive(Clone, Debug)]
enum Source {
    Server(Box<MySqlConnectOptions>),
    Pool(MySqlPool),
}

impl Route {
    pub(crate) async fn new(config: &MysqlConfig, patience: Duration) -> Result<Self> {
        let (options, pool) = match &config.server {
            Server::Url { url, tls: None } => (url.options()?, None),
            Server::Url { url, tls: Some(tls) } => (with_tls(url.options()?, tls).await?, None),
            Server::Pool(pool) => (pool.connect_options().as_ref().clone(), Some(pool.clone())),
        };
        let endpoint = match options.get_socket() {
            Some(socket) => socket.display().to_string(),
            None => format!("{}:{}", options.get_host(), options.get_port()),
        };
        // Statements hold values, which belong in no log.
        let options = Box::new(options.disable_statement_logging());
        Ok(Self {
            source: pool.map_or_else(|| Source::Server(options.clone()), Source::Pool),
            endpoint,
            patience,
            encrypted: matches!(&config.server, Server::Url { tls: Some(_), .. }),
            warned: Arc::default(),
        })
    }

    /// The same server, apart from an application's pool: for what runs on a runtime of its own.
    pub(crate) fn apart(&self) -> Self {
        let source = match &self.source {
            Source::Server(options) => Source::Server(options.clone()),
            Source::Pool(pool) => {
                let options = pool.connect_options().as_ref().clone();
                Source::Server(Box::new(options.disable_statement_logging()))
            }
        };
        Self { source, ..self.clone() }
    }

    fn failed(&self, source: sqlx::Error) -> Trouble {
        Trouble::Client {
            endpoint: self.endpoint.clone(),
            source,
        }
    }

    pub(crate) fn silent(&self) -> Trouble {
        Trouble::Silent {
            endpoint: self.endpoint.clone(),
            waited: self.patience,
        }
    }

    async fn open(&self) -> Result<Line<'_>, Trouble> {
        let opening = async {
            match &self.source {
                Source::Server(options) => Ok(Connection::Own(options.connect().await?)),
                Source::Pool(pool) => Ok(Connection::Pooled(pool.acquire().await?)),
            }
        };
        let opened = timeout(self.patience, opening).await.map_err(|_| self.silent())?;
        let line = Line {
            route: self,
            connection: Some(opened.map_err(|error| self.not_opened(error))?),
        };
        // Each time: behind one address there may be another server than last time.
        let sql = match &self.source {
            Source::Server(_) => format!("{}; {}", settings::SET, settings::show()),
            // An application's connections stay as they are.
            Source::Pool(_) => settings::show(),
        };
        let (line, mut answers) = line.ask(&sql, NO_BOUND).await?;
        let rows = answers.pop().unwrap_or_default().rows;
        let setting = |row: &MySqlRow| Ok((column(row, 0)?, column::<Option<String>>(row, 1)?.unwrap_or_default()));
        let found: Result<Settings, sqlx::Error> = rows.iter().map(setting).collect();
        self.check(&found.map_err(|error| self.failed(error))?)?;
        Ok(line)
    }

    fn not_opened(&self, source: sqlx::Error) -> Trouble {
        let endpoint = self.endpoint.clone();
        match source {
            // Without TLS the one thing that the client can't do is to send a password under RSA.
            sqlx::Error::Configuration(_) if !self.encrypted => Trouble::NeedsTls { endpoint, source },
            source => Trouble::Client { endpoint, source },
        }
    }

    /// Checks the answer to [`settings::READ_ONLY`].
    pub(crate) fn check_writable(&self, answer: Option<Answer>) -> Result<(), Trouble> {
        let row = answer.and_then(|answer| answer.rows.into_iter().next());
        let row = row.ok_or_else(|| self.failed(sqlx::Error::RowNotFound))?;
        for place in 0..row.len() {
            let value = column::<&[u8]>(&row, place).map_err(|error| self.failed(error))?;
            if settings::is_on(value) {
                return Err(Trouble::ReadOnly(self.endpoint.clone()));
            }
        }
        Ok(())
    }

    fn check(&self, found: &Settings) -> Result<(), Trouble> {
        let endpoint = || self.endpoint.clone();
        settings::check(found).map_err(|wrong| Trouble::Setting {
            endpoint: endpoint(),
            wrong,
        })?;
        if settings::is_read_only(found) {
            return Err(Trouble::ReadOnly(endpoint()));
        }
        if let Some(version) = found.get("version")
            && !self.warned.swap(true, Ordering::Relaxed)
        {
            for fault in settings::known_faults(version) {
                tracing::warn!(
                    endpoint = self.endpoint,
                    version,
                    "a known fault of the server: {fault}"
                );
            }
        }
        Ok(())
    }
}

async fn with_tls(options: MySqlConnectOptions, tls: &Tls) -> Result<MySqlConnectOptions> {
    let ca = read_file("registry.mysql.tls.ca", &tls.ca).await?;
    let options = options.ssl_mode(MySqlSslMode::VerifyIdentity).ssl_ca_from_pem(ca);
    let Some(client) = &tls.client else { return Ok(options) };
    let cert = read_file("registry.mysql.tls.cert", &client.cert).await?;
    let key = read_file("registry.mysql.tls.key", &client.key).await?;
    Ok(options.ssl_client_cert_from_pem(cert).ssl_client_key_from_pem(key))
}

async fn read_file(field: &str, path: &Path) -> Result<Vec<u8>> {
    let read = tokio::fs::read(path).await;
    read.map_err(|e| config::config(field, format!("{}: {e}", path.display())))
}

/// No answer of the registry's own bounds is larger.
pub(crate) const NO_BOUND: usize = usize::MAX;

/// A connection in use.
pub(crate) struct Line<'r> {
    route: &'r Route,
    connection: Option<Connection>,
}

enum Connection {
    Own(MySqlConnection),
    Pooled(PoolConnection<MySql>),
}

impl Drop for Line<'_> {
    fn drop(&mut self) {
        if let Some(Connection::Pooled(mut connection)) = self.connection.take() {
            connection.close_on_drop();
        }
    }
}

/// What one statement answered.
#[derive(Default)]
pub(crate) struct Answer {
    pub(crate) rows: Vec<MySqlRow>,
    /// How many rows it changed.
    pub(crate) affected: u64,
    /// The rest was left unread: there was more than the bound on bytes.
    pub(crate) cut: bool,
}

impl Line<'_> {
    /// Sends statements and reads an answer to each. Beyond so many bytes the rest is left, and the line is of no more use.
    pub(crate) async fn ask(mut self, sql: &str, room: usize) -> Result<(Self, Vec<Answer>), Trouble> {
        let route = self.route;
        let connection: &mut MySqlConnection = match &mut self.connection {
            Some(Connection::Own(connection)) => connection,
            Some(Connection::Pooled(connection)) => connection,
            None => return Err(Trouble::Stopped),
        };
        // Everything in it is either ours or a literal made of digits.
        let mut incoming = connection.fetch_many(sqlx::raw_sql(AssertSqlSafe(sql)));
        let mut answers = Vec::new();
        let (mut answer, mut bytes) = (Answer::default(), 0);
        loop {
            match timeout(route.patience, incoming.next()).await {
                Err(_) => return Err(route.silent()),
                Ok(Some(Err(error))) => return Err(route.failed(error)),
                Ok(Some(Ok(Either::Right(row)))) => {
                    bytes += size(&row);
                    answer.rows.push(row);
                    if bytes > room {
                        answer.cut = true;
                        answers.push(answer);
                        break;
                    }
                }
                Ok(Some(Ok(Either::Left(result)))) => {
                    answer.affected = result.rows_affected();
                    answers.push(std::mem::take(&mut answer));
                }
                Ok(None) => break,
            }
        }
        drop(incoming);
        if answers.last().is_some_and(|answer| answer.cut) {
            self = Self {
                route,
                connection: None,
            };
        }
        Ok((self, answers))
    }
}

/// Lines to one place.
pub(crate) struct Lines {
    pub(crate) route: Route,
    idle: Mutex<Vec<Idle>>,
    /// How many requests may be under way at once.
    places: Semaphore,
}

/// A connection that is not in use.
struct Idle {
    connection: MySqlConnection,
    since: Instant,
}

impl Lines {
    pub(crate) fn new(route: Route, places: usize) -> Self {
        Self {
            route,
            idle: Mutex::default(),
            places: Semaphore::new(places),
        }
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Idle>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A line that was used before, or a new one.
    pub(crate) async fn take(&self) -> Result<Line<'_>, Trouble> {
        let idle = self.idle().pop();
        match idle {
            Some(idle) if idle.since.elapsed() < MAX_IDLE => Ok(Line {
                route: &self.route,
                connection: Some(Connection::Own(idle.connection)),
            }),
            Some(idle) => {
                // The last one given back is on top, so those below have been idle for longer.
                let others = std::mem::take(&mut *self.idle());
                for idle in others.into_iter().chain([idle]) {
                    // The server hears of it if the connection still exists; nobody waits for an answer.
                    let _ = timeout(Duration::from_millis(100), idle.connection.close()).await;
                }
                self.route.open().await
            }
            None => self.route.open().await,
        }
    }

    /// Gives a line back whose answer was read to its end.
    pub(crate) fn give_back(&self, mut line: Line<'_>) {
        match line.connection.take() {
            Some(Connection::Own(connection)) => self.idle().push(Idle {
                connection,
                since: Instant::now(),
            }),
            // Dropped as it is, it returns to its pool.
            Some(Connection::Pooled(_)) | None => {}
        }
    }

    /// After one line was lost the others may be as well.
    pub(crate) fn forget_idle(&self) {
        self.idle().clear();
    }

    /// Sends a request that may be sent twice: on another line when one is lost or leads to a server that is not the
    /// primary any more, and again when others were in the way. An answer that was cut comes from a server that was the
    /// primary when the line was opened, and is not checked further.
    pub(crate) async fn ask(&self, deadline: Instant, sql: &str, room: usize) -> Result<Vec<Answer>> {
        let mut backoff = Backoff::default();
        let mut last = None;
        loop {
            let trouble = match timeout_at(deadline, self.try_ask(sql, room)).await {
                Ok(Ok(answers)) => return Ok(answers),
                Ok(Err(trouble)) => trouble,
                Err(_) => {
                    self.forget_idle();
                    return Err(last.unwrap_or_else(|| self.route.silent()).unchanged());
                }
            };
            match trouble.verdict() {
                Verdict::Lost | Verdict::Conflict => {
                    self.forget_idle();
                    if !backoff.wait_until(deadline).await {
                        return Err(trouble.unchanged());
                    }
                    last = Some(trouble);
                }
                _ => return Err(trouble.unchanged()),
            }
        }
    }

    async fn try_ask(&self, sql: &str, room: usize) -> Result<Vec<Answer>, Trouble> {
        let _place = self.places.acquire().await.map_err(|_| Trouble::Stopped)?;
        let sql = format!("{}; {}", sql.trim_end_matches([';', '\n']), settings::READ_ONLY);
        let (line, mut answers) = self.take().await?.ask(&sql, room).await?;
        // The rest of a cut answer was not read, and the check with it.
        if answers.last().is_none_or(|answer| !answer.cut) {
            self.route.check_writable(answers.pop())?;
        }
        self.give_back(line);
        Ok(answers)
    }
}

fn size(row: &MySqlRow) -> usize {
    let sizes = (0..row.len()).map(|column| row.try_get_unchecked::<&[u8], _>(column).map_or(0, <[u8]>::len));
    sizes.sum()
}

/// A column of a row.
pub(crate) fn column<'r, T>(row: &'r MySqlRow, place: usize) -> Result<T, sqlx::Error>
where
    T: Decode<'r, MySql> + Type<MySql>,
{
    row.try_get_unchecked(place)
}

/// A number, whatever its type in SQL.
pub(crate) fn number(row: &MySqlRow, place: usize) -> Result<u64, sqlx::Error> {
    column(row, place)
}

/// Waits that double, from none at all to half a second.
#[derive(Debug, Default)]
pub(crate) struct Backoff(Duration);

impl Backoff {
    /// Waits, unless the deadline comes first: then it is `false`, at once.
    pub(crate) async fn wait_until(&mut self, deadline: Instant) -> bool {
        let until = Instant::now() + self.0;
        if until >= deadline {
            return false;
        }
        sleep_until(until).await;
        self.0 = (self.0 * 2).clamp(Duration::from_millis(10), Duration::from_millis(500));
        true
    }
}
