//! A system of a process's own: its wall clock jumps, its disk fails to sync.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use rustix::io::Errno;
use tokio::process::Command;

/// The machine as one process sees it. Its monotonic clock is the machine's.
#[derive(Clone, Debug)]
pub struct System {
    /// What it is like, in two words.
    said: PathBuf,
    /// What comes between the process and the machine.
    library: PathBuf,
}

impl System {
    /// The one of which that file tells. It is as the machine is until another word is said.
    pub fn told_by(file: &Path) -> Self {
        let system = Self {
            said: file.into(),
            library: file.with_extension("so"),
        };
        if !file.exists() {
            system.say(0, 0);
            system.say(1, 0);
            compile(&system.library);
        }
        system
    }

    /// Gives it to a process that is to be started.
    pub fn give_to(&self, command: &mut Command) {
        command.env("LD_PRELOAD", &self.library);
        command.env("REGISTRY_TEST_SYSTEM", &self.said);
    }

    /// From now on its time of day is so many seconds ahead of the machine's.
    pub fn set_clock(&self, seconds: i64) {
        self.say(0, seconds);
    }

    /// From now on each sync of a file or a directory fails, and does nothing; or none does.
    pub fn fail_syncs(&self, with: Option<Errno>) {
        self.say(1, with.map_or(0, |error| error.raw_os_error().into()));
    }

    fn say(&self, at: u64, word: i64) {
        // In place, since processes have the file in their memory.
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&self.said);
        let written = file.and_then(|file| file.write_all_at(&word.to_ne_bytes(), 8 * at));
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
    std::io::Write::write_all(&mut source, include_bytes!("system.c")).expect("cc reads");
    drop(source);
    let status = cc.wait().expect("cc ends");
    assert!(status.success(), "what comes between can't be compiled");
}

#[cfg(test)]
mod tests {
    use std::time::{SystemTime, UNIX_EPOCH};

    use super::*;
    use crate::Process;

    #[tokio::test]
    async fn a_process_sees_the_jump_while_it_runs() {
        let dir = tempfile::tempdir().expect("there is room for a directory");
        let system = System::told_by(&dir.path().join("system"));
        let mut command = Command::new("bash");
        command.args(["-c", r"while printf '%(%s)T\n'; do sleep 0.1; done"]);
        system.give_to(&mut command);
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
                system.set_clock(86_400);
            }
            (told > now + 3600).then_some(())
        };
        Process::start(command, jumped).await.0.kill().await;
    }

    #[tokio::test]
    async fn a_sync_fails_as_long_as_it_is_to() {
        let dir = tempfile::tempdir().expect("there is room for a directory");
        let system = System::told_by(&dir.path().join("system"));
        for with in [None, Some(Errno::IO), None] {
            system.fail_syncs(with);
            for what in ["--data", "--"] {
                let mut command = Command::new("sync");
                command.arg(what).arg(dir.path().join("system.so"));
                system.give_to(&mut command);
                let output = command.output().await.expect("coreutils are there");
                assert_eq!(output.status.success(), with.is_none(), "{output:?}");
            }
        }
    }
}
