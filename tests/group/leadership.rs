//! Programs that embed a member and ask whether it leads: cut off, standing still and handing over. The test runs itself as
//! its programs.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use registry::raft::Member;
use registry::{Backend, Config, Overrides};
use rustix::time::{ClockId, clock_gettime};
use tokio::process::Command;

use crate::harness::Group;
use crate::until;

const CONFIG: &str = "REGISTRY_TEST_MEMBER";

/// Of the clock that all processes of the machine share, in nanoseconds.
fn now() -> i128 {
    let now = clock_gettime(ClockId::Monotonic);
    i128::from(now.tv_sec) * 1_000_000_000 + i128::from(now.tv_nsec)
}

/// Where a program writes what it finds.
fn file_of(config: &Path) -> PathBuf {
    config.with_extension("told")
}

/// Where it writes what it is told without asking.
fn told_file_of(config: &Path) -> PathBuf {
    config.with_extension("channel")
}

/// Asks without pause whether it leads, and writes down when it found a change: at each, the moment before it asked, and
/// for how long it was so. Writes down also what it is told by itself: the term, or 0. Does nothing else.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_program_that_embeds_a_member() {
    let Ok(config) = std::env::var(CONFIG) else { return };
    let Backend::Raft(raft) = Config::load(Some(Path::new(&config)), &Overrides::default())
        .unwrap()
        .backend
    else {
        panic!("it is no member")
    };
    let member = Member::start(&raft).await.unwrap();
    println!("\nready");
    let path = file_of(Path::new(&config));
    let mut file = OpenOptions::new().create(true).append(true).open(path).unwrap();
    let mut told = member.leadership();
    let told_file = told_file_of(Path::new(&config));
    let mut told_file = OpenOptions::new().create(true).append(true).open(told_file).unwrap();
    tokio::spawn(async move {
        loop {
            let leads = *told.borrow_and_update();
            writeln!(told_file, "{}", leads.unwrap_or(0)).unwrap();
            if told.changed().await.is_err() {
                return;
            }
        }
    });
    let asking = move || -> std::io::Result<()> {
        let mut found: Option<(u64, i128, i128)> = None;
        loop {
            let asked = now();
            let leads = member.leads();
            if let Some((term, since, last)) = found
                && leads != Some(term)
            {
                writeln!(file, "ended {term} {since} {last}")?;
                found = None;
            }
            if let Some(term) = leads {
                if found.is_none() {
                    writeln!(file, "leads {term} {asked} {asked}")?;
                }
                let since = found.map_or(asked, |(_, since, _)| since);
                found = Some((term, since, asked));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    tokio::task::spawn_blocking(asking).await.unwrap().unwrap();
}

fn program(config: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "leadership::a_program_that_embeds_a_member"]);
    command.args(["--nocapture", "--test-threads=1"]).env(CONFIG, config);
    command
}

/// What one program found: the term, and the first and last moment that it led in it.
#[derive(Clone, Copy, Debug)]
struct Led {
    term: u64,
    first: i128,
    last: i128,
    ended: bool,
}

/// All that the program of a member found, by its first moment.
fn found_by(group: &Group, name: &str) -> Vec<Led> {
    let text = std::fs::read_to_string(file_of(&group.config_file(name))).unwrap_or_default();
    let mut led = BTreeMap::new();
    // A line may be half written.
    for line in text.split_inclusive('\n').filter(|line| line.ends_with('\n')) {
        let fields: Vec<_> = line.split_whitespace().collect();
        let [what, term, first, last] = fields[..] else {
            panic!("{line}")
        };
        let (first, last) = (first.parse().unwrap(), last.parse().unwrap());
        let found = Led {
            term: term.parse().unwrap(),
            first,
            last,
            ended: what == "ended",
        };
        led.insert(first, found);
    }
    led.into_values().collect()
}

/// What the program of a member was told: terms, and 0 when it led no more.
fn told_to(group: &Group, name: &str) -> Vec<u64> {
    let text = std::fs::read_to_string(told_file_of(&group.config_file(name))).unwrap_or_default();
    let whole = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
    whole.map(|line| line.trim().parse().unwrap()).collect()
}

/// Nine rounds: a leader that is cut off, one that stands still, and one that is cut off while the others start anew, in
/// turns.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_program_finds_that_it_leads_while_another_may() {
    let mut group = Group::start_program(3, |_| String::new(), program).await;
    let names = ["a", "b", "c"];
    let all = |group: &Group| -> Vec<(usize, Led)> {
        let of = |at| found_by(group, names[at]).into_iter().map(move |led| (at, led));
        (0..3).flat_map(of).collect()
    };
    let newest = |group: &Group| all(group).into_iter().max_by_key(|(_, led)| led.term);
    for round in 0..9 {
        until("one finds that it leads, and is told", || async {
            newest(&group).is_some_and(|(at, led)| !led.ended && told_to(&group, names[at]).contains(&led.term))
        })
        .await;
        let (old, before) = newest(&group).unwrap();
        match round % 3 {
            0 => group.net.isolate(old),
            1 => group.process(old).pause(),
            _ => {
                group.net.isolate(old);
                let others = (0..3).filter(|at| *at != old);
                for at in others.clone() {
                    group.kill(at).await;
                }
                others.for_each(|at| group.start_unready(at));
            }
        }
        until("another finds that it leads", || async {
            newest(&group).is_some_and(|(at, led)| at != old && led.term > before.term)
        })
        .await;
        match round % 3 {
            1 => group.process(old).resume(),
            _ => group.net.mend(),
        }
        until("the old one finds that it leads no more, and is told", || async {
            let found = found_by(&group, names[old]);
            let told = told_to(&group, names[old]);
            let place = told.iter().position(|term| *term == before.term);
            found.iter().any(|led| led.term == before.term && led.ended)
                && place.is_some_and(|place| told.len() > place + 1)
        })
        .await;
    }
    let mut all = all(&group);
    println!("{all:#?}");
    all.sort_by_key(|(_, led)| (led.term, led.first));
    assert!(all.len() > 9);
    for pair in all.windows(2) {
        let ((one, earlier), (other, later)) = (pair[0], pair[1]);
        assert!(
            earlier.last < later.first,
            "two led at once: {one} {earlier:?} and {other} {later:?}"
        );
        assert!(
            one == other || earlier.term < later.term,
            "two led in one term: {earlier:?} and {later:?}"
        );
    }
}
