//! The conformance suite on an ensemble of three ZooKeeper servers.

#![allow(clippy::unwrap_used)]

mod harness;

use harness::suite::{Own, Shared};

mod conformance {
    use super::*;
    registry_tests::properties!(tests_of, Shared<3>);
}

mod faults {
    use super::*;
    registry_tests::properties!(faults tests_of, Own<3>);
}

registry_tests::torture!(Own<3>);
