//! What a member answers to handles, in its own process or over gRPC.

use std::time::Duration;

use futures_util::stream::BoxStream;
use futures_util::{StreamExt, stream};
use registry_api::{
    Error, Expect, Key, MAX_OPERATIONS, MAX_TXN, Namespace, Prefix, Revision, Watch, WatchFrom, WatchRequest,
    WatchScope,
};
use tokio::sync::watch;
use tonic::{Request, Response, Status, Streaming};

use crate::backup;
use crate::command::{Change, Command};
use crate::conversation;
use crate::founding::Door;
use crate::link::{BACKEND, Gone};
use crate::member::{Core, CutOff, unavailable};
use crate::proto;
use crate::proto::failure::Kind;
use crate::proto::registry_server::Registry;
use crate::proto::request::Call;
use crate::proto::response::Answer;

/// The longest a member works on one request, whatever the caller asks.
const MAX_PATIENCE: Duration = Duration::from_secs(60);
/// The longest page that is made.
pub(crate) const MAX_LIMIT: u64 = 10_000;

/// The gRPC service of a member.
#[derive(Clone, Debug)]
pub(crate) struct Service {
    pub(crate) door: Door,
    /// Whether the member stops.
    pub(crate) stopping: watch::Receiver<bool>,
}

impl Service {
    /// Requests that come before the member is ready are answered, so that a handle goes on to the next.
    fn core(&self) -> Result<&Core, Error> {
        self.door.core().ok_or_else(|| Error::Unavailable {
            backend: BACKEND,
            source: "the member is not ready yet".into(),
        })
    }

    /// The cluster that the member belongs to, once it is ready.
    pub(crate) fn cluster(&self) -> Option<[u8; 16]> {
        self.door.core().map(|core| core.identity().cluster)
    }

    pub(crate) async fn answer(&self, request: proto::Request) -> proto::Response {
        let patience = Duration::from_millis(request.patience_ms.into()).min(MAX_PATIENCE);
        let call = request
            .call
            .ok_or_else(|| Error::InvalidRequest("a request this version does not know".into()));
        let (answer, leader) = match (call.and_then(|call| check(&call).map(|()| call)), self.core()) {
            (Ok(call), Ok(core)) if request.forwarded => {
                let answer = match core.identity().check(request.header.as_ref()) {
                    Ok(_) => core.serve_here(call, patience).await,
                    Err(status) => Err(unavailable(status.message())),
                };
                (answer, String::new())
            }
            (Ok(call), Ok(core)) => (core.serve(call, patience).await, core.leader_elsewhere()),
            (Err(error), _) | (_, Err(error)) => (Err(error), String::new()),
        };
        let answer = Some(answer.unwrap_or_else(|error| Answer::Failure(said(&error))));
        proto::Response { leader, answer }
    }

    /// What is listed once a key is gone.
    pub(crate) async fn once_gone(&self, gone: proto::OnceGone) -> proto::Response {
        let listed = async {
            let patience = Duration::from_millis(gone.patience_ms.into()).min(MAX_PATIENCE);
            let core = self.core()?;
            let mut cut_off = core.cut_off();
            tokio::select! {
                listed = core.once_gone(wait(gone)?, patience) => listed,
                error = cut_off.wait() => Err(Error::OutcomeUnknown {
                    operation: "a wait",
                    source: error.into(),
                }),
            }
        };
        let answer = match listed.await {
            Ok(Some(page)) => Answer::Page(page),
            Ok(None) => Answer::Done(proto::Unit {}),
            Err(error) => Answer::Failure(said(&error)),
        };
        answer.into()
    }

    /// Begins a watch of keys of that namespace, and says what ends it early.
    pub(crate) async fn watch(&self, request: proto::WatchRequest) -> Result<(Namespace, Watch, CutOff), Error> {
        let (namespace, request) = watch_request(request)?;
        let core = self.core()?;
        let watch = core.watch(&namespace, request, MAX_PATIENCE).await?;
        Ok((namespace, watch, core.cut_off()))
    }
}

#[tonic::async_trait]
impl Registry for Service {
    type ConverseStream = BoxStream<'static, Result<proto::ToldTogether, Status>>;

    async fn converse(
        &self,
        asked: Request<Streaming<proto::AskedTogether>>,
    ) -> Result<Response<Self::ConverseStream>, Status> {
        let told = conversation::answer(self.clone(), asked.into_inner(), self.stopping.clone());
        Ok(Response::new(told.boxed()))
    }

    type BackupStream = BoxStream<'static, Result<proto::BackupPart, Status>>;

    async fn backup(&self, _: Request<proto::BackupRequest>) -> Result<Response<Self::BackupStream>, Status> {
        let parts = match self.core() {
            Ok(core) => core.backup().await,
            Err(error) => Err(error),
        };
        let parts = parts.unwrap_or_else(|error| stream::iter([Err(error)]).boxed());
        Ok(Response::new(parts.map(|part| Ok(backup::message(part))).boxed()))
    }
}

impl From<Answer> for proto::Response {
    fn from(answer: Answer) -> Self {
        Self {
            leader: String::new(),
            answer: Some(answer),
        }
    }
}

/// An error as a member says it.
pub(crate) fn said(error: &Error) -> proto::Failure {
    let text = why(error);
    let of = |kind: Kind| proto::Failure {
        kind: kind.into(),
        text,
        requested: 0,
        oldest: 0,
    };
    match error {
        Error::OutcomeUnknown { .. } => of(Kind::OutcomeUnknown),
        Error::SessionExpired { session } => proto::Failure {
            requested: session.0,
            ..of(Kind::SessionExpired)
        },
        Error::AccessDenied { .. } => of(Kind::Denied),
        Error::Compacted {
            requested: Revision(requested),
            oldest: Revision(oldest),
        } => proto::Failure {
            requested: *requested,
            oldest: *oldest,
            ..of(Kind::Compacted)
        },
        Error::InvalidRequest(_) | Error::Key(_) | Error::Namespace(_) | Error::TooLarge { .. } => of(Kind::Invalid),
        _ => of(Kind::Unavailable),
    }
}

/// The text of an error and of what is beneath it; what only repeats the kind is left out.
pub(crate) fn why(error: &Error) -> String {
    match error {
        Error::Unavailable { source, .. }
        | Error::OutcomeUnknown { source, .. }
        | Error::AccessDenied { source, .. } => source.to_string(),
        Error::InvalidRequest(reason) => reason.clone(),
        error => error.to_string(),
    }
}

/// Refuses what no handle of ours sends: a caller on the network may be anybody.
pub(crate) fn check(call: &Call) -> Result<(), Error> {
    match call {
        Call::Get(get) => qualified_key(&get.key),
        Call::Count(count) => qualified_prefix(&count.prefix).map(|_| ()),
        Call::Children(children) => qualified_prefix(&children.prefix).map(|_| ()),
        Call::List(list) => check_list(list),
        Call::Command(command) => check_command(command),
        Call::CommandThenList(both) => {
            check_command(both.command.as_ref().unwrap_or(&Command::default()))?;
            check_list(both.list.as_ref().unwrap_or(&proto::List::default()))
        }
        Call::Members(change) => check_members(change),
        Call::KeepAlive(_) | Call::Status(_) | Call::Digest(_) => Ok(()),
        // By whom is looked at where it is answered.
        Call::ReadIndex(_) | Call::Promise(_) => Ok(()),
    }
}

fn check_list(list: &proto::List) -> Result<(), Error> {
    qualified_prefix(&list.prefix)?;
    if !list.after.is_empty() {
        qualified_key(&list.after)?;
    }
    match (1..=MAX_LIMIT).contains(&list.limit) {
        true => Ok(()),
        false => Err(Error::InvalidRequest(format!(
            "a page of {} entries, 1 to {MAX_LIMIT} are made",
            list.limit
        ))),
    }
}

fn check_members(change: &proto::ChangeMembers) -> Result<(), Error> {
    use proto::change_members::Kind;
    let checked = crate::config::check_name("name", &change.name).and_then(|()| match change.kind() {
        Kind::Add => crate::config::check_reachable("address", &change.address),
        Kind::Promote | Kind::Remove | Kind::Transfer => Ok(()),
    });
    // It is no setting of this member's.
    checked.map_err(|error| match error {
        Error::Config { reason, .. } => Error::InvalidRequest(reason),
        error => error,
    })
}

fn check_command(command: &Command) -> Result<(), Error> {
    let invalid = |reason: &str| Err(Error::InvalidRequest(reason.into()));
    match &command.change {
        None => invalid("a change this version does not know"),
        Some(Change::Expire(_) | Change::Silences(_) | Change::Heard(_)) => {
            invalid("only a Raft leader says when a session expires")
        }
        Some(Change::Open(open)) if !(1_000..=3_600_000).contains(&open.ttl_ms) => invalid("a TTL is 1 s to 1 h"),
        Some(Change::Mark(_)) if command.session > 0 => invalid("a mark is of no session"),
        Some(Change::Open(_) | Change::Close(_) | Change::Mark(_)) => Ok(()),
        Some(Change::DeletePrefix(prefix)) => qualified_prefix(prefix).map(|_| ()),
        Some(Change::Txn(txn)) => check_txn(txn),
    }
}

/// The bounds of `Txn::check`, by rebuilding the transaction in the words of the api.
fn check_txn(txn: &proto::Txn) -> Result<(), Error> {
    use proto::operation::Write;
    if txn.conditions.len() > MAX_OPERATIONS || txn.operations.len() > MAX_OPERATIONS {
        return Err(Error::InvalidRequest(format!(
            "more than {MAX_OPERATIONS} conditions or operations"
        )));
    }
    let size: usize = txn.operations.iter().map(prost::Message::encoded_len).sum();
    if size > 2 * MAX_TXN {
        return Err(Error::TooLarge {
            what: "a transaction",
            size,
            limit: MAX_TXN,
        });
    }
    let mut checked = registry_api::Txn::new();
    for condition in &txn.conditions {
        let (_, key) = split(&condition.key)?;
        // What is demanded does not matter to the bounds; one that is not understood is refused by the state machine.
        checked = checked.when(&Key::from_store(key)?, Expect::Present);
    }
    for operation in &txn.operations {
        let (_, key) = split(&operation.key)?;
        let key = Key::from_store(key)?;
        checked = match &operation.write {
            Some(Write::Put(put)) if put.ephemeral => checked.put_ephemeral(&key, put.value.clone()),
            Some(Write::Put(put)) => checked.put(&key, put.value.clone()),
            Some(Write::Delete(_)) => checked.delete(&key),
            None => return Err(Error::InvalidRequest("an operation this version does not know".into())),
        };
    }
    checked.check()
}

pub(crate) fn watch_request(request: proto::WatchRequest) -> Result<(Namespace, WatchRequest), Error> {
    use proto::watch_request::{From, Scope};
    let (namespace, prefix) = qualified_prefix(&request.prefix)?;
    let scope = match request.scope() {
        Scope::Key => WatchScope::Key,
        Scope::Children => WatchScope::Children,
        Scope::Subtree => WatchScope::Subtree,
    };
    let from = match request.from {
        Some(From::After(revision)) => WatchFrom::After(Revision(revision)),
        Some(From::AfterOrReset(revision)) => WatchFrom::AfterOrReset(Revision(revision)),
        Some(From::Now(_)) | None => WatchFrom::Now,
    };
    Ok((namespace, WatchRequest { prefix, scope, from }))
}

pub(crate) fn wait(gone: proto::OnceGone) -> Result<Gone, Error> {
    let (namespace, key) = split(&gone.key)?;
    let list = gone.list.unwrap_or_default();
    check_list(&list)?;
    Ok(Gone {
        key: Key::from_store(key)?,
        namespace,
        created: Revision(gone.created),
        list,
    })
}

fn qualified_key(qualified: &str) -> Result<(), Error> {
    let (_, key) = split(qualified)?;
    Key::from_store(key)?;
    Ok(())
}

fn qualified_prefix(qualified: &str) -> Result<(Namespace, Prefix), Error> {
    let (namespace, prefix) = split(qualified)?;
    Ok((namespace, Prefix::from_store(prefix)?))
}

/// The namespace, and what is behind it: nothing, a user's key or a recipe's.
pub(crate) fn split(qualified: &str) -> Result<(Namespace, &str), Error> {
    let end = qualified
        .char_indices()
        .skip(1)
        .find(|&(_, c)| c == '/' || c == '~')
        .map_or(qualified.len(), |(at, _)| at);
    Ok((Namespace::parse(&qualified[..end])?, &qualified[end..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_qualified_name_is_taken_apart() {
        for (qualified, namespace, rest) in [
            ("/ns", "/ns", ""),
            ("/ns/a/b", "/ns", "/a/b"),
            ("/ns~/lock/1/a", "/ns", "~/lock/1/a"),
        ] {
            let (parsed, behind) = split(qualified).unwrap();
            assert_eq!((parsed.as_str(), behind), (namespace, rest));
        }
    }

    #[test]
    fn what_no_handle_sends_is_refused() {
        let get = |key: &str| {
            Call::Get(proto::Get {
                key: key.into(),
                ..proto::Get::default()
            })
        };
        for bad in [
            "",
            "/",
            "ns/a",
            "/ns/../a",
            "/ns/a/",
            "//a",
            "/ns~x",
            "/ns~/a/../b",
            "/é\0/a",
        ] {
            assert!(check(&get(bad)).is_err(), "{bad:?} was taken");
        }
        let expire = Change::Expire(proto::ExpireSessions {
            sessions: vec![1],
            term: 1,
        });
        assert!(check(&Call::Command(Command::new(expire))).is_err());
        assert!(check(&Call::Command(Command::default())).is_err());
        let put = proto::operation::Write::Put(proto::Put {
            value: vec![0; 2 * MAX_TXN].into(),
            ..proto::Put::default()
        });
        let operations = vec![proto::Operation {
            key: "/ns/a".into(),
            write: Some(put),
        }];
        assert!(
            check_txn(&proto::Txn {
                conditions: Vec::new(),
                operations
            })
            .is_err()
        );
    }
}
