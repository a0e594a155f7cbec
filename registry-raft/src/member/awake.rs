//! Keeps a member's thread from sleeping between calls that come one after the other.
//!
//! To wake a thread that sleeps takes 10 to 25 µs in a virtual machine, and a lone caller's call waits for several: as
//! long as a read takes, and a quarter of a put. While such calls come, a task that has nothing to do gives way to all
//! others, of the member and of the system, and asks for its turn again ("spin, then park" of Karlin, Li, Manasse and
//! Owicki, "Empirical studies of competitive spinning for a shared-memory multiprocessor", 1991).

use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use tokio::sync::Notify;

/// For how long after a call the next is waited for so, and how soon it must come after the one before.
const SOON: u64 = 400;
/// How many in a row must have come so soon: by chance few would, of calls that do not wait for each other.
const ROW: u32 = 16;
/// More calls than these at once keep a thread awake themselves, and need the processors.
const FEW: usize = 2;

/// When calls come, in microseconds since the member began.
#[derive(Debug)]
pub(super) struct Awake {
    began: Instant,
    last: AtomicU64,
    row: AtomicU32,
    calls: AtomicUsize,
    begin: Notify,
}

impl Default for Awake {
    fn default() -> Self {
        Self {
            began: Instant::now(),
            last: AtomicU64::new(0),
            row: AtomicU32::new(0),
            calls: AtomicUsize::new(0),
            begin: Notify::new(),
        }
    }
}

/// A call that is being answered.
pub(super) struct Calling<'a>(&'a Awake);

impl Drop for Calling<'_> {
    fn drop(&mut self) {
        self.0.calls.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Awake {
    /// Notes that a call comes, until what this answers is dropped.
    pub(super) fn call(&self) -> Calling<'_> {
        self.call_at(self.now())
    }

    /// Of two that race, either may be missed: nothing but time depends on it.
    fn call_at(&self, now: u64) -> Calling<'_> {
        let before = self.last.swap(now, Ordering::Relaxed);
        self.calls.fetch_add(1, Ordering::Relaxed);
        if now.saturating_sub(before) > SOON {
            self.row.store(0, Ordering::Relaxed);
        } else if self.row.fetch_add(1, Ordering::Relaxed) >= ROW && self.pays_at(now) {
            self.begin.notify_one();
        }
        Calling(self)
    }

    /// Keeps the thread that runs this awake while that pays. Never ends.
    pub(super) async fn keep(&self) {
        loop {
            self.begin.notified().await;
            while self.pays_at(self.now()) {
                std::thread::yield_now();
                tokio::task::yield_now().await;
            }
        }
    }

    fn pays_at(&self, now: u64) -> bool {
        let soon = now.saturating_sub(self.last.load(Ordering::Relaxed)) <= SOON;
        soon && self.calls.load(Ordering::Relaxed) <= FEW
    }

    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    /// Whether the calls so far have it stay awake.
    fn awake(awake: &Awake) -> bool {
        awake.begin.notified().now_or_never().is_some()
    }

    #[test]
    fn only_a_row_of_calls_that_come_at_once_keeps_it_awake() {
        let paced = Awake::default();
        let mut now = 1_000_000;
        // As many that come by chance, most of them at once.
        for _ in 0..20 {
            for _ in 0..=ROW {
                drop(paced.call_at(now));
                now += SOON;
            }
            now += 1;
        }
        assert!(!awake(&paced));
        for _ in 0..=ROW + 1 {
            drop(paced.call_at(now));
            now += SOON;
        }
        assert!(awake(&paced));
        assert!(paced.pays_at(now) && !paced.pays_at(now + 1), "it sleeps after a while");
        drop(paced.call_at(now + 1));
        assert!(!awake(&paced), "one that came later begins another row");
    }

    #[test]
    fn many_calls_at_once_need_no_help() {
        let paced = Awake::default();
        let calls: Vec<_> = (0..100).map(|_| paced.call_at(0)).collect();
        assert!(!awake(&paced) && !paced.pays_at(0));
        drop(calls);
        let one = paced.call_at(0);
        assert!(awake(&paced) && paced.pays_at(0));
        drop(one);
    }

    /// It leaves the thread to all others, and to the end of the runtime.
    #[tokio::test]
    async fn others_run_meanwhile() {
        let paced = std::sync::Arc::new(Awake::default());
        let keeping = paced.clone();
        let keeping = tokio::spawn(async move { keeping.keep().await });
        for _ in 0..1000 {
            drop(paced.call());
            tokio::task::yield_now().await;
        }
        keeping.abort();
        assert!(keeping.await.unwrap_err().is_cancelled());
    }
}
