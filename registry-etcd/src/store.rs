//! What all calls on a handle share.

use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Certificate, ConnectOptions, Identity, TlsOptions};
use registry_api::{Error, Options, Result};
use tokio::time::Instant;

use crate::config::{EtcdConfig, Tls, config};
use crate::gather::Gather;
use crate::history::History;
use crate::link::{Leader, Link};
use crate::list::Reader;
use crate::names::Names;
use crate::range::{AnswerSize, Patience};

/// The links to etcd and what was learnt of it.
pub(crate) struct Store {
    pub(crate) names: Names,
    /// For requests, which a member without a leader may answer too.
    pub(crate) requests: Link,
    /// For watches, on a connection of their own: what they bring delays no request.
    pub(crate) streams: Link,
    pub(crate) request_timeout: Duration,
    pub(crate) gather: Gather,
    /// How far this handle has seen the store come; no stale read is to show an older state.
    pub(crate) history: Arc<History>,
    size: AnswerSize,
}

impl Store {
    /// Nothing is sent yet.
    pub(crate) fn new(config: &EtcdConfig, dial: ConnectOptions, options: &Options) -> Self {
        let history = Arc::<History>::default();
        let link = |dial, leader| Link::new(config, dial, leader, options, history.clone());
        Self {
            names: Names(options.namespace.clone()),
            requests: link(dial.clone(), Leader::Optional),
            streams: link(dial, Leader::Required),
            request_timeout: options.request_timeout,
            gather: Gather::default(),
            size: AnswerSize::default(),
            history,
        }
    }

    pub(crate) fn deadline(&self) -> Instant {
        Instant::now() + self.request_timeout
    }

    /// For a call of the user, which ends at its deadline.
    pub(crate) fn reader(&self, deadline: Instant) -> Reader<'_> {
        self.reader_with(Patience::Until(deadline))
    }

    /// For a watch, which has no end: each request of a listing is retried until it is answered.
    pub(crate) fn patient_reader(&self) -> Reader<'_> {
        self.reader_with(Patience::each(self.request_timeout))
    }

    fn reader_with(&self, patience: Patience) -> Reader<'_> {
        Reader {
            link: &self.requests,
            names: &self.names,
            size: &self.size,
            patience,
        }
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
