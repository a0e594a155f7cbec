//! What an abstraction costs: the same work by a store's own client and through the registry, in one run.
//!
//! The two take turns, round by round, so that what else the machine does falls on both; the figure of each is the median
//! of its rounds.

use std::time::{Duration, Instant};

use registry_api::BoxError;

/// What a piece of work comes to.
pub type Done = Result<(), BoxError>;

const ROUNDS: usize = 15;

/// Prints the head of the table.
pub fn head(client: &str) {
    println!(
        "{:<36}{:>12}{:>12}{:>8}{:>10}{:>10}",
        "work", client, "registry", "ratio", "raw op/s", "our op/s"
    );
}

/// Prints the time of one operation on each side, as each of so many tasks sees it. The work is given the number of its
/// task, and how many operations to do.
pub async fn row<R, O>(
    name: &str,
    tasks: usize,
    operations: usize,
    raw: impl Fn(usize, usize) -> R,
    ours: impl Fn(usize, usize) -> O,
) -> Done
where
    R: Future<Output = Done> + Send + 'static,
    O: Future<Output = Done> + Send + 'static,
{
    let each = if tasks == 1 { operations } else { operations / 16 };
    let (mut of_raw, mut of_ours) = (Vec::new(), Vec::new());
    for round in 0..=ROUNDS {
        let (first, second) = (round % 2 == 0, round % 2 == 1);
        for turn in [first, second] {
            let taken = match turn {
                true => timed(tasks, |task| raw(task, each)).await?,
                false => timed(tasks, |task| ours(task, each)).await?,
            };
            // The first round only warms up.
            if round > 0 {
                if turn { &mut of_raw } else { &mut of_ours }.push(taken.as_secs_f64() / each as f64);
            }
        }
    }
    let (raw, ours) = (median(of_raw), median(of_ours));
    let rate = |seconds: f64| tasks as f64 / seconds;
    println!(
        "{:<36}{:>9.0} µs{:>9.0} µs{:>8.2}{:>10.0}{:>10.0}",
        format!("{name}, {tasks} task{}", if tasks == 1 { "" } else { "s" }),
        raw * 1e6,
        ours * 1e6,
        ours / raw,
        rate(raw),
        rate(ours),
    );
    Ok(())
}

/// Runs a task so many times at once, and says how long the slowest took.
async fn timed<F>(tasks: usize, start: impl Fn(usize) -> F) -> Result<Duration, BoxError>
where
    F: Future<Output = Done> + Send + 'static,
{
    let began = Instant::now();
    let running: Vec<_> = (0..tasks).map(|task| tokio::spawn(start(task))).collect();
    for task in running {
        task.await??;
    }
    Ok(began.elapsed())
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}
