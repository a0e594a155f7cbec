//! The log as openraft drives it.

use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds};
use std::path::Path;
use std::sync::Arc;

use openraft::storage::{IOFlushed, RaftLogStorage};
use openraft::{EntryPayload, LogState, RaftLogReader};
use registry_api::Result;
use tokio::sync::oneshot;

use crate::disk::{Disk, Folder};
use crate::log::{self, Identity, Job, Log, OnFatal, Options, Place, Segment};
use crate::standing::Standing;
use crate::types::{LogEntry, LogId, StoredMembership, TypeConfig, Vote};

/// The most bytes of entries that are read for one message to another member.
const READ_BYTES: u64 = 2 << 20;

/// An entry that is to be read: from memory, or from its file.
type Found = (LogId, Option<LogEntry>, Option<(Place, Segment)>);

/// A member's log, and the member's place in the group by it. Clones share both.
#[derive(Clone, Debug)]
pub(crate) struct LogStore(Arc<Log>, Standing);

impl LogStore {
    /// Opens the log in that directory.
    ///
    /// # Errors
    /// As [`Log::open`].
    pub(crate) fn open(directory: &Path, identity: Identity, options: Options, on_fatal: OnFatal) -> Result<Self> {
        Self::on(Arc::new(Folder(directory.into())), identity, options, on_fatal)
    }

    /// As [`LogStore::open`], on any disk.
    pub(crate) fn on(disk: Arc<dyn Disk>, identity: Identity, options: Options, on_fatal: OnFatal) -> Result<Self> {
        let log = Log::open(disk, identity, options, on_fatal)?;
        Ok(Self::of(log, identity.member))
    }

    pub(crate) fn in_memory(member: u64) -> Self {
        Self::of(Log::in_memory(), member)
    }

    fn of(log: Log, member: u64) -> Self {
        let standing = Standing::new(member);
        let vote = log.state.lock().vote;
        vote.iter().for_each(|vote| standing.note_vote(vote));
        Self(Arc::new(log), standing)
    }

    pub(crate) fn standing(&self) -> &Standing {
        &self.1
    }

    /// The last entry of the log.
    pub(crate) fn last(&self) -> Option<LogId> {
        self.0.state.lock().last()
    }

    /// The term that this member has promised itself to: noted before anybody is told, and durable when they are.
    pub(crate) fn promised(&self) -> u64 {
        self.0.state.lock().vote.map_or(0, |vote| vote.leader_id().term)
    }

    pub(crate) fn log(&self) -> &Log {
        &self.0
    }

    /// The entries of `from..to`, as far as they go and the bytes last; at least one, if there is one.
    fn read(&self, from: u64, to: u64, most: u64) -> io::Result<Vec<LogEntry>> {
        let mut found = Vec::new();
        {
            let state = self.0.state.lock();
            let first = state.first();
            let skip = usize::try_from(from.saturating_sub(first)).map_err(io::Error::other)?;
            let mut bytes = 0;
            for slot in state.slots.iter().skip(skip).take_while(|slot| slot.id.index < to) {
                if bytes > 0 && bytes + u64::from(slot.bytes) > most {
                    break;
                }
                bytes += u64::from(slot.bytes);
                let place = slot.place.filter(|_| slot.entry.is_none());
                let place = place.and_then(|place| Some((place, state.segment(place)?)));
                found.push((slot.id, slot.entry.clone(), place));
            }
        }
        // Files are read without the lock.
        let read = |(id, entry, place): Found| match (entry, place) {
            (Some(entry), _) => Ok(entry),
            (None, Some((place, segment))) => log::read(&segment, id, place),
            (None, None) => Err(io::Error::other(format!(
                "entry {} is neither in memory nor on disk",
                id.index
            ))),
        };
        found.into_iter().map(read).collect()
    }

    async fn wait(&self, job: impl FnOnce(oneshot::Sender<io::Result<()>>) -> Job) -> io::Result<()> {
        let (done, written) = oneshot::channel();
        match self.0.submit(job(done))? {
            None => written.await.map_err(io::Error::other)?,
            Some(_) => Ok(()),
        }
    }
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<R>(&mut self, range: R) -> io::Result<Vec<LogEntry>>
    where
        R: RangeBounds<u64> + Clone + Debug + Send,
    {
        let from = match range.start_bound() {
            Bound::Included(from) => *from,
            Bound::Excluded(from) => from + 1,
            Bound::Unbounded => 0,
        };
        let to = match range.end_bound() {
            Bound::Included(to) => to.saturating_add(1),
            Bound::Excluded(to) => *to,
            Bound::Unbounded => u64::MAX,
        };
        self.read(from, to, u64::MAX)
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> io::Result<Vec<LogEntry>> {
        let entries = self.read(start, end, READ_BYTES)?;
        // What was purged meanwhile must not look like entries that follow what is sent: openraft takes nothing as "not
        // now", and sends a snapshot once it learns of the purge.
        match entries.first() {
            Some(first) if first.log_id.index != start => Ok(Vec::new()),
            _ => Ok(entries),
        }
    }

    async fn read_vote(&mut self) -> io::Result<Option<Vote>> {
        Ok(self.0.state.lock().vote)
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> io::Result<LogState<TypeConfig>> {
        let state = self.0.state.lock();
        Ok(LogState {
            last_purged_log_id: state.purged,
            last_log_id: state.last(),
        })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> io::Result<()> {
        self.0.state.lock().vote = Some(*vote);
        self.1.note_vote(vote);
        self.wait(|done| Job::Vote(*vote, done)).await
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> io::Result<()> {
        // The writer looks there.
        let mut state = self.0.state.lock();
        state.committed = state.committed.max(committed);
        Ok(())
    }

    async fn read_committed(&mut self) -> io::Result<Option<LogId>> {
        Ok(self.0.state.lock().committed)
    }

    async fn append<I>(&mut self, entries: I, flushed: IOFlushed<TypeConfig>) -> io::Result<()>
    where
        I: IntoIterator<Item = LogEntry> + Send,
        I::IntoIter: Send,
    {
        let entries: Vec<_> = entries.into_iter().collect();
        {
            // Readable at once, before they are on disk.
            let mut state = self.0.state.lock();
            for entry in &entries {
                if let EntryPayload::Membership(membership) = &entry.payload {
                    let membership = StoredMembership::new(Some(entry.log_id), membership.clone());
                    self.1.note_membership(Some(membership));
                }
                state.push(entry.clone(), None)?;
            }
        }
        if let Some(Job::Append(_, flushed)) = self.0.submit(Job::Append(entries, flushed))? {
            flushed.io_completed(Ok(()));
        }
        Ok(())
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> io::Result<()> {
        self.0.state.lock().truncate_after(last);
        self.1.note_membership(None);
        self.wait(|done| Job::Truncate(last, done)).await
    }

    async fn purge(&mut self, upto: LogId) -> io::Result<()> {
        let gone = self.0.state.lock().purge(upto);
        // A snapshot may purge a million entries, and openraft waits here.
        tokio::task::spawn_blocking(move || drop(gone));
        self.0.submit(Job::Purge(upto)).map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs;
    use std::path::PathBuf;
    use std::time::Duration;

    use openraft::entry::RaftEntry;
    use openraft::testing::log::{StoreBuilder, Suite};
    use openraft::type_config::TypeConfigExt;
    use openraft::{Membership, StorageError};
    use registry_tests::cluster::eventually;
    use tempfile::TempDir;

    use super::*;
    use crate::snapshot::Snapshots;
    use crate::state_machine::StateMachine;
    use crate::store::Store;
    use crate::types::{Peer, Proposal};

    const IDENTITY: Identity = Identity {
        cluster: [7; 16],
        member: 1,
    };
    const ONE: Options = Options {
        segment_bytes: 16 << 10,
        cache_bytes: 1 << 20,
    };
    const SMALL: Options = Options {
        segment_bytes: 4096,
        cache_bytes: 2048,
    };

    struct OnDisk;

    impl StoreBuilder<TypeConfig, LogStore, StateMachine, TempDir> for OnDisk {
        async fn build(&self) -> std::result::Result<(TempDir, LogStore, StateMachine), StorageError<TypeConfig>> {
            let dir = TempDir::new().unwrap();
            for part in ["log", "snapshots"] {
                fs::create_dir(dir.path().join(part)).unwrap();
            }
            let log = open(&dir.path().join("log"), SMALL).unwrap();
            let snapshots = Snapshots::open(Some(dir.path().join("snapshots")), IDENTITY).unwrap();
            Ok((
                dir,
                log,
                StateMachine::open(Store::default(), Arc::new(snapshots)).unwrap(),
            ))
        }
    }

    struct InMemory;

    impl StoreBuilder<TypeConfig, LogStore, StateMachine, ()> for InMemory {
        async fn build(&self) -> std::result::Result<((), LogStore, StateMachine), StorageError<TypeConfig>> {
            let snapshots = Snapshots::open(None, IDENTITY).unwrap();
            Ok((
                (),
                LogStore::in_memory(1),
                StateMachine::open(Store::default(), Arc::new(snapshots)).unwrap(),
            ))
        }
    }

    #[test]
    fn openrafts_suite_on_disk() {
        runtime().block_on(Suite::test_all(OnDisk)).unwrap();
    }

    #[test]
    fn openrafts_suite_in_memory() {
        runtime().block_on(Suite::test_all(InMemory)).unwrap();
    }

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
    }

    fn open(directory: &Path, options: Options) -> Result<LogStore> {
        LogStore::open(
            directory,
            IDENTITY,
            options,
            Arc::new(|error| panic!("the disk failed: {error}")),
        )
    }

    fn id(index: u64) -> LogId {
        LogId::new_term_index(1, index)
    }

    fn entry(index: u64) -> LogEntry {
        let text = format!("entry {index} {}", "x".repeat(index as usize % 97));
        LogEntry::new(id(index), openraft::EntryPayload::Normal(Proposal(text.into())))
    }

    /// Appends and waits until it is on disk.
    async fn append(log: &mut LogStore, range: std::ops::Range<u64>) {
        let (done, flushed) = TypeConfig::oneshot();
        log.append(range.map(entry), IOFlushed::signal(done)).await.unwrap();
        flushed.await.unwrap().unwrap();
    }

    async fn expect(log: &mut LogStore, range: std::ops::Range<u64>) {
        let entries = log.try_get_log_entries(..).await.unwrap();
        assert_eq!(entries, range.map(entry).collect::<Vec<_>>());
    }

    fn segments(directory: &Path) -> Vec<PathBuf> {
        let files = fs::read_dir(directory).unwrap().map(|file| file.unwrap().path());
        let mut files: Vec<_> = files
            .filter(|path| path.extension().is_some_and(|e| e == "log"))
            .collect();
        files.sort();
        files
    }

    /// Before an entry can be sent, or a vote answered.
    #[tokio::test]
    async fn a_membership_and_a_vote_are_noted_as_they_are_written() {
        let membership = |index, voters: &[u64]| {
            let nodes: BTreeMap<_, _> = (1..=2).map(|id| (id, Peer::default())).collect();
            let membership = Membership::new(vec![voters.iter().copied().collect()], nodes).unwrap();
            LogEntry::new(id(index), EntryPayload::Membership(membership))
        };
        let none = StoredMembership::default();
        let mut log = LogStore::in_memory(1);
        let standing = log.standing().clone();
        let append = async |log: &mut LogStore, entry| {
            let (done, _flushed) = TypeConfig::oneshot();
            log.append([entry], IOFlushed::signal(done)).await.unwrap();
        };
        log.save_vote(&Vote::new_committed(2, 1)).await.unwrap();
        append(&mut log, membership(0, &[1, 2])).await;
        assert!(standing.may_lead(2, &none) && !standing.is_only_voter_in(2, &none));
        append(&mut log, membership(1, &[1])).await;
        assert!(standing.is_only_voter_in(2, &none));
        append(&mut log, membership(2, &[2])).await;
        assert!(!standing.may_lead(2, &none));
        append(&mut log, membership(3, &[1])).await;
        log.truncate_after(Some(id(1))).await.unwrap();
        assert!(!standing.is_only_voter_in(2, &none), "what was truncated says nothing");
        append(&mut log, membership(2, &[1])).await;
        assert!(standing.is_only_voter_in(2, &none));
        log.save_vote(&Vote::new(3, 2)).await.unwrap();
        assert!(!standing.may_lead(2, &none) && !standing.is_only_voter_in(2, &none));
    }

    #[tokio::test]
    async fn what_was_appended_is_there_again() {
        let dir = TempDir::new().unwrap();
        let mut log = open(dir.path(), SMALL).unwrap();
        let vote = Vote::new(3, 1);
        for at in (0..200).step_by(10) {
            append(&mut log, at..at + 10).await;
            log.save_vote(&vote).await.unwrap();
            log.save_committed(Some(id(at))).await.unwrap();
        }
        expect(&mut log, 0..200).await;
        drop(log);
        let mut log = open(dir.path(), SMALL).unwrap();
        expect(&mut log, 0..200).await;
        assert_eq!(log.read_vote().await.unwrap(), Some(vote));
        assert_eq!(log.read_committed().await.unwrap(), Some(id(190)));
        assert!(segments(dir.path()).len() > 3);
        let some = log.limited_get_log_entries(5, 200).await.unwrap();
        assert_eq!(some[0], entry(5));
    }

    #[tokio::test]
    async fn what_is_read_for_a_message_is_capped_by_its_bytes() {
        let mut log = LogStore::in_memory(1);
        let sizes = [900_000; 5].into_iter().chain([3 << 20, 1]);
        let entries = (0..).zip(sizes).map(|(index, size)| {
            let payload = openraft::EntryPayload::Normal(Proposal(vec![7; size].into()));
            LogEntry::new(id(index), payload)
        });
        let (done, flushed) = TypeConfig::oneshot();
        log.append(entries, IOFlushed::signal(done)).await.unwrap();
        flushed.await.unwrap().unwrap();
        let (mut from, mut together) = (0, Vec::new());
        while from < 7 {
            together.push(log.limited_get_log_entries(from, 7).await.unwrap().len());
            from += *together.last().unwrap() as u64;
        }
        // None is left out, one that is larger than the cap comes alone.
        assert_eq!(together, [2, 2, 1, 1, 1]);
    }

    #[tokio::test]
    async fn truncated_and_purged_stay_so() {
        let dir = TempDir::new().unwrap();
        let mut log = open(dir.path(), SMALL).unwrap();
        append(&mut log, 0..100).await;
        log.truncate_after(Some(id(79))).await.unwrap();
        append(&mut log, 80..150).await;
        let before = segments(dir.path()).len();
        log.purge(id(59)).await.unwrap();
        append(&mut log, 150..160).await;
        expect(&mut log, 60..160).await;
        // The writer removes segments when nobody waits for it any more.
        eventually(Duration::from_secs(20), || async {
            segments(dir.path()).len() < before
        })
        .await;
        for _ in 0..2 {
            drop(log);
            log = open(dir.path(), SMALL).unwrap();
            expect(&mut log, 60..160).await;
            assert_eq!(log.get_log_state().await.unwrap().last_purged_log_id, Some(id(59)));
        }
        // As after a snapshot that is ahead of the log.
        log.purge(id(500)).await.unwrap();
        append(&mut log, 501..510).await;
        drop(log);
        let mut log = open(dir.path(), SMALL).unwrap();
        expect(&mut log, 501..510).await;
        log.truncate_after(None).await.unwrap();
        drop(log);
        let state = open(dir.path(), SMALL).unwrap().get_log_state().await.unwrap();
        assert_eq!(
            (state.last_purged_log_id, state.last_log_id),
            (Some(id(500)), Some(id(500)))
        );
    }

    #[tokio::test]
    async fn old_entries_leave_memory_and_are_read_back() {
        let dir = TempDir::new().unwrap();
        let mut log = open(dir.path(), SMALL).unwrap();
        for at in 0..100 {
            append(&mut log, at..at + 1).await;
        }
        let in_memory = |log: &LogStore| {
            log.0
                .state
                .lock()
                .slots
                .iter()
                .filter(|slot| slot.entry.is_some())
                .count()
        };
        assert!((1..50).contains(&in_memory(&log)), "{} are in memory", in_memory(&log));
        expect(&mut log, 0..100).await;
        drop(log);
        let mut log = open(dir.path(), SMALL).unwrap();
        assert!(in_memory(&log) < 50);
        expect(&mut log, 0..100).await;
    }

    /// Where the records of the newest segment end.
    fn end(bytes: &[u8]) -> usize {
        bytes.iter().rposition(|&byte| byte != 0).unwrap() + 1
    }

    #[tokio::test]
    async fn a_torn_tail_is_cut_wherever_it_was_torn() {
        let dir = TempDir::new().unwrap();
        let mut log = open(dir.path(), ONE).unwrap();
        append(&mut log, 0..20).await;
        drop(log);
        let path = segments(dir.path()).pop().unwrap();
        let whole = fs::read(&path).unwrap();
        let mut log = open(dir.path(), ONE).unwrap();
        append(&mut log, 20..21).await;
        drop(log);
        let longer = fs::read(&path).unwrap();
        for torn in end(&whole)..end(&longer) {
            let mut bytes = longer.clone();
            bytes[torn..].fill(0);
            fs::write(&path, &bytes).unwrap();
            let mut log = open(dir.path(), ONE).unwrap();
            expect(&mut log, 0..20).await;
            append(&mut log, 20..22).await;
            drop(log);
            expect(&mut open(dir.path(), ONE).unwrap(), 0..22).await;
        }
    }

    #[tokio::test]
    async fn sectors_of_one_batch_may_be_lost_in_any_order() {
        let dir = TempDir::new().unwrap();
        let mut log = open(dir.path(), ONE).unwrap();
        append(&mut log, 0..20).await;
        let path = segments(dir.path()).pop().unwrap();
        let from = end(&fs::read(&path).unwrap());
        append(&mut log, 20..40).await;
        drop(log);
        let whole = fs::read(&path).unwrap();
        let mut bytes = whole.clone();
        bytes[from..from + 200].fill(0);
        fs::write(&path, &bytes).unwrap();
        // The records after the hole were written with it, and say so: nothing of the batch was acknowledged.
        expect(&mut open(dir.path(), ONE).unwrap(), 0..20).await;

        // Once another batch follows, the hole is in what was acknowledged.
        fs::write(&path, &whole).unwrap();
        let mut log = open(dir.path(), ONE).unwrap();
        append(&mut log, 40..41).await;
        drop(log);
        let mut bytes = fs::read(&path).unwrap();
        bytes[from..from + 200].fill(0);
        fs::write(&path, &bytes).unwrap();
        let refusal = open(dir.path(), ONE).unwrap_err().to_string();
        assert!(
            refusal.contains("wal-") && refusal.contains("damaged at byte"),
            "{refusal}"
        );
    }

    #[tokio::test]
    async fn a_flipped_bit_before_good_records_is_refused_and_left_alone() {
        let dir = TempDir::new().unwrap();
        let mut log = open(dir.path(), ONE).unwrap();
        append(&mut log, 0..10).await;
        let path = segments(dir.path()).pop().unwrap();
        let acknowledged = end(&fs::read(&path).unwrap());
        append(&mut log, 10..11).await;
        drop(log);
        let good = fs::read(&path).unwrap();
        // The head's zeros after its message mean nothing.
        for at in (0..39).chain(512..acknowledged) {
            let mut bad = good.clone();
            bad[at] ^= 1 << (at % 8);
            fs::write(&path, &bad).unwrap();
            match open(dir.path(), ONE) {
                Err(error) => assert!(error.to_string().contains("nothing was changed"), "{error}"),
                Ok(_) => panic!("the flip at byte {at} was not seen"),
            }
            assert!(fs::read(&path).unwrap() == bad);
        }
    }

    #[tokio::test]
    async fn foreign_newer_and_missing_segments_are_refused() {
        let dir = TempDir::new().unwrap();
        let mut log = open(dir.path(), SMALL).unwrap();
        append(&mut log, 0..200).await;
        drop(log);
        let refusal = |identity| {
            let opened = LogStore::open(dir.path(), identity, SMALL, Arc::new(|_| {}));
            opened.expect_err("it was taken").to_string()
        };
        assert!(
            refusal(Identity {
                cluster: [8; 16],
                member: 1
            })
            .contains("another cluster's")
        );
        assert!(
            refusal(Identity {
                cluster: [7; 16],
                member: 2
            })
            .contains("member 1's")
        );
        let files = segments(dir.path());
        let good = fs::read(&files[0]).unwrap();
        fs::write(&files[0], [&good[..8], &3_u32.to_le_bytes(), &good[12..]].concat()).unwrap();
        assert!(refusal(IDENTITY).contains("its format is 3"));
        fs::write(&files[0], &good).unwrap();
        let aside = dir.path().join("aside");
        for (at, why) in [(0, "segment is missing"), (1, "segment is missing")] {
            fs::rename(&files[at], &aside).unwrap();
            assert!(refusal(IDENTITY).contains(why), "{}", refusal(IDENTITY));
            fs::rename(&aside, &files[at]).unwrap();
        }
        expect(&mut open(dir.path(), SMALL).unwrap(), 0..200).await;
    }
}
