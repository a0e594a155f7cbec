//! TLS 1.3, with a certificate on both sides.

use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{Stream, StreamExt};
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

/// How many callers may be proving who they are at once; more wait their turn.
const HANDSHAKES: usize = 256;
/// How long a caller may take to prove it, and then how long one that was refused may take to hear so.
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
        accepted(listener)
            .map(move |tcp| admit(acceptor.clone(), tcp))
            .buffer_unordered(HANDSHAKES)
            .filter_map(std::future::ready)
    }
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
    if !matches!(tcp.peek(&mut first).await, Ok(1)) {
        return Err(None);
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
