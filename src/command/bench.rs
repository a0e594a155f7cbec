//! bench

mod plot;
mod report;
mod work;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use registry::{Config, Key, Prefix, Registry};

use super::kv::close;
use super::output::{Output, shows_escapes};
use super::stop::Stop;
use super::{Failure, Outcome, Settings};
use report::Row;
use work::{Load, Work};

#[derive(Debug, Args)]
pub(crate) struct Bench {
    /// What to measure; everything if not given
    #[arg(value_enum)]
    works: Vec<Work>,
    /// How many tasks at once; one measurement each.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 16, 64], value_parser = clap::value_parser!(u16).range(1..=10_000))]
    tasks: Vec<u16>,
    /// How long each measurement lasts, its warm-up aside.
    #[arg(long, default_value = "5s", value_parser = humantime::parse_duration)]
    duration: Duration,
    /// How long each works before anything is counted.
    #[arg(long, default_value = "1s", value_parser = humantime::parse_duration)]
    warm_up: Duration,
    /// Bytes of each value.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(0..=registry::MAX_VALUE as i64))]
    value_size: u32,
    /// How many keys there are to be read and written.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..))]
    keys: u32,
    /// Opens the handle as a program does that has this config: with the embedded store, as a member in this process.
    #[arg(long)]
    embedded: bool,
    /// Draws throughput and latency against tasks.
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
}

impl Bench {
    pub(crate) async fn run(mut self, settings: &Settings, out: Output) -> Outcome {
        if self.works.is_empty() {
            self.works = Work::ALL.to_vec();
        }
        let config = match self.embedded {
            true => settings.load()?,
            false => settings.remote()?,
        };
        let stop = Stop::listen()?;
        let registry = registry::connect(&config).await;
        let registry = registry.map_err(|error| Failure::connect(error, &config))?;
        let space = Prefix::from(space(&registry)?);
        let measured = tokio::select! {
            measured = self.measure(&config, &registry, out) => measured,
            () = stop.asked() => Err(Failure::new(130, "stopped")),
        };
        // Whatever became of the measurements, their keys go.
        let cleared = registry.delete_prefix(&space).await;
        close(&registry).await;
        // Keys that are left are named, whatever else has failed.
        let left = |failure: Failure| failure.after(&format!("keys of this run may be left at and below {space}"));
        let rows = match (measured, cleared) {
            (Ok(rows), Ok(_)) => rows,
            (Ok(_), Err(error)) => return Err(left(error.into())),
            (Err(failure), Ok(_)) => return Err(failure),
            (Err(failure), Err(_)) => return Err(left(failure)),
        };
        if let Some(path) = &self.plot {
            plot::draw(path, &rows)?;
        }
        match rows.iter().find_map(|row| row.failed.as_ref()) {
            Some(why) => Err(Failure::new(1, format!("some operations failed: {why}"))),
            None => Ok(ExitCode::SUCCESS),
        }
    }

    async fn measure(&self, config: &Config, registry: &Arc<dyn Registry>, out: Output) -> Result<Vec<Row>, Failure> {
        let load = Load::new(config, registry, &space(registry)?, self.keys, self.value_size as usize);
        let bar = progress(self.works.len() * self.tasks.len());
        if self.works.iter().any(|work| work.reads_keys()) {
            bar.set_message("putting the keys");
            load.fill().await?;
        }
        let mut rows = Vec::new();
        report::head(out)?;
        for work in &self.works {
            for tasks in &self.tasks {
                bar.set_message(format!("{work}, {tasks} tasks"));
                let row = work::measure(*work, &load, usize::from(*tasks), self.warm_up, self.duration).await?;
                bar.suspend(|| row.print(out))?;
                bar.inc(1);
                rows.push(row);
            }
        }
        bar.finish_and_clear();
        Ok(rows)
    }
}

/// Where this run keeps its keys, apart from those of any other.
fn space(registry: &Arc<dyn Registry>) -> Result<Key, Failure> {
    let session = registry.session().live()?;
    Ok(Key::parse(&format!("/bench-{session}")).map_err(registry::Error::from)?)
}

fn progress(steps: usize) -> ProgressBar {
    if !shows_escapes() {
        return ProgressBar::hidden();
    }
    ProgressBar::new(steps as u64)
        .with_style(ProgressStyle::with_template("{bar:30} {pos}/{len} {msg} {eta}").expect("the template is good"))
}
