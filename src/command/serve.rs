//! serve

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use registry::raft::Member;
use registry::{Backend, Options, Registry};
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
    let gate = registry::raft::Gate::open(raft).await?;
    let http = gate.as_ref().map(registry::raft::Gate::address);
    let member = Member::start(raft).await?;
    let Some(address) = member.address() else {
        return Err(Failure::usage("a member in memory listens nowhere; give it a data_dir"));
    };
    let stop = Stop::listen()?;
    let name = member.name().to_owned();
    let data = raft.data_dir.clone().unwrap_or_else(|| "registry-data".into());
    out.line(
        || {
            format!(
                "registry is ready on {address}: member {name}, data in {}{}",
                data.display(),
                http.map_or_else(String::new, |http| format!(", HTTP on {http}"))
            )
        },
        || json!({ "ready": true, "address": address.to_string(), "member": name, "data_dir": data, "http": http }),
    )?;
    let ending = async {
        tokio::select! {
            () = stop.asked() => None,
            reason = member.ended() => Some(reason),
        }
    };
    let ended = match gate {
        Some(gate) => {
            let (mut ended, connecting) = (None, connect(&member, &config.options));
            let ending = async { ended = ending.await };
            registry::http::serve(gate, connecting, member.observer(), ending).await;
            ended
        }
        None => ending.await,
    };
    let stopped = member.stop().await;
    if let Some(reason) = ended {
        return Err(Failure::new(1, reason));
    }
    stopped?;
    out.line(|| "registry has stopped".into(), || json!({ "ready": false }))?;
    Ok(ExitCode::SUCCESS)
}

/// A handle, as soon as the group can open a session.
async fn connect(member: &Member, options: &Options) -> Arc<dyn Registry> {
    loop {
        match member.connect(options).await {
            Ok(registry) => return registry,
            Err(error) => tracing::warn!(%error, "HTTP has nothing to answer from yet"),
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}
