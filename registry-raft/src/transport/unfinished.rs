//! What has come of messages that are not whole yet, on all connections together.
//!
//! A message is decoded when it is whole, and may be megabytes until then. A caller that sends the beginnings of many, on
//! many streams or connections, is bounded here: beyond [`MOST`] bytes the message that was begun first is given up, with
//! its stream. A caller that means to finish its messages is done within moments, so the oldest is seldom one of those.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use bytes::Buf;
use http_body::{Frame, SizeHint};
use parking_lot::Mutex;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::http::Request;

/// How many bytes of messages that are not whole a member holds.
const MOST: usize = 256 << 20;
/// What a message of gRPC begins with: whether it is compressed, and its length.
const HEAD: usize = 5;

/// Counts the bytes. Clones share the count.
#[derive(Clone, Debug)]
pub(super) struct Unfinished(Arc<Mutex<Messages>>);

#[derive(Debug)]
struct Messages {
    most: usize,
    bytes: usize,
    begun: u64,
    /// By the order in which they were begun.
    messages: BTreeMap<u64, Message>,
}

#[derive(Debug)]
struct Message {
    bytes: usize,
    waker: Option<Waker>,
}

impl Default for Unfinished {
    fn default() -> Self {
        Self::of_at_most(MOST)
    }
}

impl Unfinished {
    fn of_at_most(most: usize) -> Self {
        Self(Arc::new(Mutex::new(Messages {
            most,
            bytes: 0,
            begun: 0,
            messages: BTreeMap::new(),
        })))
    }

    /// The request, whose body counts.
    pub(super) fn count(&self, request: Request<Body>) -> Request<Body> {
        request.map(|body| {
            Body::new(Counted {
                body,
                place: Place {
                    unfinished: self.clone(),
                    message: None,
                },
                framing: Framing::default(),
            })
        })
    }
}

/// One stream's place among what is counted.
#[derive(Debug)]
struct Place {
    unfinished: Unfinished,
    /// The number of its message that is not whole, if there is one.
    message: Option<u64>,
}

impl Place {
    /// Notes how many bytes there are of a message that is not whole, and whether it is another one than before.
    fn note(&mut self, bytes: usize, another: bool) {
        if bytes == 0 || another {
            self.leave();
        }
        if bytes == 0 {
            return;
        }
        let messages = &mut *self.unfinished.0.lock();
        let number = *self.message.get_or_insert_with(|| {
            messages.begun += 1;
            messages.begun
        });
        let message = messages
            .messages
            .entry(number)
            .or_insert(Message { bytes: 0, waker: None });
        messages.bytes += bytes - message.bytes;
        message.bytes = bytes;
        while messages.bytes > messages.most
            && let Some((_, oldest)) = messages.messages.pop_first()
        {
            messages.bytes -= oldest.bytes;
            if let Some(waker) = oldest.waker {
                waker.wake();
            }
        }
    }

    /// Whether the message was given up. If not, whoever waits for more of it is woken once it is.
    fn is_given_up(&self, context: &Context<'_>) -> bool {
        let Some(number) = self.message else {
            return false;
        };
        match self.unfinished.0.lock().messages.get_mut(&number) {
            Some(message) => {
                message.waker = Some(context.waker().clone());
                false
            }
            None => true,
        }
    }

    fn leave(&mut self) {
        if let Some(number) = self.message.take() {
            let messages = &mut *self.unfinished.0.lock();
            if let Some(message) = messages.messages.remove(&number) {
                messages.bytes -= message.bytes;
            }
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.leave();
    }
}

/// Where in a stream of messages the next byte is.
#[derive(Debug, Default)]
struct Framing {
    head: [u8; HEAD],
    /// How many bytes there are of the present message, its head included.
    bytes: usize,
}

impl Framing {
    /// Goes on over what has come, and says whether a message ended in it.
    fn advance(&mut self, mut come: &[u8]) -> bool {
        let mut ended = false;
        while !come.is_empty() {
            if self.bytes < HEAD {
                let some = come.len().min(HEAD - self.bytes);
                self.head[self.bytes..][..some].copy_from_slice(&come[..some]);
                self.bytes += some;
                come = &come[some..];
            }
            if self.bytes >= HEAD {
                let [_, length @ ..] = self.head;
                let whole = HEAD + u32::from_be_bytes(length) as usize;
                let some = come.len().min(whole - self.bytes);
                self.bytes += some;
                come = &come[some..];
                if self.bytes == whole {
                    self.bytes = 0;
                    ended = true;
                }
            }
        }
        ended
    }
}

/// The body of a request, of which what is not whole counts.
#[derive(Debug)]
struct Counted {
    body: Body,
    place: Place,
    framing: Framing,
}

impl http_body::Body for Counted {
    type Data = bytes::Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        let this = &mut *self;
        if this.place.is_given_up(context) {
            let why = "a message was given up that took long to come, since too many are not whole";
            return Poll::Ready(Some(Err(Status::resource_exhausted(why))));
        }
        let polled = Pin::new(&mut this.body).poll_frame(context);
        if let Poll::Ready(Some(Ok(frame))) = &polled
            && let Some(data) = frame.data_ref()
        {
            let ended = this.framing.advance(data.chunk());
            this.place.note(this.framing.bytes, ended);
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt;
    use tonic::codegen::Bytes;

    use super::*;

    fn message(length: u32, come: usize) -> Vec<u8> {
        [&[0][..], &length.to_be_bytes(), &vec![7; come]].concat()
    }

    #[test]
    fn the_bytes_of_a_message_count_until_it_is_whole() {
        let stream = [message(10, 10), message(0, 0), message(300, 300), message(9, 4)].concat();
        for piece in [1, 2, 4, 5, 7, 100, 1_000] {
            let (mut framing, mut ended) = (Framing::default(), 0);
            for come in stream.chunks(piece) {
                ended += usize::from(framing.advance(come));
            }
            assert_eq!(framing.bytes, HEAD + 4, "in pieces of {piece}");
            assert!(if piece < 5 {
                ended == 3
            } else {
                (1..=3).contains(&ended)
            });
        }
    }

    /// A stream of what comes on the receiver, as a service reads it.
    fn stream(unfinished: &Unfinished) -> (tokio::sync::mpsc::UnboundedSender<Bytes>, Body) {
        let (send, come) = tokio::sync::mpsc::unbounded_channel::<Bytes>();
        let come = tokio_stream::wrappers::UnboundedReceiverStream::new(come);
        let body = Body::new(Coming(come.boxed()));
        (send, unfinished.count(Request::new(body)).into_body())
    }

    struct Coming(futures_util::stream::BoxStream<'static, Bytes>);

    impl http_body::Body for Coming {
        type Data = Bytes;
        type Error = Status;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            context: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
            self.0
                .poll_next_unpin(context)
                .map(|next| next.map(|bytes| Ok(Frame::data(bytes))))
        }
    }

    async fn read(body: &mut Body) -> Result<usize, Status> {
        let frame = std::future::poll_fn(|context| http_body::Body::poll_frame(Pin::new(&mut *body), context)).await;
        frame.map_or(Ok(0), |frame| {
            frame.map(|frame| frame.into_data().map_or(0, |data| data.len()))
        })
    }

    #[tokio::test]
    async fn the_message_that_was_begun_first_is_given_up() {
        let unfinished = Unfinished::of_at_most(1_000);
        let held = || unfinished.0.lock().bytes;
        let (first, mut first_body) = stream(&unfinished);
        let (second, mut second_body) = stream(&unfinished);
        first.send(message(5_000, 495).into()).unwrap();
        assert_eq!(read(&mut first_body).await.unwrap(), 500);
        // One message after the other counts for nothing once it is whole.
        for _ in 0..100 {
            let whole = message(400, 400);
            let (begin, rest) = whole.split_at(100);
            for (piece, counts) in [(begin, 100), (rest, 0)] {
                second.send(Bytes::copy_from_slice(piece)).unwrap();
                assert_eq!(read(&mut second_body).await.unwrap(), piece.len());
                assert_eq!(held(), 500 + counts);
            }
        }
        second.send(message(5_000, 495).into()).unwrap();
        assert_eq!(read(&mut second_body).await.unwrap(), 500);
        assert_eq!(held(), 1_000);
        // It waits for more, and is told.
        let more = async {
            tokio::task::yield_now().await;
            second.send(vec![7; 100].into()).unwrap();
            read(&mut second_body).await
        };
        let (given_up, more) = tokio::join!(read(&mut first_body), more);
        assert_eq!(given_up.unwrap_err().code(), tonic::Code::ResourceExhausted);
        assert_eq!((more.unwrap(), held()), (100, 600));
        drop(second_body);
        assert_eq!(held(), 0);
    }
}
