//! The conformance suite on one ZooKeeper server.

#![allow(clippy::unwrap_used)]

mod harness;

use harness::suite::{Own, Shared};

mod conformance {
    use super::*;
    registry_tests::properties!(tests_of, Shared<1>);
}

mod faults {
    use super::*;
    registry_tests::properties!(faults tests_of, Own<1>);
}

registry_tests::torture!(Own<1>);
