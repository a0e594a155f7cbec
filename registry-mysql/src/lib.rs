//! The MySQL and MariaDB backend of `registry`.
//!
//! One row counts the revisions of a namespace, and whoever writes holds its lock to the commit: so the order of
//! revisions is the order of commits, and a reader of the change log never skips one. What the schema is, which locks
//! each statement takes, and what happens when something fails is on the backend's page in the book.
//!
//! Read in this order: [`MysqlConfig`], `schema.rs` and `schema/`, `backend.rs` (the trait), `plan.rs`, `commit.rs`
//! and `gather.rs` (writes), `list.rs` (reads), `session.rs` and `sweep.rs`, `log.rs`, `poll.rs` and `watch.rs`, and
//! `line.rs`, the connections beneath them all.

mod backend;
mod commit;
mod config;
mod error;
mod gather;
mod line;
mod list;
mod log;
mod plan;
mod poll;
mod schema;
mod session;
mod settings;
mod store;
mod sweep;
mod tables;
mod watch;

use std::sync::Arc;

use registry_api::{Options, Registry, Result};

pub use config::{History, Identity, MysqlConfig, PollInterval, PoolSize, Server, Tls, Url};
pub use schema::sql as schema;
pub use tables::TablePrefix;

/// Opens a handle.
///
/// # Errors
/// [`registry_api::Error::Unavailable`] if the server does not answer within `connect_timeout`, or is read-only, naming
/// it and the cause; [`registry_api::Error::AccessDenied`] for a user, password or right that it refuses;
/// [`registry_api::Error::Config`] for a setting of ours or of the server's that can't be worked with, by name;
/// [`registry_api::Error::Storage`] for tables that are missing (and are not to be made), or newer than this program.
///
/// # Cancel safety
/// A session that was opened meanwhile ends by its TTL.
pub async fn connect(config: &MysqlConfig, options: &Options) -> Result<Arc<dyn Registry>> {
    Ok(Arc::new(backend::Mysql::open(config, options).await?))
}
