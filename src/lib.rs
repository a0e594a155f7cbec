//! One coordination API for Rust programs: keys and values, ephemeral keys, watches, locks and leader election, with the
//! store beneath it chosen in a config file.
//!
//! ```toml
//! [registry]
//! type = "raft"          # raft | etcd | zk | mysql
//! namespace = "/myapp"
//! ```
//!
//! A program starts on the embedded Raft store with nothing else to operate, and moves to etcd, ZooKeeper or MySQL by
//! changing one word: the same call means the same on each, which one conformance suite shows on real servers.
//!
//! ```
//! use registry::{Config, Key, Read, WatchItem, WatchRequest, WatchScope};
//!
//! # #[tokio::main]
//! # async fn main() -> registry::Result<()> {
//! // In memory, for this example; a file, the environment and flags otherwise: `Config::load`.
//! let registry = registry::connect(&Config::in_memory()).await?;
//!
//! // Keys and values.
//! let config = Key::parse("/app/config")?;
//! registry.put(&config, "v1").await?;
//! assert_eq!(registry.get(&config, Read::Linearizable).await?.unwrap().value, "v1");
//!
//! // Who is alive: ephemeral keys go with the session of the handle that put them.
//! let worker = registry.register(&Key::parse("/app/workers/w1")?, "10.0.0.7:9000").await?;
//! let mut workers = registry.watch(WatchRequest::new(&Key::parse("/app/workers")?, WatchScope::Children)).await?;
//! assert!(matches!(workers.next().await.unwrap()?, WatchItem::Changes(created) if created.len() == 1));
//!
//! // One at a time, with a token that only grows: send it along, so that a late write of a lost holder is refused.
//! let held = registry.lock(&Key::parse("/app/nightly-job")?).acquire().await?;
//! println!("holding with fencing token {}", held.token());
//! held.release().await?;
//!
//! // One leader.
//! let leadership = registry.election(&Key::parse("/app/scheduler")?).campaign("10.0.0.7:9000").await?;
//! leadership.resign().await?;
//!
//! worker.unregister().await?;
//! registry.close().await
//! # }
//! ```
//!
//! What you may rely on, sentence by sentence, is in the book (`docs/guarantees.md`), each with the name of its test.
//!
//! # Features
//! `raft` (default), `etcd`, `zk` and `mysql` compile the backends in; `registry.type` chooses among those.

mod config;
#[cfg(feature = "raft")]
pub mod http;
pub mod json;

pub use config::{BACKENDS, Backend, Config, Overrides, connect};
pub use registry_api::*;

#[cfg(feature = "etcd")]
pub use registry_etcd as etcd;
#[cfg(feature = "mysql")]
pub use registry_mysql as mysql;
#[cfg(feature = "raft")]
pub use registry_raft as raft;
#[cfg(feature = "zk")]
pub use registry_zk as zk;
