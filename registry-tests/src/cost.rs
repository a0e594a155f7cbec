//! What an abstraction costs: the same work by a store's own client and through the registry, in one run.
//!
//! The two take turns, round by round, so that what else the machine does falls on both; the figure of each is the median
//! of its rounds.

use std::sync::Arc;
use std::time::{Duration, Instant};

use registry_api::{BoxError, Key, Registry, WatchItem, WatchRequest, WatchScope};

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

/// Prints the time of one operation on each side, as each of so many tasks sees it; nothing if the program was started
/// with parts of names of which none fits. The work is given what it works on, the number of its task, and how many
/// operations to do.
pub async fn row<S, R, O>(
    sides: &S,
    name: &str,
    tasks: usize,
    operations: usize,
    raw: impl Fn(S, usize, usize) -> R,
    ours: impl Fn(S, usize, usize) -> O,
) -> Done
where
    S: Clone,
    R: Future<Output = Done> + Send + 'static,
    O: Future<Output = Done> + Send + 'static,
{
    let name = format!("{name}, {tasks} task{}", if tasks == 1 { "" } else { "s" });
    let mut wanted = std::env::args()
        .skip(1)
        .filter(|argument| !argument.starts_with("--"))
        .peekable();
    if wanted.peek().is_some() && !wanted.any(|part| name.contains(&part)) {
        return Ok(());
    }
    let each = if tasks == 1 { operations } else { operations / 16 };
    let (mut of_raw, mut of_ours) = (Vec::new(), Vec::new());
    for round in 0..=ROUNDS {
        let (first, second) = (round % 2 == 0, round % 2 == 1);
        for turn in [first, second] {
            let taken = match turn {
                true => timed(tasks, |task| raw(sides.clone(), task, each)).await?,
                false => timed(tasks, |task| ours(sides.clone(), task, each)).await?,
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
        name,
        raw * 1e6,
        ours * 1e6,
        ours / raw,
        rate(raw),
        rate(ours),
    );
    Ok(())
}

/// Puts a key so many times, and reads each change from a watch before the next.
pub async fn put_until_told(registry: &dyn Registry, name: &Key, value: &[u8], count: usize) -> Done {
    let mut watch = registry.watch(WatchRequest::new(name, WatchScope::Key)).await?;
    while !matches!(watch.next().await.transpose()?, Some(WatchItem::Synced(_))) {}
    for _ in 0..count {
        registry.put(name, value.to_vec()).await?;
        while !matches!(watch.next().await.transpose()?, Some(WatchItem::Changes(_))) {}
    }
    Ok(())
}

/// Takes and releases a lock that nobody else wants, so many times.
pub async fn lock_and_unlock(registry: Arc<dyn Registry>, name: &Key, count: usize) -> Done {
    let lock = registry.lock(name);
    for _ in 0..count {
        lock.acquire().await?.release().await?;
    }
    Ok(())
}

/// Runs a task so many times at once, and says how long the slowest took.
pub async fn timed<F>(tasks: usize, start: impl Fn(usize) -> F) -> Result<Duration, BoxError>
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

/// The one in the middle.
pub fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}
