//! What a member does by itself as long as it runs: sessions expire, and the log stays short.

use std::time::{Duration, Instant};

use openraft::async_runtime::WatchReceiver;
use tokio::sync::watch;

use super::Core;
use crate::command::{Change, Command};
use crate::expiry::{self, Known};
use crate::members::is_joint;
use crate::proto;
use crate::read_index::of_term;
use crate::types::LogId;

/// How many bytes of log that a snapshot covers are kept for members that lag behind.
const KEPT: u64 = 32 << 20;
const HOUSEKEEPING: Duration = Duration::from_millis(500);

impl Core {
    /// Expires sessions as long as this member leads.
    pub(super) async fn keep_time(self, mut stopping: watch::Receiver<bool>) {
        let mut tick = tokio::time::interval(expiry::TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                // An error says that the member is gone.
                _ = stopping.changed() => return,
            }
            // Not before it has applied all that earlier leaders have answered.
            let leads = self.leads();
            let leads = leads.filter(|term| self.store.read(|inner| of_term(inner.applied, *term)).is_some());
            let Some(term) = leads else {
                self.expiry.rest();
                continue;
            };
            let sessions = self.store.read(|inner| {
                let known = inner.state.sessions.iter().map(|(id, session)| Known {
                    session: *id,
                    ttl: Duration::from_millis(session.ttl_ms),
                    silent: Duration::from_millis(session.silent_ms),
                    heard: session.heard,
                    keys: session.keys.len(),
                });
                known.collect::<Vec<_>>()
            });
            let due = self.expiry.due(term, Instant::now(), sessions.into_iter());
            for sessions in due.expired {
                tokio::spawn(self.clone().expire(sessions, term));
            }
            for silent in due.silent.chunks(expiry::BATCH) {
                tokio::spawn(self.clone().note_silences(silent.to_vec(), term));
            }
        }
    }

    async fn note_silences(self, silent: Vec<(Known, Duration)>, term: u64) {
        let silences = silent.iter().map(|(known, silent)| proto::Silence {
            session: known.session,
            silent_ms: u64::try_from(silent.as_millis()).unwrap_or(u64::MAX),
            heard: known.heard,
        });
        let silences = Change::Silences(proto::Silences {
            term,
            silences: silences.collect(),
        });
        let turn = self.expiry.turn().await;
        let noted = self.propose(&Command::new(silences)).await;
        drop(turn);
        if let Err(error) = noted {
            tracing::debug!(%error, "the next Raft leader will not know that sessions are silent");
        }
    }

    async fn expire(self, sessions: Vec<u64>, term: u64) {
        let expire = Change::Expire(proto::ExpireSessions {
            sessions: sessions.clone(),
            term,
        });
        let turn = self.expiry.turn().await;
        let expired = self.propose(&Command::new(expire)).await;
        drop(turn);
        match expired {
            Ok(_) => tracing::info!(count = sessions.len(), "sessions have expired"),
            // Without a majority it is so ten times a second.
            Err(error) => tracing::debug!(%error, "sessions could not be expired, trying again"),
        }
        self.expiry.settled(&sessions);
    }

    /// Takes a snapshot when the log has grown, and completes a change of voters that nobody completes.
    pub(super) async fn keep_house(self, snapshot_log_bytes: u64, mut stopping: watch::Receiver<bool>) {
        let mut joint = None;
        let mut tick = tokio::time::interval(HOUSEKEEPING);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                // An error says that the member is gone.
                _ = stopping.changed() => return,
            }
            joint = self.finish_change_of_others(joint).await;
            // As much log again as the snapshot is large: what is written for snapshots is bounded by what is logged.
            let enough = snapshot_log_bytes.max(self.snapshots.bytes());
            let (covered, alone) = {
                let metrics = self.raft.metrics();
                let metrics = metrics.borrow_watched();
                let covered = metrics.snapshot.map(|snapshot| snapshot.index);
                (covered, metrics.membership_config.membership().nodes().count() <= 1)
            };
            self.purge(covered, if alone { 0 } else { KEPT.min(snapshot_log_bytes / 2) })
                .await;
            let damaged = self.network.take_refused() && self.has_damaged_snapshot().await;
            if (damaged || self.log.log().bytes_after(covered) > enough)
                && !self.snapshots.is_writing()
                && let Err(error) = self.raft.trigger().snapshot().await
            {
                tracing::warn!(%error, "no snapshot could be taken");
            }
        }
    }

    /// Completes a change of voters that was there half a second ago and is not being completed, on the leader. Returns where
    /// in the log the one is that is there now.
    async fn finish_change_of_others(&self, before: Option<LogId>) -> Option<LogId> {
        self.leads()?;
        let (at, membership) = self.membership();
        let at = at.filter(|_| is_joint(&membership))?;
        if before == Some(at)
            && let Err(error) = self.finish_change().await
        {
            tracing::debug!(%error, "a change of voters is not completed yet");
        }
        Some(at)
    }

    /// Reads the newest snapshot again, since another member refused it.
    async fn has_damaged_snapshot(&self) -> bool {
        let snapshots = self.snapshots.clone();
        let checking = tokio::task::spawn_blocking(move || snapshots.check_newest());
        let checked = checking.await.unwrap_or_else(|error| Err(std::io::Error::other(error)));
        if let Err(error) = &checked {
            tracing::error!(%error, "this member's snapshot is damaged, it is written again: check the disk");
        }
        checked.is_err()
    }

    /// Drops the log that a snapshot covers, but for the newest bytes.
    async fn purge(&self, covered: Option<u64>, keep: u64) {
        let point = covered.and_then(|covered| self.log.log().purge_point(covered, keep));
        if let Some(point) = point
            && let Err(error) = self.raft.trigger().purge_log(point).await
        {
            tracing::warn!(%error, "the log could not be purged");
        }
    }
}
