//! How a member reaches the others.
//!
//! Entries go over a stream that is not waited on, and a snapshot over a connection of its own. Heartbeats, votes and read
//! indexes share a third, keep-alives that a member passes on to the leader have a fourth, and all other calls that it
//! passes on a fifth: neither a large batch nor many changes that wait at the leader delay what is short. Every request
//! has a deadline of its own, since openraft ends none that hangs.

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::future::Future;
use std::io::Read;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use futures_util::{Stream, StreamExt, stream};
use openraft::error::{NetworkError, RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{Backoff, RPCOption, stream_append_sequential};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, StreamAppendResult, TransferLeaderRequest,
    TransferLeaderResponse, VoteRequest, VoteResponse,
};
use openraft::{RaftNetworkFactory, RaftNetworkV2};
use parking_lot::Mutex;
use tonic::{Code, Status};

use crate::addresses::Addresses;
use crate::config::Timers;
use crate::conversation::Conversation;
use crate::log::Identity;
use crate::peers;
use crate::proto::registry::peer::v1 as message;
use crate::proto::registry::peer::v1::peers_client::PeersClient;
use crate::proto::request::Call;
use crate::snapshot::SnapshotData;
use crate::transport::{Connection, MAX_MESSAGE, Transport};
use crate::types::{Peer, Snapshot, TypeConfig, Vote};
use crate::wire;

/// How long entries that were sent may wait for an answer while none comes: several times what a slow disk takes.
const STALLED: Duration = Duration::from_secs(2);
/// How long a part of a snapshot may take, or its last one until it is installed.
const PART: Duration = Duration::from_secs(10);
const INSTALL: Duration = Duration::from_secs(600);
/// How long a member may take to take a connection.
const PATIENCE: Duration = Duration::from_secs(2);
/// How much of a snapshot is one message.
const CHUNK: usize = 512 << 10;
/// The pause after a member could not be reached.
const BACKOFF: Duration = Duration::from_millis(50);

/// One connection to a member, made when it is needed and again when it broke.
#[derive(Debug)]
pub(crate) struct Lane {
    transport: Transport,
    address: String,
    /// The member, if it is to be reached wherever it is now.
    member: Option<(u64, Addresses)>,
    channel: Mutex<Option<(String, Connection)>>,
    conversation: Mutex<Option<Conversation>>,
}

impl Lane {
    pub(crate) fn new(transport: &Transport, address: &str) -> Self {
        Self {
            transport: transport.clone(),
            address: address.into(),
            member: None,
            channel: Mutex::default(),
            conversation: Mutex::default(),
        }
    }

    /// Where it leads now.
    fn address(&self) -> String {
        let now = self.member.as_ref().and_then(|(id, addresses)| addresses.of(*id));
        now.unwrap_or_else(|| self.address.clone())
    }

    /// The connection that there is, if it leads where the member is now.
    fn dialed(&self) -> Option<Connection> {
        let dialed = self.channel.lock().clone();
        let (to, channel) = dialed?;
        if to == self.address() {
            return Some(channel);
        }
        self.reset();
        None
    }

    pub(crate) async fn channel(&self) -> Result<Connection, Status> {
        if let Some(channel) = self.dialed() {
            return Ok(channel);
        }
        let address = self.address();
        let dialed = self.transport.dial(&address, PATIENCE).await;
        let channel = dialed.map_err(|error| {
            let cause = std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
            Status::unavailable(format!("{address}: {cause}"))
        })?;
        *self.channel.lock() = Some((address, channel.clone()));
        Ok(channel)
    }

    /// What is passed on to that member goes over one stream.
    pub(crate) async fn conversation(&self) -> Result<Conversation, Status> {
        let channel = self.channel().await?;
        let mut conversation = self.conversation.lock();
        match &*conversation {
            Some(begun) if !begun.has_ended() => Ok(begun.clone()),
            _ => Ok(conversation.insert(Conversation::begin(channel)).clone()),
        }
    }

    /// It broke, or was too slow: the next question takes a new one.
    pub(crate) fn reset(&self) {
        *self.channel.lock() = None;
        *self.conversation.lock() = None;
    }

    pub(crate) async fn peer(&self) -> Result<PeersClient<Connection>, Status> {
        let client = PeersClient::new(self.channel().await?);
        Ok(client
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE))
    }

    /// Asks within a deadline, on the member's own connection.
    pub(crate) async fn ask<T, F>(
        &self,
        deadline: Duration,
        ask: impl FnOnce(PeersClient<Connection>) -> F,
    ) -> Result<T, Status>
    where
        F: Future<Output = Result<tonic::Response<T>, Status>>,
    {
        let asked = async { ask(self.peer().await?).await.map(tonic::Response::into_inner) };
        let answer = match tokio::time::timeout(deadline, asked).await {
            Ok(answer) => answer,
            Err(_) => Err(Status::deadline_exceeded(format!(
                "{}: no answer within {deadline:?}",
                self.address()
            ))),
        };
        if let Err(status) = &answer
            && matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Cancelled)
        {
            self.reset();
        }
        answer
    }
}

type Lanes = HashMap<(u64, Way), Arc<Lane>>;

/// What a connection to another member is for. The other side answers a bounded number of requests of one conversation at
/// once, and reads no further meanwhile: what must not wait has a conversation of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Way {
    /// What Raft itself asks: heartbeats, votes and read indexes. No answer waits for the log.
    Raft,
    /// Keep-alives, and how a member stands. An answer waits for one small entry of the log at the most.
    Sessions,
    /// Changes, and whatever else may be large or take long.
    Changes,
}

impl Way {
    /// Which way a call goes that a member passes on.
    pub(crate) fn of(call: &Call) -> Self {
        match call {
            Call::ReadIndex(_) | Call::Promise(_) => Self::Raft,
            Call::KeepAlive(_) | Call::Status(_) => Self::Sessions,
            Call::Get(_)
            | Call::List(_)
            | Call::Children(_)
            | Call::Count(_)
            | Call::Command(_)
            | Call::CommandThenList(_)
            | Call::Members(_)
            | Call::Digest(_) => Self::Changes,
        }
    }
}

/// The ways to the others.
#[derive(Clone, Debug)]
pub(crate) struct Network {
    us: Identity,
    transport: Transport,
    addresses: Addresses,
    lanes: Arc<Mutex<Lanes>>,
    silences: Silences,
    /// Whether another member refused this one's snapshot as damaged.
    refused: Arc<AtomicBool>,
}

/// For how long each member elects no other leader after it acknowledged this one, in milliseconds, as it said with its
/// newest acknowledgement.
#[derive(Clone, Debug, Default)]
struct Silences(Arc<Mutex<HashMap<u64, u64>>>);

impl Silences {
    /// Noted before Raft counts the acknowledgement. A member of an older version says nothing.
    fn note(&self, member: u64, millis: u32) {
        let millis = match millis {
            0 => Timers::shortest_silence(),
            millis => millis.into(),
        };
        self.0.lock().insert(member, millis);
    }
}

impl Network {
    pub(crate) fn new(us: Identity, transport: Transport) -> Self {
        Self {
            us,
            transport,
            addresses: Addresses::default(),
            lanes: Arc::default(),
            silences: Silences::default(),
            refused: Arc::default(),
        }
    }

    /// Returns whether another member has refused this one's snapshot as damaged since the last call.
    pub(crate) fn take_refused(&self) -> bool {
        self.refused.swap(false, Ordering::AcqRel)
    }

    /// The shortest time for which one of these members elects no other leader after its acknowledgement, of those that
    /// acknowledged this one as their leader.
    pub(crate) fn shortest_silence(&self, members: impl Iterator<Item = u64>) -> Option<Duration> {
        let silences = self.silences.0.lock();
        let said = members.filter_map(|member| silences.get(&member).copied());
        said.min().map(Duration::from_millis)
    }

    pub(crate) fn transport(&self) -> &Transport {
        &self.transport
    }

    /// Where the members are reached.
    pub(crate) fn addresses(&self) -> &Addresses {
        &self.addresses
    }

    /// The connection for what Raft itself asks.
    pub(crate) fn lane(&self, target: u64, recorded: &str) -> Arc<Lane> {
        self.lane_for(target, recorded, Way::Raft)
    }

    /// The connection to a member for calls of that kind: to the address that the group has recorded, or where the member was
    /// found since.
    pub(crate) fn lane_for(&self, target: u64, recorded: &str, way: Way) -> Arc<Lane> {
        self.addresses.record(target, recorded);
        let mut lanes = self.lanes.lock();
        let lane = lanes.entry((target, way));
        lane.or_insert_with(|| Arc::new(self.lane_of(target, recorded))).clone()
    }

    /// As [`Network::lane`], one of its own.
    fn lane_of(&self, target: u64, recorded: &str) -> Lane {
        Lane {
            member: Some((target, self.addresses.clone())),
            ..self.new_lane(recorded)
        }
    }

    /// A connection of one's own.
    pub(crate) fn new_lane(&self, address: &str) -> Lane {
        Lane::new(&self.transport, address)
    }

    fn client(&self, target: u64, peer: &Peer, kind: Kind) -> PeerClient {
        PeerClient {
            us: self.us,
            target,
            short: self.lane(target, &peer.address),
            bulk: self.lane_of(target, &peer.address),
            silences: self.silences.clone(),
            refused: self.refused.clone(),
            kind,
        }
    }
}

impl RaftNetworkFactory<TypeConfig> for Network {
    type Network = PeerClient;

    async fn new_client(&mut self, target: u64, peer: &Peer) -> PeerClient {
        self.client(target, peer, Kind::Entries)
    }

    async fn new_heartbeat_client(&mut self, target: u64, peer: &Peer) -> PeerClient {
        self.client(target, peer, Kind::Heartbeats)
    }
}

/// What a client is for: entries have a stream, a heartbeat is one question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Entries,
    Heartbeats,
}

/// The way to one member.
#[derive(Debug)]
pub(crate) struct PeerClient {
    us: Identity,
    target: u64,
    short: Arc<Lane>,
    /// For entries, or for a snapshot: each client has its own.
    bulk: Lane,
    silences: Silences,
    refused: Arc<AtomicBool>,
    kind: Kind,
}

impl PeerClient {
    fn header(&self) -> Option<message::Header> {
        self.us.header(self.target)
    }

    fn checked<T>(&self, answer: T, header: impl Fn(&T) -> Option<&message::Header>) -> Result<T, Status> {
        self.us.check_answer(header(&answer), self.target)?;
        Ok(answer)
    }

    fn appended(&self, answer: message::AppendAnswer) -> peers::Appended {
        self.silences.note(self.target, answer.silence_ms);
        peers::appended_from(answer)
    }
}

/// What can't be reached is left alone for a moment, what broke is tried again at once.
fn failed(status: &Status) -> RPCError<TypeConfig> {
    match status.code() {
        Code::DeadlineExceeded | Code::Cancelled | Code::Unknown => {
            RPCError::Network(NetworkError::from_string(status))
        }
        _ => RPCError::Unreachable(Unreachable::from_string(status)),
    }
}

impl RaftNetworkV2<TypeConfig> for PeerClient {
    type SnapshotData = SnapshotData;

    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<TypeConfig>, RPCError<TypeConfig>> {
        let request = peers::append_to(self.header(), &rpc);
        let asked = self.short.ask(option.soft_ttl(), |mut client| async move {
            client.heartbeat(request).await
        });
        let answer = asked
            .await
            .and_then(|answer| self.checked(answer, |answer| answer.header.as_ref()));
        Ok(self.appended(answer.map_err(|status| failed(&status))?).into())
    }

    fn stream_append<'s, S>(
        &'s mut self,
        input: S,
        option: RPCOption,
    ) -> BoxFuture<
        's,
        Result<BoxStream<'s, Result<StreamAppendResult<TypeConfig>, RPCError<TypeConfig>>>, RPCError<TypeConfig>>,
    >
    where
        S: Stream<Item = AppendEntriesRequest<TypeConfig>> + Send + Unpin + 'static,
    {
        if self.kind == Kind::Heartbeats {
            return stream_append_sequential(self, input, option);
        }
        Box::pin(async move {
            // The pause after a failure is taken by the entries, not by who asks for them: without the first of them there
            // is nothing to connect for.
            let mut input = input.peekable();
            if Pin::new(&mut input).peek().await.is_none() {
                return Ok(stream::empty().boxed());
            }
            let on_their_way = Arc::new(OnTheirWay::default());
            let (sent, header) = (on_their_way.clone(), self.header());
            let requests = input.map(move |request| {
                sent.sent.fetch_add(1, Ordering::Relaxed);
                peers::append_to(header.clone(), &request)
            });
            let over = on_their_way.clone();
            let requests = requests.chain(stream::poll_fn(move |_| {
                over.ended.store(true, Ordering::Release);
                std::task::Poll::Ready(None)
            }));
            let opened = self
                .bulk
                .ask(STALLED, |mut client| async move { client.append(requests).await });
            let answers = opened.await.map_err(|status| failed(&status))?;
            let state = Some((&*self, answers, on_their_way));
            let answers = stream::unfold(state, |state| async move {
                let (client, mut answers, on_their_way) = state?;
                match client.next(&mut answers, &on_their_way).await {
                    Ok(None) => None,
                    Ok(Some(appended)) => Some((Ok(appended), Some((client, answers, on_their_way)))),
                    Err(status) => {
                        client.bulk.reset();
                        Some((Err(failed(&status)), None))
                    }
                }
            });
            Ok(answers.boxed())
        })
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        let request = peers::vote_request_to(self.header(), &rpc);
        let asked = self.short.ask(
            option.soft_ttl(),
            |mut client| async move { client.vote(request).await },
        );
        let answer = asked
            .await
            .and_then(|answer| self.checked(answer, |answer| answer.header.as_ref()));
        answer
            .and_then(peers::vote_answer_from)
            .map_err(|status| failed(&status))
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        let request = peers::vote_request_to(self.header(), &rpc);
        let asked = self.short.ask(
            option.soft_ttl(),
            |mut client| async move { client.pre_vote(request).await },
        );
        let answer = asked
            .await
            .and_then(|answer| self.checked(answer, |answer| answer.header.as_ref()));
        answer
            .and_then(peers::vote_answer_from)
            .map_err(|status| failed(&status))
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot,
        cancel: impl Future<Output = ReplicationClosed> + Send + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        tokio::select! {
            sent = self.send_snapshot(vote, snapshot) => {
                let answer = sent.and_then(|answer| self.checked(answer, |answer| answer.header.as_ref()));
                let answer = answer.inspect_err(|_| self.bulk.reset()).map_err(|status| failed(&status))?;
                let vote = answer.vote.map(wire::vote_from).unwrap_or(vote);
                Ok(SnapshotResponse::new(vote))
            }
            closed = cancel => {
                self.bulk.reset();
                Err(closed.into())
            }
        }
    }

    async fn transfer_leader(
        &mut self,
        request: TransferLeaderRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<TypeConfig>, RPCError<TypeConfig>> {
        let message = message::TransferRequest {
            header: self.header(),
            vote: Some(wire::vote_to(request.from_leader())),
            last: request.last_log_id().map(wire::log_id_to),
            next: *request.to_node_id(),
        };
        let asked = self.short.ask(option.soft_ttl(), |mut client| async move {
            client.transfer_leader(message).await
        });
        let answer = asked
            .await
            .and_then(|answer| self.checked(answer, |answer| answer.header.as_ref()));
        answer.map(|_| Ok(())).map_err(|status| failed(&status))
    }

    fn backoff(&self) -> Option<Backoff> {
        Some(Backoff::new(std::iter::repeat(BACKOFF)))
    }
}

/// What was sent on a stream and is not answered yet.
#[derive(Debug, Default)]
struct OnTheirWay {
    sent: AtomicU64,
    answered: AtomicU64,
    /// Nothing more is sent.
    ended: AtomicBool,
}

impl PeerClient {
    /// The next answer on a stream. `None` when all is answered that was sent, and nothing more will be.
    async fn next(
        &self,
        answers: &mut tonic::Streaming<message::AppendAnswer>,
        on_their_way: &OnTheirWay,
    ) -> Result<Option<peers::Appended>, Status> {
        let mut waiting = false;
        loop {
            let Ok(answer) = tokio::time::timeout(STALLED, answers.message()).await else {
                let left = on_their_way.sent.load(Ordering::Relaxed) > on_their_way.answered.load(Ordering::Relaxed);
                // What was sent a moment ago is given as long again.
                if left && waiting {
                    return Err(Status::deadline_exceeded(format!(
                        "no answer to entries within {STALLED:?}"
                    )));
                }
                waiting = left;
                continue;
            };
            return match answer? {
                Some(answer) => {
                    let answer = self.checked(answer, |answer| answer.header.as_ref())?;
                    on_their_way.answered.fetch_add(1, Ordering::Relaxed);
                    Ok(Some(self.appended(answer)))
                }
                None if on_their_way.ended.load(Ordering::Acquire) => Ok(None),
                None => Err(Status::unknown("the member ended the stream of entries")),
            };
        }
    }

    /// Streams a snapshot, and waits until it is installed. It fails when nothing moves for a while.
    async fn send_snapshot(&self, vote: Vote, snapshot: Snapshot) -> Result<message::SnapshotAnswer, Status> {
        let head = peers::snapshot_head_to(self.header(), &vote, &snapshot);
        let (parts, queue) = tokio::sync::mpsc::channel(2);
        let moved = Arc::new(AtomicU64::new(0));
        let reader = Reader {
            parts,
            moved: moved.clone(),
        };
        let reading = tokio::task::spawn_blocking(move || reader.run(head, &snapshot.snapshot));
        let mut client = tokio::time::timeout(PART, self.bulk.peer())
            .await
            .map_err(|_| Status::deadline_exceeded("no connection for a snapshot"))??;
        let sending = client.snapshot(tokio_stream::wrappers::ReceiverStream::new(queue));
        tokio::pin!(sending);
        let mut seen = 0;
        loop {
            let deadline = if reading.is_finished() { INSTALL } else { PART };
            match tokio::time::timeout(deadline, &mut sending).await {
                Ok(Err(refused)) => {
                    let damaged = refused.code() == Code::DataLoss;
                    self.refused.fetch_or(damaged, Ordering::AcqRel);
                    return Err(refused);
                }
                Ok(answer) => return answer.map(tonic::Response::into_inner),
                Err(_) if moved.load(Ordering::Relaxed) > seen => seen = moved.load(Ordering::Relaxed),
                Err(_) => return Err(Status::deadline_exceeded("a snapshot does not get on")),
            }
        }
    }
}

/// Reads a snapshot into the parts that are sent.
struct Reader {
    parts: tokio::sync::mpsc::Sender<message::SnapshotPart>,
    moved: Arc<AtomicU64>,
}

impl Reader {
    fn run(self, head: message::SnapshotHead, data: &SnapshotData) {
        use message::snapshot_part::Part;
        let send = |part| {
            self.moved.fetch_add(1, Ordering::Relaxed);
            let sent = self.parts.blocking_send(message::SnapshotPart { part: Some(part) });
            sent.map_err(|_| std::io::Error::from(std::io::ErrorKind::BrokenPipe))
        };
        let read = || -> std::io::Result<()> {
            send(Part::Head(head))?;
            let mut from = data.open()?;
            let (mut checksum, mut bytes) = (crc32fast::Hasher::new(), 0);
            loop {
                let mut chunk = Vec::with_capacity(CHUNK);
                from.by_ref().take(CHUNK as u64).read_to_end(&mut chunk)?;
                if chunk.is_empty() {
                    break;
                }
                checksum.update(&chunk);
                bytes += chunk.len() as u64;
                send(Part::Chunk(chunk.into()))?;
            }
            let checksum = checksum.finalize();
            send(Part::End(message::SnapshotEnd { bytes, checksum }))
        };
        if let Err(error) = read() {
            // The receiver misses the end, and refuses what it has.
            tracing::debug!(%error, "a snapshot was not sent to its end");
        }
    }
}
