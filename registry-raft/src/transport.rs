//! The one place where connections are made and taken, and where both sides prove who they are.
//!
//! Whoever speaks to a member, another member or a handle, does it through [`Transport::dial`], and a member answers
//! through [`Transport::listen`] and [`Transport::serve`], whatever services it has: with `[registry.raft.tls]` both
//! sides present a certificate that the same authority signed, and with `token_file` each request carries the token. No
//! service looks at either; a request that reaches one is from somebody who may ask.
//!
//! ```text
//! let transport = Transport::new(&config)?;                          // reads the files
//! let client = RegistryClient::new(transport.dial("10.0.0.1:7480", patience).await?);
//! let listener = transport.listen("listen", address).await?;
//! transport.serve(listener, Routes::new(service).add_service(another), stopping).await;
//! ```
//!
//! A refusal is told apart from silence: a connection that [`Transport::dial`] answered is one that the other side has
//! taken, certificate and all.

mod gate;
mod refusal;
mod tls;
mod token;
mod unfinished;

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use futures_util::StreamExt;
use hyper_util::rt::TokioIo;
use registry_api::{Error, Result};
use tokio::net::{TcpListener, TcpStream};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::codegen::InterceptedService;
use tonic::codegen::http::Uri;
use tonic::service::Routes;
use tonic::service::interceptor::InterceptorLayer;
use tonic::transport::{Channel, Endpoint, Server};
use tower::util::MapRequestLayer;

use crate::config::RaftConfig;
use crate::link::BACKEND;
use refusal::Refusal;
use tls::Proofs;
use token::{Demand, Say, Token};
use unfinished::Unfinished;

pub use gate::{Gate, Guard};
pub(crate) use refusal::status_error;

/// The largest message either side takes: a transaction or a page, and some room.
pub(crate) const MAX_MESSAGE: usize = 8 << 20;
/// The size at which what has many parts is cut into several messages: by what the parts take encoded, the last one not
/// counted. A part is at most a transaction.
pub(crate) const CUT: usize = MAX_MESSAGE / 4;
/// The largest part that shares a message with others: what does not fit is replaced by an error before it is sent, since a
/// message that can't be encoded ends the stream, and all that is in flight on it.
pub(crate) const MAX_PART: usize = MAX_MESSAGE - (1 << 20);
/// What a part of a repeated field takes besides its own bytes: the tag and the length.
const PART_HEAD: usize = 6;

/// How many bytes a part takes in a repeated field, at most.
pub(crate) fn part_len(part: &impl prost::Message) -> usize {
    part.encoded_len() + PART_HEAD
}
/// How many bytes may be on their way before the other side has read any.
const WINDOW: u32 = 1 << 20;
/// The largest frame that is taken: each is a system call of its own to whoever sends. HTTP/2 has 16 KiB, a third of what a
/// member gets at once of what a hundred callers put.
const FRAME: u32 = WINDOW / 4;
/// How long the other side may take to take a connection, handshake and all.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a connection may be silent before it is asked for a sign of life, and how long for the answer.
const SILENCE: Duration = Duration::from_secs(2);
/// The same, on the side that was called.
const SILENCE_OF_CALLERS: Duration = Duration::from_secs(10);

/// How many requests one connection has in flight: each holds what has come of its next message. A handle needs two or
/// three, and a member some more; one that begins more waits.
const STREAMS: u32 = 32;

/// The pause after a connection that could not be taken.
const NOT_TAKEN: Duration = Duration::from_millis(100);

/// A connection on which each request says the token, if there is one. Clones share it.
pub(crate) type Connection = InterceptedService<Channel, Say>;

/// How this process reaches others and is reached. `Debug` shows no secret.
#[derive(Clone, Debug)]
pub(crate) struct Transport {
    proofs: Option<Proofs>,
    token: Option<Token>,
}

impl Transport {
    /// Reads the certificates, the key and the token.
    ///
    /// # Errors
    /// [`Error::Config`], naming the setting and the file that is missing, can't be read or does not hold what it should.
    pub(crate) fn new(config: &RaftConfig) -> Result<Self> {
        Ok(Self {
            proofs: config.tls.as_ref().map(Proofs::read).transpose()?,
            token: config.token_file.as_deref().map(Token::read).transpose()?,
        })
    }

    /// Connects to a member, `host:port`. The connection dials again by itself when it breaks.
    ///
    /// # Errors
    /// [`Error::Unavailable`] within `patience`, or two seconds if that is longer, with what stood in the way;
    /// [`Error::AccessDenied`] if the other side refused the certificate of this one. Nothing was asked yet.
    pub(crate) async fn dial(&self, address: &str, patience: Duration) -> Result<Connection> {
        // To hyper the connection is a plain one: TLS is beneath, in the connector.
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .map_err(|error| unavailable(&error))?
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(WINDOW)
            .max_frame_size(FRAME)
            .http2_keep_alive_interval(SILENCE)
            .keep_alive_timeout(SILENCE)
            .keep_alive_while_idle(true);
        let (proofs, to) = (self.proofs.clone(), address.to_owned());
        let connector = tower::service_fn(move |_: Uri| {
            let (proofs, to) = (proofs.clone(), to.clone());
            async move {
                let connecting = connect(proofs.as_ref(), &to);
                let connected = tokio::time::timeout(CONNECT_TIMEOUT, connecting).await;
                connected.unwrap_or(Err(Refusal::Silent(CONNECT_TIMEOUT)))
            }
        });
        // In a place of its own: who asks over a connection that stands would carry the room for it.
        let connecting = Box::pin(endpoint.connect_with_connector(connector));
        let channel = match tokio::time::timeout(patience, connecting).await {
            Ok(connected) => connected.map_err(|error| refusal::connect_error(&error))?,
            Err(_) => return Err(unavailable(&Refusal::Silent(patience))),
        };
        Ok(InterceptedService::new(channel, Say(self.token.clone())))
    }

    /// Takes the address to listen on that the setting gives.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if it can't be had.
    pub(crate) async fn listen(&self, setting: &'static str, address: SocketAddr) -> Result<TcpListener> {
        if self.proofs.is_none() && !address.ip().is_loopback() {
            tracing::warn!(%address, "listening beyond loopback without registry.raft.tls: anybody who reaches this address reads and writes");
        }
        TcpListener::bind(address).await.map_err(|error| Error::Unavailable {
            backend: BACKEND,
            source: format!("can't listen on {address}: {error}; set registry.raft.{setting} to another address")
                .into(),
        })
    }

    /// Answers until `stop`, and until what is under way then has ended.
    pub(crate) async fn serve(&self, listener: TcpListener, routes: Routes, stop: impl Future<Output = ()>) {
        let unfinished = Unfinished::default();
        let server = Server::builder()
            .max_concurrent_streams(STREAMS)
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(WINDOW)
            .max_frame_size(FRAME)
            .http2_keepalive_interval(Some(SILENCE_OF_CALLERS))
            .http2_keepalive_timeout(Some(SILENCE_OF_CALLERS))
            .layer(InterceptorLayer::new(Demand(self.token.clone())))
            .layer(MapRequestLayer::new(move |request| unfinished.count(request)))
            .add_routes(routes);
        let served = match &self.proofs {
            Some(proofs) => {
                let incoming = proofs.accept(listener).map(io::Result::Ok);
                server.serve_with_incoming_shutdown(incoming, stop).await
            }
            None => {
                let incoming = accepted(listener).map(io::Result::Ok);
                server.serve_with_incoming_shutdown(incoming, stop).await
            }
        };
        if let Err(error) = served {
            tracing::error!(%error, "the server has ended, nobody gets an answer any more");
        }
    }
}

/// Connects, and proves who is there on both sides.
async fn connect(proofs: Option<&Proofs>, address: &str) -> Result<TokioIo<Stream>, Refusal> {
    let tcp = TcpStream::connect(address).await.map_err(Refusal::Unreachable)?;
    tcp.set_nodelay(true).map_err(Refusal::Unreachable)?;
    Ok(TokioIo::new(match proofs {
        Some(proofs) => Box::new(proofs.greet(tcp, address).await?),
        None => Box::new(tcp),
    }))
}

/// The connections that are taken, one after the other.
fn accepted(listener: TcpListener) -> impl futures_util::Stream<Item = TcpStream> {
    TcpListenerStream::new(listener).filter_map(|tcp| async {
        match tcp.and_then(|tcp| tcp.set_nodelay(true).map(|()| tcp)) {
            Ok(tcp) => Some(tcp),
            Err(error) => {
                tracing::warn!(%error, "a connection could not be taken");
                // Out of file descriptors, say: the next try at once would fail as well.
                tokio::time::sleep(NOT_TAKEN).await;
                None
            }
        }
    })
}

/// A connection of either kind.
pub type Stream = Box<dyn ReadWrite>;

/// What can be read from and written to.
pub trait ReadWrite: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin {}

impl<T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin> ReadWrite for T {}

fn unavailable(error: &dyn std::error::Error) -> Error {
    Error::Unavailable {
        backend: BACKEND,
        source: error.to_string().into(),
    }
}
