//! Deleting placeholder znodes that no key needs any more.

use std::sync::Arc;

use registry_api::{Error, Expect, Refusal};
use tokio::time::Instant;
use zookeeper_client::Error as ClientError;

use crate::error::{self, Verdict};
use crate::names::parent;
use crate::plan::Step;
use crate::send::Sent;
use crate::store::{Conn, Store};
use crate::walk::{Walk, look_at};

impl Store {
    /// Whether a transaction that was refused for what is below a key may be judged again: there were only placeholders,
    /// which the end of a session leaves for some seconds, and they were deleted.
    pub(crate) async fn is_cleared(&self, conn: &Arc<Conn>, deadline: Instant, refused: &Error) -> Result<bool, Sent> {
        let (Error::Refused {
            key,
            refusal: Refusal::HasChildren,
        }
        | Error::Conflict {
            key,
            expected: Expect::Childless,
            ..
        }) = refused
        else {
            return Ok(false);
        };
        let path = self.names.path(key);
        // What is below a recipe's key is never a placeholder.
        if self.names.part(&path).is_none() {
            return Ok(false);
        }
        let cleared = self.clear(conn, deadline, &path).await;
        cleared.map_err(|failure| match error::verdict(&failure) {
            Verdict::SessionOver | Verdict::NotApplied | Verdict::Unknown => Sent::NotApplied(failure),
            _ => Sent::Failed(error::read(failure)),
        })
    }

    /// Deletes the placeholders below a path if there is nothing else. Returns whether nothing is left.
    async fn clear(&self, conn: &Arc<Conn>, deadline: Instant, path: &str) -> Result<bool, ClientError> {
        let walk = async {
            let mut walk = Walk::below(&self.names, &conn.client, path);
            // One that is no placeholder is enough.
            walk.next(1, usize::MAX).await.map(|(nodes, _)| nodes)
        };
        let nodes = self
            .ask(conn, deadline, walk)
            .await
            .unwrap_or(Err(ClientError::Timeout))?;
        if nodes.iter().any(|(_, found)| !found.is_mark()) {
            return Ok(false);
        }
        for (leaf, _) in nodes.iter().rev().filter(|(_, found)| found.stat.num_children == 0) {
            self.tidy(conn, deadline, leaf).await?;
        }
        let left = self.ask(conn, deadline, conn.client.check_stat(path)).await;
        let left = left.unwrap_or(Err(ClientError::Timeout))?;
        Ok(left.is_none_or(|stat| stat.num_children == 0))
    }

    /// Deletes a birth znode whose key is gone, as the delete of a prefix leaves it that meets a put of that key.
    pub(crate) async fn tidy_birth(&self, conn: &Arc<Conn>, deadline: Instant, birth: &str) -> Result<(), ClientError> {
        let (names, client) = (&self.names, &conn.client);
        let Some(path) = names.born(birth) else { return Ok(()) };
        let Some(part) = names.part(&path) else { return Ok(()) };
        let read = async {
            let guard = client.check_stat(&names.guard(part)).await?;
            Ok((guard, look_at(client, &path).await?))
        };
        let (guard, found) = match self.ask(conn, deadline, read).await {
            Some(Ok(read)) => read,
            Some(Err(ClientError::NoAuth)) => return Ok(()),
            Some(Err(failure)) => return Err(failure),
            None => return Err(ClientError::Timeout),
        };
        let Some(guard) = guard else { return Ok(()) };
        if found.is_some_and(|found| !found.is_mark()) {
            return Ok(());
        }
        // Whoever creates the key writes its guard.
        let guard = Step::Set {
            path: names.guard(part),
            data: bytes::Bytes::new(),
            version: Some(guard.version),
        };
        let (path, version) = (birth.to_owned(), None);
        match self
            .send(conn, deadline, &[guard, Step::Delete { path, version }], None)
            .await
        {
            Sent::NotApplied(failure) => Err(failure),
            Sent::Failed(Error::AccessDenied { .. }) | Sent::Done(..) | Sent::Stale(..) => Ok(()),
            Sent::Failed(_) => Err(ClientError::ConnectionLoss),
        }
    }

    /// Deletes a placeholder that has no children, and those above it that this empties. Returns the one that it could not
    /// judge, because other requests created or deleted keys meanwhile.
    ///
    /// # Errors
    /// [`ClientError::Timeout`] if there is no answer by the deadline; what was not deleted is left to the sweep.
    pub(crate) async fn tidy<'p>(
        &self,
        conn: &Arc<Conn>,
        deadline: Instant,
        path: &'p str,
    ) -> Result<Option<&'p str>, ClientError> {
        let mut path = path;
        // The root of a tree stays.
        while path.get(1..).is_some_and(|path| path.contains('/')) {
            let (names, client) = (&self.names, &conn.client);
            let guard = names.part(path).map(|part| names.guard(part));
            let read = async {
                let version = match &guard {
                    Some(guard) => client.check_stat(guard).await?.map(|stat| stat.version),
                    None => None,
                };
                Ok((version, look_at(client, path).await?))
            };
            let (version, found) = match self.ask(conn, deadline, read).await {
                Some(Ok((version, Some(found)))) => (version, found),
                Some(Ok((_, None))) => {
                    path = parent(path);
                    continue;
                }
                // Another client's, then.
                Some(Err(ClientError::NoAuth)) => return Ok(None),
                Some(Err(failure)) => return Err(failure),
                None => return Err(ClientError::Timeout),
            };
            if !found.is_mark() || found.stat.num_children > 0 {
                return Ok(None);
            }
            let mut steps = vec![self.tick()];
            if let (Some(path), Some(version)) = (guard, version) {
                steps.push(Step::Check { path, version });
            }
            steps.push(Step::Delete {
                path: path.to_owned(),
                version: Some(found.stat.version),
            });
            match self.send(conn, deadline, &steps, None).await {
                Sent::Done(..) => path = parent(path),
                Sent::Stale(..) => return Ok(Some(path)),
                Sent::NotApplied(failure) => return Err(failure),
                // It lies in a node of another client.
                Sent::Failed(Error::AccessDenied { .. }) => return Ok(None),
                Sent::Failed(_) => return Err(ClientError::ConnectionLoss),
            }
        }
        Ok(None)
    }
}
