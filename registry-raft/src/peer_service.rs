//! What a member answers to the others.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::stream::BoxStream;
use futures_util::{StreamExt, stream};
use openraft::raft::{AppendEntriesRequest, TransferLeaderRequest};
use parking_lot::Mutex;
use tonic::{Request, Response, Status, Streaming};

use crate::founding::Door;
use crate::log::Identity;
use crate::member::Core;
use crate::peers::{self, refused};
use crate::proto::registry::peer::v1 as message;
use crate::proto::registry::peer::v1::peers_server::Peers;
use crate::proto::registry::peer::v1::snapshot_part::Part;
use crate::snapshot::{Incoming, SnapshotData};
use crate::types::{Snapshot, SnapshotMeta, TypeConfig, Vote};
use crate::wire;

/// How long the next part of a snapshot may take to come.
const PART: Duration = Duration::from_secs(20);

/// The service for the other members.
#[derive(Clone, Debug)]
pub(crate) struct PeerService {
    pub(crate) door: Door,
}

impl PeerService {
    fn core(&self) -> Result<&Core, Status> {
        let core = self.door.core();
        core.ok_or_else(|| Status::unavailable("the member is not ready yet"))
    }

    /// The member, and who sent the message if it is one for it.
    fn checked(&self, header: Option<&message::Header>) -> Result<(&Core, u64), Status> {
        let core = self.core()?;
        Ok((core, core.identity().check(header)?))
    }
}

fn stopped(error: impl std::fmt::Display) -> Status {
    Status::unavailable(format!("the member has stopped: {error}"))
}

#[tonic::async_trait]
impl Peers for PeerService {
    async fn greet(&self, request: Request<message::Greeting>) -> Result<Response<message::Greeting>, Status> {
        Ok(Response::new(self.door.respond(request.get_ref())))
    }

    async fn admit(&self, request: Request<message::Admission>) -> Result<Response<message::Admitted>, Status> {
        self.core()?.admit(request.into_inner()).await?;
        Ok(Response::new(message::Admitted {}))
    }

    type AppendStream = BoxStream<'static, Result<message::AppendAnswer, Status>>;

    async fn append(
        &self,
        request: Request<Streaming<message::AppendRequest>>,
    ) -> Result<Response<Self::AppendStream>, Status> {
        let core = self.core()?;
        let us = core.identity();
        let (sender, refusal) = (Arc::new(AtomicU64::new(0)), Arc::new(Mutex::new(None)));
        let requests = stream::unfold(request.into_inner(), {
            let (sender, refusal) = (sender.clone(), refusal.clone());
            move |mut requests| {
                let (sender, refusal) = (sender.clone(), refusal.clone());
                async move {
                    let next = requests.message().await;
                    let taken = next.and_then(|next| next.map(|request| take(request, us, &sender)).transpose());
                    match taken {
                        Ok(taken) => taken.map(|taken| (taken, requests)),
                        // The first that can't be taken ends the stream: nothing may be taken after a gap.
                        Err(status) => {
                            *refusal.lock() = Some(status);
                            None
                        }
                    }
                }
            }
        });
        let hearing = core.clone();
        let answers = core.raft().stream_append(requests).map(move |appended| match appended {
            Ok(appended) => {
                let sender = sender.load(Ordering::Relaxed);
                hearing.hear(sender, &appended);
                Ok(peers::appended_to(us.header(sender), &appended, hearing.silence()))
            }
            Err(fatal) => Err(stopped(fatal)),
        });
        let end = stream::once(async move { refusal.lock().take() }).filter_map(std::future::ready);
        Ok(Response::new(answers.chain(end.map(Err)).boxed()))
    }

    async fn heartbeat(
        &self,
        request: Request<message::AppendRequest>,
    ) -> Result<Response<message::AppendAnswer>, Status> {
        let request = request.into_inner();
        let (core, sender) = self.checked(request.header.as_ref())?;
        let request = peers::append_from(request, sender)?;
        let previous = request.prev_log_id;
        let last = request.entries.last().map(|entry| entry.log_id).or(previous);
        let answer = core.raft().append_entries(request).await.map_err(stopped)?;
        let appended = answer.into_stream_result(previous, last);
        core.hear(sender, &appended);
        let header = core.identity().header(sender);
        Ok(Response::new(peers::appended_to(header, &appended, core.silence())))
    }

    async fn vote(&self, request: Request<message::VoteRequest>) -> Result<Response<message::VoteAnswer>, Status> {
        let request = request.into_inner();
        let (core, sender) = self.checked(request.header.as_ref())?;
        // Who hands over counts on nobody's silence any more.
        if !request.leadership_transfer {
            core.may_elect()?;
        }
        let request = peers::vote_request_from(request, sender)?;
        let answer = core.raft().vote(request).await.map_err(stopped)?;
        Ok(Response::new(peers::vote_answer_to(
            core.identity().header(sender),
            &answer,
        )))
    }

    async fn pre_vote(&self, request: Request<message::VoteRequest>) -> Result<Response<message::VoteAnswer>, Status> {
        let request = request.into_inner();
        let (core, sender) = self.checked(request.header.as_ref())?;
        core.may_elect()?;
        let request = peers::vote_request_from(request, sender)?;
        let answer = core.raft().pre_vote(request).await.map_err(stopped)?;
        Ok(Response::new(peers::vote_answer_to(
            core.identity().header(sender),
            &answer,
        )))
    }

    async fn snapshot(
        &self,
        request: Request<Streaming<message::SnapshotPart>>,
    ) -> Result<Response<message::SnapshotAnswer>, Status> {
        let mut parts = request.into_inner();
        let Some(Part::Head(head)) = next(&mut parts).await? else {
            return Err(refused("a snapshot begins with its head".into()));
        };
        let (core, sender) = self.checked(head.header.as_ref())?;
        let (vote, meta) = peers::snapshot_head_from(head, sender)?;
        let data = receive(&mut parts, core.snapshots().incoming().map_err(unwritable)?).await?;
        let data = checked(core, &meta, data).await?;
        let answer = install(core, vote, meta, data).await?;
        Ok(Response::new(message::SnapshotAnswer {
            header: core.identity().header(sender),
            vote: Some(wire::vote_to(&answer)),
        }))
    }

    async fn transfer_leader(
        &self,
        request: Request<message::TransferRequest>,
    ) -> Result<Response<message::TransferAnswer>, Status> {
        let request = request.into_inner();
        let (core, sender) = self.checked(request.header.as_ref())?;
        let vote = request.vote.filter(|vote| vote.node == sender);
        let vote = vote.ok_or_else(|| refused("it is not the sender's to hand over".into()))?;
        let last = request.last.map(wire::log_id_from);
        let request = TransferLeaderRequest::new(wire::vote_from(vote), request.next, last);
        let taken = core.raft().handle_transfer_leader(request).await.map_err(stopped)?;
        Ok(Response::new(message::TransferAnswer {
            header: core.identity().header(sender),
            taken: taken.is_ok(),
        }))
    }
}

/// A message of the stream of entries, if it is one for this member and from whom the first was.
fn take(
    request: message::AppendRequest,
    us: Identity,
    sender: &AtomicU64,
) -> Result<AppendEntriesRequest<TypeConfig>, Status> {
    let from = us.check(request.header.as_ref())?;
    match sender.swap(from, Ordering::Relaxed) {
        0 => {}
        first if first == from => {}
        first => return Err(refused(format!("the stream is {first}'s, and {from} sends"))),
    }
    peers::append_from(request, from)
}

fn unwritable(error: impl std::fmt::Display) -> Status {
    Status::internal(format!("a snapshot can't be written: {error}"))
}

async fn next(parts: &mut Streaming<message::SnapshotPart>) -> Result<Option<Part>, Status> {
    let part = tokio::time::timeout(PART, parts.message()).await;
    let part = part.map_err(|_| Status::deadline_exceeded("the rest of a snapshot does not come"))??;
    Ok(part.and_then(|part| part.part))
}

/// Takes a snapshot to its end, which tells that nothing is missing.
async fn receive(parts: &mut Streaming<message::SnapshotPart>, mut incoming: Incoming) -> Result<SnapshotData, Status> {
    let (mut checksum, mut bytes) = (crc32fast::Hasher::new(), 0);
    loop {
        match next(parts).await? {
            Some(Part::Chunk(chunk)) => {
                checksum.update(&chunk);
                bytes += chunk.len() as u64;
                let written = tokio::task::spawn_blocking(move || incoming.write_all(&chunk).map(|()| incoming));
                incoming = written.await.map_err(unwritable)?.map_err(unwritable)?;
            }
            Some(Part::End(end)) if (end.bytes, end.checksum) == (bytes, checksum.clone().finalize()) => {
                return incoming.finish().map_err(unwritable);
            }
            Some(Part::End(_)) => return Err(Status::data_loss("a snapshot was damaged on its way")),
            Some(Part::Head(_)) | None => return Err(Status::aborted("a snapshot was cut off")),
        }
    }
}

/// Refuses a snapshot that was damaged where it is from: to openraft one that can't be installed is the end of this member.
async fn checked(core: &Core, meta: &SnapshotMeta, data: SnapshotData) -> Result<SnapshotData, Status> {
    let (snapshots, meta) = (core.snapshots().clone(), meta.clone());
    let checking = tokio::task::spawn_blocking(move || snapshots.check(&meta, &data).map(|_| data));
    match checking.await.map_err(unwritable)? {
        Ok(data) => Ok(data),
        Err(error) if error.kind() == std::io::ErrorKind::InvalidData => {
            Err(Status::data_loss(format!("the snapshot is damaged: {error}")))
        }
        Err(error) => Err(unwritable(error)),
    }
}

async fn install(core: &Core, vote: Vote, meta: SnapshotMeta, data: SnapshotData) -> Result<Vote, Status> {
    let snapshot = Snapshot { meta, snapshot: data };
    let installed = core.raft().install_full_snapshot(vote, snapshot).await;
    Ok(installed.map_err(stopped)?.vote)
}
