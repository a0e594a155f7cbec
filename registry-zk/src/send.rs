//! Sending one multi, and what became of it.

use std::sync::Arc;

use registry_api::{Error, Kind, SessionId};
use tokio::time::Instant;
use zookeeper_client::{Client, Error as ClientError, MultiWriteError, MultiWriteResult, Stat};

use crate::commit::OPERATION;
use crate::ephemerals::{MAX_BYTES, Outcome, Reserved};
use crate::error::{self, Verdict};
use crate::plan::Step;
use crate::store::{Conn, Store};

/// What became of a multi.
pub(crate) enum Sent {
    /// The change of that zxid, and for each step what the node is now, where it tells.
    Done(i64, Vec<Option<Stat>>),
    /// Something was not as it was read; which step said so. Nothing happened.
    Stale(usize, ClientError),
    /// Nothing happened.
    NotApplied(ClientError),
    /// It failed for good.
    Failed(Error),
}

impl Store {
    /// Sends one multi, and counts the ephemeral znodes that it creates and deletes.
    pub(crate) async fn send(
        &self,
        conn: &Arc<Conn>,
        deadline: Instant,
        steps: &[Step],
        session: Option<SessionId>,
    ) -> Sent {
        let reserved = match self.reserve(conn, deadline, steps).await {
            Ok(reserved) => reserved,
            Err(refused) => return refused,
        };
        let sent = self.transmit(conn, deadline, steps, session).await;
        if let Sent::Done(zxid, _) = &sent {
            for step in steps {
                if let Step::Delete { path, .. } = step {
                    self.ephemerals.deleted(conn.session, path, *zxid, self.above());
                }
            }
        }
        if let Some(reserved) = reserved {
            reserved.settle(match &sent {
                Sent::Done(zxid, _) => Outcome::Done(*zxid),
                Sent::Stale(..) | Sent::NotApplied(_) => Outcome::NotDone,
                Sent::Failed(Error::OutcomeUnknown { .. }) => Outcome::Unknown,
                Sent::Failed(_) => Outcome::NotDone,
            });
        }
        sent
    }

    /// Counts the ephemeral znodes that a request creates. If they seem too many, the server is asked which there are:
    /// other clients may have deleted some, and some requests have had no answer.
    async fn reserve(&self, conn: &Arc<Conn>, deadline: Instant, steps: &[Step]) -> Result<Option<Reserved<'_>>, Sent> {
        let paths: Vec<_> = steps
            .iter()
            .filter_map(|step| match step {
                Step::Create {
                    path,
                    kind: Kind::Ephemeral,
                    ..
                } => Some(path.clone()),
                _ => None,
            })
            .collect();
        if paths.is_empty() {
            return Ok(None);
        }
        let (session, above) = (conn.session, self.above());
        if let Ok(reserved) = self.ephemerals.reserve(session, paths.clone(), above) {
            return Ok(Some(reserved));
        }
        let client = &conn.client;
        let present = async {
            // What an earlier request left undecided is decided when this is answered.
            let synced = client.sync(self.names.root());
            let present = client.list_ephemerals("/").await?;
            synced.await?;
            Ok(present.into_iter().collect())
        };
        match self.ask(conn, deadline, present).await {
            Some(Ok(present)) => self.ephemerals.replace(session, &present, above),
            Some(Err(failure)) => return Err(Sent::NotApplied(failure)),
            None => return Err(Sent::Failed(error::unavailable(self.silent()))),
        }
        let reserved = self.ephemerals.reserve(session, paths, above);
        reserved.map(Some).map_err(|size| {
            Sent::Failed(Error::TooLarge {
                what: "the set of names of one session's ephemeral keys",
                size,
                limit: MAX_BYTES,
            })
        })
    }

    /// How many bytes a chroot puts before each path.
    pub(crate) fn above(&self) -> usize {
        self.config.servers.chroot().map_or(0, str::len)
    }

    async fn transmit(&self, conn: &Arc<Conn>, deadline: Instant, steps: &[Step], session: Option<SessionId>) -> Sent {
        let multi = self.multi(&conn.client, steps);
        let failure = match self.ask(conn, deadline, multi).await {
            Some(Ok(results)) => return self.applied(&results),
            Some(Err(MultiWriteError::OperationFailed { index, source })) => {
                return match error::verdict(&source) {
                    Verdict::Node => {
                        if let Some(Step::Check { path, .. } | Step::Set { path, .. }) = steps.get(index) {
                            tracing::trace!(path, "not as it was read");
                        }
                        Sent::Stale(index, source)
                    }
                    Verdict::SessionOver | Verdict::NotApplied => Sent::NotApplied(source),
                    _ => Sent::Failed(error::write(OPERATION, session, source)),
                };
            }
            Some(Err(MultiWriteError::RequestFailed { source })) => source,
            None => return Sent::Failed(error::unknown(OPERATION, self.silent())),
        };
        match error::verdict(&failure) {
            Verdict::SessionOver | Verdict::NotApplied => Sent::NotApplied(failure),
            _ => Sent::Failed(error::write(OPERATION, session, failure)),
        }
    }

    async fn multi(&self, client: &Client, steps: &[Step]) -> Result<Vec<MultiWriteResult>, MultiWriteError> {
        let mut multi = client.new_multi_writer();
        for step in steps {
            match step {
                Step::Check { path, version } => multi.add_check_version(path, *version),
                Step::Set { path, data, version } => multi.add_set_data(path, data, *version),
                Step::Create { path, data, kind } => {
                    let options = match kind {
                        Kind::Persistent => self.persistent(),
                        Kind::Ephemeral => self.ephemeral(),
                    };
                    multi.add_create(path, data, &options)
                }
                Step::Delete { path, version } => multi.add_delete(path, *version),
            }?;
        }
        multi.commit().await
    }

    fn applied(&self, results: &[MultiWriteResult]) -> Sent {
        let stat = |result: &MultiWriteResult| match result {
            MultiWriteResult::SetData { stat } => Some(*stat),
            // Some versions of ZooKeeper answer a create in a multi without a stat (ZOOKEEPER-4026).
            _ => None,
        };
        let stats: Vec<_> = results.iter().map(stat).collect();
        let zxid = stats.iter().flatten().map(|stat| stat.mzxid).max().unwrap_or(0);
        self.saw(zxid);
        Sent::Done(zxid, stats)
    }
}
