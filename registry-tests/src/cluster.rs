//! What a backend offers to be tested.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use registry_api::{Error, Key, Options, Prefix, Refusal, Registry, Result, SessionId, SessionTtl};

use crate::net::Net;
use crate::proxy::Wire;
use crate::torture::Usage;

/// The shortest TTL that there is. A machine that is busy for half of it loses the session.
pub const TTL: Duration = Duration::from_secs(1);
/// A TTL that survives that, and is soon over all the same.
const STEADY: Duration = Duration::from_secs(3);
/// No property takes longer.
pub const LONGEST: Duration = Duration::from_secs(60);

/// A store to be tested: a real server, started for the test and gone with it.
#[async_trait]
pub trait Cluster: Sized + Send + Sync + 'static {
    /// Starts a store, or takes a namespace of its own on one that runs. Panics with the package to install when the
    /// server is missing.
    async fn start() -> Self;

    /// Settings for a handle: this cluster's namespace, and the shortest TTL that the store grants.
    fn options(&self) -> Options;

    /// Opens a handle.
    async fn connect_with(&self, options: Options) -> Result<Arc<dyn Registry>>;

    /// [`Cluster::options`] with a TTL that a busy machine keeps: for whatever is not to lose its session by chance.
    fn steady(&self) -> Options {
        let options = self.options();
        let session_ttl = match options.session_ttl.get() < STEADY {
            true => SessionTtl::new(STEADY).expect("it is in the range"),
            false => options.session_ttl,
        };
        Options { session_ttl, ..options }
    }

    /// Opens a handle with [`Cluster::steady`].
    async fn connect(&self) -> Result<Arc<dyn Registry>> {
        self.connect_with(self.steady()).await
    }

    /// Opens a handle all of whose connections pass a wire that can be cut.
    async fn connect_through(&self, options: Options) -> Result<(Arc<dyn Registry>, Wire)>;

    /// Kills the store without warning (SIGKILL).
    async fn kill(&self);

    /// Starts the store again, on the same data and address.
    async fn restart(&self);

    /// Stops the store's clock (SIGSTOP).
    async fn pause(&self);

    /// Lets a paused store go on.
    async fn resume(&self);

    /// Ends a session behind its handle's back, by whatever means an operator has.
    async fn revoke(&self, session: SessionId);
}

/// A store whose processes can be broken one by one.
#[async_trait]
pub trait Members: Cluster {
    /// How many processes store.
    fn members(&self) -> usize;

    /// Kills one without warning (SIGKILL).
    async fn kill_member(&self, member: usize);

    /// Starts one again that was killed, on the same data and address; it need not find the others.
    async fn restart_member(&self, member: usize);

    /// Stops the clock of one (SIGSTOP).
    async fn pause_member(&self, member: usize);

    /// Lets one go on.
    async fn resume_member(&self, member: usize);

    /// Has the store forget what it need not keep: of its log, of the history that watches resume from. Says whether
    /// there is a way.
    async fn trim(&self) -> bool;

    /// Sets the wall clock of one so many seconds ahead of the machine's. Says whether there is a way.
    async fn set_clock(&self, _: usize, _: i64) -> bool {
        false
    }

    /// Has one more process join, store and vote, and leave again, whatever breaks meanwhile. Says whether there is a way.
    async fn have_a_guest(&self) -> bool {
        false
    }

    /// The network between them, if it can be broken.
    fn net(&self) -> Option<&Net> {
        None
    }

    /// What the processes use, if that is of interest.
    async fn usage(&self) -> Option<Usage> {
        None
    }
}

/// A key that is one.
pub fn key(path: &str) -> Key {
    Key::parse(path).unwrap_or_else(|error| panic!("{error}"))
}

/// A prefix that is one.
pub fn prefix(path: &str) -> Prefix {
    Prefix::parse(path).unwrap_or_else(|error| panic!("{error}"))
}

/// Why a put was refused by name; a panic if it was not.
#[track_caller]
pub fn refusal<T: fmt::Debug>(put: Result<T>) -> Refusal {
    match put {
        Err(Error::Refused { refusal, .. }) => refusal,
        other => panic!("not refused by name: {other:?}"),
    }
}

/// What comes within the deadline; a panic if it does not.
#[track_caller]
pub fn within<F: Future>(deadline: Duration, future: F) -> impl Future<Output = F::Output> {
    let caller = std::panic::Location::caller();
    async move {
        match tokio::time::timeout(deadline, future).await {
            Ok(output) => output,
            Err(_) => panic!("not within {deadline:?}, at {caller}"),
        }
    }
}

/// Asks again until the answer is yes: for what stays true once it is.
#[track_caller]
pub fn eventually<F>(deadline: Duration, mut ask: impl FnMut() -> F) -> impl Future<Output = ()>
where
    F: Future<Output = bool>,
{
    let caller = std::panic::Location::caller();
    async move {
        let asking = async {
            while !ask().await {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        if tokio::time::timeout(deadline, asking).await.is_err() {
            panic!("not within {deadline:?}, at {caller}");
        }
    }
}

/// Puts until it succeeds, whatever comes between: the way to see that a handle works again.
#[track_caller]
pub fn put_at_last(registry: &dyn Registry, path: &str, value: &str) -> impl Future<Output = ()> {
    eventually(LONGEST, move || async move {
        registry.put(&key(path), value.to_owned()).await.is_ok()
    })
}
