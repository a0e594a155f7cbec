//! The conformance suite on the embedded store, through both links: a handle in the member's process, and one over gRPC.

#![cfg(feature = "raft")]

mod clusters;

use clusters::{InProcess, Served};

mod in_process {
    use super::*;
    registry_tests::conformance!(InProcess, local);
}

mod served {
    use super::*;
    registry_tests::conformance!(Served);
    registry_tests::torture!(Served);
}
