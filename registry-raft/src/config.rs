//! Settings of the Raft backend.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use registry_api::{Error, Result};
use serde::Deserialize;

/// Where a member listens, and where a handle looks for one, when nothing is said.
pub const DEFAULT_ADDRESS: &str = "127.0.0.1:7480";
/// A host name has 253 bytes at the most (RFC 1035), and a port 5.
const LONGEST_ADDRESS: usize = 260;
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
    /// The members that found the group together, each name with its `host:port`, the same on each of them. It founds
    /// only: the group keeps its membership itself from then on, and a later difference is a warning.
    pub cluster: BTreeMap<String, String>,
    /// Members of a running group that this one is to join, `host:port`. It becomes a learner, which has no vote until
    /// it is promoted.
    pub join: Vec<String>,
    /// Where the other members reach this one, if not at `listen`.
    pub advertise: Option<String>,
    /// How soon the silence of the Raft leader is noticed, `default` if not given.
    pub timers: Timers,
    /// Whether the Raft leader answers linearizable reads without asking the others, as long as a majority heard it within
    /// 0.8 times the longest that its silence is waited for. They are linearizable then as far as its clock runs as fast as
    /// theirs, and does not stand still while theirs go on, as that of a virtual machine does which is suspended. Off if
    /// not given: each read asks a majority. The same on all members.
    pub lease_reads: bool,
    /// Members to reach from elsewhere, `host:port`, in the order they are tried.
    pub endpoints: Vec<String>,
    /// How many bytes of log make a member take a snapshot and drop what it covers: 1 MiB or more, 64 MiB if not given.
    pub snapshot_log_bytes: Option<u64>,
    /// How both sides of every connection prove who they are; without it nothing is encrypted and anybody is believed.
    pub tls: Option<Tls>,
    /// The address on which `registry serve` also speaks HTTP: health, metrics and keys. None if not given.
    pub http: Option<String>,
    /// A file with the word that every request has to carry: the same one for all members and handles. Needs `tls`, since
    /// whoever listens would hear it.
    pub token_file: Option<PathBuf>,
}

/// The `[registry.raft.tls]` table, the same for members and handles. Files are PEM, and read at the start.
///
/// It is mutual: a member takes connections only from those who present a certificate that `ca` signed, and believes
/// only members who do.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tls {
    /// The certificates of the authorities that may have signed the certificates of the others.
    pub ca: PathBuf,
    /// The file with this side's certificate, and those between it and the authority.
    pub cert: PathBuf,
    /// The file with its private key.
    pub key: PathBuf,
}

/// How soon the silence of the Raft leader is noticed. The same on all members.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
#[non_exhaustive]
pub enum Timers {
    /// Another leads within about a second: for any local network, and disks that are shared.
    #[default]
    Default,
    /// In about half of that: for a quiet network and disks that sync within milliseconds.
    Fast,
}

impl TryFrom<String> for Timers {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match text.as_str() {
            "default" => Ok(Self::Default),
            "fast" => Ok(Self::Fast),
            _ => Err(format!("{text:?} is neither `default` nor `fast`")),
        }
    }
}

impl Timers {
    /// The pause between heartbeats, and the bounds of the wait for one, in milliseconds.
    pub(crate) fn millis(self) -> (u64, u64, u64) {
        match self {
            Self::Default => (100, 300, 600),
            Self::Fast => (50, 150, 300),
        }
    }

    /// The shortest time, in milliseconds, for which any setting has a member wait for a silent leader, and the longest.
    /// Members may differ while the setting is changed on one after the other.
    pub(crate) fn shortest_silence() -> u64 {
        Self::Fast.millis().2
    }

    pub(crate) fn longest_silence() -> u64 {
        Self::Default.millis().2
    }
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

    /// A remote handle on the members that these settings name: on this one first, then on those it founds with.
    pub fn to_remote(&self) -> Self {
        if self.is_remote() {
            return self.clone();
        }
        let own = self.advertise.as_deref().or(self.listed()).or(self.listen.as_deref());
        let own = own.unwrap_or(DEFAULT_ADDRESS);
        let others = self
            .cluster
            .values()
            .chain(&self.join)
            .filter(|address| *address != own);
        Self {
            tls: self.tls.clone(),
            token_file: self.token_file.clone(),
            ..Self::remote(std::iter::once(own.to_owned()).chain(others.cloned()))
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

    /// Its own entry of the founding list.
    fn listed(&self) -> Option<&str> {
        self.cluster.get(self.member_name()).map(String::as_str)
    }

    /// The address to listen on: if not given, its own of the founding list.
    pub(crate) fn address(&self) -> Result<SocketAddr> {
        let listen = self.listen.as_deref().or(self.listed()).unwrap_or(DEFAULT_ADDRESS);
        let wrong = || match &self.listen {
            Some(listen) => format!("{listen:?} is no address such as {DEFAULT_ADDRESS}"),
            None => format!("give the address to listen on: the list has {listen:?}, a name"),
        };
        listen.parse().map_err(|_| refused("listen", wrong()))
    }

    /// The address to speak HTTP on.
    pub(crate) fn http_address(&self) -> Result<Option<SocketAddr>> {
        let parse = |text: &String| {
            let wrong = |_| refused("http", format!("{text:?} is no address such as 127.0.0.1:7490"));
            text.parse().map_err(wrong)
        };
        self.http.as_ref().map(parse).transpose()
    }

    /// Where the others reach this member, which listens at `bound`.
    pub(crate) fn advertised(&self, bound: SocketAddr) -> String {
        let given = self.advertise.as_deref().or(self.listed());
        given.map_or_else(|| bound.to_string(), str::to_owned)
    }

    /// Refuses what contradicts itself.
    ///
    /// # Errors
    /// [`Error::Config`] names the setting, and what is allowed.
    pub fn check(&self) -> Result<()> {
        if self.token_file.is_some() && self.tls.is_none() {
            return Err(refused(
                "token_file",
                "without registry.raft.tls whoever listens would hear the token; set both".into(),
            ));
        }
        if self.is_remote() {
            let of_member = [
                ("member", self.member.is_some()),
                ("data_dir", self.data_dir.is_some()),
                ("listen", self.listen.is_some()),
                ("http", self.http.is_some()),
                ("snapshot_log_bytes", self.snapshot_log_bytes.is_some()),
                ("cluster", !self.cluster.is_empty()),
                ("join", !self.join.is_empty()),
                ("advertise", self.advertise.is_some()),
                ("timers", self.timers != Timers::Default),
                ("lease_reads", self.lease_reads),
            ];
            if let Some((field, _)) = of_member.into_iter().find(|&(_, given)| given) {
                return Err(refused(
                    field,
                    "is a member's, and endpoints make this a remote handle; give one of them".into(),
                ));
            }
            let mut endpoints = self.endpoints.iter();
            return endpoints.try_for_each(|endpoint| check_address("endpoints", endpoint));
        }
        check_name("member", self.member_name())?;
        self.check_group()?;
        if self.snapshot_log_bytes() < 1 << 20 {
            return Err(refused("snapshot_log_bytes", "at least 1048576 (1 MiB)".into()));
        }
        if self.directory().is_none() && self.listen.is_some() {
            return Err(refused(
                "listen",
                "a member in memory listens nowhere; give it a data_dir, or drop listen".into(),
            ));
        }
        if self.directory().is_none() && self.tls.is_some() {
            return Err(refused(
                "tls",
                "a member in memory listens nowhere; give it a data_dir, or drop tls".into(),
            ));
        }
        self.http_address()?;
        self.address().map(|_| ())
    }

    fn check_group(&self) -> Result<()> {
        let name = self.member_name();
        for (member, address) in &self.cluster {
            check_name("cluster", member)?;
            check_reachable("cluster", address)?;
        }
        for address in &self.join {
            check_address("join", address)?;
        }
        if let Some(address) = &self.advertise {
            check_reachable("advertise", address)?;
        }
        if self.directory().is_some()
            && self.advertise.as_deref().or(self.listed()).is_none()
            && let Some(listen) = self.listen.as_deref().filter(|listen| is_unspecified(listen))
        {
            let reason = format!(
                "the member listens on {listen:?}, all addresses of its host, which leads others to themselves; set it to \
                 the host:port by which they reach this one"
            );
            return Err(refused("advertise", reason));
        }
        if !self.cluster.is_empty() && self.listed().is_none() {
            let members: Vec<_> = self.cluster.keys().map(String::as_str).collect();
            let reason = format!("member {name:?} is not on the list, which has {}", members.join(", "));
            return Err(refused("cluster", reason));
        }
        if !self.cluster.is_empty() && !self.join.is_empty() {
            return Err(refused(
                "join",
                "a member founds a group or joins one; give cluster or join".into(),
            ));
        }
        if self.directory().is_none() && !(self.cluster.is_empty() && self.join.is_empty()) {
            return Err(refused(
                "data_dir",
                "a member in memory is alone, and reached by nobody".into(),
            ));
        }
        let advertised = self.advertise.as_deref().or(self.listed());
        if let (Some(advertised), Some(listed)) = (&self.advertise, self.listed())
            && advertised != listed
        {
            return Err(refused(
                "advertise",
                format!("the list has {listed:?} for member {name:?}; give one"),
            ));
        }
        let mut others = self
            .cluster
            .values()
            .chain(&self.join)
            .map(String::as_str)
            .chain(advertised);
        let here = others.clone().filter(|address| is_loopback(address)).count();
        match others.find(|address| here > 0 && !is_loopback(address)) {
            Some(elsewhere) => Err(refused(
                if self.cluster.is_empty() {
                    "advertise"
                } else {
                    "cluster"
                },
                format!("{elsewhere:?} is another host, from which a loopback address reaches nobody"),
            )),
            None => Ok(()),
        }
    }
}

pub(crate) fn check_name(field: &str, name: &str) -> Result<()> {
    let word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    match !name.is_empty() && name.len() <= 64 && name.chars().all(word) {
        true => Ok(()),
        false => Err(refused(
            field,
            format!("{name:?} is no name: 1 to 64 letters, digits, `-`, `_` and `.`"),
        )),
    }
}

pub(crate) fn check_address(field: &str, address: &str) -> Result<()> {
    match is_host_and_port(address) {
        true => Ok(()),
        false => Err(refused(
            field,
            format!("{address:?} is no host and port such as {DEFAULT_ADDRESS}"),
        )),
    }
}

/// Refuses what is no address by which a member is reached from elsewhere.
pub(crate) fn check_reachable(field: &str, address: &str) -> Result<()> {
    check_address(field, address)?;
    let reason = match address.len() {
        _ if is_unspecified(address) => {
            "stands for all addresses of a host, and leads others to themselves; give the host:port by which they reach it"
        }
        LONGEST_ADDRESS.. => "is longer than any host and port",
        _ => return Ok(()),
    };
    Err(refused(field, format!("{address:?} {reason}")))
}

fn is_unspecified(address: &str) -> bool {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    match host.parse::<std::net::IpAddr>() {
        Ok(std::net::IpAddr::V6(ip)) => ip.to_canonical().is_unspecified(),
        Ok(ip) => ip.is_unspecified(),
        Err(_) => false,
    }
}

fn is_loopback(address: &str) -> bool {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

fn is_host_and_port(endpoint: &str) -> bool {
    let Some((host, port)) = endpoint.rsplit_once(':') else {
        return false;
    };
    port.parse::<u16>().is_ok_and(|port| port > 0) && is_host(host)
}

/// Whether it can be the host of a URI, which an endpoint becomes part of.
fn is_host(host: &str) -> bool {
    match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
        None => {
            !host.is_empty()
                && host
                    .chars()
                    .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
        }
    }
}

pub(crate) fn refused(field: &str, reason: String) -> Error {
    Error::Config {
        field: format!("registry.raft.{field}"),
        reason,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_told_where_to_listen_listens_on_loopback_alone() {
        let member = RaftConfig::default();
        assert!(member.address().unwrap().ip().is_loopback());
        assert_eq!(member.http_address().unwrap(), None);
    }

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
            RaftConfig {
                http: Some("localhost:1".into()),
                ..member.clone()
            },
            RaftConfig {
                token_file: Some("token".into()),
                ..member.clone()
            },
            RaftConfig {
                tls: Some(Tls {
                    ca: "ca".into(),
                    cert: "cert".into(),
                    key: "key".into(),
                }),
                ..RaftConfig::in_memory()
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

    #[test]
    fn a_group_that_can_not_be_is_refused_naming_the_setting() {
        let list = |members: &[(&str, &str)]| -> RaftConfig {
            let owned = members.iter().map(|(name, at)| ((*name).into(), (*at).into()));
            RaftConfig {
                cluster: owned.collect(),
                ..RaftConfig::default()
            }
        };
        let join = |addresses: &[&str]| RaftConfig {
            join: addresses.iter().map(|at| (*at).to_owned()).collect(),
            ..RaftConfig::default()
        };
        let advertise = |address: &str, config: RaftConfig| RaftConfig {
            advertise: Some(address.into()),
            ..config
        };
        let listen = |address: &str, config: RaftConfig| RaftConfig {
            listen: Some(address.into()),
            ..config
        };
        for good in [
            list(&[("a", "127.0.0.1:1"), ("b", "localhost:2"), ("c", "[::1]:3")]),
            list(&[("a", "10.0.0.2:1"), ("b", "db-1:1")]),
            join(&["10.0.0.2:1", "db-1:1"]),
            advertise("db-2:1", join(&["db-1:1"])),
            listen("0.0.0.0:1", advertise("db-2:1", join(&["db-1:1"]))),
            listen("0.0.0.0:1", list(&[("a", "h1:1"), ("b", "h2:1")])),
        ] {
            good.check().unwrap();
        }
        let both = RaftConfig {
            join: vec!["h2:1".into()],
            ..list(&[("a", "h1:1")])
        };
        let in_memory = RaftConfig {
            data_dir: RaftConfig::in_memory().data_dir,
            ..list(&[("a", "h1:1"), ("b", "h2:1")])
        };
        let refused = [
            // A loopback address of a group on several hosts leads each of them to itself.
            ("cluster", list(&[("a", "10.0.0.1:1"), ("b", "127.0.0.1:1")])),
            ("cluster", list(&[("a", "localhost:1"), ("b", "db-2:1")])),
            // A name may be that of several addresses.
            ("listen", list(&[("a", "db-1:1"), ("b", "db-2:1")])),
            ("cluster", list(&[("a", "[::1]:1"), ("b", "[fe80::2]:1")])),
            ("advertise", advertise("127.0.0.1:1", join(&["10.0.0.1:1"]))),
            (
                "advertise",
                advertise("10.0.0.9:1", list(&[("a", "10.0.0.1:1"), ("b", "10.0.0.2:1")])),
            ),
            ("cluster", list(&[("b", "h2:1"), ("c", "h3:1")])),
            ("cluster", list(&[("a", "h1"), ("b", "h2:1")])),
            ("cluster", list(&[("a", "h1:1"), ("b/c", "h2:1")])),
            ("join", join(&["h1"])),
            // All addresses of a host lead each of the others to itself.
            ("cluster", list(&[("a", "0.0.0.0:1"), ("b", "h2:1")])),
            ("cluster", list(&[("a", "h1:1"), ("b", "[::]:1")])),
            ("advertise", advertise("0.0.0.0:1", join(&["h1:1"]))),
            ("advertise", advertise("[::ffff:0.0.0.0]:1", join(&["h1:1"]))),
            ("advertise", listen("0.0.0.0:1", join(&["h1:1"]))),
            ("advertise", listen("[::]:1", RaftConfig::default())),
            (
                "advertise",
                advertise(&format!("{}:1", "h".repeat(300)), join(&["h1:1"])),
            ),
            ("join", both),
            ("data_dir", in_memory),
        ];
        for (setting, config) in refused {
            match config.check() {
                Err(Error::Config { field, .. }) => assert_eq!(field, format!("registry.raft.{setting}"), "{config:?}"),
                other => panic!("{config:?}: {other:?}"),
            }
        }
    }
}
