//! backup, restore

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use registry::Backend;
use serde_json::json;

use super::output::{Output, progress};
use super::stop::Stop;
use super::{Failure, Outcome, Settings};

#[derive(Debug, Args)]
pub(crate) struct Backup {
    /// The file; one of that name is replaced when the new one is whole
    file: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct Restore {
    /// The backup
    file: PathBuf,
}

impl Backup {
    pub(crate) async fn run(self, settings: &Settings, out: Output) -> Outcome {
        let config = settings.remote()?;
        let Backend::Raft(raft) = &config.backend else {
            return Err(not_embedded());
        };
        let bar = progress(Some(0));
        let written = registry::raft::backup(raft, &config.options, &self.file, |done, size| {
            bar.set_length(size);
            bar.set_position(done);
        });
        let stop = Stop::listen()?;
        // Dropped in the middle, it removes the file that it was writing.
        let written = stop.unless_again(written).await;
        bar.finish_and_clear();
        let written = written.ok_or_else(|| Failure::new(Failure::STOPPED, "stopped: nothing was written"))?;
        let backup = written.map_err(|error| Failure::connect(error, &config))?;
        let people = || {
            format!(
                "{}: {} keys and {} sessions at revision {}, {}",
                self.file.display(),
                backup.keys,
                backup.sessions,
                backup.revision,
                indicatif::HumanBytes(backup.bytes)
            )
        };
        out.line(people, || json!({ "file": self.file, "backup": backup }))?;
        Ok(ExitCode::SUCCESS)
    }
}

impl Restore {
    pub(crate) async fn run(self, settings: &Settings, out: Output) -> Outcome {
        let config = settings.load()?;
        let Backend::Raft(raft) = &config.backend else {
            return Err(not_embedded());
        };
        std::fs::File::open(&self.file).map_err(|error| Failure::usage(format!("{}: {error}", self.file.display())))?;
        let backup = registry::raft::restore(&self.file, raft).await?;
        let data = raft.data_dir.clone().unwrap_or_else(|| "registry-data".into());
        // The first endpoint of a remote handle on this member is where the others reach it.
        let address = raft.to_remote().endpoints.into_iter().next().unwrap_or_default();
        let people = || {
            format!(
                "{}: {} keys of revision {} restored into a new group, whose one member is reached at {address}; \
                 `registry serve` with the same settings starts it",
                data.display(),
                backup.keys,
                backup.revision
            )
        };
        out.line(
            people,
            || json!({ "data_dir": data, "address": address, "backup": backup }),
        )?;
        Ok(ExitCode::SUCCESS)
    }
}

fn not_embedded() -> Failure {
    Failure::usage(
        "only the embedded store is backed up so: for the others use `registry export` and `import`, or the server's own tools",
    )
}
