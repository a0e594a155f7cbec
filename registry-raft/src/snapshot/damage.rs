//! Whatever the frames of a snapshot say, and whatever becomes of its bytes.

use registry_tests::Dice;

use super::format::{FORMAT, MAGIC};
use super::*;
use crate::bad_input::in_proportion;
use crate::command::{Change, Command};
use crate::proto;
use crate::types::LogId;

const IDENTITY: Identity = Identity {
    cluster: [7; 16],
    member: 1,
};
/// The magic number and the format.
const HEAD: usize = 12;

fn read(file: &[u8]) -> io::Result<Frozen> {
    Snapshots::on(None, IDENTITY).unwrap().read(file)
}

fn file(frozen: &Frozen) -> Vec<u8> {
    let mut file = Vec::new();
    write(&mut file, &IDENTITY, frozen).unwrap();
    file
}

/// Puts the checksum right of what would be a frame at the start of `bytes`, and answers its length.
fn mend(bytes: &mut [u8]) -> Option<usize> {
    let size = u32::from_le_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
    let crc = crc32fast::hash(bytes.get(8..8 + size)?);
    bytes[4..8].copy_from_slice(&crc.to_le_bytes());
    Some(8 + size)
}

/// Takes the input for the frames of a snapshot, with the checksums that they should have. What is not refused can be
/// used, written and read again; and when anything else becomes of the file, that is refused.
fn is_taken(input: &[u8]) -> bool {
    let mut snapshot = [&MAGIC[..], &FORMAT.to_le_bytes(), input].concat();
    let mut at = HEAD;
    while let Some(length) = mend(&mut snapshot[at..]) {
        at += length;
    }
    let Ok(frozen) = in_proportion(input, || read(&snapshot)) else {
        return false;
    };
    let again = file(&frozen);
    assert_eq!(file(&read(&again).unwrap()), again);
    let (state, meta) = frozen.thaw();
    let thawed = file(&Frozen::of(&state, meta));
    let (state, meta) = read(&thawed).unwrap().thaw();
    assert_eq!(file(&Frozen::of(&state, meta)), thawed);

    let damaged = Dice(crc32fast::hash(input).into()).damage(&snapshot);
    assert!(damaged == snapshot || read(&damaged).is_err(), "taken: {damaged:?}");
    true
}

fn good() -> Vec<Vec<u8>> {
    let mut state = State::default();
    let mut meta = SnapshotMeta::default();
    let mut good = vec![file(&Frozen::of(&state, meta.clone()))];
    for ttl_ms in [1_000, u64::MAX / 3] {
        state.apply(1, Command::new(Change::Open(proto::OpenSession { ttl_ms, first: 0 })));
    }
    for (number, key) in (1..).zip(["/ns/a", "/ns/a/b", "/ns~/lock/1/x", "/other/c"]) {
        let put = proto::operation::Write::Put(proto::Put {
            value: vec![7; number as usize % 3].into(),
            ephemeral: number > 1,
            take_over: false,
        });
        let operations = vec![proto::Operation {
            key: key.into(),
            write: Some(put),
        }];
        let conditions = Vec::new();
        let command = Command {
            session: 1 + number % 2,
            sequence: number,
            answered_below: number / 2,
            level: 0,
            change: Some(Change::Txn(proto::Txn { conditions, operations })),
        };
        state.apply(1, command);
    }
    state.apply(1, Command::new(Change::Heard(1)));
    state.removed = [3, u64::MAX / 3].into();
    meta.last_log_id = Some(LogId::new_term_index(2, u64::MAX / 3));
    good.push(file(&Frozen::of(&state, meta)));
    good.into_iter().map(|file| file[HEAD..].to_vec()).collect()
}

#[test]
fn whatever_its_frames_say_a_snapshot_is_kept_or_refused_and_all_damage_is_refused() {
    Dice::damage_each(&good(), 5_000, is_taken);
    bolero::check!(name = "snapshot")
        .with_iterations(1_000)
        .for_each(|input: &[u8]| {
            is_taken(input);
        });
}
