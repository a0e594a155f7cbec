//! Whatever the records of a log say, and whatever becomes of their bytes.

use openraft::EntryPayload;
use openraft::entry::RaftEntry;
use registry_tests::Dice;

use super::record::{self, Record};
use super::segment::{self, HEADER};
use super::{Identity, Options, recovery};
use crate::bad_input::in_proportion;
use crate::disk::Disk;
use crate::disk::faulty::Faulty;
use crate::proto::registry::log::v1 as message;
use crate::types::{LogEntry, LogId, Proposal, Vote};
use crate::wire;

const IDENTITY: Identity = Identity {
    cluster: [7; 16],
    member: 1,
};

const SALT: u64 = 0x7361_6c74_2121_0a00;

/// What a start finds in the log.
#[derive(Debug, PartialEq)]
struct Found {
    entries: Vec<LogEntry>,
    vote: Option<Vote>,
    committed: Option<LogId>,
    purged: Option<LogId>,
}

/// What a start finds in a log of that one file, and the next start too; nothing if it is refused.
fn found(file: &[u8]) -> Option<Found> {
    let disk = Faulty::default();
    let start = || {
        let recovered = recovery::recover(&disk, IDENTITY, Options::default()).ok()?;
        let entries = recovered.state.slots.into_iter().filter_map(|slot| slot.entry);
        Some(Found {
            entries: entries.collect(),
            vote: recovered.state.vote,
            committed: recovered.state.committed,
            purged: recovered.state.purged,
        })
    };
    let segment = disk.create(&segment::name(1)).unwrap();
    segment.write_at(file, 0).unwrap();
    let found = start();
    assert_eq!(start(), found, "another start finds something else");
    found
}

fn file(records: &[Record]) -> Vec<u8> {
    salted(records, SALT)
}

fn salted(records: &[Record], salt: u64) -> Vec<u8> {
    let mut file = segment::header(1, IDENTITY, salt);
    for record in records {
        let at = u32::try_from(file.len()).unwrap();
        record::write(&mut file, salt, at.into(), at, record).unwrap();
    }
    file
}

/// The records that make a log of what was found.
fn records(found: &Found) -> Vec<Record> {
    let entries = found.entries.iter().map(|entry| Record::Entry(wire::entry_to(entry)));
    let marks = [
        found.purged.as_ref().map(|id| Record::Purged(wire::log_id_to(id))),
        found.vote.as_ref().map(|vote| Record::Vote(wire::vote_to(vote))),
        found
            .committed
            .as_ref()
            .map(|id| Record::Committed(wire::log_id_to(id))),
    ];
    marks.into_iter().flatten().chain(entries).collect()
}

/// Takes the input for the records of a log, with the checksums that they should have. What is not refused can be written
/// and found again; and when anything else becomes of the file, that is refused or cut, from the first bad record on.
fn is_taken(input: &[u8]) -> bool {
    let mut log = [file(&[]), input.to_vec()].concat();
    let mut ends = vec![HEADER];
    let mut end = HEADER;
    while let Some(length) = record::mend(&mut log[end..], SALT, end as u64) {
        end += length;
        ends.push(end);
    }
    let Some(taken) = in_proportion(input, || found(&log)) else {
        return false;
    };
    assert_eq!(found(&file(&records(&taken))).as_ref(), Some(&taken));

    let mut dice = Dice(crc32fast::hash(input).into());
    let damaged = [&log[..HEADER], &dice.damage(&log[HEADER..])].concat();
    let good = log.iter().zip(&damaged).take_while(|(good, bad)| good == bad).count();
    if let Some(served) = found(&damaged) {
        let cut = ends[ends.partition_point(|&end| end <= good) - 1];
        let cut = if damaged == log { log.len() } else { cut };
        assert_eq!(
            Some(served),
            found(&log[..cut]),
            "what is damaged at byte {good} was served"
        );
    }
    true
}

fn good() -> Vec<Vec<u8>> {
    let id = |index| LogId::new_term_index(3, index);
    let entry = |index, payload| Record::Entry(wire::entry_to(&LogEntry::new(id(index), payload)));
    let normal = |index: u64| {
        entry(
            index,
            EntryPayload::Normal(Proposal(vec![b'x'; 1 + index as usize % 9].into())),
        )
    };
    let membership = message::Membership {
        configs: vec![message::Voters { members: vec![1, 2] }; 2],
        nodes: [1, 2]
            .map(|id| message::Node {
                id,
                name: "a".into(),
                address: "h:1".into(),
            })
            .to_vec(),
    };
    let membership = |index| {
        let membership = wire::membership_from(membership.clone()).unwrap();
        entry(index, EntryPayload::Membership(membership))
    };
    let vote = |term| Record::Vote(wire::vote_to(&Vote::new(term, 1)));
    let committed = |index| Record::Committed(wire::log_id_to(&id(index)));
    let purged = |index| Record::Purged(wire::log_id_to(&id(index)));
    let truncate = |last: Option<u64>| {
        let last = last.map(|last| wire::log_id_to(&id(last)));
        Record::Truncate(message::Truncate { last })
    };
    let blank = |index| entry(index, EntryPayload::Blank);
    // Numbers of many bytes, for a fuzzer to change.
    let far = u64::MAX / 3;
    [
        vec![],
        vec![vote(1), membership(0), blank(1), normal(2), committed(1)],
        vec![
            blank(0),
            blank(1),
            truncate(Some(0)),
            vote(2),
            normal(1),
            purged(0),
            committed(1),
        ],
        vec![blank(0), truncate(None), normal(0)],
        vec![purged(far), blank(far + 1), normal(far + 2), committed(far), vote(far)],
    ]
    // Of another salt: no record that the test did not make one is one, whatever becomes of it.
    .map(|records| salted(&records, !SALT)[HEADER..].to_vec())
    .to_vec()
}

#[test]
fn whatever_its_records_say_a_log_is_kept_or_refused_and_no_damage_is_served() {
    Dice::damage_each(&good(), 2_000, is_taken);
    bolero::check!(name = "log")
        .with_iterations(1_000)
        .for_each(|input: &[u8]| {
            is_taken(input);
        });
}

/// Another of the same length may be written where one was torn. What was cut off after it must not follow it then.
#[test]
fn what_is_cut_off_is_gone_for_good() {
    let entry = |index| {
        let payload = EntryPayload::Normal(Proposal(vec![b'x'; 6_000].into()));
        Record::Entry(wire::entry_to(&LogEntry::new(LogId::new_term_index(3, index), payload)))
    };
    let mut bytes = file(&[entry(0)]);
    let torn = bytes.len();
    // Two that were written together, and a part of the first is lost.
    for index in 1..3 {
        let place = bytes.len() as u64;
        record::write(&mut bytes, SALT, place, u32::try_from(torn).unwrap(), &entry(index)).unwrap();
    }
    bytes[torn + 1_000] = 0;
    bytes.resize(bytes.len() + 9_000, 0);
    let marks = |bytes: &[u8]| record::marks(&bytes[HEADER..], SALT).count();
    assert_eq!(marks(&bytes), 3);

    let disk = Faulty::default();
    let segment = disk.create(&segment::name(1)).unwrap();
    segment.write_at(&bytes, 0).unwrap();
    let recovered = recovery::recover(&disk, IDENTITY, Options::default()).unwrap();
    assert_eq!(recovered.state.slots.len(), 1);
    let disk = disk.without_power(&mut Dice(1));
    assert_eq!(marks(&disk.files()[&segment::name(1)]), 1);
}

/// No log is so long: what would follow the last index, or the last segment, is refused as any damage.
#[test]
fn what_follows_the_last_index_is_refused() {
    let at = |index| {
        let id = LogId::new_term_index(3, index);
        Record::Entry(wire::entry_to(&LogEntry::new(id, EntryPayload::Blank)))
    };
    let purged = Record::Purged(wire::log_id_to(&LogId::new_term_index(3, u64::MAX - 1)));
    assert_eq!(found(&file(&[purged, at(u64::MAX), at(u64::MAX)])), None);

    let disk = Faulty::default();
    disk.create(&segment::name(u64::MAX)).unwrap();
    recovery::recover(&disk, IDENTITY, Options::default())
        .map(drop)
        .unwrap_err();
}

/// Its checksum is right, so it was written and may have been acknowledged: by a version that knows more. Cut off as a torn
/// end, it would be lost with all that follows.
#[test]
fn a_record_that_is_not_known_is_refused_and_not_cut() {
    let committed = Record::Committed(message::LogId { term: 1, index: 0 });
    let blank = Record::Entry(wire::entry_to(&LogEntry::new(
        LogId::new_term_index(1, 0),
        EntryPayload::Blank,
    )));
    let known = file(std::slice::from_ref(&blank));
    let mut bytes = file(&[blank, committed]);
    assert!(found(&bytes).is_some());
    // Another field than any that there is.
    bytes[known.len() + record::HEAD] = 15 << 3 | 2;
    record::mend(&mut bytes[known.len()..], SALT, known.len() as u64).unwrap();
    assert_eq!(found(&bytes), None);
    let disk = Faulty::default();
    disk.create(&segment::name(1)).unwrap().write_at(&bytes, 0).unwrap();
    let error = recovery::recover(&disk, IDENTITY, Options::default())
        .map(drop)
        .unwrap_err();
    assert!(error.to_string().contains("this version knows"), "{error}");
}

/// A log that lacks its beginning, or what it says is committed, is no shorter log.
#[test]
fn a_log_that_lacks_entries_is_refused() {
    let id = |index| LogId::new_term_index(1, index);
    let vote = Record::Vote(wire::vote_to(&Vote::new(3, 1)));
    let blank = |index| Record::Entry(wire::entry_to(&LogEntry::new(id(index), EntryPayload::Blank)));
    let committed = |index| Record::Committed(wire::log_id_to(&id(index)));
    let purged = |index| Record::Purged(wire::log_id_to(&id(index)));
    let refusal = |sequence, records: &[Record]| {
        let mut bytes = segment::header(sequence, IDENTITY, SALT);
        for record in records {
            let at = u32::try_from(bytes.len()).unwrap();
            record::write(&mut bytes, SALT, at.into(), at, record).unwrap();
        }
        let disk = Faulty::default();
        let file = disk.create(&segment::name(sequence)).unwrap();
        file.write_at(&bytes, 0).unwrap();
        let recovered = recovery::recover(&disk, IDENTITY, Options::default());
        recovered.err().map(|error| error.to_string())
    };
    assert_eq!(refusal(1, std::slice::from_ref(&vote)), None);
    let missing = refusal(2, std::slice::from_ref(&vote)).unwrap();
    assert!(
        missing.contains(&segment::name(1)) && missing.contains("missing"),
        "{missing}"
    );
    assert_eq!(refusal(2, &[purged(4), vote]), None);
    assert_eq!(refusal(2, &[purged(4), blank(5), committed(5)]), None);
    let missing = refusal(2, &[purged(4), blank(5), committed(7)]).unwrap();
    assert!(missing.contains("entries 6 to 7 are missing"), "{missing}");
}
