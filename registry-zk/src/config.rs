//! Settings.

use std::fmt;
use std::path::PathBuf;

use registry_api::{Error, Result};
use serde::Deserialize;

/// Settings of the ZooKeeper backend: the `[registry.zk]` table.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct ZkConfig {
    /// The servers, and where to begin below their root: `zk-1:2181,zk-2:2181/apps`.
    pub servers: Servers,
    /// Who is asking. What is stored is then open to this user alone; without it, to everybody.
    #[serde(default)]
    pub auth: Option<Digest>,
    /// How to speak TLS; without it nothing is encrypted.
    #[serde(default)]
    pub tls: Option<Tls>,
    /// What makes a linearizable read.
    #[serde(default)]
    pub read: ReadMode,
}

impl ZkConfig {
    /// Settings for these servers, without authentication and TLS.
    pub fn new(servers: Servers) -> Self {
        Self {
            servers,
            auth: None,
            tls: None,
            read: ReadMode::default(),
        }
    }
}

/// The addresses of the servers of one ensemble, `host:port` with commas between, and after the last one, if wanted, the
/// path that everything is stored below (a chroot), which is made where it is missing.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Servers {
    addresses: Vec<String>,
    chroot: Option<String>,
}

impl Servers {
    /// Takes a list of addresses as ZooKeeper's own clients do.
    ///
    /// # Errors
    /// [`Error::Config`] for what is no such list.
    pub fn new(servers: &str) -> Result<Self> {
        Self::parse(servers).map_err(|reason| config("registry.zk.servers", reason))
    }

    fn parse(servers: &str) -> Result<Self, String> {
        let (hosts, chroot) = match servers.find('/') {
            Some(at) => servers.split_at(at),
            None => (servers, "/"),
        };
        let chroot = match chroot {
            "/" => None,
            path => Some(
                registry_api::Key::parse(path)
                    .map_err(|e| format!("the path: {e}"))?
                    .to_string(),
            ),
        };
        let addresses = hosts
            .split(',')
            .map(str::trim)
            .enumerate()
            // An address that is refused may hold a password, so it is not repeated.
            .map(|(place, address)| check_address(address).map_err(|reason| format!("number {}: {reason}", place + 1)))
            .collect::<Result<_, String>>()?;
        Ok(Self { addresses, chroot })
    }

    pub(crate) fn addresses(&self) -> impl Iterator<Item = &str> {
        self.addresses.iter().map(String::as_str)
    }

    pub(crate) fn chroot(&self) -> Option<&str> {
        self.chroot.as_deref()
    }
}

fn check_address(address: &str) -> Result<String, &'static str> {
    let (host, port) = address.rsplit_once(':').ok_or("not an address such as zk-1:2181")?;
    if host.is_empty() || host.contains(|c: char| matches!(c, '@' | '/') || c.is_whitespace()) {
        return Err("the host is missing, or is none");
    }
    match port.parse::<u16>() {
        Ok(1..) => Ok(address.to_owned()),
        _ => Err("the port is not a number from 1 to 65535"),
    }
}

impl fmt::Display for Servers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.addresses.join(","), self.chroot().unwrap_or_default())
    }
}

impl TryFrom<String> for Servers {
    type Error = String;

    fn try_from(servers: String) -> Result<Self, String> {
        Self::parse(&servers)
    }
}

/// A user of ZooKeeper's digest authentication. `Debug` shows no password.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Digest {
    /// The user's name.
    pub user: String,
    /// The user's password.
    pub password: String,
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Digest")
            .field("user", &self.user)
            .finish_non_exhaustive()
    }
}

/// What makes a linearizable read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ReadMode {
    /// A `sync` before the read. Cheap, and exact as long as one leader is at work; a leader that was replaced and does not
    /// know it yet answers it too.
    #[default]
    Sync,
    /// A small write before the read. Exact always, at the price of a write.
    Write,
}

/// Whom to trust, and how to be trusted. Files are PEM, and read whenever a session is opened.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "TlsTable")]
pub struct Tls {
    /// The certificates of the authorities that may have signed the servers' certificates.
    pub ca: PathBuf,
    /// The client's own certificate and key, where the servers ask for them.
    pub client: Option<Identity>,
}

/// A certificate and its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The file with the certificate, and those between it and the authority.
    pub cert: PathBuf,
    /// The file with its private key.
    pub key: PathBuf,
}

/// The table as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TlsTable {
    ca: PathBuf,
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
}

impl TryFrom<TlsTable> for Tls {
    type Error = &'static str;

    fn try_from(table: TlsTable) -> Result<Self, &'static str> {
        let client = match (table.cert, table.key) {
            (Some(cert), Some(key)) => Some(Identity { cert, key }),
            (None, None) => None,
            (Some(_), None) => return Err("registry.zk.tls.cert needs registry.zk.tls.key"),
            (None, Some(_)) => return Err("registry.zk.tls.key needs registry.zk.tls.cert"),
        };
        Ok(Self { ca: table.ca, client })
    }
}

pub(crate) fn config(field: &str, reason: impl Into<String>) -> Error {
    Error::Config {
        field: field.into(),
        reason: reason.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_addresses_and_perhaps_a_path() {
        let servers = Servers::new("a:1,[::1]:2181/apps/x").expect("well formed");
        assert_eq!(servers.addresses().collect::<Vec<_>>(), ["a:1", "[::1]:2181"]);
        assert_eq!(servers.chroot(), Some("/apps/x"));
        assert_eq!(servers.to_string(), "a:1,[::1]:2181/apps/x");
        assert_eq!(Servers::new("a:1/").expect("the root").chroot(), None);
        for wrong in ["", "a", "a:0", "a:1,", ":1", "u:p@a:1", "a:1//x", "a:1/x/", "zk://a:1"] {
            assert!(Servers::new(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn debug_shows_no_password() {
        let digest = Digest {
            user: "me".into(),
            password: "secret".into(),
        };
        assert!(!format!("{digest:?}").contains("secret"));
    }
}
