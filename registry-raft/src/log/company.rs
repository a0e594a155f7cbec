//! Whether an entry that comes alone waits for others before it is synced.
//!
//! Callers that wait for each other, or whose last entries shared a sync, come back within a moment of each other. The first
//! would have a sync of its own, and the others wait for it and then for theirs. Where several came together of late, the
//! first waits a moment for as many. (Helland, Sammer, Lyon, Carr, Garrett and Reuter, "Group Commit Timers and High Volume
//! Transaction Systems", 1987.)

use std::time::Duration;

/// How long it waits at the most, and no longer than the last sync took.
pub(super) const MOMENT: Duration = Duration::from_micros(120);
/// After a wait in vain so many batches do not wait. More than are looked back at: who was together with another by chance
/// waits once for it.
const VAIN: u32 = 4;

/// So many are worth a sync, however many came together before: where many callers keep the processors busy, to wait for more
/// has fewer puts in the end.
const MANY: usize = 4;

/// How many entries shared a sync of late.
#[derive(Debug, Default)]
pub(super) struct Company {
    recent: [usize; VAIN as usize - 1],
    alone: u32,
}

impl Company {
    /// How many entries a batch waits for.
    pub(super) fn expected(&self) -> usize {
        match self.alone {
            0 => self.recent.iter().copied().max().unwrap_or(0).min(MANY),
            _ => 0,
        }
    }

    /// Notes a batch of so many entries, of which `first` were there when it began to wait, if it did.
    pub(super) fn note(&mut self, first: Option<usize>, entries: usize) {
        self.alone = match first {
            Some(first) if entries == first => VAIN,
            Some(_) => 0,
            None => self.alone.saturating_sub(1),
        };
        self.recent.rotate_right(1);
        self.recent[0] = entries;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lone_caller_waits_for_nobody() {
        let mut company = Company::default();
        for _ in 0..10 {
            assert!(company.expected() <= 1);
            company.note(None, 1);
        }
    }

    #[test]
    fn two_that_come_together_wait_for_each_other() {
        let mut company = Company::default();
        company.note(None, 2);
        for _ in 0..10 {
            assert_eq!(company.expected(), 2);
            company.note(Some(1), 2);
        }
    }

    #[test]
    fn many_do_not_wait_for_more() {
        let mut company = Company::default();
        company.note(None, 1000);
        assert_eq!(company.expected(), MANY);
    }

    #[test]
    fn who_came_together_by_chance_waits_once() {
        let mut company = Company::default();
        let mut waits = 0;
        company.note(None, 2);
        for _ in 0..100 {
            let waited = company.expected() > 1;
            waits += usize::from(waited);
            company.note(waited.then_some(1), 1);
        }
        assert_eq!(waits, 1);
    }
}
