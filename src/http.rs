//! A small door for HTTP: keys, watches, health and metrics, for `curl` and for Prometheus.
//!
//! It is over the trait, as any other program; what each path answers is in the book (`docs/rest.md`). A request waits no
//! longer than the handle's `request_timeout`, a body is read up to the size of a value, headers and bodies have to come in
//! time, and a reader that is slow holds its own connection only: a watch is folded for it (W6).

mod answer;
mod kv;
mod metrics;
mod watch;

use std::convert::Infallible;
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::http::request::Parts;
use axum::http::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use registry_api::Registry;
use registry_raft::{Gate, Guard, Status, Stream};
use tokio::sync::{Semaphore, SetOnce, watch as signal};

use answer::Refusal;

/// How many connections there may be; more wait their turn.
const CONNECTIONS: usize = 512;
/// How many requests one of them makes at once.
const STREAMS: u32 = 16;
/// How long the head of a request may take, and a connection have no request in flight.
const PATIENCE: Duration = Duration::from_secs(15);
/// How long a request waits for the handle at the start.
const ARRIVAL: Duration = Duration::from_secs(5);
/// How long what is under way may take to end when the server stops, its session too, and the rest of a body that is not
/// needed.
const GRACE: Duration = Duration::from_secs(1);

/// What every request is answered from.
#[derive(Clone)]
struct Door {
    registry: Arc<SetOnce<Arc<dyn Registry>>>,
    status: Arc<dyn Fn() -> Status + Send + Sync>,
    guard: Guard,
}

/// Answers until `stop`. The handle may come later, `connecting`: requests wait a little for it, and are then told that there
/// is none.
pub async fn serve(
    mut gate: Gate,
    connecting: impl Future<Output = Arc<dyn Registry>>,
    status: impl Fn() -> Status + Send + Sync + 'static,
    stop: impl Future<Output = ()>,
) {
    let door = Door {
        registry: Arc::default(),
        status: Arc::new(status),
        guard: gate.guard(),
    };
    let (stopping, stopped) = signal::channel(false);
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let (mut connecting, mut stop) = (pin!(connecting), pin!(stop));
    loop {
        let next = async {
            let place = places.clone().acquire_owned().await;
            (place, gate.next().await)
        };
        tokio::select! {
            registry = &mut connecting, if door.registry.get().is_none() => {
                // It is set here alone.
                let _ = door.registry.set(registry);
            }
            next = next => match next {
                (Ok(place), Some(stream)) => {
                    let answering = answer_all(door.clone(), stream, stopped.clone());
                    tokio::spawn(async move {
                        answering.await;
                        drop(place);
                    });
                }
                _ => break,
            },
            () = &mut stop => break,
        }
    }
    stopping.send_replace(true);
    drop(stopped);
    // Until the last connection is gone, or is not waited for any more.
    let _ = tokio::time::timeout(2 * GRACE, stopping.closed()).await;
    if let Some(registry) = door.registry.get()
        && !matches!(tokio::time::timeout(GRACE, registry.close()).await, Ok(Ok(())))
    {
        tracing::warn!("the session of the HTTP door ends by expiry");
    }
}

/// Answers the requests of one connection.
async fn answer_all(door: Door, stream: Stream, mut stopped: signal::Receiver<bool>) {
    let (requests, mut changes) = signal::channel(0_usize);
    let requests = Arc::new(requests);
    let service = tower::service_fn(move |request: Request<hyper::body::Incoming>| {
        let (door, in_flight) = (door.clone(), InFlight::new(&requests));
        async move {
            let response = door.answer(request.map(Body::new)).await;
            Ok::<_, Infallible>(response.map(|body| {
                Body::new(Responding {
                    body,
                    _in_flight: in_flight,
                })
            }))
        }
    });
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(PATIENCE);
    // Each request may bring a body of the largest value.
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(PATIENCE)
        .max_concurrent_streams(STREAMS);
    let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(service)));
    let asked_to_stop = async {
        // An error says that the server is gone.
        let _ = stopped.wait_for(|stop| *stop).await;
    };
    // One that only responds to pings would keep its place for ever.
    let idle = async {
        loop {
            match tokio::time::timeout(PATIENCE, changes.changed()).await {
                Err(_) if *changes.borrow() == 0 => return,
                Err(_) | Ok(Ok(())) => {}
                // It has ended.
                Ok(Err(_)) => std::future::pending().await,
            }
        }
    };
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = async { tokio::select! { () = asked_to_stop => {}, () = idle => {} } } => {
            connection.as_mut().graceful_shutdown();
            match tokio::time::timeout(GRACE, connection).await {
                Ok(ended) => ended,
                // A watch has no end of its own.
                Err(_) => return,
            }
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection ended early");
    }
}

/// One request that is in flight until this is dropped.
struct InFlight(Arc<signal::Sender<usize>>);

impl InFlight {
    fn new(requests: &Arc<signal::Sender<usize>>) -> Self {
        requests.send_modify(|count| *count += 1);
        Self(requests.clone())
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

/// The body of a response, whose request is in flight until it is sent.
struct Responding {
    body: Body,
    _in_flight: InFlight,
}

impl hyper::body::Body for Responding {
    type Data = <Body as hyper::body::Body>::Data;
    type Error = <Body as hyper::body::Body>::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<hyper::body::Frame<Self::Data>, Self::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        self.body.size_hint()
    }
}

/// What `HEAD` is answered: with HTTP/1 hyper leaves the body out, with HTTP/2 it would send it.
fn without_body(mut answer: Response<Body>) -> Response<Body> {
    let body = std::mem::replace(answer.body_mut(), Body::empty());
    if let Some(length) = hyper::body::Body::size_hint(&body).exact().filter(|length| *length > 0) {
        answer
            .headers_mut()
            .entry(header::CONTENT_LENGTH)
            .or_insert(length.into());
    }
    answer
}

impl Door {
    async fn answer(&self, request: Request<Body>) -> Response<Body> {
        let (head, mut body) = request.into_parts();
        let answer = self.try_answer(&head, &mut body).await;
        kv::let_go(&mut body).await;
        let answer = answer.unwrap_or_else(Refusal::response);
        match head.method {
            Method::HEAD => without_body(answer),
            _ => answer,
        }
    }

    async fn try_answer(&self, head: &Parts, body: &mut Body) -> Result<Response<Body>, Refusal> {
        let authorization = head.headers.get(header::AUTHORIZATION);
        if !self.guard.admits(authorization.map(header::HeaderValue::as_bytes)) {
            return Err(Refusal::unauthorized());
        }
        let path = head.uri.path();
        let get = || match head.method {
            Method::GET | Method::HEAD => Ok(()),
            _ => Err(Refusal::method("GET, HEAD")),
        };
        match path {
            "/health" => {
                get()?;
                let health = self.registry().await?.health().await?;
                Ok(answer::json(
                    StatusCode::OK,
                    &serde_json::json!({ "ok": true, "revision": health.revision.0 }),
                ))
            }
            "/metrics" => {
                get()?;
                Ok(metrics::response(&(self.status)()))
            }
            "/v1/members" => {
                get()?;
                Ok(answer::json(StatusCode::OK, &serde_json::json!((self.status)())))
            }
            path => match (path.strip_prefix("/v1/kv"), path.strip_prefix("/v1/watch")) {
                (Some(name), _) if name.starts_with('/') => kv::answer(self.registry().await?, name, head, body).await,
                (_, Some(name)) if name.starts_with('/') => {
                    get()?;
                    watch::answer(self.registry().await?, name, head).await
                }
                _ => Err(Refusal::new(
                    StatusCode::NOT_FOUND,
                    "not_found",
                    "there is nothing at this path",
                )),
            },
        }
    }

    async fn registry(&self) -> Result<&Arc<dyn Registry>, Refusal> {
        let none = || {
            Refusal::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "unavailable",
                "the group has no Raft leader yet",
            )
        };
        tokio::time::timeout(ARRIVAL, self.registry.wait())
            .await
            .map_err(|_| none())
    }
}
