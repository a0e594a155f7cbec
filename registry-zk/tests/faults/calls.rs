//! Calls that the program keeps and does not poll, and runtimes that nobody drives.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::Poll;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use registry_api::{List, Prefix, Registry};

use super::*;

type Call<'r> = BoxFuture<'r, ()>;

/// One of each kind of call.
fn calls(registry: &dyn Registry) -> Vec<Call<'_>> {
    fn call<'r, T: 'r>(call: impl Future<Output = T> + Send + 'r) -> Call<'r> {
        call.map(drop).boxed()
    }
    vec![
        call(async { registry.get(&key("/a"), Read::Linearizable).await }),
        call(async { registry.get(&key("/a"), Read::Stale).await }),
        call(async { registry.list(List::new(Prefix::root())).await }),
        call(async { registry.children(&Prefix::root(), Read::Linearizable).await }),
        call(async { registry.count(&Prefix::root(), Read::Linearizable).await }),
        call(async {
            registry
                .commit(registry_api::Txn::new().put(&key("/new/key"), ""))
                .await
        }),
        call(async { registry.delete_prefix(&Prefix::parse("/new").unwrap()).await }),
        call(async {
            let after = registry_api::WatchFrom::After(registry_api::Revision(1));
            let mut request = WatchRequest::new(key("/a"), WatchScope::Key);
            request.from = after;
            registry.watch(request).await
        }),
        call(async { registry.health().await }),
    ]
}

async fn poll_once(call: &mut Call<'_>) {
    poll_fn(|cx| {
        // Its result is of no interest: it is kept whether it is ready or not.
        let _ = Pin::new(&mut *call).poll(cx);
        Poll::Ready(())
    })
    .await;
}

/// `close` ends the session, and its ephemeral keys go, whatever the program does with its calls.
#[tokio::test(flavor = "multi_thread")]
async fn close_ends_the_session_while_the_program_keeps_calls() {
    let servers = Servers::start(1).await;
    let other = connect(&servers.addresses()).await;
    // Each kind of call on its own, so that each of them is seen to let go.
    let kinds = calls(&*other).len();
    for kind in 0..kinds {
        let registry = connect(&servers.addresses()).await;
        registry.put_ephemeral(&key("/alive"), "").await.unwrap();
        let mut call = calls(&*registry).swap_remove(kind);
        poll_once(&mut call).await;
        registry
            .close()
            .await
            .unwrap_or_else(|error| panic!("call {kind}: {error}"));
        assert!(other.get(&key("/alive"), Read::Linearizable).await.unwrap().is_none());
        drop(call);
    }
    other.close().await.unwrap();
}

/// The same for a session that the clock gives up: its keys go when the servers can be reached again, and not when the
/// program polls its call.
#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_was_given_up_ends_while_the_program_keeps_calls() {
    let servers = Servers::start(1).await;
    let wire = wire_to(&servers, 0).await;
    let registry = connect(&wire.address().to_string()).await;
    let session = session_of(&registry);
    let mut states = registry.session().states();
    let mut kept = calls(&*registry);
    for call in &mut kept {
        poll_once(call).await;
    }
    wire.cut();
    registry.session().ended(session).await;
    wire.mend();
    let renewed = states.wait_for(|state| matches!(state, SessionState::Connected(id) if *id != session));
    within(PATIENCE, renewed).await.unwrap();
    let sign = format!("/registry~/session/{session}");
    let raw = servers.raw().await;
    until("the first session is over", harness::TTL, async || {
        raw.check_stat(&sign).await.unwrap().is_none()
    })
    .await;
    drop(kept);
    registry.close().await.unwrap();
}

/// Nothing that the handle does in the background is on the program's runtime.
#[test]
fn close_ends_the_session_while_nobody_drives_the_runtime_of_its_calls() {
    let (first, second) = (one_thread(), one_thread());
    let servers = first.block_on(Servers::start(1));
    let (registry, watch) = second.block_on(async {
        let registry = connect(&servers.addresses()).await;
        registry.put_ephemeral(&key("/alive"), "").await.unwrap();
        let (watch, _) = Picture::of(&*registry).await.unwrap();
        (registry, watch)
    });
    first.block_on(async {
        registry.close().await.unwrap();
        let other = connect(&servers.addresses()).await;
        assert!(other.get(&key("/alive"), Read::Linearizable).await.unwrap().is_none());
        other.close().await.unwrap();
    });
    drop((watch, second));
}

fn one_thread() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}
