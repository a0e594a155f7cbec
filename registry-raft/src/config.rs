//! Settings of the Raft backend.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use registry_api::{Error, Result};
use serde::Deserialize;

/// Where a member listens, and where a handle looks for one, when nothing is said.
pub const DEFAULT_ADDRESS: &str = "127.0.0.1:7480";
const DEFAULT_MEMBER: &str = "a";
const DEFAULT_DATA_DIR: &str = "registry-data";
/// The data directory that is none: everything in memory, and no port.
const MEMORY: &str = ":memory:";

/// Settings of the Raft backend: the `[registry.raft]` table.
///
/// With `endpoints` the handle is remote: it stores nothing and has no vote. Without, this process is a member, which
/// stores and votes; with nothing given at all it is the member `a`, in `./registry-data`, on 127.0.0.1:7480.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct RaftConfig {
    /// The member's name, `a` if not given. A directory belongs to one member, whose name can't change.
    pub member: Option<String>,
    /// Where the member keeps its log and snapshots, `registry-data` if not given. `:memory:` keeps nothing, and listens
    /// nowhere: for unit tests.
    pub data_dir: Option<PathBuf>,
    /// The address the member answers remote handles on, `127.0.0.1:7480` if not given. Port 0 takes a free one.
    pub listen: Option<String>,
    /// Members to reach from elsewhere, `host:port`, in the order they are tried.
    pub endpoints: Vec<String>,
    /// How many bytes of log make a member take a snapshot and drop what it covers: 1 MiB or more, 64 MiB if not given.
    pub snapshot_log_bytes: Option<u64>,
}

impl RaftConfig {
    /// A member that keeps everything in memory.
    pub fn in_memory() -> Self {
        Self {
            data_dir: Some(MEMORY.into()),
            ..Self::default()
        }
    }

    /// A remote handle.
    pub fn remote(endpoints: impl IntoIterator<Item = String>) -> Self {
        Self {
            endpoints: endpoints.into_iter().collect(),
            ..Self::default()
        }
    }

    /// Whether this is a remote handle.
    pub fn is_remote(&self) -> bool {
        !self.endpoints.is_empty()
    }

    pub(crate) fn member_name(&self) -> &str {
        self.member.as_deref().unwrap_or(DEFAULT_MEMBER)
    }

    /// The directory, or `None` for memory.
    pub(crate) fn directory(&self) -> Option<&Path> {
        let directory = self.data_dir.as_deref().unwrap_or(Path::new(DEFAULT_DATA_DIR));
        (directory != Path::new(MEMORY)).then_some(directory)
    }

    pub(crate) fn snapshot_log_bytes(&self) -> u64 {
        self.snapshot_log_bytes.unwrap_or(64 << 20)
    }

    /// The address to listen on.
    pub(crate) fn address(&self) -> Result<SocketAddr> {
        let listen = self.listen.as_deref().unwrap_or(DEFAULT_ADDRESS);
        listen
            .parse()
            .map_err(|_| refused("listen", format!("{listen:?} is no address such as {DEFAULT_ADDRESS}")))
    }

    /// Refuses what contradicts itself.
    ///
    /// # Errors
    /// [`Error::Config`] names the setting, and what is allowed.
    pub fn check(&self) -> Result<()> {
        if self.is_remote() {
            let of_member = [
                ("member", self.member.is_some()),
                ("data_dir", self.data_dir.is_some()),
                ("listen", self.listen.is_some()),
                ("snapshot_log_bytes", self.snapshot_log_bytes.is_some()),
            ];
            if let Some((field, _)) = of_member.into_iter().find(|&(_, given)| given) {
                return Err(refused(
                    field,
                    "is a member's, and endpoints make this a remote handle; give one of them".into(),
                ));
            }
            return match self.endpoints.iter().find(|endpoint| !is_host_and_port(endpoint)) {
                Some(bad) => Err(refused(
                    "endpoints",
                    format!("{bad:?} is no host and port such as {DEFAULT_ADDRESS}"),
                )),
                None => Ok(()),
            };
        }
        let name = self.member_name();
        let word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if name.is_empty() || name.len() > 64 || !name.chars().all(word) {
            return Err(refused(
                "member",
                format!("{name:?} is no name: 1 to 64 letters, digits, `-`, `_` and `.`"),
            ));
        }
        if self.snapshot_log_bytes() < 1 << 20 {
            return Err(refused("snapshot_log_bytes", "at least 1048576 (1 MiB)".into()));
        }
        if self.directory().is_none() && self.listen.is_some() {
            return Err(refused(
                "listen",
                "a member in memory listens nowhere; give it a data_dir, or drop listen".into(),
            ));
        }
        self.address().map(|_| ())
    }
}

fn is_host_and_port(endpoint: &str) -> bool {
    let port = endpoint
        .rsplit_once(':')
        .filter(|(host, _)| !host.is_empty() && !host.contains('/'));
    port.is_some_and(|(_, port)| port.parse::<u16>().is_ok_and(|port| port > 0))
}

fn refused(field: &str, reason: String) -> Error {
    Error::Config {
        field: format!("registry.raft.{field}"),
        reason,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_contradicts_itself_is_refused() {
        let member = RaftConfig::default();
        member.check().unwrap();
        RaftConfig::in_memory().check().unwrap();
        RaftConfig::remote(["db-1:7480".into(), "[::1]:7480".into()])
            .check()
            .unwrap();
        let refused = [
            RaftConfig {
                member: Some("a b".into()),
                ..member.clone()
            },
            RaftConfig {
                listen: Some("localhost".into()),
                ..member.clone()
            },
            RaftConfig {
                snapshot_log_bytes: Some(5),
                ..member.clone()
            },
            RaftConfig {
                listen: Some("127.0.0.1:0".into()),
                ..RaftConfig::in_memory()
            },
            RaftConfig {
                member: Some("a".into()),
                ..RaftConfig::remote(["h:1".into()])
            },
            RaftConfig::remote(["h".into()]),
            RaftConfig::remote(["http://h:1".into()]),
        ];
        for config in refused {
            assert!(
                matches!(config.check(), Err(Error::Config { .. })),
                "{config:?} was taken"
            );
        }
    }
}
