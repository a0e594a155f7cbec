//! Two members that do not hold the same, as a fault of memory or of this program would leave them.

use openraft::LogIdOptionExt;
use registry_api::{Key, Options};

use super::*;
use crate::command::{Change, Command, txn_to_proto};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_that_differ_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let config = |name: &str| RaftConfig {
        member: Some(name.into()),
        data_dir: Some(dir.path().join(name)),
        listen: Some("127.0.0.1:0".into()),
        ..RaftConfig::default()
    };
    let first = Member::start(&config("a")).await.unwrap();
    let address = first.address().unwrap().to_string();
    let joining = RaftConfig {
        join: vec![address.clone()],
        ..config("b")
    };
    let second = Member::start(&joining).await.unwrap();
    let registry = first.connect(&Options::default()).await.unwrap();
    registry.put(&Key::parse("/a").unwrap(), "1").await.unwrap();
    let verify = || async {
        let remote = RaftConfig::remote([address.clone()]);
        crate::verify(&remote, &Options::default()).await.unwrap()
    };
    let same = verify().await;
    assert!(same.is_complete() && same.is_equal(), "{same:?}");

    // The learner's copy alone is changed: by what no entry of the log says.
    let txn = registry_api::Txn::new().put(&Key::parse("/a").unwrap(), "2");
    let change = Change::Txn(txn_to_proto(&Options::default().namespace, &txn));
    let at = second.core.store.read(|inner| inner.applied).unwrap();
    second.core.store.apply(|applier| {
        applier.command(at, Command::new(change));
    });
    let differ = verify().await;
    assert!(differ.is_complete() && !differ.is_equal(), "{differ:?}");
    let names: Vec<_> = differ.members.iter().map(|member| member.name.as_str()).collect();
    assert_eq!(names, ["a", "b"]);
    assert!(Some(at).index() < Some(differ.index));

    registry.close().await.unwrap();
    second.stop().await.unwrap();
    first.stop().await.unwrap();
}
