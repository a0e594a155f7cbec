//! serve

use std::process::ExitCode;

use registry::Backend;
use serde_json::json;

use super::output::Output;
use super::stop::Stop;
use super::{Failure, Outcome, Settings};

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
    let stop = Stop::listen()?;
    let name = member.name().to_owned();
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
    let ended = tokio::select! {
        () = stop.asked() => None,
        reason = member.ended() => Some(reason),
    };
    member.stop().await?;
    if let Some(reason) = ended {
        return Err(Failure::new(1, reason));
    }
    out.line(|| "registry has stopped".into(), || json!({ "ready": false }))?;
    Ok(ExitCode::SUCCESS)
}
