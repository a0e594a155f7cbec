//! The side that is asked.

use std::collections::HashMap;
use std::sync::Arc;

use futures_util::{Stream, StreamExt};
use tokio::sync::{Semaphore, mpsc, watch};
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
/// How much that is told waits for the connection to take it.
const TOLD: usize = 256;

/// Answers all that is asked until nobody asks or hears any more, or the member stops: what was begun is answered then.
pub(crate) fn answer(
    service: Service,
    asked: Streaming<proto::AskedTogether>,
    stopping: watch::Receiver<bool>,
) -> impl Stream<Item = Result<proto::ToldTogether, Status>> + Send {
    let (tell, told) = mpsc::channel(TOLD);
    tokio::spawn(read(service, asked, tell, stopping));
    together(told, mpsc::Receiver::poll_recv, |told| proto::ToldTogether { told }).map(Ok)
}

async fn read(
    service: Service,
    mut asked: Streaming<proto::AskedTogether>,
    tell: mpsc::Sender<proto::Told>,
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
            () = tell.closed() => return,
            // An error says that the member is gone.
            _ = stopping.wait_for(|stop| *stop) => return,
        };
        for proto::Asked { number, what } in together.asked {
            match what {
                Some(Ask::Watch(request)) => {
                    let (service, tell) = (service.clone(), tell.clone());
                    by_number.insert(number, watches.spawn(items(service, request, number, tell)));
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
                    let (service, tell) = (service.clone(), tell.clone());
                    tokio::spawn(async move {
                        let what = Some(Tell::Response(service.answer(request).await));
                        // Nobody may hear it any more.
                        let _ = tell.send(proto::Told { number, what }).await;
                        drop(place);
                    });
                }
            }
        }
    }
}

/// Tells the items of a watch, and its end; its number is left.
async fn items(service: Service, request: proto::WatchRequest, number: u64, tell: mpsc::Sender<proto::Told>) -> u64 {
    let mut items = service.watch(request).await;
    loop {
        let item = items.next().await;
        let ended = item.is_none();
        let what = item.map(Tell::Item);
        if tell.send(proto::Told { number, what }).await.is_err() || ended {
            return number;
        }
    }
}
