//! schema

use std::process::ExitCode;

use clap::{Args, ValueEnum};
use registry::mysql::TablePrefix;
use serde_json::json;

use super::Outcome;
use super::output::Output;

#[derive(Debug, Args)]
pub(crate) struct Schema {
    /// Which store.
    store: Store,
    /// What the names of the tables begin with.
    #[arg(long, default_value = "registry_", value_name = "PREFIX", value_parser = prefix)]
    table_prefix: TablePrefix,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Store {
    /// MySQL or MariaDB.
    Mysql,
}

impl Schema {
    pub(crate) fn run(&self, out: Output) -> Outcome {
        let sql = match self.store {
            Store::Mysql => registry::mysql::schema(&self.table_prefix),
        };
        out.line(|| sql.trim_end().to_owned(), || json!({ "sql": sql }))?;
        Ok(ExitCode::SUCCESS)
    }
}

fn prefix(text: &str) -> Result<TablePrefix, String> {
    TablePrefix::new(text).map_err(|error| error.to_string())
}
