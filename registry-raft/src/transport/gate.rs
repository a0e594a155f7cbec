//! A second address of a member, for what speaks HTTP.

use std::net::SocketAddr;

use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use registry_api::Result;

use super::token::Demand;
use super::{Stream, Transport, accepted};
use crate::config::{RaftConfig, refused};

/// The connections to `registry.raft.http`: with TLS, those alone that proved who they are, as at the member's own address.
pub struct Gate {
    address: SocketAddr,
    guard: Guard,
    connections: BoxStream<'static, Stream>,
}

impl std::fmt::Debug for Gate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gate")
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

impl Gate {
    /// Listens where the config says; `None` if it says nothing.
    ///
    /// # Errors
    /// [`registry_api::Error::Config`] for a file that does not hold what it should, [`registry_api::Error::Unavailable`]
    /// for an address that can't be had.
    pub async fn open(config: &RaftConfig) -> Result<Option<Self>> {
        config.check()?;
        let Some(address) = config.http_address()? else {
            return Ok(None);
        };
        let transport = Transport::new(config)?;
        let listener = transport.listen("http", address).await?;
        let address = listener
            .local_addr()
            .map_err(|error| refused("http", error.to_string()))?;
        let connections = match &transport.proofs {
            Some(proofs) => {
                let proven = proofs.for_http().accept(listener);
                proven.map(|tls| Box::new(tls) as Stream).boxed()
            }
            None => accepted(listener).map(|tcp| Box::new(tcp) as Stream).boxed(),
        };
        Ok(Some(Self {
            address,
            guard: Guard(Demand(transport.token)),
            connections,
        }))
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Who looks at the token of each request.
    pub fn guard(&self) -> Guard {
        self.guard.clone()
    }

    /// The next connection.
    ///
    /// # Cancel safety
    /// Dropping the future loses none.
    pub async fn next(&mut self) -> Option<Stream> {
        self.connections.next().await
    }
}

/// Knows the token, if there is one, and shows it to nobody.
#[derive(Clone, Debug)]
pub struct Guard(Demand);

impl Guard {
    /// Whether a request with this `Authorization` header may be looked at.
    pub fn admits(&self, authorization: Option<&[u8]>) -> bool {
        self.0.check(None, authorization).is_ok()
    }
}
