//! What all calls on a handle share.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use registry_api::{Error, Namespace, Options, Result, Revision};
use sqlx::mysql::MySqlRow;
use tokio::time::Instant;

use crate::config::MysqlConfig;
use crate::error::Trouble;
use crate::line::{Answer, Lines, NO_BOUND, Route, number};
use crate::list::AnswerSize;
use crate::poll::Poll;
use crate::schema;
use crate::tables::{Hex, Tables};

/// The lines to the server, and what was learnt of it.
pub(crate) struct Store {
    pub(crate) lines: Lines,
    pub(crate) tables: Tables,
    /// Marks this handle's changes, to find out what became of a lost commit.
    pub(crate) client: u64,
    pub(crate) request_timeout: Duration,
    pub(crate) poll_interval: Duration,
    pub(crate) history: u64,
    pub(crate) size: AnswerSize,
    pub(crate) poll: Poll,
    /// How often a watch found that the server went back.
    pub(crate) rollbacks: AtomicU64,
}

impl Store {
    /// Looks for the tables, makes them if they are missing, and finds the namespace.
    pub(crate) async fn open(config: &MysqlConfig, options: &Options, deadline: Instant) -> Result<Self> {
        let lines = Lines::new(
            Route::new(config, options.request_timeout).await?,
            config.pool_size.get(),
        );
        let mut tables = Tables::new(&config.table_prefix);
        schema::prepare(&lines, config, deadline).await?;
        tables.namespace = find_namespace(&lines, &tables, &options.namespace, deadline).await?;
        Ok(Self {
            lines,
            tables,
            client: random(),
            request_timeout: options.request_timeout,
            poll_interval: config.poll_interval.get(),
            history: config.history.get(),
            size: AnswerSize::default(),
            poll: Poll::default(),
            rollbacks: AtomicU64::new(0),
        })
    }

    pub(crate) fn deadline(&self) -> Instant {
        Instant::now() + self.request_timeout
    }

    /// Asks what may be asked twice.
    pub(crate) async fn ask(&self, deadline: Instant, sql: &str) -> Result<Vec<Answer>> {
        self.lines.ask(deadline, sql, NO_BOUND).await
    }

    /// Asks several things of one and the same moment.
    pub(crate) async fn ask_at_once(&self, deadline: Instant, sql: &str, room: usize) -> Result<Vec<Answer>> {
        let sql = format!(
            "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ; START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY; \
             {sql}; COMMIT"
        );
        let mut answers = self.lines.ask(deadline, &sql, room).await?;
        answers.drain(..answers.len().min(2));
        Ok(answers)
    }

    /// The revision now.
    pub(crate) async fn revision(&self, deadline: Instant) -> Result<Revision> {
        let answers = self.ask(deadline, &self.select_revision()).await?;
        Ok(Revision(self.counters(answers.first())?.revision))
    }

    pub(crate) fn select_revision(&self) -> String {
        let Tables {
            namespaces, namespace, ..
        } = &self.tables;
        format!("SELECT revision, compacted FROM {namespaces} WHERE id = {namespace}")
    }

    /// The answer to [`Store::select_revision`].
    pub(crate) fn counters(&self, answer: Option<&Answer>) -> Result<Counters> {
        let row = answer.and_then(|answer| answer.rows.first());
        let row = row.ok_or_else(|| Trouble::NoNamespace(self.lines.route.endpoint.clone()).unchanged())?;
        self.decode(Counters::of(row))
    }

    /// What a row holds, or an error that says the tables are not what they should be.
    pub(crate) fn decode<T>(&self, decoded: Result<T, sqlx::Error>) -> Result<T> {
        decoded.map_err(|source| {
            let endpoint = self.lines.route.endpoint.clone();
            Trouble::Client { endpoint, source }.unchanged()
        })
    }
}

/// The row of a namespace.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Counters {
    /// That of the last change.
    pub(crate) revision: u64,
    /// Changes up to this one are no longer kept.
    pub(crate) compacted: u64,
}

impl Counters {
    pub(crate) fn of(row: &MySqlRow) -> Result<Self, sqlx::Error> {
        Ok(Self {
            revision: number(row, 0)?,
            compacted: number(row, 1)?,
        })
    }
}

async fn find_namespace(lines: &Lines, tables: &Tables, namespace: &Namespace, deadline: Instant) -> Result<u64> {
    let namespaces = &tables.namespaces;
    let name = Hex(namespace.as_str().as_bytes());
    let select = format!("SELECT id FROM {namespaces} WHERE name = {name}");
    // Asked first, so that nothing is written where the namespace is there.
    let insert = format!("INSERT IGNORE INTO {namespaces} (name, revision, compacted) VALUES ({name}, 0, 0); {select}");
    for sql in [select, insert] {
        let answers = lines.ask(deadline, &sql, NO_BOUND).await?;
        if let Some(row) = answers.last().and_then(|answer| answer.rows.first()) {
            let found = number(row, 0);
            return found.map_err(|error| storage(namespaces, error.to_string()));
        }
    }
    Err(storage(namespaces, "a namespace that was put is not there".into()))
}

pub(crate) fn storage(table: &str, reason: String) -> Error {
    Error::Storage {
        place: format!("table {table}"),
        reason,
    }
}

/// A number that no other has.
pub(crate) fn random() -> u64 {
    uuid::Uuid::new_v4().as_u64_pair().0 ^ uuid::Uuid::new_v4().as_u64_pair().1
}
