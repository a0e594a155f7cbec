//! The side that is asked.

use std::collections::HashMap;
use std::sync::Arc;
use std::task::Context;

use futures_util::{Stream, StreamExt};
use prost::Message;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tonic::{Status, Streaming};

use super::{Ask, Tell, together};
use crate::proto;
use crate::proto::request::Call;
use crate::service::Service;

/// How many requests of one conversation are worked on at once; the next are not read meanwhile.
const AT_ONCE: u32 = 1024;
/// For how many a list counts, whose answer may be as large as those of so many others.
const LIST: u32 = AT_ONCE / 32;
/// How much that is told waits for the connection to take it, in parts and in bytes. A part that is larger waits alone.
const TOLD: usize = 256;
const TOLD_BYTES: usize = 4 << 20;

/// Answers all that is asked until nobody asks or hears any more, or the member stops: what was begun is answered then.
pub(crate) fn answer(
    service: Service,
    asked: Streaming<proto::AskedTogether>,
    stopping: watch::Receiver<bool>,
) -> impl Stream<Item = Result<proto::ToldTogether, Status>> + Send {
    let (tell, told) = mpsc::channel(TOLD);
    let room = Arc::new(Semaphore::new(TOLD_BYTES));
    tokio::spawn(read(service, asked, Telling { tell, room }, stopping));
    let next = |told: &mut mpsc::Receiver<Waiting>, context: &mut Context<'_>| {
        told.poll_recv(context)
            .map(|waiting| waiting.map(|waiting| waiting.told))
    };
    together(told, next, |told| proto::ToldTogether { told }).map(Ok)
}

/// What is to be told, with its place among what waits for the connection.
struct Waiting {
    told: proto::Told,
    _place: OwnedSemaphorePermit,
}

/// Tells the other side. Clones share the room for what waits.
#[derive(Clone)]
struct Telling {
    tell: mpsc::Sender<Waiting>,
    room: Arc<Semaphore>,
}

impl Telling {
    /// Waits for room, and says whether anybody hears it.
    async fn tell(&self, number: u64, what: Option<Tell>) -> bool {
        let told = proto::Told { number, what };
        let bytes = u32::try_from(told.encoded_len().min(TOLD_BYTES)).unwrap_or(u32::MAX);
        let Ok(place) = self.room.clone().acquire_many_owned(bytes).await else {
            return false;
        };
        self.tell.send(Waiting { told, _place: place }).await.is_ok()
    }
}

async fn read(
    service: Service,
    mut asked: Streaming<proto::AskedTogether>,
    telling: Telling,
    mut stopping: watch::Receiver<bool>,
) {
    let room = Arc::new(Semaphore::new(AT_ONCE as usize));
    // Those that nobody cancelled end with this.
    let (mut watches, mut by_number) = (JoinSet::new(), HashMap::new());
    loop {
        let together = tokio::select! {
            message = asked.message() => match message {
                Ok(Some(together)) => together,
                // It was said to the end, or broke off.
                Ok(None) | Err(_) => return,
            },
            Some(ended) = watches.join_next() => {
                // One that was cancelled is not there any more.
                if let Ok(number) = ended {
                    by_number.remove(&number);
                }
                continue;
            }
            () = telling.tell.closed() => return,
            // An error says that the member is gone.
            _ = stopping.wait_for(|stop| *stop) => return,
        };
        for proto::Asked { number, what } in together.asked {
            match what {
                Some(Ask::Watch(request)) => {
                    let (service, telling) = (service.clone(), telling.clone());
                    by_number.insert(number, watches.spawn(items(service, request, number, telling)));
                }
                Some(Ask::Cancel(_)) => {
                    if let Some(watch) = by_number.remove(&number) {
                        watch.abort();
                    }
                }
                request => {
                    let request = match request {
                        Some(Ask::Request(request)) => request,
                        _ => proto::Request::default(),
                    };
                    let counts_for = match &request.call {
                        Some(Call::List(_)) => LIST,
                        _ => 1,
                    };
                    let Ok(place) = room.clone().acquire_many_owned(counts_for).await else {
                        return;
                    };
                    let (service, telling) = (service.clone(), telling.clone());
                    tokio::spawn(async move {
                        let what = Some(Tell::Response(service.answer(request).await));
                        // Nobody may hear it any more.
                        let _ = telling.tell(number, what).await;
                        drop(place);
                    });
                }
            }
        }
    }
}

/// Tells the items of a watch, and its end; its number is left.
async fn items(service: Service, request: proto::WatchRequest, number: u64, telling: Telling) -> u64 {
    let mut items = service.watch(request).await;
    loop {
        let item = items.next().await;
        let ended = item.is_none();
        if !telling.tell(number, item.map(Tell::Item)).await || ended {
            return number;
        }
    }
}
