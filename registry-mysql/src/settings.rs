//! Server and session settings that change what our SQL means, or what a commit is worth.
//!
//! A connection that the handle opened gets the session settings of [`SET`]. All connections are then checked against
//! [`check`]: those of an application's pool keep the application's settings, so a wrong one is refused by name there.

use std::collections::HashMap;

/// The least `max_allowed_packet`. A transaction of 900,000 bytes takes twice that as hexadecimal literals, and its names
/// and their ancestors take up to 3 MiB.
pub(crate) const LEAST_PACKET: u64 = 4 << 20;

/// No limit, as `sql_select_limit` writes it.
const UNLIMITED: &str = "18446744073709551615";

/// Session settings of a connection of our own. A statement whose client has gone waits for a lock no longer than ten seconds,
/// so that the connections of those that retry don't pile up. The comments are executed by MySQL alone (`/*!50708`, a range of versions
/// that MariaDB skips) and by MariaDB alone (`/*M!`).
pub(crate) const SET: &str = "\
    SET SESSION completion_type = 0, autocommit = 1, sql_mode = 'STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION', \
    sql_select_limit = 18446744073709551615, sql_safe_updates = 0, sql_big_selects = 1, unique_checks = 1, \
    foreign_key_checks = 1, max_sort_length = 8192, \
    innodb_lock_wait_timeout = LEAST(@@SESSION.innodb_lock_wait_timeout, 10), \
    lock_wait_timeout = LEAST(@@SESSION.lock_wait_timeout, 10) \
    /*!50708 , max_execution_time = 0 */ /*M! , max_statement_time = 0 */; \
    SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED, READ WRITE";

/// Reads the settings that are checked. `SHOW` passes over those that a server does not have, and needs no right.
pub(crate) fn show() -> String {
    let names: Vec<_> = RULES.iter().map(|rule| rule.variable).chain(OTHERS).collect();
    format!("SHOW VARIABLES WHERE Variable_name IN ('{}')", names.join("', '"))
}

/// Settings that are read for themselves, or beside the one that a rule is on.
const OTHERS: [&str; 4] = ["read_only", "innodb_read_only", "log_bin", "version"];

/// Tells whether a server takes no writes. It ends every request, so what the request read was read from a server that
/// was the primary at a later moment. `super_read_only` implies `read_only`; a reader of Aurora has only
/// `innodb_read_only`.
pub(crate) const READ_ONLY: &str = "SELECT @@global.read_only, @@global.innodb_read_only";

/// Whether a switch is on. Later versions of MariaDB have more values of `read_only` than two.
pub(crate) fn is_on(value: &[u8]) -> bool {
    !matches!(value, b"0" | b"OFF")
}

/// The settings of a connection.
pub(crate) type Settings = HashMap<String, String>;

/// A setting that can't be worked with.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Wrong {
    pub(crate) variable: &'static str,
    pub(crate) found: String,
    pub(crate) reason: &'static str,
}

struct Rule {
    variable: &'static str,
    is_right: fn(&str, &Settings) -> bool,
    reason: &'static str,
}

/// What a variable has to be, where a server has it.
const RULES: &[Rule] = &[
    Rule {
        variable: "sql_select_limit",
        is_right: |value, _| value == UNLIMITED,
        reason: "reads would leave rows out without an error",
    },
    Rule {
        variable: "version",
        is_right: |value, _| !is_too_old(value),
        reason: "MySQL 8.0 or MariaDB 10.3 is the least: older versions have no window functions",
    },
    Rule {
        variable: "autocommit",
        is_right: |value, _| value == "ON",
        reason: "reads would stay in the past and keep-alives would not be committed: turn it on",
    },
    Rule {
        variable: "completion_type",
        is_right: |value, _| matches!(value, "NO_CHAIN" | "0"),
        reason: "a commit would begin another transaction or end the connection: NO_CHAIN is needed",
    },
    Rule {
        variable: "transaction_isolation",
        is_right: is_isolated,
        reason: "reads would see what is not committed",
    },
    Rule {
        variable: "tx_isolation",
        is_right: is_isolated,
        reason: "reads would see what is not committed",
    },
    Rule {
        variable: "transaction_read_only",
        is_right: |value, _| value == "OFF",
        reason: "nothing could be written: turn it off",
    },
    Rule {
        variable: "tx_read_only",
        is_right: |value, _| value == "OFF",
        reason: "nothing could be written: turn it off",
    },
    Rule {
        variable: "sql_mode",
        is_right: |value, _| {
            let changes = [
                "EMPTY_STRING_IS_NULL",
                "HIGH_NOT_PRECEDENCE",
                "SIMULTANEOUS_ASSIGNMENT",
                "ORACLE",
            ];
            !value.split(',').any(|mode| changes.contains(&mode))
        },
        reason: "EMPTY_STRING_IS_NULL, HIGH_NOT_PRECEDENCE, SIMULTANEOUS_ASSIGNMENT and ORACLE read SQL in another way",
    },
    Rule {
        variable: "sql_big_selects",
        is_right: |value, _| value == "ON",
        reason: "large reads would be refused: turn it on, or raise max_join_size",
    },
    Rule {
        variable: "sql_safe_updates",
        is_right: |value, _| value == "OFF",
        reason: "deletes of ranges may be refused: turn it off",
    },
    Rule {
        variable: "unique_checks",
        is_right: |value, _| value == "ON",
        reason: "two handles could make a namespace twice: turn it on",
    },
    Rule {
        variable: "max_sort_length",
        is_right: |value, _| value.parse().is_ok_and(|bytes: u64| bytes >= 255),
        reason: "children would come out of order: at least 255 is needed",
    },
    Rule {
        variable: "character_set_results",
        is_right: |value, _| !(value.starts_with("utf16") || matches!(value, "ucs2" | "utf32")),
        reason: "numbers could not be read: one that contains ASCII is needed, such as utf8mb4",
    },
    Rule {
        variable: "max_allowed_packet",
        is_right: |value, _| value.parse().is_ok_and(|bytes: u64| bytes >= LEAST_PACKET),
        reason: "at least 4194304 bytes (4 MiB) are needed for the largest transactions",
    },
    Rule {
        variable: "binlog_format",
        is_right: |value, settings| value != "STATEMENT" || !has_binlog(settings),
        reason: "statement-based logs refuse READ COMMITTED: ROW is needed",
    },
    Rule {
        variable: "sql_log_bin",
        is_right: |value, settings| value == "ON" || !has_binlog(settings),
        reason: "replicas would not get what is written: turn it on",
    },
    Rule {
        variable: "innodb_flush_log_at_trx_commit",
        // 3 is MariaDB's: synced at the prepare and at the commit.
        is_right: |value, _| matches!(value, "1" | "3"),
        reason: "a crash would lose acknowledged writes: 1 is needed",
    },
    Rule {
        variable: "sync_binlog",
        is_right: |value, settings| value == "1" || !has_binlog(settings),
        reason: "with log_bin on, a crash would lose acknowledged writes: 1 is needed",
    },
    Rule {
        variable: "wsrep_on",
        is_right: |value, _| value == "OFF",
        reason: "Galera clusters are not supported: a lock of one member does not hold on the others",
    },
    Rule {
        variable: "group_replication_single_primary_mode",
        is_right: |value, _| value == "ON",
        reason: "a group with several primaries is not supported: a lock of one member does not hold on the others",
    },
];

fn is_isolated(value: &str, _: &Settings) -> bool {
    value != "READ-UNCOMMITTED"
}

fn has_binlog(settings: &Settings) -> bool {
    settings.get("log_bin").is_some_and(|value| value == "ON")
}

/// Checks the settings of a connection.
pub(crate) fn check(settings: &Settings) -> Result<(), Wrong> {
    for rule in RULES {
        let wrong = |found: &str| {
            Err(Wrong {
                variable: rule.variable,
                found: found.into(),
                reason: rule.reason,
            })
        };
        match settings.get(rule.variable) {
            Some(value) if !(rule.is_right)(value, settings) => return wrong(value),
            // Every server has it, and it bounds what SHOW answers too.
            None if rule.variable == "sql_select_limit" => return wrong("too low to read the settings"),
            _ => {}
        }
    }
    Ok(())
}

/// Whether the server takes no writes.
pub(crate) fn is_read_only(settings: &Settings) -> bool {
    let on = |variable: &str| settings.get(variable).is_some_and(|value| is_on(value.as_bytes()));
    on("read_only") || on("innodb_read_only")
}

/// The numbers of a version, and whether it is MariaDB's.
fn numbers(version: &str) -> ([u64; 3], bool) {
    // A replication hack of old: MariaDB 10 said that it was 5.5.5-10.x.
    let mut parts = version
        .trim_start_matches("5.5.5-")
        .split(|c: char| !c.is_ascii_digit())
        .map(|part| part.parse().unwrap_or(0));
    let numbers = [(); 3].map(|()| parts.next().unwrap_or(0));
    (numbers, version.contains("MariaDB"))
}

fn is_too_old(version: &str) -> bool {
    match numbers(version) {
        (numbers, true) => numbers < [10, 3, 0],
        (numbers, false) => numbers < [8, 0, 0],
    }
}

/// Faults of a version that a user of it should know of.
pub(crate) fn known_faults(version: &str) -> &'static [&'static str] {
    match numbers(version) {
        ([8, 0, 38] | [8, 4, 1] | [9, 0, 0], false) => {
            &["MySQL bug 115517: a server with more than 10,000 tables does not start again"]
        }
        _ => &[],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn right() -> Settings {
        [
            ("sql_select_limit", UNLIMITED),
            ("version", "10.11.19-MariaDB-0+deb12u1"),
            ("autocommit", "ON"),
            ("log_bin", "ON"),
            ("binlog_format", "MIXED"),
            ("innodb_flush_log_at_trx_commit", "1"),
            ("sync_binlog", "1"),
            ("max_allowed_packet", "16777216"),
            ("read_only", "OFF"),
        ]
        .map(|(variable, value)| (variable.into(), value.into()))
        .into()
    }

    #[test]
    fn a_wrong_setting_is_named() {
        assert_eq!(check(&right()), Ok(()));
        for (variable, value) in [
            ("sql_select_limit", "5"),
            ("version", "5.7.44"),
            ("version", "10.2.44-MariaDB"),
            ("autocommit", "OFF"),
            ("completion_type", "CHAIN"),
            ("transaction_isolation", "READ-UNCOMMITTED"),
            ("tx_isolation", "READ-UNCOMMITTED"),
            ("transaction_read_only", "ON"),
            ("tx_read_only", "ON"),
            ("sql_mode", "STRICT_TRANS_TABLES,EMPTY_STRING_IS_NULL"),
            ("sql_big_selects", "OFF"),
            ("sql_safe_updates", "ON"),
            ("unique_checks", "OFF"),
            ("max_sort_length", "64"),
            ("character_set_results", "utf16le"),
            ("max_allowed_packet", "4194303"),
            ("binlog_format", "STATEMENT"),
            ("sql_log_bin", "OFF"),
            ("innodb_flush_log_at_trx_commit", "2"),
            ("sync_binlog", "0"),
            ("wsrep_on", "ON"),
            ("group_replication_single_primary_mode", "OFF"),
        ] {
            let mut settings = right();
            settings.insert(variable.into(), value.into());
            let wrong = check(&settings).expect_err(variable);
            assert_eq!((wrong.variable, &*wrong.found), (variable, value));
        }
        // Without a binary log its settings mean nothing.
        let mut settings = right();
        for (variable, value) in [("log_bin", "OFF"), ("binlog_format", "STATEMENT"), ("sync_binlog", "0")] {
            settings.insert(variable.into(), value.into());
        }
        assert_eq!(check(&settings), Ok(()));
        settings.remove("sql_select_limit");
        assert!(check(&settings).is_err());
    }

    #[test]
    fn every_kind_of_a_read_only_server_is_seen() {
        assert!(!is_read_only(&right()));
        for (variable, value) in [
            ("read_only", "ON"),
            ("innodb_read_only", "ON"),
            ("read_only", "NO_LOCK"),
        ] {
            let mut settings = right();
            settings.insert(variable.into(), value.into());
            assert!(is_read_only(&settings), "{variable} = {value}");
        }
        assert!(is_on(b"1") && is_on(b"ON") && !is_on(b"0") && !is_on(b"OFF"));
    }

    #[test]
    fn versions_are_told_apart() {
        assert!(!is_too_old("8.0.11") && !is_too_old("9.7.4-2") && !is_too_old("5.5.5-10.3.1-MariaDB-log"));
        assert!(is_too_old("5.7.44-log") && is_too_old("5.5.5-10.2.9-MariaDB"));
        assert_eq!(known_faults("8.4.1").len(), 1);
        assert!(known_faults("8.4.2").is_empty() && known_faults("10.11.19-MariaDB").is_empty());
    }
}
