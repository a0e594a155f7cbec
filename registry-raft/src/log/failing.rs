//! Tests of the log on a disk that fails, fills up, or takes its time.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use openraft::entry::RaftEntry;
use openraft::storage::{IOFlushed, RaftLogStorage};
use openraft::type_config::TypeConfigExt;
use openraft::{EntryPayload, RaftLogReader};
use registry_tests::Dice;

use super::{Identity, OnFatal, Options};
use crate::disk::faulty::Faulty;
use crate::log_store::LogStore;
use crate::types::{LogEntry, LogId, Proposal, TypeConfig, Vote};

const IDENTITY: Identity = Identity {
    cluster: [7; 16],
    member: 1,
};
const OPTIONS: Options = Options {
    segment_bytes: 8 << 10,
    cache_bytes: 1 << 10,
};

type Flushed = tokio::sync::oneshot::Receiver<std::io::Result<()>>;

fn open(disk: &Faulty) -> (LogStore, Arc<AtomicUsize>) {
    let fatal = Arc::new(AtomicUsize::new(0));
    let count = fatal.clone();
    let on_fatal: OnFatal = Arc::new(move |_| {
        count.fetch_add(1, Ordering::SeqCst);
    });
    let log = LogStore::on(Arc::new(disk.clone()), IDENTITY, OPTIONS, on_fatal).unwrap();
    (log, fatal)
}

fn id(index: u64) -> LogId {
    LogId::new_term_index(1, index)
}

fn entry(index: u64) -> LogEntry {
    LogEntry::new(id(index), EntryPayload::Normal(Proposal(vec![b'x'; 200].into())))
}

async fn append(log: &mut LogStore, index: u64) -> Flushed {
    let (done, flushed) = TypeConfig::oneshot();
    log.append([entry(index)], IOFlushed::signal(done)).await.unwrap();
    flushed
}

async fn held(log: &mut LogStore) -> u64 {
    log.try_get_log_entries(..).await.unwrap().len() as u64
}

/// Waits for what stays true once it is.
fn until(what: impl Fn() -> bool) {
    let start = Instant::now();
    while !what() {
        assert!(start.elapsed() < Duration::from_secs(10), "it did not come");
        std::thread::yield_now();
    }
}

fn has_reserve(log: &LogStore) -> bool {
    log.log().stats().unwrap().reserve
}

#[tokio::test]
async fn nothing_is_acknowledged_before_the_sync_and_all_in_order() {
    let disk = Faulty::default();
    let (mut log, _) = open(&disk);
    until(|| has_reserve(&log));
    let segment = || disk.files()["wal-0000000000000001.log"].clone();
    disk.hold_syncs();
    let mut flushed = append(&mut log, 0).await;
    // It is written, and readable, and not acknowledged.
    until(|| segment()[512..].windows(200).any(|window| window == [b'x'; 200]));
    assert_eq!(held(&mut log).await, 1);
    assert!(flushed.try_recv().is_err());
    let mut later = append(&mut log, 1).await;
    let voter = tokio::spawn({
        let mut log = log.clone();
        async move { log.save_vote(&Vote::new(2, 1)).await }
    });
    tokio::task::yield_now().await;
    assert!(later.try_recv().is_err() && !voter.is_finished());
    disk.let_syncs_go();
    voter.await.unwrap().unwrap();
    // One stream: what was handed in before the vote was acknowledged before it.
    assert!(flushed.try_recv().unwrap().is_ok() && later.try_recv().unwrap().is_ok());
}

#[tokio::test]
async fn a_failed_sync_is_the_end_and_is_not_believed_by_the_next_start() {
    let disk = Faulty::default();
    let (mut log, fatal) = open(&disk);
    until(|| has_reserve(&log));
    append(&mut log, 0).await.await.unwrap().unwrap();
    disk.fail_syncs(1);
    assert!(append(&mut log, 1).await.await.unwrap().is_err());
    // The disk works again, as far as it says. The log does not ask.
    assert!(append(&mut log, 2).await.await.unwrap().is_err());
    assert!(log.save_vote(&Vote::new(2, 1)).await.is_err());
    assert_eq!(fatal.load(Ordering::SeqCst), 1);
    assert!(log.log().close().unwrap_err().to_string().contains("the sync failed"));

    // Entry 1 is in the page cache, clean, and not on disk. Whoever serves it must have written it.
    let disk = disk.killed();
    let (mut log, _) = open(&disk);
    let served = held(&mut log).await;
    drop(log);
    let (mut log, _) = open(&disk.without_power(&mut Dice(1)));
    assert_eq!((served, held(&mut log).await), (2, 2));
}

#[tokio::test]
async fn a_full_disk_takes_the_reserve_then_ends_and_is_recovered_from() {
    let disk = Faulty::default();
    let (mut log, fatal) = open(&disk);
    until(|| has_reserve(&log));
    disk.limit(disk.used());
    let mut acknowledged = 0;
    while append(&mut log, acknowledged).await.await.unwrap().is_ok() {
        acknowledged += 1;
    }
    // The first segment and the reserve, and no more.
    assert!((50..70).contains(&acknowledged), "{acknowledged}");
    assert_eq!(fatal.load(Ordering::SeqCst), 1);
    assert!(!has_reserve(&log));

    // Nothing is needed to start, nor for a vote: entries leave room for it.
    let full = disk.killed();
    full.limit(full.used());
    let (mut log, fatal) = open(&full);
    assert_eq!(held(&mut log).await, acknowledged);
    log.save_vote(&Vote::new(2, 1)).await.unwrap();
    // A purge makes room, and the reserve comes by itself.
    log.purge(id(acknowledged - 1)).await.unwrap();
    until(|| has_reserve(&log));
    append(&mut log, acknowledged).await.await.unwrap().unwrap();
    assert_eq!((held(&mut log).await, fatal.load(Ordering::SeqCst)), (1, 0));
    assert_eq!(log.log().stats().unwrap().segments, 2);
}

/// Appends so many entries of those from `next` on, and purges what was there before.
async fn move_on(log: &mut LogStore, next: &mut u64, entries: u64) {
    let before = *next;
    for index in before..before + entries {
        append(log, index).await.await.unwrap().unwrap();
    }
    *next += entries;
    log.purge(id(before)).await.unwrap();
    // The writer lets go of segments when nobody waits for it any more.
    until(|| log.log().stats().unwrap().segments <= 3 && has_reserve(log));
}

#[tokio::test]
async fn a_log_that_is_purged_needs_no_more_room() {
    let disk = Faulty::default();
    let (mut log, fatal) = open(&disk);
    let mut next = 0;
    for _ in 0..10 {
        move_on(&mut log, &mut next, 50).await;
    }
    disk.limit(disk.used());
    for _ in 0..50 {
        move_on(&mut log, &mut next, 50).await;
    }
    assert_eq!((held(&mut log).await, fatal.load(Ordering::SeqCst)), (49, 0));
}

#[tokio::test]
async fn what_an_earlier_use_left_is_not_served_and_is_no_damage() {
    let mut disk = Faulty::default();
    let (mut next, mut left) = (0, 0);
    for life in 1..=40 {
        let before = disk.files();
        let (mut log, _) = open(&disk);
        if life > 1 {
            assert_eq!(held(&mut log).await, 49, "life {life}");
            // A start finds no fault with it, and leaves it.
            let after = disk.files();
            let mut segments = before.iter().filter(|(name, _)| name.ends_with(".log"));
            assert!(
                segments.clone().all(|(name, bytes)| after[name] == *bytes),
                "life {life}"
            );
            let (_, newest) = segments.next_back().unwrap();
            left += u32::from(
                newest[OPTIONS.segment_bytes as usize / 2..]
                    .iter()
                    .any(|&byte| byte != 0),
            );
        }
        move_on(&mut log, &mut next, 50 + life % 7).await;
        log.purge(id(next - 50)).await.unwrap();
        log.log().close().unwrap();
        disk = disk.killed();
    }
    assert!(left > 10, "{left}");
}

#[tokio::test]
async fn who_reads_a_purged_entry_does_not_find_it_written_over() {
    let disk = Faulty::default();
    let (mut log, _) = open(&disk);
    let mut next = 0;
    move_on(&mut log, &mut next, 50).await;
    let (first, place, segment) = {
        let state = log.log().state.lock();
        let slot = &state.slots[0];
        let place = slot.place.unwrap();
        (slot.id, place, state.segment(place).unwrap())
    };
    for _ in 0..10 {
        move_on(&mut log, &mut next, 50).await;
    }
    assert!(log.log().state.lock().segment(place).is_none());
    assert_eq!(super::read(&segment, first, place).unwrap(), entry(first.index));
}

#[tokio::test]
async fn what_a_stop_left_half_made_is_removed() {
    let disk = Faulty::default();
    drop(open(&disk));
    let half = disk.killed();
    crate::disk::Disk::create(&half, "wal-next.tmp").unwrap();
    let names = |disk: &Faulty| disk.files().into_keys().collect::<Vec<_>>();
    let (log, _) = open(&half);
    until(|| has_reserve(&log));
    assert_eq!(names(&half), ["wal-0000000000000001.log", "wal-next"]);
}

/// The disk after a kill, with another byte in a file.
fn with_byte(disk: &Faulty, name: &str, at: usize, byte: u8) -> Faulty {
    let bad = disk.killed();
    let file = crate::disk::Disk::open(&bad, name).unwrap();
    file.write_at(&[byte], at as u64).unwrap();
    bad
}

#[tokio::test]
async fn a_flipped_bit_at_the_end_is_cut_and_never_served() {
    let disk = Faulty::default();
    let (mut log, _) = open(&disk);
    let name = "wal-0000000000000001.log";
    let end = |disk: &Faulty| disk.files()[name].iter().rposition(|&byte| byte != 0).unwrap() + 1;
    for index in 0..2 {
        append(&mut log, index).await.await.unwrap().unwrap();
    }
    let cut = end(&disk);
    append(&mut log, 2).await.await.unwrap().unwrap();
    log.log().close().unwrap();
    let (good, end_before) = (disk.files()[name].clone(), end(&disk));
    for (at, byte) in good.iter().enumerate().take(end_before).skip(cut) {
        let bad = with_byte(&disk, name, at, byte ^ 1);
        let (mut log, _) = open(&bad);
        // It can't be told from a torn one: nothing follows that proves it was acknowledged.
        assert_eq!(log.try_get_log_entries(..).await.unwrap(), [entry(0), entry(1)]);
        assert_eq!(end(&bad), cut, "byte {at}");
    }
}

#[test]
fn a_file_that_is_used_again_begins_with_a_head_and_an_end() {
    let disk = Faulty::default();
    let spare = crate::disk::Disk::create(&disk, "wal-spare-0000000000000007").unwrap();
    spare.write_at(&[b'x'; 8192], 0).unwrap();
    let reserve = super::Reserve::start(Arc::new(disk.clone()), IDENTITY, 8192).unwrap();
    let segment = reserve.take(9).unwrap();
    let bytes = disk.files()["wal-0000000000000009.log"].clone();
    assert_eq!(super::segment::salt(&bytes, 9, IDENTITY), Ok(segment.salt));
    assert_eq!(bytes[512..528], [0; 16]);
    assert!(bytes[528..].iter().all(|&byte| byte == b'x'));
    reserve.stop();
}

/// Whatever bit of whatever file is another: the log is refused, or what is cut is at its very end, where nothing proves
/// that it was acknowledged. Never is anything served that was not written, nor anything before the end left out.
#[tokio::test]
async fn a_flipped_bit_anywhere_is_refused_or_cut_and_never_served() {
    let disk = Faulty::default();
    let (mut log, _) = open(&disk);
    for index in 0..60 {
        append(&mut log, index).await.await.unwrap().unwrap();
        if index % 10 == 9 {
            log.save_vote(&Vote::new(index, 1)).await.unwrap();
        }
    }
    log.log().close().unwrap();
    let files = disk.files();
    let segments: Vec<_> = files.iter().filter(|(name, _)| name.ends_with(".log")).collect();
    assert!(segments.len() > 1, "{}", segments.len());
    let mut dice = Dice::of_run();
    let (mut flips, mut refused, mut cut) = (0, 0, 0);
    for (name, good) in segments {
        let end = good.iter().rposition(|&byte| byte != 0).unwrap() + 1;
        for (at, byte) in good.iter().enumerate().take(end) {
            flips += 1;
            let bad = with_byte(&disk, name, at, byte ^ (1 << dice.roll(8)));
            let opened = LogStore::on(Arc::new(bad), IDENTITY, OPTIONS, Arc::new(|_: &_| {}));
            let Ok(mut log) = opened else {
                refused += 1;
                continue;
            };
            let held = log.try_get_log_entries(..).await.unwrap();
            assert!(
                held.len() >= 59,
                "{name}, byte {at}: only {} entries are left",
                held.len()
            );
            assert!(
                held.into_iter().zip(0..).all(|(held, index)| held == entry(index)),
                "{name}, byte {at}"
            );
            cut += 1;
        }
    }
    println!("{flips} flips: {refused} were refused, {cut} cut the end or touched nothing");
    assert!(refused > cut && cut > 0);
}

/// Whatever a file has become: the log is refused, or what it serves is how it began.
#[tokio::test]
async fn a_damaged_log_serves_nothing_else() {
    let mut dice = Dice::of_run();
    let disk = Faulty::default();
    let (mut log, _) = open(&disk);
    for index in 0..60 {
        append(&mut log, index).await.await.unwrap().unwrap();
    }
    log.log().close().unwrap();
    let files = disk.files();
    let segments: Vec<_> = files.iter().filter(|(name, _)| name.ends_with(".log")).collect();
    let (tries, mut refused) = (Dice::tries(1_000), 0);
    for _ in 0..tries {
        let (name, good) = segments[dice.pick(segments.len())];
        let bad = disk.killed();
        let file = crate::disk::Disk::open(&bad, name).unwrap();
        file.truncate(0).unwrap();
        file.write_at(&dice.damage(good), 0).unwrap();
        let Ok(mut log) = LogStore::on(Arc::new(bad), IDENTITY, OPTIONS, Arc::new(|_: &_| {})) else {
            refused += 1;
            continue;
        };
        let held = log.try_get_log_entries(..).await.unwrap();
        assert!(held.into_iter().zip(0..).all(|(held, index)| held == entry(index)));
    }
    println!("{tries} damaged logs: {refused} were refused");
    assert!(0 < refused && refused < tries);
}

/// A part of the disk that can't be read is not the end of what was written.
#[tokio::test]
async fn a_read_that_fails_at_the_start_is_told_and_nothing_is_cut() {
    let disk = Faulty::default();
    let (mut log, _) = open(&disk);
    for index in 0..60 {
        append(&mut log, index).await.await.unwrap().unwrap();
    }
    log.log().close().unwrap();
    let mut refused = 0;
    for reads in 0.. {
        let bad = disk.killed();
        bad.fail_read_after(reads);
        let opened = LogStore::on(Arc::new(bad.clone()), IDENTITY, OPTIONS, Arc::new(|_: &_| {}));
        if !bad.has_failed_a_read() {
            break;
        }
        let error = opened.expect_err("it was opened").to_string();
        assert!(error.contains("wal-") && error.contains("the read failed"), "{error}");
        refused += 1;
        assert_eq!(held(&mut open(&bad.killed()).0).await, 60);
    }
    assert!(refused > 1, "{refused}");
}

/// Nor is it a hole in what is sent, nor anything that was purged.
#[tokio::test]
async fn an_entry_that_can_t_be_read_is_an_error() {
    let disk = Faulty::default();
    let (mut log, _) = open(&disk);
    for index in 0..60 {
        append(&mut log, index).await.await.unwrap().unwrap();
    }
    for reads in 0..20 {
        disk.fail_read_after(reads);
        let error = log.try_get_log_entries(..).await.unwrap_err();
        assert!(error.to_string().contains("the read failed"), "{error}");
        disk.fail_read_after(reads);
        assert!(log.limited_get_log_entries(0, 60).await.is_err());
        assert!(disk.has_failed_a_read());
    }
    // It could be read after all.
    assert_eq!(held(&mut log).await, 60);
}

#[tokio::test]
async fn entries_purged_while_they_are_sent_are_no_hole() {
    let disk = Faulty::default();
    let (mut log, _) = open(&disk);
    for index in 0..100 {
        append(&mut log, index).await.await.unwrap().unwrap();
    }
    log.purge(id(79)).await.unwrap();
    assert_eq!(log.limited_get_log_entries(70, 100).await.unwrap(), []);
    assert_eq!(
        log.limited_get_log_entries(80, 82).await.unwrap(),
        [entry(80), entry(81)]
    );
}
