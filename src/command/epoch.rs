//! epoch

use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;
use registry::{Error, Raise, Registry, Token};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::kv::close;
use super::output::Output;
use super::{Failure, Outcome};

#[derive(Debug, Args)]
pub(crate) struct Epoch {
    /// Raises it: after etcd, ZooKeeper or MySQL was restored from a copy, before programs start
    #[arg(long)]
    raise: bool,
    /// A fencing token that was given out: the raised epoch's are larger, besides what `--raise` sees to by itself
    #[arg(long, value_name = "TOKEN", requires = "raise")]
    above: Option<Token>,
}

impl Epoch {
    pub(crate) async fn run(self, registry: &Arc<dyn Registry>, out: Output) -> Outcome {
        let epoch = match self.raise {
            true => raise(&**registry, self.above).await?,
            false => registry.epoch().await?,
        };
        close(registry).await;
        let token = epoch.highest_token()?;
        out.line(
            || format!("epoch {}, no fencing token is larger than {token}", epoch.epoch),
            || json!({ "epoch": epoch.epoch, "revision": epoch.revision.0, "token": token }),
        )?;
        Ok(ExitCode::SUCCESS)
    }
}

async fn raise(registry: &dyn Registry, above: Option<Token>) -> Result<registry::Epoch, Failure> {
    let raised = registry.raise_epoch(Raise::AfterRestore).await?;
    let Some(token) = above else { return Ok(raised) };
    let above = registry.raise_epoch(Raise::Above(token)).await;
    // A code that says that nothing has changed would not be true.
    above.map_err(|error| {
        Failure::from(error)
            .with_code(1)
            .after("the epoch was raised, but not above the token")
    })
}

/// The first line of an export: where the fencing tokens of the store were.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Header {
    registry: Position,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Position {
    epoch: u32,
    revision: u64,
    /// The highest token that can have been given out.
    token: Token,
}

impl Header {
    /// Reads it; `None` if this client may not.
    pub(super) async fn read(registry: &dyn Registry) -> Result<Option<Self>, Failure> {
        let epoch = match registry.epoch().await {
            Err(Error::AccessDenied { .. }) => return Ok(None),
            epoch => epoch?,
        };
        Ok(Some(Self {
            registry: Position {
                epoch: epoch.epoch,
                revision: epoch.revision.0,
                token: epoch.highest_token()?,
            },
        }))
    }

    pub(super) fn line(&self) -> String {
        json!(self).to_string()
    }

    /// The header in a line, if it is one.
    pub(super) fn parse(line: &[u8]) -> Option<Self> {
        serde_json::from_slice(line).ok()
    }

    /// Makes the tokens of a store larger than those of the one that the header is from.
    pub(super) async fn raise(&self, registry: &dyn Registry) -> Result<(), Failure> {
        let raised = registry.raise_epoch(Raise::Above(self.registry.token)).await;
        raised.map(|_| ()).map_err(|error| {
            let why =
                "the fencing tokens of this store can't be made larger than those of the file's: nothing was imported";
            Failure::from(error).after(why)
        })
    }
}
