//! How a handle reaches a member: in the same process, or over gRPC. The handle is the same for both.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use registry_api::{Error, Key, Namespace, Result, Revision, SessionId, Watch, WatchRequest};

use crate::command::{Command, Reply, not_understood};
use crate::proto;
use crate::proto::request::Call;
use crate::proto::response::Answer;

pub(crate) const BACKEND: &str = "raft";

/// One way to a member.
#[async_trait]
pub(crate) trait Link: std::fmt::Debug + Send + Sync + 'static {
    /// Asks, and waits for the answer no longer than `patience`.
    ///
    /// [`Error::Unavailable`] says that nothing was done, [`Error::OutcomeUnknown`] that it may have been.
    async fn call(&self, call: Call, patience: Duration) -> Result<Answer>;

    /// Begins a watch that goes on by itself until its end is dropped.
    async fn watch(&self, namespace: &Namespace, request: WatchRequest, patience: Duration) -> Result<Watch>;

    /// Lists once that is gone which was created at that revision; `None` if the page is too large to come along. The
    /// patience is that until the wait has begun.
    ///
    /// [`Error::Unavailable`] says that it did not begin, [`Error::OutcomeUnknown`] that it broke off.
    async fn once_gone(&self, gone: Gone, patience: Duration) -> Result<Option<proto::Page>>;

    /// Who is asked now.
    fn endpoint(&self) -> String;

    /// The cluster of the member that answered last, if that is known.
    fn cluster(&self) -> Option<[u8; 16]> {
        None
    }

    /// The session that is over, since another cluster answers now than the one that opened it.
    fn ended(&self) -> Option<SessionId> {
        None
    }

    /// Another way to the same members, for the thread that keeps sessions alive: with connections of its own.
    fn apart(&self) -> Arc<dyn Link>;
}

/// What is waited for, and what is listed then.
#[derive(Clone, Debug)]
pub(crate) struct Gone {
    pub(crate) namespace: Namespace,
    pub(crate) key: Key,
    pub(crate) created: Revision,
    pub(crate) list: proto::List,
}

impl dyn Link {
    /// Carries out a command.
    pub(crate) async fn command(&self, command: Command, patience: Duration) -> Result<Reply> {
        match self.call(Call::Command(command), patience).await? {
            Answer::Reply(reply) => Ok(reply),
            _ => Err(not_understood()),
        }
    }

    /// Carries out a command, and lists then, if the page is small enough to come along.
    pub(crate) async fn command_then_list(
        &self,
        command: Command,
        list: Option<proto::List>,
        patience: Duration,
    ) -> Result<(Reply, Option<proto::Page>)> {
        let Some(list) = list else {
            return Ok((self.command(command, patience).await?, None));
        };
        let both = proto::CommandThenList {
            command: Some(command),
            list: Some(list),
        };
        match self.call(Call::CommandThenList(both), patience).await? {
            Answer::ReplyThenPage(both) => Ok((both.reply.ok_or_else(not_understood)?, both.page)),
            _ => Err(not_understood()),
        }
    }
}

/// What a member said instead of an answer, in the words of the api.
pub(crate) fn failure(failure: proto::Failure) -> Error {
    use proto::failure::Kind;
    let Ok(kind) = Kind::try_from(failure.kind) else {
        // Of a newer version. What can't be classified may have happened.
        return Error::OutcomeUnknown {
            operation: "a request",
            source: failure.text.into(),
        };
    };
    match kind {
        Kind::Unavailable => Error::Unavailable {
            backend: BACKEND,
            source: failure.text.into(),
        },
        Kind::OutcomeUnknown => Error::OutcomeUnknown {
            operation: "a write",
            source: failure.text.into(),
        },
        Kind::Invalid => Error::InvalidRequest(failure.text),
        Kind::SessionExpired => Error::SessionExpired {
            session: registry_api::SessionId(failure.requested),
        },
        Kind::Denied => Error::AccessDenied {
            backend: BACKEND,
            source: failure.text.into(),
        },
        Kind::Compacted => Error::Compacted {
            requested: registry_api::Revision(failure.requested),
            oldest: registry_api::Revision(failure.oldest),
        },
    }
}

/// The error of a question: asking changes nothing, whatever became of it.
pub(crate) fn of_question(error: Error) -> Error {
    match error {
        Error::OutcomeUnknown { source, .. } => Error::Unavailable {
            backend: BACKEND,
            source,
        },
        error => error,
    }
}

/// As a message says it: a time too long for that is none that anybody waits.
pub(crate) fn millis(time: Duration) -> u32 {
    u32::try_from(time.as_millis()).unwrap_or(u32::MAX)
}
