//! From the client's errors to the registry's, by number and never by text (F2).

use std::sync::Arc;
use std::time::Duration;

use registry_api::{BoxError, Error, with_causes};
use sqlx::mysql::MySqlDatabaseError;

use crate::settings::Wrong;

/// The word in [`Error`] for this kind of store.
pub(crate) const BACKEND: &str = "mysql";

/// Why a request has no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Trouble {
    #[error("{endpoint}: {}", with_causes(.source))]
    Client { endpoint: String, source: sqlx::Error },
    #[error("no answer from {endpoint} in {waited:?}")]
    Silent { endpoint: String, waited: Duration },
    #[error("{0} is read-only: a replica, or a server that is being replaced")]
    ReadOnly(String),
    #[error("{} is {} at {endpoint}: {}", .wrong.variable, .wrong.found, .wrong.reason)]
    Setting { endpoint: String, wrong: Wrong },
    #[error(
        "{endpoint} offers no TLS, and the account's password can't be sent without it (caching_sha2_password and \
         sha256_password need an encrypted connection): turn TLS on at the server, and set registry.mysql.tls to verify \
         it; {}",
        with_causes(.source)
    )]
    NeedsTls { endpoint: String, source: sqlx::Error },
    #[error("the namespace is gone from the tables at {0}")]
    NoNamespace(String),
    #[error(transparent)]
    Repeated(Shared),
    #[error("the runtime of the handle has stopped")]
    Stopped,
}

/// What a trouble says of the request it befell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The connection was lost, could not be made, or leads to a server that takes no writes. Another may do better.
    Lost,
    /// Others were in the way: a deadlock, or a lock waited for too long. The server undid it; it may be tried again.
    Conflict,
    /// The server has no room.
    Unable,
    /// The server refused who is asking, or what they may do.
    Denied,
    /// A setting of the server's can't be worked with.
    Setting(&'static str),
    /// The password needs a connection with TLS.
    Tls,
    /// The tables are not what they should be.
    Schema,
    /// Anything else that the server says.
    Other,
}

impl Trouble {
    pub(crate) fn verdict(&self) -> Verdict {
        match self {
            Self::Client { source, .. } => verdict_of(source),
            Self::Repeated(shared) => shared.0.verdict(),
            Self::Silent { .. } | Self::Stopped => Verdict::Lost,
            // Another server is the primary now, or is about to be.
            Self::ReadOnly(_) => Verdict::Lost,
            Self::Setting { wrong, .. } => Verdict::Setting(wrong.variable),
            Self::NeedsTls { .. } => Verdict::Tls,
            Self::NoNamespace(_) => Verdict::Schema,
        }
    }

    /// What it is to the caller of a request that changed nothing.
    pub(crate) fn unchanged(self) -> Error {
        match self.verdict() {
            Verdict::Denied => Error::AccessDenied {
                backend: BACKEND,
                source: self.into(),
            },
            Verdict::Setting(variable) => Error::Config {
                field: format!("the server's {variable}"),
                reason: self.to_string(),
            },
            Verdict::Tls => Error::Config {
                field: "registry.mysql.tls".into(),
                reason: self.to_string(),
            },
            Verdict::Schema => Error::Storage {
                place: "the registry's tables".into(),
                reason: self.to_string(),
            },
            Verdict::Lost | Verdict::Conflict | Verdict::Unable | Verdict::Other => unavailable(self),
        }
    }
}

fn verdict_of(error: &sqlx::Error) -> Verdict {
    match error {
        sqlx::Error::Database(error) => error
            .try_downcast_ref::<MySqlDatabaseError>()
            .map_or(Verdict::Other, |error| verdict_of_number(error.number())),
        sqlx::Error::Io(_)
        | sqlx::Error::Tls(_)
        | sqlx::Error::Protocol(_)
        | sqlx::Error::PoolTimedOut
        | sqlx::Error::PoolClosed
        | sqlx::Error::WorkerCrashed => Verdict::Lost,
        sqlx::Error::Configuration(_) | sqlx::Error::InvalidArgument(_) => Verdict::Setting("configuration"),
        // Columns that are missing, or hold what they can't.
        sqlx::Error::RowNotFound
        | sqlx::Error::ColumnNotFound(_)
        | sqlx::Error::ColumnIndexOutOfBounds { .. }
        | sqlx::Error::ColumnDecode { .. }
        | sqlx::Error::Decode(_)
        | sqlx::Error::TypeNotFound { .. } => Verdict::Schema,
        _ => Verdict::Other,
    }
}

/// The numbers are those of MySQL 8 and MariaDB 10.11; where only one of them has one, it says so.
fn verdict_of_number(number: u16) -> Verdict {
    match number {
        // Record has changed since last read (MariaDB, innodb_snapshot_isolation); lock wait timeout; deadlock; rolled back
        // by group replication (MySQL).
        1020 | 1205 | 1213 | 3101 => Verdict::Conflict,
        // Too many connections, server shutdown, handshake errors, aborting, packets out of order, killed (1927: MariaDB,
        // 3169: MySQL, 1317: the query), a statement that took too long (1969: MariaDB, 3024: MySQL), starting up.
        1040
        | 1043
        | 1053
        | 1077
        | 1079
        | 1080
        | 1152
        | 1156..=1161
        | 1184
        | 1203
        | 1317
        | 1927
        | 1969
        | 3024
        | 3169 => Verdict::Lost,
        // MySQL closes a connection that was idle (4031), or because it stops (3168) or goes offline (3032); a member leaves
        // its replication group (3100).
        3032 | 3100 | 3168 | 4031 => Verdict::Lost,
        // The server is read-only (1290, 1792, 1836; 1874: MariaDB): another one is the primary, or will be.
        1290 | 1792 | 1836 | 1874 => Verdict::Lost,
        // Disk full, write error, error from the storage engine, no room in the table space, out of resources.
        1021 | 1026 | 1030 | 1114 | 1037 | 1041 | 1135 | 1180 => Verdict::Unable,
        // A user, a host, a password, a right, a database, a table or a column of it; a bound of the account; TLS asked for.
        1044 | 1045 | 1129 | 1130 | 1131 | 1132 | 1133 | 1141 | 1142 | 1143 | 1226 | 1227 | 1370 | 1410 | 1698
        | 1820 | 1862 | 3118 | 3159 | 4151 => Verdict::Denied,
        1104 => Verdict::Setting("max_join_size"),
        1153 => Verdict::Setting("max_allowed_packet"),
        1175 => Verdict::Setting("sql_safe_updates"),
        1665 => Verdict::Setting("binlog_format"),
        1049 => Verdict::Setting("database"),
        // No such table, column, database object; a table of another shape.
        1051 | 1054 | 1136 | 1146 | 1364 | 1366 | 1406 => Verdict::Schema,
        _ => Verdict::Other,
    }
}

pub(crate) fn unavailable(source: impl Into<BoxError>) -> Error {
    Error::Unavailable {
        backend: BACKEND,
        source: source.into(),
    }
}

pub(crate) fn unknown(source: impl Into<BoxError>) -> Error {
    Error::OutcomeUnknown {
        operation: "the transaction",
        source: source.into(),
    }
}

/// One cause of several errors.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Shared(pub(crate) Arc<Trouble>);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_say_what_is_true() {
        for (number, verdict) in [
            (1020, Verdict::Conflict),
            (1205, Verdict::Conflict),
            (1213, Verdict::Conflict),
            (1290, Verdict::Lost),
            (1792, Verdict::Lost),
            (1836, Verdict::Lost),
            (3032, Verdict::Lost),
            (3168, Verdict::Lost),
            (4031, Verdict::Lost),
            (1665, Verdict::Setting("binlog_format")),
            (1153, Verdict::Setting("max_allowed_packet")),
            (1114, Verdict::Unable),
            (1045, Verdict::Denied),
            (1146, Verdict::Schema),
            (1927, Verdict::Lost),
            (1064, Verdict::Other),
        ] {
            assert_eq!(verdict_of_number(number), verdict, "{number}");
        }
    }

    #[test]
    fn a_lost_connection_is_no_verdict_on_the_request() {
        let lost = Trouble::Client {
            endpoint: "db:3306".into(),
            source: std::io::Error::from(std::io::ErrorKind::ConnectionReset).into(),
        };
        assert_eq!(lost.verdict(), Verdict::Lost);
        assert!(lost.to_string().starts_with("db:3306: "), "{lost}");
    }
}
