//! Tests of the file that says whose a directory is, on a disk that loses power at every point there is.

use registry_tests::Dice;

use super::*;
use crate::disk::faulty::Faulty;

fn open(disk: &Faulty, number: u64) -> Result<LabelFile> {
    let identity = Identity {
        cluster: [0; 16],
        member: number,
    };
    LabelFile::open(Arc::new(disk.clone()), "a", || Ok(identity))
}

/// One run of several lives; answers how many ends there were within a write, and how many lost it.
fn run(seed: u64) -> (u64, u64) {
    let mut dice = Dice(seed);
    let mut disk = Faulty::default();
    // What a start may find: the newest that was acknowledged, and one that was being written.
    let mut may_be: Vec<Label> = Vec::new();
    let (mut acknowledged, mut ends, mut lost) = (false, 0, 0);
    for life in 0..6 {
        if dice.roll(6) > 0 {
            disk.cut_after(1 + dice.roll(12));
        }
        let number = 2 + life;
        match open(&disk, number) {
            Ok(file) => {
                let found = file.label();
                let new = found.identity.member == number;
                assert!(
                    may_be.contains(&found) || (new && !acknowledged),
                    "seed {seed}: {found:?} is none of {may_be:?}"
                );
                lost += u64::from(may_be.len() > 1 && may_be.last() != Some(&found));
                (may_be, acknowledged) = (vec![found], true);
                for _ in 0..dice.roll(4) {
                    let cluster = [dice.roll(256) as u8; 16];
                    let mut next = file.label();
                    let noted = match dice.roll(3) {
                        0 => {
                            next.founded = true;
                            file.note(|label| label.founded = true)
                        }
                        1 => {
                            next.removed = true;
                            file.note(|label| label.removed = true)
                        }
                        _ => {
                            next.identity.cluster = cluster;
                            file.note(|label| label.identity.cluster = cluster)
                        }
                    };
                    match noted {
                        Ok(()) => may_be = vec![next],
                        Err(error) => {
                            assert!(disk.is_off(), "seed {seed}: {error}");
                            may_be.push(next);
                            ends += 1;
                            break;
                        }
                    }
                }
            }
            Err(error) => {
                assert!(disk.is_off(), "seed {seed}: {error}");
                // A first one that was not acknowledged may be there all the same.
                if !acknowledged {
                    may_be.push(Label {
                        identity: Identity {
                            cluster: [0; 16],
                            member: number,
                        },
                        founded: false,
                        removed: false,
                    });
                }
            }
        }
        disk = match dice.roll(3) {
            0 => disk.killed(),
            _ => disk.without_power(&mut dice),
        };
    }
    (ends, lost)
}

#[test]
fn what_was_noted_last_is_found_after_the_loss_of_power_at_any_point() {
    let Dice(first) = Dice::of_run();
    let runs = Dice::tries(2000);
    let (mut ends, mut lost) = (0, 0);
    for seed in 0..runs {
        let (some, gone) = run(first + seed * 1_000_003);
        (ends, lost) = (ends + some, lost + gone);
    }
    println!("{runs} runs of 6 lives: {ends} ended within a write, {lost} of those were not there afterwards");
    assert!(ends > runs / 4 && lost > 0, "the test tests nothing");
}
