//! Settings.

use std::fmt;
use std::path::PathBuf;

use registry_api::{Error, Result};
use serde::Deserialize;
use tonic::codegen::http::Uri;

/// Settings of the etcd backend: the `[registry.etcd]` table.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "Table")]
#[non_exhaustive]
pub struct EtcdConfig {
    /// Members to try; at least one.
    pub endpoints: Endpoints,
    /// Who is asking, where etcd's authentication is on.
    pub credentials: Option<Credentials>,
    /// How to speak TLS; without it nothing is encrypted.
    pub tls: Option<Tls>,
}

impl EtcdConfig {
    /// Settings for these members, without authentication and TLS.
    pub fn new(endpoints: Endpoints) -> Self {
        Self {
            endpoints,
            credentials: None,
            tls: None,
        }
    }

    /// Checks what the parts can't say alone.
    ///
    /// # Errors
    /// [`Error::Config`] for an endpoint whose scheme contradicts `tls`.
    pub(crate) fn check(&self) -> Result<()> {
        for endpoint in self.endpoints.iter() {
            let wrong = match &self.tls {
                Some(_) if endpoint.starts_with("http://") => "registry.etcd.tls is set: it has to begin with https://",
                None if endpoint.starts_with("https://") => "https:// needs registry.etcd.tls with a ca",
                _ => continue,
            };
            return Err(config("registry.etcd.endpoints", format!("{endpoint}: {wrong}")));
        }
        Ok(())
    }
}

/// The addresses of members, such as `127.0.0.1:2379` or `https://etcd-1:2379`; at least one, in the order in which they
/// are tried.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Vec<String>")]
pub struct Endpoints(Vec<String>);

impl Endpoints {
    /// Takes a list of addresses.
    ///
    /// # Errors
    /// [`Error::Config`] for an empty list, and for what is no address of a host, with or without `http://` or
    /// `https://` before it.
    pub fn new<S: Into<String>>(endpoints: impl IntoIterator<Item = S>) -> Result<Self> {
        let endpoints: Vec<String> = endpoints.into_iter().map(Into::into).collect();
        if endpoints.is_empty() {
            return Err(config("registry.etcd.endpoints", "at least one is needed"));
        }
        for (place, endpoint) in endpoints.iter().enumerate() {
            // An address that is refused may hold a password, so it is not repeated.
            check_endpoint(endpoint)
                .map_err(|reason| config("registry.etcd.endpoints", format!("number {}: {reason}", place + 1)))?;
        }
        Ok(Self(endpoints))
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }
}

fn check_endpoint(endpoint: &str) -> Result<(), &'static str> {
    let uri: Uri = match endpoint.contains("://") {
        true => endpoint.parse(),
        false => format!("http://{endpoint}").parse(),
    }
    .map_err(|_| "not an address such as https://etcd-1:2379")?;
    if !matches!(uri.scheme_str(), Some("http" | "https")) {
        return Err("only http:// and https:// are known");
    }
    match uri.authority() {
        None => Err("the host is missing"),
        Some(host) if host.as_str().contains('@') => {
            Err("a user does not belong in an address: set registry.etcd.user and registry.etcd.password")
        }
        Some(host) if host.port().is_none() => Err("the port is missing"),
        Some(_) if uri.path_and_query().is_some_and(|path| path.as_str() != "/") => {
            Err("nothing may follow the port: what is stored below is registry.namespace")
        }
        Some(_) => Ok(()),
    }
}

impl TryFrom<Vec<String>> for Endpoints {
    type Error = String;

    fn try_from(endpoints: Vec<String>) -> Result<Self, String> {
        Self::new(endpoints).map_err(|e| e.to_string())
    }
}

/// A user of etcd's own authentication. `Debug` shows no password.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    /// The user's name.
    pub user: String,
    /// The user's password.
    pub password: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("user", &self.user)
            .finish_non_exhaustive()
    }
}

/// Whom to trust, and how to be trusted. Files are PEM, and read when a handle is opened.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "TlsTable")]
pub struct Tls {
    /// The certificates of the authorities that may have signed the members' certificates.
    pub ca: PathBuf,
    /// The client's own certificate and key, where etcd asks for them.
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
struct Table {
    endpoints: Endpoints,
    user: Option<String>,
    password: Option<String>,
    tls: Option<Tls>,
}

impl TryFrom<Table> for EtcdConfig {
    type Error = String;

    fn try_from(table: Table) -> Result<Self, String> {
        let credentials = match (table.user, table.password) {
            (Some(user), Some(password)) => Some(Credentials { user, password }),
            (None, None) => None,
            (Some(_), None) => return Err("registry.etcd.user needs registry.etcd.password".into()),
            (None, Some(_)) => return Err("registry.etcd.password needs registry.etcd.user".into()),
        };
        let config = Self {
            endpoints: table.endpoints,
            credentials,
            tls: table.tls,
        };
        config.check().map_err(|e| e.to_string())?;
        Ok(config)
    }
}

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
            (Some(_), None) => return Err("registry.etcd.tls.cert needs registry.etcd.tls.key"),
            (None, Some(_)) => return Err("registry.etcd.tls.key needs registry.etcd.tls.cert"),
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
    use serde_json::{from_value, json};

    use super::*;

    fn parse(table: serde_json::Value) -> Result<EtcdConfig, String> {
        from_value(table).map_err(|e| e.to_string())
    }

    #[test]
    fn a_whole_table_is_taken() {
        let config = parse(json!({
            "endpoints": ["https://etcd-1:2379", "etcd-2:2379"],
            "user": "app", "password": "secret",
            "tls": { "ca": "ca.pem", "cert": "app.pem", "key": "app.key" },
        }))
        .expect("every setting is right");
        let endpoints: Vec<_> = config.endpoints.iter().collect();
        assert_eq!(endpoints, ["https://etcd-1:2379", "etcd-2:2379"]);
        let credentials = config.credentials.map(|who| (who.user, who.password));
        assert_eq!(credentials, Some(("app".into(), "secret".into())));
        assert!(config.tls.is_some_and(|tls| tls.client.is_some()));
    }

    #[test]
    fn debug_shows_no_password() {
        let config = parse(json!({ "endpoints": ["e:1"], "user": "app", "password": "secret" })).expect("right");
        let shown = format!("{config:?}");
        assert!(shown.contains("app") && !shown.contains("secret"), "{shown}");
    }

    #[test]
    fn wrong_settings_are_refused_by_name() {
        for (table, named) in [
            (json!({}), "endpoints"),
            (json!({ "endpoints": [] }), "registry.etcd.endpoints"),
            (json!({ "endpoints": ["no port"] }), "number 1"),
            (json!({ "endpoints": ["a:1", "b"] }), "number 2"),
            (json!({ "endpoints": ["ftp://a:1"] }), "http"),
            (json!({ "endpoints": ["http://a:1/path"] }), "registry.namespace"),
            (json!({ "endpoints": ["a:1"], "usr": "x" }), "usr"),
            (json!({ "endpoints": ["a:1"], "user": "x" }), "registry.etcd.password"),
            (json!({ "endpoints": ["a:1"], "password": "x" }), "registry.etcd.user"),
            (json!({ "endpoints": ["a:1"], "tls": {} }), "ca"),
            (
                json!({ "endpoints": ["a:1"], "tls": { "ca": "c", "cert": "c" } }),
                "registry.etcd.tls.key",
            ),
            (
                json!({ "endpoints": ["a:1"], "tls": { "ca": "c", "key": "k" } }),
                "registry.etcd.tls.cert",
            ),
            (json!({ "endpoints": ["http://a:1"], "tls": { "ca": "c" } }), "https"),
            (json!({ "endpoints": ["https://a:1"] }), "registry.etcd.tls"),
        ] {
            let refused = parse(table.clone()).expect_err(&table.to_string());
            assert!(refused.contains(named), "{table}: {refused}");
        }
    }

    #[test]
    fn a_refusal_repeats_no_password() {
        let refused = parse(json!({ "endpoints": ["http://app:secret@a:1"] })).expect_err("a user in an address");
        assert!(
            !refused.contains("secret") && refused.contains("registry.etcd.user"),
            "{refused}"
        );
    }
}
