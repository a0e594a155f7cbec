//! Background tasks of handles and recipes.
//!
//! They run on threads of this crate. A caller may drop a recipe's object outside a runtime, or stop driving the runtime
//! that it was made on, and the session of the handle lives on all the same.

use std::sync::OnceLock;

use tokio::runtime::{Builder, Runtime};
use tokio::task::JoinHandle;

/// How many threads. Sessions have one of their own.
const THREADS: usize = 2;

/// Runs a task in the background, whichever runtime the caller is on, if any. For backends.
pub fn spawn<T: Send + 'static>(task: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    let start = || {
        let mut builder = Builder::new_multi_thread();
        builder
            .worker_threads(THREADS)
            .thread_name("registry-tasks")
            .enable_all();
        builder
            .build()
            .expect("a process that can't start a thread can't go on")
    };
    RUNTIME.get_or_init(start).spawn(task)
}
