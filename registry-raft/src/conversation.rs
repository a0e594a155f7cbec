//! All that one side asks the other over a connection, on one stream of messages: what is asked or told in one moment
//! shares a message, so that many callers cost little more than one.

mod answering;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::Arc;

use futures_util::{Stream, stream};
use parking_lot::Mutex;
use prost::Message;
use tokio::sync::{mpsc, oneshot};
use tonic::Status;

use crate::proto;
use crate::proto::asked::What as Ask;
use crate::proto::told::What as Tell;
use crate::remote::Remote;
use crate::transport::Connection;

pub(crate) use answering::answer;

/// How many parts share a message, and how many bytes of them, but for the last.
const TOGETHER: usize = 256;
const TOGETHER_BYTES: usize = 256 << 10;

/// The asking side. Clones share it; it ends with the last of them, or when the stream breaks.
#[derive(Clone, Debug)]
pub(crate) struct Conversation {
    asking: mpsc::UnboundedSender<proto::Asked>,
    waiting: Arc<Mutex<Waiting>>,
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
    Items(mpsc::UnboundedSender<Result<proto::WatchResponse, Status>>),
}

impl Conversation {
    pub(crate) fn begin(channel: Connection) -> Self {
        let (asking, asked) = mpsc::unbounded_channel();
        let waiting = Arc::<Mutex<Waiting>>::default();
        let waits = waiting.clone();
        tokio::spawn(async move {
            let ended = hear(channel, asked, &waits).await;
            waits.lock().end(ended);
        });
        Self { asking, waiting }
    }

    /// Whether whatever is asked now is answered with an error: the stream broke.
    pub(crate) fn has_ended(&self) -> bool {
        self.waiting.lock().ended.is_some()
    }

    /// Asks, and waits however long. Dropping the future leaves open what becomes of the request.
    pub(crate) async fn ask(&self, request: proto::Request) -> Result<proto::Response, Status> {
        let (tell, told) = oneshot::channel();
        let _asked = self.send(Waiter::Once(tell), Ask::Request(request.into()))?;
        told.await.unwrap_or_else(|_| Err(gone()))
    }

    /// Begins a watch, which ends when it is dropped.
    pub(crate) fn watch(&self, request: proto::WatchRequest) -> Result<Items, Status> {
        let (tell, told) = mpsc::unbounded_channel();
        let asked = self.send(Waiter::Items(tell), Ask::Watch(request.into()))?;
        Ok(Items { told, _asked: asked })
    }

    fn send(&self, waiter: Waiter, what: Ask) -> Result<Question, Status> {
        let number = self.waiting.lock().add(waiter)?;
        let question = Question {
            number,
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
    conversation: Conversation,
}

impl Drop for Question {
    fn drop(&mut self) {
        let Self { number, conversation } = self;
        let waiter = conversation.waiting.lock().waiters.remove(number);
        if let Some(Waiter::Items(_)) = waiter {
            let (number, what) = (*number, Some(Ask::Cancel(proto::Unit {})));
            // It may have ended.
            let _ = conversation.asking.send(proto::Asked { number, what });
        }
    }
}

/// What a watch is told. Nobody waits for its reader: that one has to read on.
#[derive(Debug)]
pub(crate) struct Items {
    told: mpsc::UnboundedReceiver<Result<proto::WatchResponse, Status>>,
    _asked: Question,
}

impl Items {
    /// The next; `None` once it has ended.
    pub(crate) async fn message(&mut self) -> Result<Option<proto::WatchResponse>, Status> {
        self.told.recv().await.transpose()
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

    /// Passes on what is told; who gave up waiting is not there any more.
    fn tell(&mut self, told: proto::Told) {
        let number = &told.number;
        match (told.what, self.waiters.get(number)) {
            (Some(Tell::Item(item)), Some(Waiter::Items(waiter))) => drop(waiter.send(Ok(item))),
            (Some(Tell::Response(response)), Some(Waiter::Once(_))) => {
                if let Some(Waiter::Once(waiter)) = self.waiters.remove(number) {
                    drop(waiter.send(Ok(response)));
                }
            }
            (None, _) => drop(self.waiters.remove(number)),
            (Some(_), _) => {}
        }
    }

    fn end(&mut self, status: Status) {
        for (_, waiter) in self.waiters.drain() {
            match waiter {
                Waiter::Once(waiter) => drop(waiter.send(Err(status.clone()))),
                Waiter::Items(waiter) => drop(waiter.send(Err(status.clone()))),
            }
        }
        self.ended = Some(status);
    }
}

/// Says what is asked and passes on what is told, until one of both has an end.
async fn hear(channel: Connection, asked: mpsc::UnboundedReceiver<proto::Asked>, waiting: &Mutex<Waiting>) -> Status {
    let asked = together(asked, mpsc::UnboundedReceiver::poll_recv, |asked| {
        proto::AskedTogether { asked }
    });
    let mut told = match Remote::client(channel).converse(asked).await {
        Ok(told) => told.into_inner(),
        Err(status) => return status,
    };
    loop {
        match told.message().await {
            Ok(Some(together)) => {
                let mut waiting = waiting.lock();
                together.told.into_iter().for_each(|told| waiting.tell(told));
            }
            Ok(None) => return gone(),
            Err(status) => return status,
        }
    }
}

fn gone() -> Status {
    Status::unavailable("the other side has ended the conversation")
}

/// What waits, as few messages: nobody waits for more to come.
fn together<R, P, M>(
    receiver: R,
    poll: impl Fn(&mut R, &mut std::task::Context<'_>) -> std::task::Poll<Option<P>>,
    message: impl Fn(Vec<P>) -> M,
) -> impl Stream<Item = M>
where
    R: Unpin,
    P: Message,
{
    use std::task::Poll;
    let mut receiver = receiver;
    stream::poll_fn(move |context| {
        let (mut parts, mut bytes) = (Vec::new(), 0);
        while parts.len() < TOGETHER && bytes < TOGETHER_BYTES {
            match poll(&mut receiver, context) {
                Poll::Ready(Some(part)) => {
                    bytes += part.encoded_len();
                    parts.push(part);
                }
                Poll::Ready(None) if parts.is_empty() => return Poll::Ready(None),
                Poll::Pending if parts.is_empty() => return Poll::Pending,
                Poll::Ready(None) | Poll::Pending => break,
            }
        }
        Poll::Ready(Some(message(parts)))
    })
}
