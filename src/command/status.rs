//! status

use std::process::ExitCode;

use serde_json::json;

use super::output::Output;
use super::{Outcome, Settings};

pub(crate) async fn run(settings: &Settings, out: Output) -> Outcome {
    #[cfg(feature = "raft")]
    if let config = settings.remote()?
        && let registry::Backend::Raft(raft) = &config.backend
    {
        let asked = registry::raft::status(raft, &config.options).await;
        let status = asked.map_err(|error| super::Failure::connect(error, &config))?;
        for member in &status.members {
            out.line(
                || {
                    let this = if member.id == status.answered_by {
                        "  (answered)"
                    } else {
                        ""
                    };
                    format!("member {:10} {:8} {}{this}", member.name, member.role, member.address)
                },
                || json!({ "member": member }),
            )?;
        }
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
