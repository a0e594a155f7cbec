//! A wall clock of a process's own, that jumps.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use tokio::process::Command;

/// The time of day as one process sees it. Its monotonic clock is the machine's.
#[derive(Clone, Debug)]
pub struct WallClock {
    /// How many seconds it is ahead of the machine's.
    ahead: PathBuf,
    /// What comes between the process and the system.
    library: PathBuf,
}

impl WallClock {
    /// The clock of which that file tells. It is right until it jumps.
    pub fn told_by(file: &Path) -> Self {
        let clock = Self {
            ahead: file.into(),
            library: file.with_extension("so"),
        };
        if !file.exists() {
            clock.jump(0);
            compile(&clock.library);
        }
        clock
    }

    /// Gives it to a process that is to be started.
    pub fn give_to(&self, command: &mut Command) {
        command.env("LD_PRELOAD", &self.library);
        command.env("REGISTRY_TEST_CLOCK", &self.ahead);
    }

    /// From now on it is so many seconds ahead of the machine's.
    pub fn jump(&self, seconds: i64) {
        // In place, since processes have the file in their memory.
        let written = std::fs::OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&self.ahead)
            .and_then(|mut file| std::io::Write::write_all(&mut file, &seconds.to_ne_bytes()));
        written.expect("there is room for a file");
    }
}

fn compile(library: &Path) {
    let mut cc = std::process::Command::new("cc");
    cc.args(["-shared", "-fPIC", "-O1", "-x", "c", "-o"])
        .arg(library)
        .arg("-");
    let mut cc = cc
        .stdin(Stdio::piped())
        .spawn()
        .expect("cc is missing: apt-get install gcc");
    let source = cc.stdin.take().expect("its input is a pipe");
    let mut source = std::io::BufWriter::new(source);
    std::io::Write::write_all(&mut source, include_bytes!("clock.c")).expect("cc reads");
    drop(source);
    let status = cc.wait().expect("cc ends");
    assert!(status.success(), "the clock can't be compiled");
}

#[cfg(test)]
mod tests {
    use std::time::{SystemTime, UNIX_EPOCH};

    use super::*;
    use crate::Process;

    #[tokio::test]
    async fn a_process_sees_the_jump_while_it_runs() {
        let dir = tempfile::tempdir().expect("there is room for a directory");
        let clock = WallClock::told_by(&dir.path().join("clock"));
        let mut command = Command::new("bash");
        command.args(["-c", r"while printf '%(%s)T\n'; do sleep 0.1; done"]);
        clock.give_to(&mut command);
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .expect("it is later")
            .as_secs();
        let jumped = |line: &str| {
            let told: u64 = line.parse().expect("it prints seconds");
            assert!(
                told < now + 3600 || told > now + 86_000,
                "it jumped to {told} from {now}"
            );
            if told < now + 3600 {
                clock.jump(86_400);
            }
            (told > now + 3600).then_some(())
        };
        Process::start(command, jumped).await.0.kill().await;
    }
}
