//! The ZooKeeper backend of `registry`.
//!
//! A key is a znode below the namespace and its value the znode's data, so that other ZooKeeper tools read it; a
//! transaction is one multi, whose checks are its conditions; a session is ZooKeeper's own; a watch is a persistent
//! recursive one that names what changed, plus a read of that. ZooKeeper 3.6 or later is needed. How it all lies in
//! ZooKeeper, and what ZooKeeper does otherwise than other stores, is on the backend's page in the book.
//!
//! Read in this order: [`ZkConfig`], `backend.rs` (the trait), `names.rs` (the mapping), `plan.rs` and `commit.rs`
//! (writes), `walk.rs` (reads), `session.rs`, `watch.rs`, `sweep.rs`, and `store.rs`, the connection beneath them all.

mod backend;
mod commit;
mod config;
mod ephemerals;
mod error;
mod facts;
mod names;
mod plan;
mod prune;
mod send;
mod session;
mod store;
mod sweep;
mod tidy;
mod version;
mod walk;
mod watch;

use std::sync::Arc;

use registry_api::{Options, Registry, Result};

pub use config::{Digest, Identity, ReadMode, Servers, Tls, ZkConfig};

/// Opens a handle.
///
/// # Errors
/// [`registry_api::Error::Unavailable`] if no server grants a session within `connect_timeout`, naming each and its
/// cause; [`registry_api::Error::AccessDenied`] if the user may not use the namespace;
/// [`registry_api::Error::Config`] for a TLS file that can't be read, or a session TTL that ZooKeeper does not grant;
/// [`registry_api::Error::Unsupported`] for a server older than ZooKeeper 3.6.
///
/// # Cancel safety
/// A session that was opened meanwhile ends by its TTL.
pub async fn connect(config: &ZkConfig, options: &Options) -> Result<Arc<dyn Registry>> {
    Ok(backend::Zk::open(config, options).await?)
}
