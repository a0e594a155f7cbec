//! The embedded Raft backend of `registry`: the store is in your own process, with nothing else to operate.
//!
//! [`connect`] opens a handle: on a member in this process, or on members elsewhere by their addresses. Both are one
//! implementation over two links. [`Member`] is the member itself, for a program that serves others.
//!
//! ```
//! # use registry_api::{Key, Options, Read};
//! # #[tokio::main]
//! # async fn main() -> registry_api::Result<()> {
//! let member = registry_raft::Member::start(&registry_raft::RaftConfig::in_memory()).await?;
//! let registry = member.connect(&Options::default()).await?;
//! let key = Key::parse("/greeting")?;
//! registry.put(&key, "hello").await?;
//! assert_eq!(registry.get(&key, Read::Linearizable).await?.unwrap().value, "hello");
//! registry.close().await?;
//! member.stop().await
//! # }
//! ```
//!
//! Everything of openraft stays inside this crate: messages are our own, on the wire and on disk.

mod addresses;
mod backend;
mod backup;
#[cfg(test)]
mod bad_input;
mod command;
mod config;
mod conversation;
mod directory;
mod disk;
mod expiry;
mod founding;
mod history;
mod leader;
mod link;
mod log;
mod log_store;
mod member;
mod members;
mod network;
mod peer_service;
mod peers;
mod read_index;
mod remote;
mod service;
mod session;
mod snapshot;
mod standing;
mod state;
mod state_machine;
mod status;
mod store;
mod transport;
mod tree;
mod types;
mod verify;
mod watchers;
mod wire;

use std::sync::Arc;

use registry_api::{Error, Options, Registry, Result, SessionId, SessionStore};

use crate::backend::RaftRegistry;
use crate::remote::Remote;
use crate::session::Sessions;
use crate::transport::Transport;

#[doc(hidden)]
pub use log::measure;

pub use backup::{Backup, restore};

pub use config::{DEFAULT_ADDRESS, RaftConfig, Timers, Tls};
pub use member::Member;
pub use members::MemberChange;
pub use status::{MemberStatus, Status};
pub use transport::{Gate, Guard, ReadWrite, Stream};
pub use verify::{MemberDigest, Verification, verify};

/// The messages, as they are compiled from `proto/`.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub(crate) mod proto {
    pub mod registry {
        pub mod v1 {
            tonic::include_proto!("registry.v1");
        }
        pub mod log {
            pub mod v1 {
                tonic::include_proto!("registry.log.v1");
            }
        }
        pub mod peer {
            pub mod v1 {
                tonic::include_proto!("registry.peer.v1");
            }
        }
        pub mod snapshot {
            pub mod v1 {
                tonic::include_proto!("registry.snapshot.v1");
            }
        }
    }
    pub use registry::v1::*;
}

/// Opens a handle: remote if the config has `endpoints`; otherwise this process becomes a member, which stops when the
/// handle is closed or dropped.
///
/// # Errors
/// [`registry_api::Error::Unavailable`] within `connect_timeout`, naming the addresses and the causes; as
/// [`Member::start`].
pub async fn connect(config: &RaftConfig, options: &Options) -> Result<Arc<dyn Registry>> {
    config.check()?;
    if config.is_remote() {
        let link = Arc::new(remote(config)?);
        return Ok(Arc::new(RaftRegistry::open(link, options).await?));
    }
    let starting = Member::start(config);
    let member = match config.cluster.is_empty() && config.join.is_empty() {
        true => starting.await?,
        false => tokio::time::timeout(options.connect_timeout, starting)
            .await
            .map_err(|_| {
                let reason = "the group's other members were not there within connect_timeout";
                Error::Unavailable {
                    backend: link::BACKEND,
                    source: reason.into(),
                }
            })??,
    };
    member.into_handle(options).await
}

/// How the group stands, asked of the first of the config's `endpoints` that answers.
///
/// # Errors
/// [`registry_api::Error::Unavailable`] within `connect_timeout`, naming the addresses and the causes.
pub async fn status(config: &RaftConfig, options: &Options) -> Result<Status> {
    config.check()?;
    remote(config)?.status(options.connect_timeout).await
}

/// Writes a backup to a file: a consistent copy of everything, the present one first that all which was acknowledged is
/// in. Nothing stops meanwhile. It is asked of the first of the config's `endpoints` that answers.
///
/// The file is there when it is whole and was read back, in place of one of that name; only its owner may read it.
/// `progress` is told how many bytes have come, and of how many. [`restore`] makes a new group of it.
///
/// # Errors
/// [`Error::Unavailable`] if no member answers or the one that does breaks off; [`Error::Storage`] if the file can't be
/// written. Nothing of it is left then.
pub async fn backup(
    config: &RaftConfig,
    options: &Options,
    file: &std::path::Path,
    progress: impl FnMut(u64, u64),
) -> Result<Backup> {
    config.check()?;
    let parts = remote(config)?.backup(options.connect_timeout).await?;
    backup::save(parts, file, options.request_timeout, progress).await
}

/// Changes the members of the group, asked of the first of the config's `endpoints` that answers. What is so already is no
/// error, so it may be asked again.
///
/// # Errors
/// [`registry_api::Error::InvalidRequest`] for a member that is not there or can't be changed so;
/// [`registry_api::Error::Unavailable`] if nothing changed; [`registry_api::Error::OutcomeUnknown`].
pub async fn change_members(config: &RaftConfig, options: &Options, change: MemberChange) -> Result<()> {
    config.check()?;
    members::ask(&remote(config)?, change, options.request_timeout).await
}

/// Ends a session by its id, whoever holds it: for an operator who knows that its process is gone.
///
/// # Errors
/// As [`status`]. A session that is not there is no error.
pub async fn end_session(config: &RaftConfig, options: &Options, session: SessionId) -> Result<()> {
    config.check()?;
    Sessions::new(Arc::new(remote(config)?), options).close(session).await
}

fn remote(config: &RaftConfig) -> Result<Remote> {
    Ok(Remote::new(Transport::new(config)?, config.endpoints.clone()))
}
