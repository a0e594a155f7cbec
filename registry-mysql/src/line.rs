//! Connections to the server: opened when they are needed, kept for the next, closed when anything is wrong with them.
//!
//! A request is a list of statements that go to the server in one piece and come back as one answer, so a transaction
//! that needs no judgement in the middle costs one round trip and can't be left open by a client that stops. Only a line
//! whose answer was read to its end goes back to the others; one that is dropped before (by a deadline, by a caller that
//! went away, by an error) is closed, and the server undoes what was open on it.

use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use registry_api::Result;
use sqlx::mysql::{MySqlConnectOptions, MySqlRow, MySqlSslMode};
use sqlx::pool::PoolConnection;
use sqlx::{AssertSqlSafe, ConnectOptions, Decode, Either, Executor, MySql, MySqlConnection, MySqlPool, Row, Type};
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep_until, timeout, timeout_at};

use crate::config::{self, MysqlConfig, Server, Tls};
use crate::error::{Trouble, Verdict};

/// The least `max_allowed_packet`: a transaction of 900,000 bytes takes twice that as literals, and names besides.
const LEAST_PACKET: u64 = 4 << 20;

/// Where lines lead.
#[derive(Clone, Debug)]
pub(crate) struct Route {
    source: Source,
    pub(crate) endpoint: String,
    /// How long the server may be silent in the middle of an answer.
    patience: Duration,
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

    fn silent(&self) -> Trouble {
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
            connection: Some(opened.map_err(|error| self.failed(error))?),
        };
        // Each time: behind one address there may be another server than last time.
        let (line, answers) = line
            .ask(
                "SELECT @@global.read_only, @@autocommit, @@max_allowed_packet",
                NO_BOUND,
            )
            .await?;
        let settings = answers.first().and_then(|answer| answer.rows.first());
        let settings = settings.ok_or_else(|| self.failed(sqlx::Error::RowNotFound))?;
        let setting = |place| number(settings, place).map_err(|error| self.failed(error));
        if setting(0)? != 0 {
            return Err(Trouble::ReadOnly(self.endpoint.clone()));
        }
        if setting(1)? == 0 {
            return Err(Trouble::NoAutocommit(self.endpoint.clone()));
        }
        match setting(2)? {
            found if found < LEAST_PACKET => Err(Trouble::SmallPackets {
                endpoint: self.endpoint.clone(),
                found,
                least: LEAST_PACKET,
            }),
            _ => Ok(line),
        }
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
    idle: Mutex<Vec<MySqlConnection>>,
    /// How many requests may be under way at once.
    places: Semaphore,
}

impl Lines {
    pub(crate) fn new(route: Route, places: usize) -> Self {
        Self {
            route,
            idle: Mutex::default(),
            places: Semaphore::new(places),
        }
    }

    fn idle(&self) -> MutexGuard<'_, Vec<MySqlConnection>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A line that was used before, or a new one.
    pub(crate) async fn take(&self) -> Result<Line<'_>, Trouble> {
        let idle = self.idle().pop();
        match idle {
            Some(connection) => Ok(Line {
                route: &self.route,
                connection: Some(Connection::Own(connection)),
            }),
            None => self.route.open().await,
        }
    }

    /// Gives a line back whose answer was read to its end.
    pub(crate) fn give_back(&self, mut line: Line<'_>) {
        match line.connection.take() {
            Some(Connection::Own(connection)) => self.idle().push(connection),
            // Dropped as it is, it returns to its pool.
            Some(Connection::Pooled(_)) | None => {}
        }
    }

    /// After one line was lost the others may be as well.
    pub(crate) fn forget_idle(&self) {
        self.idle().clear();
    }

    /// Asks what may be asked twice: on another line when one is lost, and again when others were in the way.
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
        let (line, answers) = self.take().await?.ask(sql, room).await?;
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
