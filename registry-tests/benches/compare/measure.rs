//! Work done by so many tasks for so long, and what it took.

use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use registry_api::BoxError;

use crate::client::Client;

/// How long everybody works before anything is counted.
const WARM_UP: Duration = Duration::from_millis(300);

pub(crate) struct Figures {
    took: Histogram<u64>,
    seconds: f64,
}

impl Figures {
    /// Times are counted in nanoseconds, up to a minute.
    pub(crate) fn new(seconds: f64) -> Self {
        Self {
            took: Histogram::new_with_bounds(1, 60_000_000_000, 3).expect("the bounds are good"),
            seconds,
        }
    }

    pub(crate) fn record(&mut self, took: Duration) {
        self.took
            .saturating_record(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
    }

    fn micros(&self, percentile: f64) -> f64 {
        self.took.value_at_percentile(percentile) as f64 / 1e3
    }

    pub(crate) fn throughput(&self) -> [(&'static str, f64); 3] {
        let rate = self.took.len() as f64 / self.seconds;
        [("per second", rate), self.latency()[0], self.latency()[1]]
    }

    pub(crate) fn latency(&self) -> [(&'static str, f64); 2] {
        [("p50 µs", self.micros(50.0)), ("p99 µs", self.micros(99.0))]
    }
}

/// Whose turn it is, one after the other. Each round begins with another side, and goes round by another step, so that it is
/// not always the same one that follows another: a server that was just loaded goes on compiling, compacting and flushing.
pub(crate) fn turns(sides: usize, round: usize) -> impl Iterator<Item = usize> {
    let reach_all =
        |step: &usize| (2..=*step).all(|divisor| !(step.is_multiple_of(divisor) && sides.is_multiple_of(divisor)));
    let steps: Vec<_> = (1..sides.max(2)).filter(reach_all).collect();
    let step = steps[round % steps.len()];
    (0..sides).map(move |turn| (round + turn * step) % sides)
}

/// Each task does it again and again, on key after key.
pub(crate) async fn run<F>(
    client: &Client,
    (tasks, keys, seconds): (usize, usize, f64),
    work: impl Fn(Client, usize) -> F + Clone + Send + 'static,
) -> Result<Figures, BoxError>
where
    F: Future<Output = Result<(), BoxError>> + Send,
{
    let from = Instant::now() + WARM_UP;
    let until = from + Duration::from_secs_f64(seconds);
    let workers = (0..tasks).map(|task| {
        let (client, work) = (client.clone(), work.clone());
        tokio::spawn(async move {
            let (mut figures, mut at) = (Figures::new(seconds), task * 7919);
            loop {
                at += 1;
                let asked = Instant::now();
                if asked > until {
                    return Ok::<_, BoxError>(figures);
                }
                work(client.clone(), at % keys).await?;
                // What began in the warm-up, or ended too late, is not counted.
                if asked >= from && Instant::now() <= until {
                    figures.record(asked.elapsed());
                }
            }
        })
    });
    let mut all = Figures::new(seconds);
    for worker in workers.collect::<Vec<_>>() {
        all.took.add(&worker.await??.took)?;
    }
    Ok(all)
}
