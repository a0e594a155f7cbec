//! The end of a member that can't go on: a task that it needs has failed, its log has, or the group has removed it.

use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::Core;

impl Core {
    /// Runs a task that the member needs as long as it runs. If it panics, the member ends with the reason.
    pub(crate) fn keep(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        self.keep_running(name, tokio::spawn(task));
    }

    /// As [`Core::keep`], of a task that runs already.
    pub(crate) fn keep_running(&self, name: &'static str, task: JoinHandle<()>) -> JoinHandle<()> {
        let core = self.clone();
        tokio::spawn(async move {
            if let Err(error) = task.await
                && error.is_panic()
            {
                core.fail(format!("{name} failed: {error}"));
            }
        })
    }

    /// Ends the member with the reason if the thread that holds this panics.
    pub(crate) fn needs(&self, name: &'static str) -> Needed {
        let core = self.clone();
        Needed { core, name }
    }

    /// Says why the member can't go on. The first reason counts. From then on nothing is answered from what is applied here
    /// alone.
    pub(crate) fn fail(&self, reason: String) {
        self.standing().close();
        self.failed.send_if_modified(|failed| {
            let first = failed.is_none();
            failed.get_or_insert(reason);
            first
        });
    }

    /// Waits for a reason to end, and ends the member: it answers nobody any more.
    pub(super) async fn end_on_failure(
        self,
        ended: watch::Sender<Option<String>>,
        mut stopping: watch::Receiver<bool>,
    ) {
        let mut failed = self.failed.subscribe();
        let reason = tokio::select! {
            failed = failed.wait_for(Option::is_some) => failed.ok().and_then(|reason| reason.clone()),
            // An error says that the member is gone.
            _ = stopping.wait_for(|stop| *stop) => None,
        };
        let Some(reason) = reason else {
            return;
        };
        tracing::error!(reason, "the member ends");
        self.store().end_watches();
        // An error says that it had ended already.
        let _ = self.raft().shutdown().await;
        ended.send_replace(Some(reason));
    }
}

/// A thread that the member needs as long as it runs.
pub(crate) struct Needed {
    core: Core,
    name: &'static str,
}

impl Drop for Needed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.core.fail(format!("{} failed: its thread has panicked", self.name));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use registry_api::{Error, Key, Options, Read};

    use crate::{Member, RaftConfig};

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_member_ends_with_the_reason_when_a_task_that_it_needs_panics() {
        let member = Member::start(&RaftConfig::in_memory()).await.unwrap();
        let options = Options {
            request_timeout: Duration::from_secs(1),
            ..Options::default()
        };
        let registry = member.connect(&options).await.unwrap();
        let core = member.core();
        core.keep("a task that ends well", async {});
        core.keep("the task of this test", async { panic!("on purpose") });
        let reason = tokio::time::timeout(Duration::from_secs(20), member.ended())
            .await
            .unwrap();
        assert!(
            reason.contains("the task of this test failed") && reason.contains("on purpose"),
            "{reason}"
        );
        let read = registry.get(&Key::parse("/a").unwrap(), Read::Linearizable).await;
        assert!(matches!(read, Err(Error::Unavailable { .. })), "{read:?}");
        member.stop().await.unwrap();
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_member_ends_with_the_reason_when_a_thread_that_it_needs_panics() {
        let member = Member::start(&RaftConfig::in_memory()).await.unwrap();
        let core = member.core();
        drop(core.needs("a thread that ends well"));
        let needed = core.needs("the thread of this test");
        let ended = std::thread::spawn(move || {
            let _needed = needed;
            panic!("on purpose");
        });
        assert!(ended.join().is_err());
        let reason = tokio::time::timeout(Duration::from_secs(20), member.ended())
            .await
            .unwrap();
        assert!(reason.contains("the thread of this test failed"), "{reason}");
        member.stop().await.unwrap();
    }
}
