//! TLS 1.3, with a certificate on both sides.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use futures_util::future::{AbortHandle, abortable};
use futures_util::stream::{self, FuturesUnordered};
use futures_util::{FutureExt, Stream, StreamExt};
use registry_api::{Error, Result};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use super::accepted;
use super::refusal::Refusal;
use crate::config::{Tls, refused};

/// How many callers may be proving who they are at once. For one more, the one that has taken longest is given up: those
/// that mean to prove it take milliseconds.
const HANDSHAKES: usize = 1024;
/// How long a caller may be silent at first, how long it may take to prove who it is, and then how long one that was refused
/// may take to hear so.
const FIRST_BYTE: Duration = Duration::from_secs(1);
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
const FAREWELL: Duration = Duration::from_secs(1);
/// What a handshake begins with (RFC 8446, section 5.1).
const HANDSHAKE_RECORD: u8 = 22;
/// To a caller without TLS, in its own words (RFC 9113, sections 6.5 and 6.8): empty SETTINGS, then a GOAWAY that says
/// INADEQUATE_SECURITY.
const SPEAK_TLS: [u8; 26] = [
    0, 0, 0, 4, 0, 0, 0, 0, 0, //
    0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 12,
];

/// What this side proves itself with, and whom it believes.
#[derive(Clone)]
pub(super) struct Proofs {
    connector: TlsConnector,
    acceptor: TlsAcceptor,
}

impl std::fmt::Debug for Proofs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Proofs").finish_non_exhaustive()
    }
}

impl Proofs {
    pub(super) fn read(tls: &Tls) -> Result<Self> {
        let mut authorities = RootCertStore::empty();
        for authority in certificates("tls.ca", &tls.ca)? {
            authorities.add(authority).map_err(wrong("tls.ca", &tls.ca))?;
        }
        let authorities = Arc::new(authorities);
        let chain = certificates("tls.cert", &tls.cert)?;
        let key = PrivateKeyDer::from_pem_slice(&contents("tls.key", &tls.key)?).map_err(wrong("tls.key", &tls.key))?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let own = "the key and the certificate do not go together";
        let verifier = WebPkiClientVerifier::builder_with_provider(authorities.clone(), provider.clone())
            .build()
            .map_err(wrong("tls.ca", &tls.ca))?;
        let mut server = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .and_then(|config| {
                config
                    .with_client_cert_verifier(verifier)
                    .with_single_cert(chain.clone(), key.clone_key())
            })
            .map_err(|error| refused("tls.key", format!("{}: {own}: {error}", tls.key.display())))?;
        let mut client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .and_then(|config| {
                config
                    .with_root_certificates(authorities)
                    .with_client_auth_cert(chain, key)
            })
            .map_err(|error| refused("tls.key", format!("{}: {own}: {error}", tls.key.display())))?;
        server.alpn_protocols = vec![b"h2".to_vec()];
        client.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Self {
            connector: Arc::new(client).into(),
            acceptor: Arc::new(server).into(),
        })
    }

    /// The same, for a server of HTTP in either version.
    pub(super) fn for_http(&self) -> Self {
        let mut server = ServerConfig::clone(self.acceptor.config());
        server.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Self {
            acceptor: Arc::new(server).into(),
            ..self.clone()
        }
    }

    /// Makes a connection a safe one, and waits until the other side has taken it.
    pub(super) async fn greet(&self, tcp: TcpStream, address: &str) -> Result<client::TlsStream<TcpStream>, Refusal> {
        let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let name = ServerName::try_from(host).map_err(|error| Refusal::Unreachable(io::Error::other(error)))?;
        let mut stream = self.connector.connect(name, tcp).await?;
        // In TLS 1.3 this side is done before the other has looked at its certificate, and a refusal would only be heard
        // in place of the first answer. But the server of HTTP/2 speaks first, once it has taken the connection.
        let (tcp, session) = stream.get_mut();
        loop {
            tcp.readable().await?;
            match session.read_tls(&mut WhatIsThere(tcp)) {
                Ok(0) => return Err(Refusal::Ended),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(error) => return Err(error.into()),
            }
            if session.process_new_packets()?.plaintext_bytes_to_read() > 0 {
                return Ok(stream);
            }
        }
    }

    /// The callers who proved who they are.
    pub(super) fn accept(&self, listener: TcpListener) -> impl Stream<Item = server::TlsStream<TcpStream>> + use<> {
        let acceptor = self.acceptor.clone();
        newest(HANDSHAKES, accepted(listener), move |tcp| admit(acceptor.clone(), tcp))
    }
}

/// The results of work on each of those that arrive, as they come. Of more than `most` at once, the work that was begun first
/// is given up.
fn newest<T, R, F>(most: usize, arriving: impl Stream<Item = T>, mut work: impl FnMut(T) -> F) -> impl Stream<Item = R>
where
    F: Future<Output = Option<R>>,
{
    let mut arriving = Box::pin(arriving);
    let mut working = FuturesUnordered::new();
    let (mut begun, mut given_up_by) = (0_u64, BTreeMap::new());
    stream::poll_fn(move |context| {
        loop {
            match working.poll_next_unpin(context) {
                Poll::Ready(Some((number, result))) => {
                    given_up_by.remove(&number);
                    if let Ok(Some(result)) = result {
                        return Poll::Ready(Some(result));
                    }
                    continue;
                }
                Poll::Ready(None) | Poll::Pending => {}
            }
            match arriving.poll_next_unpin(context) {
                Poll::Ready(Some(next)) => {
                    if given_up_by.len() >= most
                        && let Some((_, oldest)) = given_up_by.pop_first()
                    {
                        AbortHandle::abort(&oldest);
                    }
                    begun += 1;
                    let (number, (result, give_up)) = (begun, abortable(work(next)));
                    given_up_by.insert(number, give_up);
                    working.push(result.map(move |result| (number, result)));
                }
                Poll::Ready(None) if working.is_empty() => return Poll::Ready(None),
                Poll::Ready(None) | Poll::Pending => return Poll::Pending,
            }
        }
    })
}

async fn admit(acceptor: TlsAcceptor, tcp: TcpStream) -> Option<server::TlsStream<TcpStream>> {
    let from = tcp.peer_addr().ok()?;
    match tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake(&acceptor, tcp)).await {
        Ok(Ok(stream)) => return Some(stream),
        Ok(Err(None)) => tracing::debug!(%from, "a connection ended before it began"),
        Ok(Err(Some(why))) => tracing::warn!(%from, %why, "a connection was refused"),
        Err(_) => tracing::warn!(%from, why = "no handshake in time", "a connection was refused"),
    }
    None
}

/// `None` for a caller that left without a word, as load balancers do.
async fn handshake(acceptor: &TlsAcceptor, tcp: TcpStream) -> Result<server::TlsStream<TcpStream>, Option<String>> {
    let mut first = [0];
    match tokio::time::timeout(FIRST_BYTE, tcp.peek(&mut first)).await {
        Ok(Ok(1)) => {}
        Ok(_) => return Err(None),
        Err(_) => return Err(Some(format!("it was silent for {FIRST_BYTE:?}"))),
    }
    if first != [HANDSHAKE_RECORD] {
        farewell(tcp, &SPEAK_TLS).await;
        return Err(Some("it does not speak TLS".into()));
    }
    match acceptor.accept(tcp).into_fallible().await {
        Ok(stream) => Ok(stream),
        Err((error, tcp)) => {
            farewell(tcp, &[]).await;
            Err(Some(error.to_string()))
        }
    }
}

/// Says a last word and lets it be heard: closing a connection with unread bytes would cut it off.
async fn farewell(mut tcp: TcpStream, word: &[u8]) {
    let heard = async {
        tcp.write_all(word).await?;
        tcp.shutdown().await?;
        let mut rest = tcp.take(64 << 10);
        tokio::io::copy(&mut rest, &mut tokio::io::sink()).await
    };
    // A caller that does not want to hear it need not.
    let _ = tokio::time::timeout(FAREWELL, heard).await;
}

/// Reads what has arrived, and does not wait for more.
struct WhatIsThere<'a>(&'a TcpStream);

impl Read for WhatIsThere<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.0.try_read(into)
    }
}

fn certificates(field: &str, path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let pem = contents(field, path)?;
    let certificates = CertificateDer::pem_slice_iter(&pem).collect::<Result<Vec<_>, _>>();
    let certificates = certificates.map_err(wrong(field, path))?;
    match certificates.is_empty() {
        true => Err(refused(
            field,
            format!("{}: there is no certificate in it", path.display()),
        )),
        false => Ok(certificates),
    }
}

pub(super) fn contents(field: &str, path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|error| refused(field, format!("{}: {error}", path.display())))
}

fn wrong<E: std::fmt::Display>(field: &str, path: &Path) -> impl Fn(E) -> Error {
    move |error| refused(field, format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use tokio::sync::{mpsc, oneshot};
    use tokio_stream::wrappers::UnboundedReceiverStream;

    use super::*;

    /// Each that arrives says what it comes to once it is told, if it was not given up.
    #[tokio::test]
    async fn the_oldest_makes_room_for_the_newest() {
        let (arrive, arriving) = mpsc::unbounded_channel::<oneshot::Receiver<u8>>();
        let arriving = UnboundedReceiverStream::new(arriving);
        let mut results = Box::pin(newest(3, arriving, |come| async move { come.await.ok() }));
        let mut waiting: Vec<_> = (0..5)
            .map(|_| {
                let (tell, told) = oneshot::channel();
                arrive.send(told).unwrap();
                tell
            })
            .collect();
        assert!(results.next().now_or_never().is_none());
        let given_up: Vec<_> = waiting.iter().map(oneshot::Sender::is_closed).collect();
        assert_eq!(given_up, [true, true, false, false, false]);
        // One that is done makes room for one more.
        waiting.swap_remove(4).send(4).unwrap();
        assert_eq!(results.next().await, Some(4));
        let (tell, told) = oneshot::channel();
        arrive.send(told).unwrap();
        assert!(results.next().now_or_never().is_none());
        assert!(!waiting[2].is_closed() && !waiting[3].is_closed());
        tell.send(5).unwrap();
        assert_eq!(results.next().await, Some(5));
        drop(arrive);
        waiting.clear();
        assert_eq!(results.next().await, None);
    }
}
