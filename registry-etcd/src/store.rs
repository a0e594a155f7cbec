//! What all calls on a handle share.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use etcd_client::{Certificate, ConnectOptions, Identity, TlsOptions};
use registry_api::{Error, Options, Result, Revision};
use tokio::time::Instant;

use crate::config::{EtcdConfig, Tls, config};
use crate::gather::Gather;
use crate::link::{Leader, Link};
use crate::list::Reader;
use crate::names::Names;
use crate::range::AnswerSize;

/// The links to etcd and what was learnt of it.
pub(crate) struct Store {
    pub(crate) names: Names,
    /// For requests, which a member without a leader may answer too.
    pub(crate) requests: Link,
    /// For watches, on a connection of their own: what they bring delays no request.
    pub(crate) streams: Link,
    pub(crate) request_timeout: Duration,
    pub(crate) gather: Gather,
    size: AnswerSize,
    /// The newest revision this handle has seen; no stale read is to show an older one.
    seen: AtomicU64,
}

impl Store {
    /// Nothing is sent yet.
    pub(crate) fn new(config: &EtcdConfig, dial: ConnectOptions, options: &Options) -> Self {
        Self {
            names: Names(options.namespace.clone()),
            requests: Link::new(config, dial.clone(), Leader::Optional, options),
            streams: Link::new(config, dial, Leader::Required, options),
            request_timeout: options.request_timeout,
            gather: Gather::default(),
            size: AnswerSize::default(),
            seen: AtomicU64::new(0),
        }
    }

    pub(crate) fn deadline(&self) -> Instant {
        Instant::now() + self.request_timeout
    }

    pub(crate) fn reader(&self, deadline: Instant) -> Reader<'_> {
        Reader {
            link: &self.requests,
            names: &self.names,
            size: &self.size,
            deadline,
        }
    }

    pub(crate) fn seen(&self) -> Revision {
        Revision(self.seen.load(Ordering::Acquire))
    }

    pub(crate) fn saw(&self, revision: Revision) {
        self.seen.fetch_max(revision.0, Ordering::AcqRel);
    }
}

/// How members are dialled: as whom, and how encrypted.
pub(crate) async fn dialling(config: &EtcdConfig) -> Result<ConnectOptions> {
    let mut dial = ConnectOptions::new();
    if let Some(credentials) = &config.credentials {
        dial = dial.with_user(&credentials.user, &credentials.password);
    }
    if let Some(tls) = &config.tls {
        dial = dial.with_tls(read_tls(tls).await?);
    }
    Ok(dial)
}

async fn read_tls(tls: &Tls) -> Result<TlsOptions> {
    let ca = read_file("registry.etcd.tls.ca", &tls.ca).await?;
    let options = TlsOptions::new().ca_certificate(Certificate::from_pem(ca));
    let Some(client) = &tls.client else {
        return Ok(options);
    };
    let cert = read_file("registry.etcd.tls.cert", &client.cert).await?;
    let key = read_file("registry.etcd.tls.key", &client.key).await?;
    Ok(options.identity(Identity::from_pem(cert, key)))
}

async fn read_file(field: &str, path: &std::path::Path) -> Result<Vec<u8>, Error> {
    let read = tokio::fs::read(path).await;
    read.map_err(|e| config(field, format!("{}: {e}", path.display())))
}
