//! status

use std::process::ExitCode;

use clap::Args;
use serde_json::json;

#[cfg(feature = "raft")]
use super::Failure;
use super::output::Output;
use super::{Outcome, Settings};

#[derive(Debug, Args)]
pub(crate) struct Status {
    /// Has all members of the embedded store take a digest of what they hold, at one moment, and compares
    #[cfg(feature = "raft")]
    #[arg(long)]
    verify: bool,
}

impl Status {
    pub(crate) async fn run(self, settings: &Settings, out: Output) -> Outcome {
        #[cfg(feature = "raft")]
        if self.verify {
            return verify(settings, out).await;
        }
        run(settings, out).await
    }
}

#[cfg(feature = "raft")]
async fn verify(settings: &Settings, out: Output) -> Outcome {
    let config = settings.remote()?;
    let registry::Backend::Raft(raft) = &config.backend else {
        return Err(Failure::usage("only members of the embedded store are compared"));
    };
    let asked = registry::raft::verify(raft, &config.options).await;
    let verified = asked.map_err(|error| Failure::connect(error, &config))?;
    for member in &verified.members {
        let said = member.digest.as_ref().or(member.error.as_ref());
        out.line(
            || format!("member {:10} {}", member.name, said.map_or("", String::as_str)),
            || json!({ "member": member }),
        )?;
    }
    let (index, equal, complete) = (verified.index, verified.is_equal(), verified.is_complete());
    match (equal, complete) {
        (false, _) => {
            return Err(Failure::new(
                1,
                format!("the members differ at entry {index} of the log"),
            ));
        }
        (true, false) => {
            return Err(Failure::new(
                5,
                "not all members have answered; those that did are equal",
            ));
        }
        (true, true) => out.line(
            || format!("equal at entry {index} of the log"),
            || json!({ "equal": true, "index": index }),
        )?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn run(settings: &Settings, out: Output) -> Outcome {
    #[cfg(feature = "raft")]
    if let config = settings.remote()?
        && let registry::Backend::Raft(raft) = &config.backend
    {
        let asked = registry::raft::status(raft, &config.options).await;
        let status = asked.map_err(|error| Failure::connect(error, &config))?;
        super::members::show(&status, out)?;
        let people = || {
            format!(
                "term {}, applied {}, revision {} (watchable after {})\n{} keys, {} sessions, {} watches\nlog {}, snapshot {}",
                status.term,
                status.applied,
                status.revision,
                status.compacted,
                status.keys,
                status.sessions,
                status.watches,
                indicatif::HumanBytes(status.log_bytes),
                indicatif::HumanBytes(status.snapshot_bytes),
            )
        };
        out.line(people, || json!({ "status": status }))?;
        return Ok(ExitCode::SUCCESS);
    }
    let registry = settings.connect().await?;
    let health = registry.health().await?;
    let capabilities = registry.capabilities();
    out.line(
        || {
            format!(
                "{} at {} answers in {:?}, revision {}, session TTL {:?}",
                capabilities.backend,
                health.endpoint,
                health.latency,
                health.revision,
                registry.session().ttl()
            )
        },
        || {
            json!({
                "backend": capabilities.backend,
                "endpoint": health.endpoint,
                "latency_us": u64::try_from(health.latency.as_micros()).unwrap_or(u64::MAX),
                "revision": health.revision.0,
                "capabilities": capabilities,
            })
        },
    )?;
    super::kv::close(&registry).await;
    Ok(ExitCode::SUCCESS)
}
