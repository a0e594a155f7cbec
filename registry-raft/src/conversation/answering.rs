//! The side that is asked.
//!
//! Whoever asks may be broken, or mean no good: what is worked on, watched and waits to be taken has bounds of its own for
//! each conversation.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use prost::Message;
use registry_api::Error;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::{AbortHandle, JoinSet};
use tonic::Status;

use super::sharing::{Lately, SharedItem, shared};
use super::{Ask, TOGETHER, Tell, together};
use crate::proto;
use crate::proto::request::Call;
use crate::proto::response::Answer;
use crate::proto::watch_response::Item;
use crate::service::{Service, said};
use crate::transport::MAX_PART;

/// How many requests of one conversation are worked on at once; the next are not read meanwhile.
const AT_ONCE: u32 = 1024;
/// For how many a list counts, whose answer may be as large as those of so many others.
const LIST: u32 = AT_ONCE / 32;
/// For how many bytes of a request it counts as one more: 16 MiB of requests are worked on at once, beside the message that
/// was read last.
const REQUEST_BYTES: usize = (16 << 20) / AT_ONCE as usize;
/// How many watches and waits one conversation has at the most; one more is refused.
pub(super) const WATCHES: usize = 4096;
/// How much that is told waits for the connection to take it, in parts and in bytes. A part that is larger waits alone.
const TOLD: usize = 256;
const TOLD_BYTES: usize = 4 << 20;
/// What a part takes besides what it says.
const PART_BYTES: usize = 16;
/// An answer up to this size waits for room as it is: `AT_ONCE` of them are as much as may wait anyway.
const SMALL: usize = TOLD_BYTES / AT_ONCE as usize;
/// A conversation ends of which nothing was taken for so long, or twice that, though something waits.
const DEAF: Duration = Duration::from_secs(30);

/// Answers all that is asked until nobody asks or hears any more, or the member stops: what was begun is answered then.
pub(crate) fn answer(
    service: Service,
    asked: impl Stream<Item = Result<proto::AskedTogether, Status>> + Send + Unpin + 'static,
    stopping: watch::Receiver<bool>,
) -> impl Stream<Item = Result<proto::ToldTogether, Status>> + Send {
    answer_unless(service, asked, stopping, DEAF)
}

/// As [`answer`], with another time after which nobody is taken to hear.
pub(super) fn answer_unless(
    service: Service,
    asked: impl Stream<Item = Result<proto::AskedTogether, Status>> + Send + Unpin + 'static,
    mut stopping: watch::Receiver<bool>,
    deaf: Duration,
) -> impl Stream<Item = Result<proto::ToldTogether, Status>> + Send {
    let (tell, told) = mpsc::channel(TOLD);
    let telling = Telling {
        tell,
        room: Arc::new(Semaphore::new(TOLD_BYTES)),
        taken: Arc::default(),
    };
    let taken = telling.taken.clone();
    let mut last = None;
    let (answers, mut said) = (service.clone(), false);
    tokio::spawn(async move {
        tokio::select! {
            () = read(service, asked, &telling) => {}
            () = telling.tell.closed() => {}
            () = telling.deaf(deaf) => {
                tracing::warn!(for_at_least = ?deaf, "a handle takes nothing of what it is told: its conversation ends");
                // Whoever waits for room gives up.
                telling.room.close();
            }
            // An error says that the member is gone.
            _ = stopping.wait_for(|stop| *stop) => {}
        }
    });
    let add = move |told: &mut Vec<proto::Told>, waiting: Waiting| {
        taken.fetch_add(1, Ordering::Relaxed);
        waiting.add_to(told, &mut last)
    };
    together(told, mpsc::Receiver::poll_recv, add, move |told| {
        let cluster = answers.cluster().filter(|_| !said);
        said |= cluster.is_some();
        proto::ToldTogether {
            told,
            cluster: cluster.map_or_else(Bytes::new, |cluster| Bytes::copy_from_slice(&cluster)),
        }
    })
    .map(Ok)
}

/// What is to be told, with its place among what waits for the connection.
struct Waiting {
    number: u64,
    what: What,
    _place: OwnedSemaphorePermit,
}

enum What {
    Response(proto::Response),
    Item(SharedItem),
    End,
}

impl What {
    fn bytes(&self) -> usize {
        let what = match self {
            Self::Response(response) => response.encoded_len(),
            Self::Item(item) => item.bytes(),
            Self::End => 0,
        };
        what + PART_BYTES
    }

    /// Itself, or an error in its place if no message has room for it: that would end the conversation, and what else is in
    /// flight on it.
    fn fitting(self) -> Self {
        let bytes = self.bytes();
        if bytes <= MAX_PART {
            return self;
        }
        tracing::error!(bytes, "a response is too large to be sent");
        let source = format!("the response takes {bytes} bytes, a message has room for {MAX_PART}").into();
        let error = Error::OutcomeUnknown {
            operation: "a request",
            source,
        };
        match self {
            Self::Response(_) => Self::Response(Answer::Failure(said(&error)).into()),
            Self::Item(_) => failure(&error),
            Self::End => Self::End,
        }
    }
}

impl Waiting {
    /// Adds it to what is told together, and says how many bytes that takes. What the last part says too is not repeated.
    fn add_to(self, told: &mut Vec<proto::Told>, last: &mut Option<SharedItem>) -> usize {
        let bytes = self.what.bytes();
        let (what, item) = match self.what {
            What::Response(response) => (Some(Tell::Response(response)), None),
            What::Item(item) => {
                if let (Some(part), Some(last)) = (told.last_mut(), &*last)
                    && last.is(&item)
                {
                    part.also.push(self.number);
                    return PART_BYTES;
                }
                (Some(Tell::Item(item.message().clone())), Some(item))
            }
            What::End => (None, None),
        };
        *last = item;
        let (number, also) = (self.number, Vec::new());
        told.push(proto::Told { number, also, what });
        bytes
    }
}

/// Tells the other side. Clones share the room for what waits.
#[derive(Clone)]
struct Telling {
    tell: mpsc::Sender<Waiting>,
    room: Arc<Semaphore>,
    /// How much was taken, in parts.
    taken: Arc<AtomicU64>,
}

impl Telling {
    /// Waits for room, and says whether anybody hears it.
    async fn tell(&self, number: u64, what: What) -> bool {
        let what = what.fitting();
        match self.room.clone().acquire_many_owned(room_for(&what)).await {
            Ok(place) => self.tell_at(place, number, what).await,
            Err(_) => false,
        }
    }

    async fn tell_at(&self, place: OwnedSemaphorePermit, number: u64, what: What) -> bool {
        let waiting = Waiting {
            number,
            what,
            _place: place,
        };
        self.tell.send(waiting).await.is_ok()
    }

    /// Tells what was read. A large answer does not wait for room: it is read again when there is some, so that what waits
    /// unread costs little, however much is asked for.
    async fn tell_read<F: Future<Output = proto::Response>>(&self, number: u64, read: impl Fn() -> F) -> bool {
        let mut had = None::<OwnedSemaphorePermit>;
        loop {
            let told = What::Response(read().await).fitting();
            let needs = room_for(&told);
            let place = match had.take() {
                Some(place) if place.num_permits() >= needs as usize => Ok(place),
                _ => self.room.clone().try_acquire_many_owned(needs),
            };
            match place {
                Ok(place) => return self.tell_at(place, number, told).await,
                Err(_) if needs as usize <= SMALL => return self.tell(number, told).await,
                Err(_) => drop(told),
            }
            match self.room.clone().acquire_many_owned(needs).await {
                Ok(place) => had = Some(place),
                Err(_) => return false,
            }
        }
    }

    /// Waits until nothing was taken for so long of what waits.
    async fn deaf(&self, patience: Duration) {
        let mut before = None;
        loop {
            let waits = self.room.available_permits() < TOLD_BYTES;
            let taken = waits.then(|| self.taken.load(Ordering::Relaxed));
            if waits && taken == before {
                return;
            }
            before = taken;
            tokio::time::sleep(patience).await;
        }
    }
}

/// How much of the room it takes.
fn room_for(what: &What) -> u32 {
    u32::try_from(what.bytes().min(TOLD_BYTES)).unwrap_or(u32::MAX)
}

/// What is done with a question that is no watch.
enum Work {
    Answer(Box<proto::Request>),
    Refuse(What),
}

/// Works on what is asked.
async fn read(
    service: Service,
    mut asked: impl Stream<Item = Result<proto::AskedTogether, Status>> + Unpin,
    telling: &Telling,
) {
    let room = Arc::new(Semaphore::new(AT_ONCE as usize));
    // Those that nobody cancelled end with this.
    let mut watches = Watches::default();
    let lately = Arc::<Lately>::default();
    loop {
        let together = match asked.next().await {
            // No handle puts more into one.
            Some(Ok(together)) if together.asked.len() <= TOGETHER => together,
            // It was said to the end, or broke off.
            Some(_) | None => return,
        };
        for proto::Asked { number, what } in together.asked {
            let work = match what {
                Some(Ask::Watch(request)) if watches.have_room_for(number) => {
                    watches.begin(
                        number,
                        items(service.clone(), *request, lately.clone(), number, telling.clone()),
                    );
                    continue;
                }
                Some(Ask::OnceGone(gone)) if watches.have_room_for(number) => {
                    watches.begin(number, once_gone(service.clone(), *gone, number, telling.clone()));
                    continue;
                }
                Some(Ask::Cancel(_)) => {
                    watches.cancel(number);
                    continue;
                }
                Some(Ask::Watch(_)) => Work::Refuse(failure(&one_watch_too_many())),
                Some(Ask::OnceGone(_)) => {
                    let failure = Answer::Failure(said(&one_watch_too_many()));
                    Work::Refuse(What::Response(failure.into()))
                }
                Some(Ask::Request(request)) => Work::Answer(request),
                None => Work::Answer(Box::default()),
            };
            let counts_for = match &work {
                Work::Answer(request) => weight(request),
                Work::Refuse(_) => 1,
            };
            let Ok(place) = room.clone().acquire_many_owned(counts_for).await else {
                return;
            };
            let (service, telling) = (service.clone(), telling.clone());
            tokio::spawn(async move {
                // Nobody may hear it any more.
                let _ = match work {
                    Work::Answer(request) => one(&service, *request, number, &telling).await,
                    Work::Refuse(what) => refuse(what, number, &telling).await,
                };
                drop(place);
            });
        }
    }
}

/// For how many requests one counts: what it and its response may take in memory.
fn weight(request: &proto::Request) -> u32 {
    let list = if matches!(request.call, Some(Call::List(_))) {
        LIST
    } else {
        1
    };
    let bytes = u32::try_from(request.encoded_len() / REQUEST_BYTES).unwrap_or(AT_ONCE);
    list.saturating_add(bytes).min(AT_ONCE)
}

/// The watches of a conversation, and the waits, by the numbers that the other side gives them.
#[derive(Default)]
struct Watches {
    tasks: JoinSet<u64>,
    by_number: HashMap<u64, AbortHandle>,
}

impl Watches {
    fn have_room_for(&mut self, number: u64) -> bool {
        self.forget_ended();
        self.by_number.len() < WATCHES || self.by_number.contains_key(&number)
    }

    /// One of the same number makes room for it.
    fn begin(&mut self, number: u64, watch: impl Future<Output = u64> + Send + 'static) {
        let begun = self.tasks.spawn(watch);
        if let Some(before) = self.by_number.insert(number, begun) {
            before.abort();
        }
    }

    fn cancel(&mut self, number: u64) {
        if let Some(watch) = self.by_number.remove(&number) {
            watch.abort();
        }
    }

    /// Where the next begins, and not as each ends: whoever reads what is asked would be waked for it, before what the watch
    /// has told last is on its way.
    fn forget_ended(&mut self) {
        while let Some(ended) = self.tasks.try_join_next_with_id() {
            // One that was cancelled is not there any more, and its number may be another's.
            if let Ok((id, number)) = ended
                && self.by_number.get(&number).is_some_and(|watch| watch.id() == id)
            {
                self.by_number.remove(&number);
            }
        }
    }
}

/// Answers a request, and says whether anybody hears it.
async fn one(service: &Service, request: proto::Request, number: u64, telling: &Telling) -> bool {
    match &request.call {
        Some(Call::Get(_) | Call::List(_) | Call::Children(_)) => {
            let request = &request;
            let read = || async move { service.answer(request.clone()).await };
            telling.tell_read(number, read).await
        }
        _ => {
            telling
                .tell(number, What::Response(service.answer(request).await))
                .await
        }
    }
}

/// Tells the items of a watch, and its end; its number is left.
async fn items(
    service: Service,
    request: proto::WatchRequest,
    lately: Arc<Lately>,
    number: u64,
    telling: Telling,
) -> u64 {
    match service.watch(request).await {
        Ok((namespace, mut watch, mut cut_off)) => {
            // An empty one says that the watch has begun.
            let mut items = shared(vec![proto::WatchResponse::default()]);
            loop {
                for item in SharedItem::each(items) {
                    if !telling.tell(number, What::Item(item)).await {
                        return number;
                    }
                }
                let item = tokio::select! {
                    biased;
                    item = watch.next() => item,
                    error = cut_off.wait() => Some(Err(error)),
                };
                match item {
                    Some(item) => items = lately.say(&namespace, item),
                    None => break,
                }
            }
            telling.tell(number, What::End).await;
        }
        Err(error) => {
            refuse(failure(&error), number, &telling).await;
        }
    }
    number
}

/// Tells what is listed once a key is gone; its number is left.
async fn once_gone(service: Service, gone: proto::OnceGone, number: u64, telling: Telling) -> u64 {
    let response = service.once_gone(gone).await;
    // Nobody may hear it any more.
    telling.tell(number, What::Response(response)).await;
    number
}

fn failure(error: &Error) -> What {
    let failure = vec![Item::Failure(said(error)).into()];
    What::Item(SharedItem(shared(failure), 0))
}

fn one_watch_too_many() -> Error {
    Error::InvalidRequest(format!("more than {WATCHES} watches of one handle"))
}

/// Tells a refusal, and that nothing follows it.
async fn refuse(what: What, number: u64, telling: &Telling) -> bool {
    telling.tell(number, what).await && telling.tell(number, What::End).await
}

#[cfg(test)]
mod tests {
    use super::super::sharing::Messages;
    use super::*;

    #[test]
    fn what_no_message_has_room_for_is_an_error_of_an_unknown_outcome() {
        let page = |bytes: usize| {
            let value = vec![0; bytes].into();
            let entries = vec![proto::Entry {
                value,
                ..proto::Entry::default()
            }];
            Answer::Page(proto::Page {
                entries,
                ..proto::Page::default()
            })
        };
        let fits = What::Response(page(MAX_PART - 100).into()).fitting();
        assert!(fits.bytes() > MAX_PART - 100);
        let What::Response(told) = What::Response(page(MAX_PART).into()).fitting() else {
            panic!("it is no response");
        };
        let Some(Answer::Failure(said)) = told.answer else {
            panic!("{told:?}");
        };
        assert!(matches!(crate::link::failure(said), Error::OutcomeUnknown { .. }));
    }

    /// However many a handle sends at once, and however large.
    #[test]
    fn a_conversation_works_on_a_bounded_number_of_bytes() {
        let command = |bytes: usize| {
            let operation = proto::Operation {
                key: "/ns/a".into(),
                write: Some(proto::operation::Write::Put(proto::Put {
                    value: vec![0; bytes].into(),
                    ..proto::Put::default()
                })),
            };
            let txn = proto::Txn {
                conditions: Vec::new(),
                operations: vec![operation],
            };
            let change = Some(proto::command::Change::Txn(txn));
            let command = proto::Command {
                change,
                ..proto::Command::default()
            };
            proto::Request {
                call: Some(Call::Command(command)),
                ..proto::Request::default()
            }
        };
        assert_eq!(weight(&command(100)), 1);
        let large = command(900_000);
        let at_once = (AT_ONCE / weight(&large)) as usize;
        assert!((8..=18).contains(&at_once), "{at_once}");
        assert!(at_once * large.encoded_len() <= 16 << 20);
        assert_eq!(weight(&command(100 << 20)), AT_ONCE);
    }

    #[test]
    fn what_the_last_part_says_too_is_told_with_it() {
        let room = Arc::new(Semaphore::new(100));
        let waiting = |number, what| Waiting {
            number,
            what,
            _place: room.clone().try_acquire_owned().unwrap(),
        };
        let two = shared(vec![Item::Synced(1).into(), Item::Synced(2).into()]);
        let equal = shared(vec![Item::Synced(1).into()]);
        let item = |messages: &Messages, at| What::Item(SharedItem(messages.clone(), at));
        let response = || What::Response(Answer::Done(proto::Unit {}).into());
        let waits = [
            (1, item(&two, 0)),
            (2, item(&two, 0)),
            (3, item(&two, 0)),
            (1, item(&two, 1)),
            (4, item(&equal, 0)),
            (5, response()),
            (6, response()),
            (7, What::End),
            (8, What::End),
            (9, item(&equal, 0)),
            (10, item(&equal, 0)),
        ];
        let (mut told, mut last) = (Vec::new(), None);
        for (number, what) in waits {
            waiting(number, what).add_to(&mut told, &mut last);
        }
        let numbers: Vec<_> = told.iter().map(|told| (told.number, told.also.clone())).collect();
        let alone = |number| (number, vec![]);
        assert_eq!(
            numbers,
            [
                (1, vec![2, 3]),
                alone(1),
                alone(4),
                alone(5),
                alone(6),
                alone(7),
                alone(8),
                (9, vec![10])
            ]
        );
        // Another message tells it again.
        let mut next = Vec::new();
        waiting(11, item(&equal, 0)).add_to(&mut next, &mut last);
        assert_eq!((next[0].number, &next[0].what), (11, &told[7].what));
        assert_eq!(room.available_permits(), 100);
    }
}
