//! A member that is alone reads without asking anybody: not before it may, and not when it has company or has stopped.

use registry_api::{Key, Read};
use registry_tests::cluster::{eventually, within};
use tempfile::TempDir;

use super::*;

const PATIENCE: Duration = Duration::from_secs(40);

fn config(dir: &TempDir, name: &str, join: Vec<String>) -> RaftConfig {
    RaftConfig {
        member: Some(name.into()),
        data_dir: Some(dir.path().join(name)),
        listen: Some("127.0.0.1:0".into()),
        join,
        ..RaftConfig::default()
    }
}

async fn value(registry: &Arc<dyn Registry>) -> Result<bytes::Bytes> {
    let entry = within(PATIENCE, registry.get(&Key::parse("/a").unwrap(), Read::Linearizable)).await?;
    Ok(entry.unwrap().value)
}

async fn put(registry: &Arc<dyn Registry>, value: &'static str) {
    registry.put(&Key::parse("/a").unwrap(), value).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_has_stopped_answers_nothing_from_what_it_knew() {
    let dir = tempfile::tempdir().unwrap();
    let first = Member::start(&config(&dir, "a", Vec::new())).await.unwrap();
    let before = first.connect(&Options::default()).await.unwrap();
    put(&before, "1").await;
    assert_eq!(value(&before).await.unwrap(), "1");
    assert!(first.core.leads_alone().is_some());
    let core = first.core.clone();
    first.stop().await.unwrap();
    let second = Member::start(&config(&dir, "a", Vec::new())).await.unwrap();
    let after = second.connect(&Options::default()).await.unwrap();
    assert_eq!(
        value(&after).await.unwrap(),
        "1",
        "not all that was acknowledged before"
    );
    put(&after, "2").await;
    let old = value(&before).await;
    assert!(old.is_err(), "{old:?}");
    assert!(core.leads_alone().is_none());
    second.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_with_company_asks_it() {
    let dir = tempfile::tempdir().unwrap();
    let first = Member::start(&config(&dir, "a", Vec::new())).await.unwrap();
    let registry = first.connect(&Options::default()).await.unwrap();
    put(&registry, "1").await;
    assert!(first.core.leads_alone().is_some());
    let address = first.address().unwrap().to_string();
    let second = Member::start(&config(&dir, "b", vec![address])).await.unwrap();
    // A learner acknowledges nothing, and is never alone.
    assert_eq!(value(&registry).await.unwrap(), "1");
    assert!(first.core.leads_alone().is_some() && second.core.leads_alone().is_none());
    let at_second = second.connect(&Options::default()).await.unwrap();
    assert_eq!(value(&at_second).await.unwrap(), "1");
    let name = || "b".to_owned();
    first
        .change_members(MemberChange::Promote { name: name() })
        .await
        .unwrap();
    assert_eq!(value(&registry).await.unwrap(), "1");
    assert!(first.core.leads_alone().is_none() && second.core.leads_alone().is_none());
    first
        .change_members(MemberChange::Transfer { name: name() })
        .await
        .unwrap();
    put(&at_second, "2").await;
    assert_eq!(value(&registry).await.unwrap(), "2");
    // The one that leads is alone again once the other is out; who is out never is.
    first
        .change_members(MemberChange::Remove { name: "a".into() })
        .await
        .unwrap();
    eventually(PATIENCE, || async {
        value(&at_second).await.is_ok() && second.core.leads_alone().is_some()
    })
    .await;
    assert!(first.core.leads_alone().is_none());
    put(&at_second, "3").await;
    let old = value(&registry).await;
    assert!(!matches!(&old, Ok(value) if value != "3"), "{old:?}");
    drop(first);
    second.stop().await.unwrap();
}
