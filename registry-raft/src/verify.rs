//! Whether all members hold the same.
//!
//! A mark goes through the log as any command does, and each member takes a digest of its copy as that entry left it: of
//! the bytes of the snapshot that it would write. Members that applied the same entries to the same state have the same
//! bytes, sessions and remembered answers included, whatever is written meanwhile.

use std::io::{self, Write};
use std::sync::Arc;

use registry_api::{BoxError, Error, Options, Result};
use ring::digest::{Context, SHA256};

use crate::command::{Change, Command, Outcome, not_understood};
use crate::config::RaftConfig;
use crate::link::{BACKEND, Link};
use crate::member::Core;
use crate::proto;
use crate::proto::request::Call;
use crate::proto::response::Answer;
use crate::remote::Remote;
use crate::transport::Transport;

/// What the members hold at one entry of the log.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct Verification {
    /// The index of the entry.
    pub index: u64,
    /// What each member answered.
    pub members: Vec<MemberDigest>,
}

/// What one member holds.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct MemberDigest {
    /// Its name.
    pub name: String,
    /// The SHA-256 of its state, in hexadecimal; `None` if it did not answer.
    pub digest: Option<String>,
    /// Why it did not answer.
    pub error: Option<String>,
}

impl Verification {
    /// Whether those that answered hold the same.
    pub fn is_equal(&self) -> bool {
        let mut digests = self.members.iter().filter_map(|member| member.digest.as_deref());
        let first = digests.next();
        digests.all(|digest| Some(digest) == first)
    }

    /// Whether all have answered.
    pub fn is_complete(&self) -> bool {
        self.members.iter().all(|member| member.digest.is_some())
    }
}

/// Has every member take a digest of what it holds, at the same entry of the log.
///
/// A member that does not answer within `request_timeout` is told of in the result.
///
/// # Errors
/// As [`crate::status`]; [`Error::OutcomeUnknown`] if it is not known whether the entry was made, which changes no key.
pub async fn verify(config: &RaftConfig, options: &Options) -> Result<Verification> {
    config.check()?;
    let transport = Transport::new(config)?;
    let link = Remote::new(transport.clone(), config.endpoints.clone());
    let members = link.status(options.connect_timeout).await?.members;
    let link: Arc<dyn Link> = Arc::new(link);
    let mark = Command::new(Change::Mark(proto::Unit {}));
    let reply = link.command(mark, options.request_timeout).await?;
    let Some(Outcome::Marked(index)) = reply.result else {
        return Err(not_understood());
    };
    let asked = members.into_iter().map(|member| {
        let transport = transport.clone();
        async move {
            let link = Remote::new(transport, vec![member.address]);
            let call = Call::Digest(proto::DigestRequest { index });
            let answer = match link.call(call, options.request_timeout).await {
                Ok(Answer::Digest(digest)) => Ok(hex(&digest)),
                Ok(_) => Err(not_understood()),
                Err(error) => Err(error),
            };
            let error = answer.as_ref().err();
            let cause = error.map(|error| match std::error::Error::source(error) {
                Some(source) => source.to_string(),
                None => error.to_string(),
            });
            MemberDigest {
                name: member.name,
                error: cause,
                digest: answer.ok(),
            }
        }
    });
    Ok(Verification {
        index,
        members: futures_util::future::join_all(asked).await,
    })
}

impl Core {
    /// The digest as of that mark, once there is one.
    pub(crate) async fn digest(&self, index: u64) -> Result<Answer> {
        let mut digests = self.store().digests();
        let found = digests.wait_for(|(newest, _)| *newest >= index).await;
        let (at, digest) = found.map_err(unavailable)?.clone();
        match at == index {
            true => Ok(Answer::Digest(digest)),
            false => Err(unavailable("a later mark has come between")),
        }
    }
}

/// Takes the digest of what is written to it.
pub(crate) struct Digest(Context);

impl Digest {
    pub(crate) fn new() -> Self {
        Self(Context::new(&SHA256))
    }

    pub(crate) fn finish(self) -> bytes::Bytes {
        bytes::Bytes::copy_from_slice(self.0.finish().as_ref())
    }
}

impl Write for Digest {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unavailable(cause: impl Into<BoxError>) -> Error {
    Error::Unavailable {
        backend: BACKEND,
        source: cause.into(),
    }
}
