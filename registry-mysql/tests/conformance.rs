//! The conformance suite on MariaDB.

#![allow(clippy::unwrap_used)]

mod harness;

use harness::suite::{Own, Shared};

mod conformance {
    use super::*;
    registry_tests::properties!(tests_of, Shared<false>);
}

mod faults {
    use super::*;
    registry_tests::properties!(faults tests_of, Own);
}

registry_tests::torture!(Own);
