//! What an abstraction costs: the same work by a store's own client and through the registry, in one run.
//!
//! The two take turns, round by round, so that what else the machine does falls on both; the figure of each is the median
//! of its rounds. `cargo bench ... -- 'put, 1 task'` does only what has that in its name.

use std::sync::Arc;
use std::time::{Duration, Instant};

use registry_api::{BoxError, Depth, List, Read, Registry, WatchItem, WatchRequest, WatchScope};

use crate::key;

/// What a piece of work comes to.
pub type Done = Result<(), BoxError>;

/// A value as it is put.
pub const VALUE: [u8; 256] = [b'v'; 256];
/// How many entries a listing has.
pub const LISTED: usize = 100;
/// How many keys each task puts and gets, one after the other.
pub const KEYS: usize = 10;
const ROUNDS: usize = 15;

/// Whether to measure at all: `cargo test` runs benches too, which are then only built.
pub fn is_wanted() -> bool {
    !std::env::args().any(|argument| argument == "--test")
}

/// Prints the head of the table.
pub fn head(client: &str) {
    println!(
        "{:<48}{:>12}{:>12}{:>8}{:>10}{:>10}",
        "work", client, "registry", "ratio", "raw op/s", "our op/s"
    );
}

/// Prints the time of one operation on each side, as each of so many tasks sees it. A side is who does the work, and the
/// work, which is given that, the number of its task, and how many operations to do.
pub async fn row<A, R, B, O>(
    name: &str,
    tasks: usize,
    operations: usize,
    raw: (&A, impl Fn(A, usize, usize) -> R),
    ours: (&B, impl Fn(B, usize, usize) -> O),
) -> Done
where
    A: Clone,
    B: Clone,
    R: Future<Output = Done> + Send + 'static,
    O: Future<Output = Done> + Send + 'static,
{
    let name = format!("{name}, {tasks} task{}", if tasks == 1 { "" } else { "s" });
    if !is_asked_for(&name) {
        return Ok(());
    }
    let each = if tasks == 1 { operations } else { operations / 16 };
    let (mut of_raw, mut of_ours) = (Vec::new(), Vec::new());
    for round in 0..=ROUNDS {
        for turn in [round % 2 == 0, round % 2 == 1] {
            let taken = match turn {
                true => timed(tasks, |task| raw.1(raw.0.clone(), task, each)).await?,
                false => timed(tasks, |task| ours.1(ours.0.clone(), task, each)).await?,
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
        "{:<48}{:>9.0} µs{:>9.0} µs{:>8.2}{:>10.0}{:>10.0}",
        name,
        raw * 1e6,
        ours * 1e6,
        ours / raw,
        rate(raw),
        rate(ours),
    );
    Ok(())
}

/// Whether to do a piece of work: the program was started with a part of its name, or with none at all.
pub fn is_asked_for(name: &str) -> bool {
    let mut wanted = std::env::args()
        .skip(1)
        .filter(|argument| !argument.starts_with("--"))
        .peekable();
    wanted.peek().is_none() || wanted.any(|part| name.contains(&part))
}

/// The registry's side.
#[derive(Clone)]
pub struct Ours(pub Arc<dyn Registry>);

impl Ours {
    /// Puts what is listed.
    pub async fn fill(&self) -> Done {
        for entry in 0..LISTED {
            self.0.put(&key(&format!("/listed/{entry}")), VALUE.to_vec()).await?;
        }
        Ok(())
    }

    /// Puts keys, the first time each is put apart, over what was there.
    pub async fn put(self, task: usize, count: usize) -> Done {
        self.put_below("", task, count).await
    }

    /// Puts keys of eight segments.
    pub async fn put_deep(self, task: usize, count: usize) -> Done {
        self.put_below("/a/b/c/d/e/f/g", task, count).await
    }

    async fn put_below(self, parent: &str, task: usize, count: usize) -> Done {
        for round in 0..count {
            let name = key(&format!("{parent}/{task}-{}", round % KEYS));
            self.0.put(&name, VALUE.to_vec()).await?;
        }
        Ok(())
    }

    /// Puts and deletes a key.
    pub async fn make_and_delete(self, task: usize, count: usize) -> Done {
        let name = key(&format!("/turn/{task}"));
        for _ in 0..count {
            self.0.put(&name, VALUE.to_vec()).await?;
            self.0.delete(&name).await?;
        }
        Ok(())
    }

    /// Gets what was put, linearizably.
    pub async fn get(self, task: usize, count: usize) -> Done {
        self.read(Read::Linearizable, task, count).await
    }

    /// Gets what was put, by a stale read.
    pub async fn get_stale(self, task: usize, count: usize) -> Done {
        self.read(Read::Stale, task, count).await
    }

    async fn read(self, read: Read, task: usize, count: usize) -> Done {
        for round in 0..count {
            self.0.get(&key(&format!("/{task}-{}", round % KEYS)), read).await?;
        }
        Ok(())
    }

    /// Lists.
    pub async fn list(self, _task: usize, count: usize) -> Done {
        self.list_as(Read::Linearizable, count).await
    }

    /// Lists by a stale read.
    pub async fn list_stale(self, _task: usize, count: usize) -> Done {
        self.list_as(Read::Stale, count).await
    }

    async fn list_as(self, read: Read, count: usize) -> Done {
        for _ in 0..count {
            let list = List {
                depth: Depth::Children,
                read,
                ..List::new(key("/listed"))
            };
            assert_eq!(self.0.list(list).await?.entries.len(), LISTED);
        }
        Ok(())
    }

    /// Puts a key, and reads each change from a watch before the next.
    pub async fn put_until_told(self, _task: usize, count: usize) -> Done {
        let name = key("/watched/key");
        let mut watch = self.0.watch(WatchRequest::new(&name, WatchScope::Key)).await?;
        while !matches!(watch.next().await.transpose()?, Some(WatchItem::Synced(_))) {}
        for _ in 0..count {
            self.0.put(&name, VALUE.to_vec()).await?;
            while !matches!(watch.next().await.transpose()?, Some(WatchItem::Changes(_))) {}
        }
        Ok(())
    }

    /// Takes and releases a lock. All tasks want the same one.
    pub async fn lock(self, _task: usize, count: usize) -> Done {
        let lock = self.0.lock(&key("/lock"));
        for _ in 0..count {
            lock.acquire().await?.release().await?;
        }
        Ok(())
    }
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

/// The one in the middle.
pub fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}
