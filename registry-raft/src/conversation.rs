//! All that one side asks the other over a connection, on one stream of messages: what is asked or told in one moment
//! shares a message, so that many callers cost little more than one.

mod answering;
mod sharing;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod understood;

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, OnceLock, Weak};

use futures_util::{Stream, stream};
use parking_lot::Mutex;
use prost::Message;
use registry_api::Error;
use tokio::sync::{mpsc, oneshot};
use tonic::Status;

use crate::proto;
use crate::proto::asked::What as Ask;
use crate::proto::response::Answer;
use crate::proto::told::What as Tell;
use crate::remote::Remote;
use crate::service::said;
use crate::transport::{Connection, MAX_PART};

pub(crate) use answering::answer;

/// How many parts share a message, and how many bytes of them, but for the last.
const TOGETHER: usize = 256;
const TOGETHER_BYTES: usize = 256 << 10;

/// The asking side. Clones share it; it ends with the last of them, or when the stream breaks.
#[derive(Clone, Debug)]
pub(crate) struct Conversation {
    asking: mpsc::UnboundedSender<proto::Asked>,
    waiting: Arc<Mutex<Waiting>>,
    /// The cluster of the member that answers, as soon as it has answered anything.
    cluster: Arc<OnceLock<[u8; 16]>>,
}

/// Who waits for what.
#[derive(Debug, Default)]
struct Waiting {
    next: u64,
    waiters: HashMap<u64, Waiter>,
    ended: Option<Status>,
}

#[derive(Debug)]
enum Waiter {
    Once(oneshot::Sender<Result<proto::Response, Status>>),
    Items(Arc<Mutex<Hearing>>),
}

/// Takes an item of a watch in the task of the connection, and says whether it takes the next.
type Take = Box<dyn FnMut(&proto::WatchResponse) -> bool + Send>;

/// Where the items of a watch go: to what takes them as they come, if there is any, else to who reads them.
struct Hearing {
    take: Option<Take>,
    /// `None` once nothing more is heard.
    read: Option<mpsc::UnboundedSender<Result<proto::WatchResponse, Status>>>,
}

impl Conversation {
    pub(crate) fn begin(channel: Connection) -> Self {
        let (asking, asked) = mpsc::unbounded_channel();
        let waiting = Arc::<Mutex<Waiting>>::default();
        let cluster = Arc::<OnceLock<_>>::default();
        let (waits, of) = (waiting.clone(), cluster.clone());
        tokio::spawn(async move {
            // Also when the runtime of this task stops, or the task panics: nobody who waits would notice.
            let mut ends = Ends {
                waiting: waits.clone(),
                status: gone(),
            };
            ends.status = hear(channel, asked, &waits, &of).await;
        });
        Self {
            asking,
            waiting,
            cluster,
        }
    }

    /// The cluster of the member that answers. It is known before the first response is, unless the member is of a version
    /// that does not send it, or does not know its cluster yet.
    pub(crate) fn cluster(&self) -> Option<[u8; 16]> {
        self.cluster.get().copied()
    }

    #[cfg(test)]
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.waiting, &other.waiting)
    }

    /// Whether whatever is asked now is answered with an error: the stream broke.
    pub(crate) fn has_ended(&self) -> bool {
        self.waiting.lock().ended.is_some()
    }

    /// Asks, and waits however long. Dropping the future leaves open what becomes of the request.
    pub(crate) async fn ask(&self, request: proto::Request) -> Result<proto::Response, Status> {
        self.once(Ask::Request(request.into())).await
    }

    /// Waits until a key is gone, and for what is listed then. Dropping the future ends the wait.
    pub(crate) async fn once_gone(&self, gone: proto::OnceGone) -> Result<proto::Response, Status> {
        self.once(Ask::OnceGone(gone.into())).await
    }

    async fn once(&self, what: Ask) -> Result<proto::Response, Status> {
        let size = what.encoded_len();
        if size > MAX_PART {
            // It could not be encoded, and would end the stream with all that is in flight on it.
            let too_large = Error::TooLarge {
                what: "a request",
                size,
                limit: MAX_PART,
            };
            return Ok(Answer::Failure(said(&too_large)).into());
        }
        let (tell, told) = oneshot::channel();
        let _asked = self.send(Waiter::Once(tell), what)?;
        told.await.unwrap_or_else(|_| Err(gone()))
    }

    /// Begins a watch, which ends when it is dropped.
    pub(crate) fn watch(&self, request: proto::WatchRequest) -> Result<Items, Status> {
        let (tell, told) = mpsc::unbounded_channel();
        let (take, read) = (None, Some(tell));
        let hearing = Arc::new(Mutex::new(Hearing { take, read }));
        Ok(Items {
            told,
            hearing: Arc::downgrade(&hearing),
            _asked: self.send(Waiter::Items(hearing), Ask::Watch(request.into()))?,
        })
    }

    fn send(&self, waiter: Waiter, what: Ask) -> Result<Question, Status> {
        let number = self.waiting.lock().add(waiter)?;
        let question = Question {
            number,
            lasts: !matches!(what, Ask::Request(_)),
            conversation: self.clone(),
        };
        let what = Some(what);
        // Nobody hears it any more; that it has ended is told to all who wait.
        let _ = self.asking.send(proto::Asked { number, what });
        Ok(question)
    }
}

/// One that was asked, and is not waited for once this is dropped.
#[derive(Debug)]
struct Question {
    number: u64,
    /// It is worked on until it is cancelled, however long.
    lasts: bool,
    conversation: Conversation,
}

impl Drop for Question {
    fn drop(&mut self) {
        let number = self.number;
        let waiter = self.conversation.waiting.lock().waiters.remove(&number);
        if self.lasts && waiter.is_some() {
            let what = Some(Ask::Cancel(proto::Unit {}));
            // It may have ended.
            let _ = self.conversation.asking.send(proto::Asked { number, what });
        }
    }
}

/// What a watch is told. Nobody waits for its reader: that one has to read on.
#[derive(Debug)]
pub(crate) struct Items {
    told: mpsc::UnboundedReceiver<Result<proto::WatchResponse, Status>>,
    hearing: Weak<Mutex<Hearing>>,
    _asked: Question,
}

impl Items {
    /// The next; `None` once it has ended.
    pub(crate) async fn message(&mut self) -> Result<Option<proto::WatchResponse>, Status> {
        self.told.recv().await.transpose()
    }

    /// Has what comes taken as it comes, in the task of the connection, which has to be quick: it is not read any more.
    /// The stream ends when it takes no more. Nothing is done as long as something is there to be read, which comes first.
    pub(crate) fn hear(&self, take: impl FnMut(&proto::WatchResponse) -> bool + Send + 'static) {
        let Some(hearing) = self.hearing.upgrade() else {
            return;
        };
        let mut hearing = hearing.lock();
        if self.told.is_empty() {
            hearing.take = Some(Box::new(take));
        }
    }
}

impl Hearing {
    fn tell(&mut self, item: &proto::WatchResponse) {
        match (&mut self.take, &self.read) {
            (Some(take), _) => {
                if !take(item) {
                    (self.take, self.read) = (None, None);
                }
            }
            (None, Some(read)) => drop(read.send(Ok(item.clone()))),
            (None, None) => {}
        }
    }
}

impl fmt::Debug for Hearing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let taken = self.take.is_some();
        f.debug_struct("Hearing").field("taken", &taken).finish_non_exhaustive()
    }
}

impl Waiting {
    fn add(&mut self, waiter: Waiter) -> Result<u64, Status> {
        if let Some(ended) = &self.ended {
            return Err(ended.clone());
        }
        self.next += 1;
        self.waiters.insert(self.next, waiter);
        Ok(self.next)
    }

    fn end(&mut self, status: Status) {
        for (_, waiter) in self.waiters.drain() {
            match waiter {
                Waiter::Once(waiter) => drop(waiter.send(Err(status.clone()))),
                Waiter::Items(hearing) => {
                    let read = &hearing.lock().read;
                    let _ = read.as_ref().map(|read| read.send(Err(status.clone())));
                }
            }
        }
        self.ended = Some(status);
    }
}

/// Passes on what is told; who gave up waiting is not there any more.
fn tell(waiting: &Mutex<Waiting>, told: proto::Told) {
    let number = &told.number;
    let mut waiting = waiting.lock();
    match told.what {
        Some(Tell::Item(item)) => {
            let hearing = |number| match waiting.waiters.get(number) {
                Some(Waiter::Items(hearing)) => Some(hearing.clone()),
                _ => None,
            };
            let all: Vec<_> = std::iter::once(number).chain(&told.also).filter_map(hearing).collect();
            // Nobody who asks something else waits for it.
            drop(waiting);
            for hearing in all {
                hearing.lock().tell(&item);
            }
        }
        Some(Tell::Response(response)) => {
            if matches!(waiting.waiters.get(number), Some(Waiter::Once(_)))
                && let Some(Waiter::Once(waiter)) = waiting.waiters.remove(number)
            {
                drop(waiter.send(Ok(response)));
            }
        }
        None => drop(waiting.waiters.remove(number)),
    }
}

/// Ends what waits when it is dropped.
struct Ends {
    waiting: Arc<Mutex<Waiting>>,
    status: Status,
}

impl Drop for Ends {
    fn drop(&mut self) {
        self.waiting.lock().end(self.status.clone());
    }
}

/// Says what is asked and passes on what is told, until one of both has an end.
async fn hear(
    channel: Connection,
    asked: mpsc::UnboundedReceiver<proto::Asked>,
    waiting: &Mutex<Waiting>,
    cluster: &OnceLock<[u8; 16]>,
) -> Status {
    let add = |together: &mut Vec<_>, asked: proto::Asked| {
        let bytes = asked.encoded_len();
        together.push(asked);
        bytes
    };
    let asked = together(asked, mpsc::UnboundedReceiver::poll_recv, add, |asked| {
        proto::AskedTogether { asked }
    });
    let mut told = match Remote::client(channel).converse(asked).await {
        Ok(told) => told.into_inner(),
        Err(status) => return status,
    };
    loop {
        match told.message().await {
            Ok(Some(together)) => {
                if let Ok(of) = <[u8; 16]>::try_from(&*together.cluster) {
                    cluster.get_or_init(|| of);
                }
                together.told.into_iter().for_each(|told| tell(waiting, told));
            }
            Ok(None) => return gone(),
            Err(status) => return status,
        }
    }
}

fn gone() -> Status {
    Status::unavailable("the other side has ended the conversation")
}

/// What waits, as few messages: nobody waits for more to come. A message has parts, to which `add` adds one that waits and
/// says how many bytes it takes.
fn together<R, W, P, M>(
    receiver: R,
    poll: impl Fn(&mut R, &mut std::task::Context<'_>) -> std::task::Poll<Option<W>>,
    mut add: impl FnMut(&mut Vec<P>, W) -> usize,
    mut message: impl FnMut(Vec<P>) -> M,
) -> impl Stream<Item = M>
where
    R: Unpin,
{
    use std::task::Poll;
    let mut receiver = receiver;
    stream::poll_fn(move |context| {
        let (mut parts, mut bytes) = (Vec::new(), 0);
        while parts.len() < TOGETHER && bytes < TOGETHER_BYTES {
            match poll(&mut receiver, context) {
                Poll::Ready(Some(waits)) => bytes += add(&mut parts, waits),
                Poll::Ready(None) if parts.is_empty() => return Poll::Ready(None),
                Poll::Pending if parts.is_empty() => return Poll::Pending,
                Poll::Ready(None) | Poll::Pending => break,
            }
        }
        Poll::Ready(Some(message(parts)))
    })
}
