//! Tests of snapshots on a disk that loses power at every point there is, fills up and fails.

use registry_tests::Dice;

use super::*;
use crate::command::{Change, Command};
use crate::disk::faulty::Faulty;
use crate::proto;
use crate::types::LogId;

const IDENTITY: Identity = Identity {
    cluster: [7; 16],
    member: 1,
};

fn open(disk: &Faulty) -> Result<(Snapshots, Option<Frozen>)> {
    let snapshots = Snapshots::on(Some(Arc::new(disk.clone())), IDENTITY)?;
    let loaded = snapshots.load()?;
    Ok((snapshots, loaded))
}

/// A state that differs from every other.
fn frozen(index: u64, dice: &mut Dice) -> Frozen {
    let mut state = State::default();
    state.apply(
        1,
        Command::new(Change::Open(proto::OpenSession { ttl_ms: 1000, first: 0 })),
    );
    for key in 0..1 + dice.roll(8) {
        let put = proto::operation::Write::Put(proto::Put {
            value: vec![dice.roll(256) as u8; dice.roll(900) as usize].into(),
            ..proto::Put::default()
        });
        let operations = vec![proto::Operation {
            key: format!("/ns/{key}"),
            write: Some(put),
        }];
        let conditions = Vec::new();
        state.apply(1, Command::new(Change::Txn(proto::Txn { conditions, operations })));
    }
    let meta = SnapshotMeta {
        last_log_id: Some(LogId::new_term_index(1, index)),
        ..SnapshotMeta::default()
    };
    Frozen::of(&state, meta)
}

fn bytes(frozen: &Frozen) -> Vec<u8> {
    let mut bytes = Vec::new();
    write(&mut bytes, &IDENTITY, frozen).unwrap();
    bytes
}

/// One run of several lives; answers how many ends there were within a snapshot, and how many lost one.
fn run(seed: u64) -> (u64, u64) {
    let mut dice = Dice(seed);
    let mut disk = Faulty::default();
    // What a start may find: the newest that was acknowledged, and those under way after it.
    let mut may_be: Vec<Option<Vec<u8>>> = vec![None];
    let (mut index, mut ends, mut lost) = (0, 0, 0);
    for _ in 0..6 {
        if dice.roll(8) > 0 {
            disk.cut_after(1 + dice.roll(60));
        }
        match open(&disk) {
            Ok((snapshots, found)) => {
                let found = found.as_ref().map(bytes);
                assert!(
                    may_be.contains(&found),
                    "seed {seed}: what was found is none of {} snapshots that may be there",
                    may_be.len()
                );
                lost += u64::from(may_be.len() > 1 && may_be.last() != Some(&found));
                may_be = vec![found];
                for _ in 0..dice.roll(6) {
                    // Now and then the same place in the log is written again.
                    index += dice.roll(4);
                    let next = frozen(index, &mut dice);
                    let data = bytes(&next);
                    may_be.push(Some(data.clone()));
                    let written = match dice.roll(3) {
                        0 => snapshots.incoming().and_then(|mut incoming| {
                            incoming.write_all(&data)?;
                            snapshots.install(&next.meta, incoming.finish()?).map(drop)
                        }),
                        _ => snapshots.write(&next).map(drop),
                    };
                    match written {
                        Ok(()) => may_be = vec![Some(data)],
                        Err(error) => {
                            assert!(disk.is_off(), "seed {seed}: {error}");
                            ends += 1;
                            break;
                        }
                    }
                }
            }
            Err(error) => assert!(disk.is_off(), "seed {seed}: {error}"),
        }
        disk = match dice.roll(3) {
            0 => disk.killed(),
            _ => disk.without_power(&mut dice),
        };
    }
    (ends, lost)
}

#[test]
fn the_newest_acknowledged_is_found_after_the_loss_of_power_at_any_point() {
    let Dice(first) = Dice::of_run();
    let runs = Dice::tries(1500);
    let (mut ends, mut lost) = (0, 0);
    for seed in 0..runs {
        let (some, gone) = run(first + seed * 1_000_003);
        (ends, lost) = (ends + some, lost + gone);
    }
    println!("{runs} runs of 6 lives: {ends} ended within a snapshot, {lost} of those were not there afterwards");
    assert!(ends > runs && lost > 0, "the test tests nothing");
}

#[test]
fn a_full_disk_or_a_failed_sync_leaves_the_one_before() {
    let mut dice = Dice(1);
    let disk = Faulty::default();
    let (snapshots, _) = open(&disk).unwrap();
    let (good, next) = (frozen(1, &mut dice), frozen(2, &mut dice));
    snapshots.write(&good).unwrap();
    disk.limit(disk.used() + 100);
    assert_eq!(snapshots.write(&next).unwrap_err().kind(), io::ErrorKind::StorageFull);
    let mut incoming = snapshots.incoming().unwrap();
    let full = incoming.write_all(&bytes(&next)).unwrap_err();
    assert_eq!(full.kind(), io::ErrorKind::StorageFull);
    disk.limit(u64::MAX);
    disk.fail_syncs(1);
    assert!(snapshots.write(&next).is_err());
    // A start needs no room.
    let full = disk.without_power(&mut dice);
    full.limit(full.used());
    let (snapshots, found) = open(&full).unwrap();
    assert_eq!(bytes(&found.unwrap()), bytes(&good));
    full.limit(u64::MAX);
    snapshots.write(&next).unwrap();
    let (_, found) = open(&full.without_power(&mut dice)).unwrap();
    assert_eq!(bytes(&found.unwrap()), bytes(&next));
}

/// A snapshot that can't be read now is not one that is not there, nor a shorter one.
#[test]
fn a_read_that_fails_is_told_and_the_snapshot_stays() {
    let mut dice = Dice(1);
    let disk = Faulty::default();
    let good = frozen(1, &mut dice);
    open(&disk).unwrap().0.write(&good).unwrap();
    let mut refused = 0;
    for reads in 0.. {
        let bad = disk.killed();
        bad.fail_read_after(reads);
        let opened = open(&bad);
        if !bad.has_failed_a_read() {
            break;
        }
        let Err(error) = opened else { panic!("it was loaded") };
        let error = error.to_string();
        assert!(error.contains(".snap") && error.contains("the read failed"), "{error}");
        refused += 1;
        let (_, found) = open(&bad.killed()).unwrap();
        assert_eq!(bytes(&found.unwrap()), bytes(&good));
    }
    assert!(refused > 0, "nothing was read");
}
