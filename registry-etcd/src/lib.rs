//! The etcd backend of `registry`.
//!
//! Keys are etcd's keys under the namespace, by their plain names; every write is one transaction of etcd's, with the
//! conditions and the rules on kinds and owners as comparisons; a session is a lease; a watch is etcd's watch, resumed
//! and re-listed where it must be. What etcd does otherwise than others is on the backend's page in the book.
//!
//! Read in this order: [`EtcdConfig`], `backend.rs` (the trait), `plan.rs`, `commit.rs` and
//! `gather.rs` (writes), `list.rs` (reads),
//! `session.rs`, `watch.rs`, and `link.rs`, the connection beneath them all.

mod backend;
mod commit;
mod config;
mod demand;
mod error;
mod gather;
mod history;
mod link;
mod list;
mod member;
mod names;
mod plan;
mod range;
mod session;
mod store;
mod stream;
mod version;
mod watch;

use std::sync::Arc;

use registry_api::{Options, Registry, Result};

pub use config::{Credentials, Endpoints, EtcdConfig, Identity, Tls};

/// Opens a handle.
///
/// # Errors
/// [`registry_api::Error::Unavailable`] if no endpoint answers within `connect_timeout`, naming each and its cause;
/// [`registry_api::Error::AccessDenied`] for a user or password that etcd refuses;
/// [`registry_api::Error::Config`] for settings that contradict each other, a TLS file that can't be read, or a session
/// TTL that etcd does not grant.
///
/// # Cancel safety
/// A session that was opened meanwhile ends by its TTL.
pub async fn connect(config: &EtcdConfig, options: &Options) -> Result<Arc<dyn Registry>> {
    Ok(Arc::new(backend::Etcd::open(config, options).await?))
}
