//! schema

use std::process::ExitCode;

use clap::{Args, ValueEnum};
use registry::mysql::TablePrefix;
use registry::{Backend, Config};
use serde_json::json;

use super::output::Output;
use super::{Failure, Outcome, Settings};

#[derive(Debug, Args)]
pub(crate) struct Schema {
    /// Which store.
    store: Store,
    /// What the names of the tables begin with; if not given, as the settings say, or `registry_`.
    #[arg(long, value_name = "PREFIX", value_parser = prefix)]
    table_prefix: Option<TablePrefix>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Store {
    /// MySQL or MariaDB.
    Mysql,
}

impl Schema {
    pub(crate) fn run(self, settings: &Settings, out: Output) -> Outcome {
        let prefix = match self.table_prefix {
            Some(prefix) => prefix,
            None => configured(settings)?,
        };
        let sql = match self.store {
            Store::Mysql => registry::mysql::schema(&prefix),
        };
        out.line(|| sql.trim_end().to_owned(), || json!({ "sql": sql }))?;
        Ok(ExitCode::SUCCESS)
    }
}

/// The prefix of the table `[registry.mysql]`, whichever store the settings select.
fn configured(settings: &Settings) -> Result<TablePrefix, Failure> {
    // Wrong settings are refused, whatever they select.
    settings.load()?;
    let mut selecting = settings.overrides.clone();
    selecting.push(("type".into(), "mysql".into()));
    match Config::load(settings.file.as_deref(), &selecting) {
        Ok(Config {
            backend: Backend::Mysql(mysql),
            ..
        }) => Ok(mysql.table_prefix),
        // There is no such table.
        _ => Ok(TablePrefix::default()),
    }
}

fn prefix(text: &str) -> Result<TablePrefix, String> {
    TablePrefix::new(text).map_err(|error| error.to_string())
}
