//! The conformance suite on MariaDB with `innodb_snapshot_isolation`, as later versions have it: what was a wait there
//! may be an error.

#![allow(clippy::unwrap_used)]

mod harness;

use harness::suite::Shared;

mod conformance {
    use super::*;
    registry_tests::properties!(tests_of, Shared<true>);
}
