//! The tables: made where they are missing, refused where they are of another version.
//!
//! Not by sqlx's own migrations: those take `GET_LOCK`, and keep their account in a table of a fixed name, which the
//! application in whose database the registry is a guest may use itself.

use registry_api::{Error, Result};
use tokio::time::Instant;

use crate::config::MysqlConfig;
use crate::line::{Lines, NO_BOUND, column};
use crate::store::storage;
use crate::tables::TablePrefix;

/// What brings the tables from each version to the next. Each can be run again, by several at once, and notes itself as
/// its last step.
const MIGRATIONS: &[&str] = &[include_str!("schema/1.sql")];

/// The SQL that makes the tables, for whoever may: `registry schema mysql` prints it. It can be run again, and changes
/// nothing then.
pub fn sql(prefix: &TablePrefix) -> String {
    MIGRATIONS.concat().replace("{prefix}", prefix.as_str())
}

/// Makes the tables what this program needs.
pub(crate) async fn prepare(lines: &Lines, config: &MysqlConfig, deadline: Instant) -> Result<()> {
    let known = MIGRATIONS.len() as u64;
    let found = version(lines, &config.table_prefix, deadline).await?;
    let table = format!("{}schema", config.table_prefix.as_str());
    match found {
        Some(found) if found == known => Ok(()),
        Some(found) if found > known => Err(storage(
            &table,
            format!("the tables are of version {found}, newer than this program, which knows versions up to {known}"),
        )),
        _ if config.migrate => {
            for migration in &MIGRATIONS[usize::try_from(found.unwrap_or(0)).unwrap_or(0)..] {
                let sql = migration.replace("{prefix}", config.table_prefix.as_str());
                lines.ask(deadline, &sql, NO_BOUND).await.map_err(may_not)?;
            }
            Ok(())
        }
        found => {
            let missing = match found {
                Some(found) => format!("the tables are of version {found}, and {known} is needed"),
                None => "the registry's tables are missing".into(),
            };
            let reason = format!(
                "{missing}; registry.mysql.migrate is false: run what `registry schema mysql` prints, or let it be true"
            );
            Err(storage(&table, reason))
        }
    }
}

/// Who may not make tables is told what to do.
fn may_not(error: Error) -> Error {
    match error {
        Error::AccessDenied { backend, source } => Error::AccessDenied {
            backend,
            source: format!("{source}; somebody who may make tables can run what `registry schema mysql` prints")
                .into(),
        },
        error => error,
    }
}

/// The version of the tables that are there.
async fn version(lines: &Lines, prefix: &TablePrefix, deadline: Instant) -> Result<Option<u64>> {
    let sql = format!("SELECT CAST(MAX(version) AS UNSIGNED) FROM {}schema", prefix.as_str());
    match lines.ask(deadline, &sql, NO_BOUND).await {
        Ok(answers) => {
            let row = answers.first().and_then(|answer| answer.rows.first());
            Ok(row.and_then(|row| column::<Option<u64>>(row, 0).ok()).flatten())
        }
        // There is no such table.
        Err(Error::Storage { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}
