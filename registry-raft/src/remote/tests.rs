//! Where a handle goes for a hint, and where not.

use super::*;
use crate::{Member, RaftConfig};

/// How long one call may take. A member that is asked answers long before, on a loaded machine too.
const PATIENCE: Duration = Duration::from_secs(10);

async fn asked(remote: &Remote) -> Result<Answer> {
    remote.call(Call::Status(proto::StatusRequest {}), PATIENCE).await
}

fn hint(address: &str) -> proto::Response {
    let leader = address.into();
    proto::Response { leader, answer: None }
}

/// A member that hangs may still be the leader that the others name: who waited for it once does not go back for that.
#[tokio::test]
async fn a_hint_to_one_that_does_not_answer_is_not_followed() {
    let dir = tempfile::tempdir().unwrap();
    let start = async |name: &str| {
        let config = RaftConfig {
            data_dir: Some(dir.path().join(name)),
            listen: Some("127.0.0.1:0".into()),
            ..RaftConfig::default()
        };
        Member::start(&config).await.unwrap()
    };
    let (one, other) = (start("one").await, start("other").await);
    // Connections to it are made by the system, and nobody reads from them.
    let mute = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = |member: &Member| member.address().unwrap().to_string();
    let addresses = vec![mute.local_addr().unwrap().to_string(), address(&one), address(&other)];
    let (mute, one_at, other_at) = (&addresses[0], &addresses[1], &addresses[2]);
    let transport = Transport::new(&RaftConfig::remote(addresses.clone())).unwrap();
    let remote = Remote::new(transport, addresses.clone());

    let silence = asked(&remote).await;
    assert!(matches!(silence, Err(Error::OutcomeUnknown { .. })), "{silence:?}");
    asked(&remote).await.unwrap();
    assert_eq!(remote.endpoint(), *one_at);
    remote.led(hint(mute));
    assert_eq!(remote.endpoint(), *one_at, "it goes back to who does not answer");
    // Nor anywhere that the handle was not told of.
    remote.led(hint("127.0.0.1:9"));
    remote.led(hint(""));
    assert_eq!(remote.endpoint(), *one_at);

    remote.led(hint(other_at));
    asked(&remote).await.unwrap();
    assert_eq!(remote.endpoint(), *other_at);
    for member in [one, other] {
        member.stop().await.unwrap();
    }
}
