//! The conformance suite on the embedded store, through both links: a handle in the member's process, and one over gRPC.

// A test may fail.
#![allow(clippy::unwrap_used)]
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

    /// kvrocks issue 113: the second leadership of a process found what the first had left.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn leadership_is_lost_and_won_a_thousand_times() {
        let cluster = <Served as registry_tests::Cluster>::start().await;
        registry_tests::election::lost_and_won(&cluster, 1000).await.unwrap();
    }
}
