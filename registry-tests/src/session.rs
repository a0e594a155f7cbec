//! S: sessions.

use registry_api::{Error, Existing, Kind, Prefix, Read, Result, SessionState, Txn};

use crate::cluster::eventually;
use crate::{Cluster, key, within};

/// S1. The TTL that was granted is reported.
pub async fn the_granted_ttl_is_reported(cluster: &impl Cluster) -> Result<()> {
    let registry = cluster.connect().await?;
    assert_eq!(registry.session().ttl(), cluster.steady().session_ttl.get());
    let session = registry.session().live()?;
    let left = registry.session().valid_until(session).expect("it is valid").left();
    assert!(left < registry.session().ttl(), "sure of {left:?}");
    registry.close().await
}

/// S1. Keep-alives need no call: a handle that does nothing for longer than its TTL keeps its session and its keys.
pub async fn keep_alives_need_no_call(cluster: &impl Cluster) -> Result<()> {
    let (idle, other) = (cluster.connect().await?, cluster.connect().await?);
    idle.put_ephemeral(&key("/e"), "").await?;
    let session = idle.session().live()?;
    let first = idle.session().valid_until(session).expect("it is valid");
    let later = 2 * idle.session().ttl();
    // Validity that was moved on by two TTLs shows as many keep-alives answered.
    eventually(3 * later, || async {
        idle.session()
            .valid_until(session)
            .is_some_and(|until| until > first + later)
    })
    .await;
    assert_eq!(idle.session().state(), SessionState::Connected(session));
    assert_eq!(
        other
            .get(&key("/e"), Read::Linearizable)
            .await?
            .expect("it stays")
            .session,
        Some(session)
    );
    other.close().await?;
    idle.close().await
}

/// S2, S3. A handle that is dropped without `close` ends its session soon, and its keys with it.
pub async fn a_dropped_handle_ends_its_session(cluster: &impl Cluster) -> Result<()> {
    let (dropped, other) = (cluster.connect().await?, cluster.connect().await?);
    dropped.put_ephemeral(&key("/e"), "").await?;
    let bound = 2 * dropped.session().ttl() + std::time::Duration::from_secs(1);
    drop(dropped);
    let other = &other;
    eventually(bound, || async move {
        other
            .get(&key("/e"), Read::Linearizable)
            .await
            .is_ok_and(|entry| entry.is_none())
    })
    .await;
    other.close().await
}

/// S3. `close` ends the session: its keys are gone when it returns, and nobody else's.
pub async fn close_frees_the_keys_before_it_returns(cluster: &impl Cluster) -> Result<()> {
    let (one, other) = (cluster.connect().await?, cluster.connect().await?);
    for path in ["/e/1", "/e/2", "/f"] {
        one.put_ephemeral(&key(path), "").await?;
    }
    one.put(&key("/p"), "").await?;
    other.put_ephemeral(&key("/e/3"), "").await?;
    one.close().await?;
    let left = other.list_all(registry_api::List::new(Prefix::root())).await?;
    assert_eq!(
        left.iter().map(|entry| entry.key.as_str()).collect::<Vec<_>>(),
        ["/e/3", "/p"]
    );
    other.close().await
}

/// F7. A closed handle refuses calls by name; a second `close` does nothing.
pub async fn a_closed_handle_refuses_calls(cluster: &impl Cluster) -> Result<()> {
    let registry = cluster.connect().await?;
    registry.close().await?;
    registry.close().await?;
    let a = key("/a");
    assert!(matches!(registry.put(&a, "").await, Err(Error::Closed)));
    assert!(matches!(registry.put_ephemeral(&a, "").await, Err(Error::Closed)));
    assert!(matches!(registry.get(&a, Read::Stale).await, Err(Error::Closed)));
    assert!(matches!(
        registry.count(&Prefix::root(), Read::Stale).await,
        Err(Error::Closed)
    ));
    assert!(matches!(registry.lock(&a).acquire().await, Err(Error::Closed)));
    assert!(matches!(registry.health().await, Err(Error::Closed)));
    let watch = registry
        .watch(registry_api::WatchRequest::new(&a, registry_api::WatchScope::Key))
        .await;
    assert!(matches!(watch, Err(Error::Closed)), "{watch:?}");
    assert!(matches!(registry.session().state(), SessionState::Closed(_)));
    Ok(())
}

/// S1. Every handle has a session of its own.
pub async fn sessions_have_their_own_ids(cluster: &impl Cluster) -> Result<()> {
    let (one, other) = (cluster.connect().await?, cluster.connect().await?);
    assert_ne!(one.session().live()?, other.session().live()?);
    other.close().await?;
    one.close().await
}

/// S6. An old session's end never removes a key that a newer session has put since.
pub async fn an_old_sessions_end_leaves_a_newer_key(cluster: &impl Cluster) -> Result<()> {
    let (old, new) = (cluster.connect().await?, cluster.connect().await?);
    let e = key("/e");
    old.put_ephemeral(&e, "old").await?;
    new.commit(Txn::new().put_as(&e, "new", Kind::Ephemeral, Existing::TakeOver))
        .await?;
    within(2 * old.session().ttl(), old.close()).await?;
    let entry = new
        .get(&e, Read::Linearizable)
        .await?
        .expect("it is the newer session's");
    assert_eq!(
        (&entry.value[..], entry.session),
        (&b"new"[..], Some(new.session().live()?))
    );
    new.close().await
}
