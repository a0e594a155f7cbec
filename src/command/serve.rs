//! serve, status

use std::process::ExitCode;

use registry::Backend;
use serde_json::json;

use super::output::Output;
use super::{Failure, Outcome, Settings, asked_to_stop};

#[cfg(feature = "raft")]
pub(crate) async fn run(settings: &Settings, out: Output) -> Outcome {
    let config = settings.load()?;
    let Backend::Raft(raft) = &config.backend else {
        return Err(Failure::usage(
            "only the embedded store is served; the others are servers of their own",
        ));
    };
    let member = registry::raft::Member::start(raft).await?;
    let Some(address) = member.address() else {
        return Err(Failure::usage("a member in memory listens nowhere; give it a data_dir"));
    };
    let name = member
        .status()
        .members
        .first()
        .map_or_else(String::new, |member| member.name.clone());
    let data = raft.data_dir.clone().unwrap_or_else(|| "registry-data".into());
    out.line(
        || {
            format!(
                "registry is ready on {address}: member {name}, data in {}",
                data.display()
            )
        },
        || json!({ "ready": true, "address": address.to_string(), "member": name, "data_dir": data }),
    )?;
    asked_to_stop().await;
    member.stop().await?;
    out.line(|| "registry has stopped".into(), || json!({ "ready": false }))?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(not(feature = "raft"))]
pub(crate) async fn run(_settings: &Settings, _out: Output) -> Outcome {
    Err(Failure::usage("the embedded store is not compiled into this program"))
}

pub(crate) async fn status(settings: &Settings, out: Output) -> Outcome {
    let config = settings.remote()?;
    #[cfg(feature = "raft")]
    if let Backend::Raft(raft) = &config.backend {
        let asked = registry::raft::status(raft, &config.options).await;
        let status = asked.map_err(|error| Failure::connect(error, &config))?;
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
