//! Each property of the conformance suite fails when its sentence is broken on purpose, and says why.
//!
//! A property that can't fail keeps no promise. Here each runs on a store with one fault, and what it says is what the
//! fault is about: not a deadline that ran out elsewhere.

// A test may fail.
#![allow(clippy::unwrap_used)]
#![cfg(feature = "raft")]

#[path = "../clusters/mod.rs"]
mod clusters;
mod store;
mod unknown;

use std::collections::BTreeSet;
use std::sync::Arc;

use async_trait::async_trait;
use clusters::{InProcess, Served};
use futures_util::future::BoxFuture;
use futures_util::{FutureExt, StreamExt, stream};
use registry::{Error, List, Options, Prefix, Registry, Result, SessionId, SessionState, SessionTtl};
use registry_tests::{Cluster, Wire};
use store::{Broken, Fault};
use tokio::sync::OnceCell;

/// How many run at once.
const AT_ONCE: usize = 24;

/// A store seen through a fault.
struct BrokenCluster<C> {
    whole: C,
    fault: Fault,
    shared: OnceCell<Arc<dyn Registry>>,
}

impl<C: Cluster> BrokenCluster<C> {
    async fn start(fault: Fault) -> Self {
        Self {
            whole: C::start().await,
            fault,
            shared: OnceCell::new(),
        }
    }

    fn broken(&self, whole: Arc<dyn Registry>) -> Arc<dyn Registry> {
        Arc::new(Broken::new(whole, self.fault))
    }
}

#[async_trait]
impl<C: Cluster> Cluster for BrokenCluster<C> {
    async fn start() -> Self {
        unreachable!("each is made with its fault")
    }

    fn options(&self) -> Options {
        self.whole.options()
    }

    async fn connect_with(&self, mut options: Options) -> Result<Arc<dyn Registry>> {
        match self.fault {
            Fault::NamespacesAreOne => options.namespace = self.options().namespace,
            Fault::TtlIsAnother => options.session_ttl = SessionTtl::default(),
            _ => {}
        }
        let open = async || Ok(self.broken(self.whole.connect_with(options).await?));
        match self.fault {
            Fault::SessionsAreShared => self.shared.get_or_try_init(open).await.cloned(),
            Fault::ErrorsNameNobody => open().await.map_err(|_| Error::Unavailable {
                backend: "broken",
                source: "nobody answers".into(),
            }),
            _ => open().await,
        }
    }

    async fn connect_through(&self, options: Options) -> Result<(Arc<dyn Registry>, Wire)> {
        let (whole, wire) = self.whole.connect_through(options).await?;
        if self.fault == Fault::SessionsEndEarly {
            // The store lets go of the first in the queue while that one still counts on it.
            let mut states = whole.session().states();
            let other = self.whole.connect().await?;
            tokio::spawn(async move {
                let suspended = |state: &SessionState| matches!(state, SessionState::Suspended(_));
                let _ = states.wait_for(suspended).await.map(|_| ());
                let locks = List::new(Prefix::from_store("~/lock").unwrap());
                let first = other
                    .list_all(locks)
                    .await
                    .unwrap()
                    .into_iter()
                    .min_by_key(|entry| entry.create_revision);
                other.delete(&first.unwrap().key).await.unwrap();
            });
        }
        Ok((self.broken(whole), wire))
    }

    async fn kill(&self) {
        self.whole.kill().await;
    }

    async fn restart(&self) {
        self.whole.restart().await;
        if self.fault == Fault::RestartsForget {
            let registry = self.whole.connect().await.unwrap();
            registry.delete_prefix(&Prefix::root()).await.unwrap();
            registry.close().await.unwrap();
        }
    }

    async fn pause(&self) {
        self.whole.pause().await;
    }

    async fn resume(&self) {
        self.whole.resume().await;
    }

    async fn revoke(&self, session: SessionId) {
        if self.fault != Fault::SessionsNeverEnd {
            self.whole.revoke(session).await;
        }
    }
}

/// A property, what is broken under it, and a part of what it must say: one of several, where it depends on time.
#[derive(Clone, Copy)]
struct Case {
    property: &'static str,
    fault: Fault,
    says: &'static str,
    run: fn(Fault) -> BoxFuture<'static, Result<()>>,
}

macro_rules! cases {
    ($cluster:ty; $($subject:ident::$property:ident: $fault:ident, $says:literal;)+) => {
        vec![$(Case {
            property: concat!(stringify!($subject), "::", stringify!($property)),
            fault: Fault::$fault,
            says: $says,
            run: |fault| async move {
                let cluster = BrokenCluster::<$cluster>::start(fault).await;
                registry_tests::$subject::$property(&cluster).await
            }.boxed(),
        }),+]
    };
}

fn cases() -> Vec<Case> {
    cases! {
        InProcess;

        keys::odd_keys_are_plain: PercentIsWild, "right: 1";
        keys::keys_differ_by_bytes: KeysFoldCase, "should be absent";
        keys::values_are_any_bytes: EmptyIsNothing, "0 bytes came back otherwise";
        keys::too_large_is_refused_before_anything_is_sent: LargeIsCut, "Ok(";
        keys::namespaces_never_meet: NamespacesAreOne, "right";
        keys::parents_need_not_exist: ParentsHaveValues, "right: None";
        keys::nothing_is_left_behind: ChildrenNeverGo, "not within";
        keys::below_goes_by_whole_segments: BelowGoesByBytes, "/a!";
        keys::delete_leaves_what_is_below: DeleteTakesWhatIsBelow, "left: None";
        keys::delete_of_what_is_missing_is_no_error: DeleteOfNothingIsTrue, "!registry.delete";
        keys::ephemeral_keys_are_leaves: EphemeralStays, "Ok(";
        keys::kind_and_owner_never_change_in_silence: KindIsIgnored, "Ok(";
        keys::a_take_over_makes_the_key_anew: TakeOverKeepsTheRevision, "create_revision > before";
        keys::children_are_sorted_and_direct: ChildrenAreUnsorted, "right";
        keys::lists_come_in_pages: PagesOverlap, "by 7";
        keys::a_list_of_children_has_their_values: ListOfChildrenIsDeep, "deep";
        keys::count_counts: CountLeavesOutTheKey, "right: (3, 2, 0)";
        keys::recipes_are_not_in_the_users_tree: RecipesLeak, "right: 1";

        revisions::revisions_grow: RevisionIsStuck, "after";
        revisions::entries_carry_their_revisions: ModRevisionIsZero, "Revision(0)";
        revisions::conditions_are_checked: ConditionsAreIgnored, "present: Ok";
        revisions::an_old_key_never_passes_for_a_new_one: AnyRevisionWillDo, "Ok(";
        revisions::a_transaction_happens_wholly_or_not_at_all: TransactionsAreSplit, "is_none()";
        revisions::a_transaction_has_one_revision: TransactionsAreSplit, "right";
        revisions::bad_transactions_are_refused: TransactionsAreSplit, "Ok(";
        revisions::conditions_on_children: ConditionsAreIgnored, "Ok(";
        revisions::one_counter_by_many: ConditionsAreIgnored, "80";
        revisions::reads_see_every_acknowledged_write: ReadsAreOld, "left: b";
        revisions::a_stale_read_never_goes_back: StaleReadsGoBack, "mod_revision >= last";
        revisions::a_listing_follows_a_commit: ListingsComeEarly, "after the commit 0";

        session::the_granted_ttl_is_reported: TtlIsAnother, "left: 10s";
        session::keep_alives_need_no_call: SessionsDie, "not within|has expired";
        session::a_dropped_handle_ends_its_session: HandlesLeak, "not within";
        session::close_frees_the_keys_before_it_returns: CloseDoesNothing, "/e/1";
        session::a_closed_handle_refuses_calls: CloseDoesNothing, "Err(Error::Closed)";
        session::sessions_have_their_own_ids: SessionsAreShared, "left != right";
        session::an_old_sessions_end_leaves_a_newer_key: CloseTakesWhatOthersPut, "the newer session's";

        watch::begins_with_the_present_then_follows: FirstIsLost, "right";
        watch::a_missing_key_can_be_watched: NeverSynced, "not within";
        watch::scopes_cover_what_they_say: ScopeIsIgnored, "/a/b/c";
        watch::a_delete_does_not_end_it_and_carries_the_last_value: LastValueIsLost, "deleted";
        watch::an_expiry_is_told_once_with_the_last_value: EventsComeTwice, "created twice";
        watch::several_watches_on_one_key: OneWatchAtATime, "a watch goes on";
        watch::one_transaction_comes_together: EventsComeAlone, "right: 3";
        watch::every_change_in_order: EventsComeTwice, "twice";
        watch::after_a_revision: RevisionIsIgnored, "updated";
        watch::after_revision_zero_no_key_is_left_out: FirstIsLost, "/z";
        watch::after_a_revision_still_to_come_is_refused: RevisionIsIgnored, "Ok(";
        watch::a_slow_reader_sees_the_end: SlowReadersLose, "what was to come did not";
        watch::a_picture_equals_the_store: FirstIsLost, "never created|right";
        watch::ends_with_the_handle: CloseDoesNothing, "not within";
        watch::a_listing_follows_the_end_of_a_key: ListingsComeEarly, "ends";

        lock::one_holds_at_a_time: ConditionsAreIgnored, "two hold it|right: 1";
        lock::waiters_come_in_their_order: QueuesAreTurnedRound, "not within 10s";
        lock::try_acquire_never_waits: ConditionsAreIgnored, "is_none()";
        lock::a_deadline_leaves_the_queue: DeleteDoesNothing, "not within 10s";
        lock::a_dropped_wait_leaves_the_queue: DeleteDoesNothing, "not within 10s";
        lock::dropping_outside_a_runtime_leaves_the_queue: DeleteDoesNothing, "not within 10s";
        lock::a_runtime_that_stopped_frees_its_locks: DeleteDoesNothing, "not within 40s";
        lock::tokens_only_grow: RevisionIsStuck, "every observer computes the same";
        lock::tokens_grow_over_a_raised_epoch: ConditionsAreIgnored, "is_none()|is_sorted()|not within 10s| after ";
        lock::a_lost_lock_writes_nothing: ConditionsAreIgnored, "Ok(";
        lock::one_handle_is_two_contenders: ConditionsAreIgnored, "Ok(";
        lock::a_reentrant_lock_counts: ConditionsAreIgnored, "frees nothing";
        lock::a_removed_reentrant_lock_is_lost: DeleteDoesNothing, "not within 10s";
        lock::a_release_that_finds_nothing_says_so: DeleteOfNothingIsTrue, "Ok(";
        lock::dropping_releases: DeleteDoesNothing, "not within 10s";
        lock::closing_releases: CloseDoesNothing, "is_lost()";
        lock::removed_by_another_hand_is_lost: WatchesSayNothing, "not within 10s";
        lock::release_of_a_lost_lock_touches_nothing: QueuesAreTurnedRound, "right";
        lock::labels_are_seen: LabelsAreLost, "right";
        lock::locks_below_locks_are_apart: BelowGoesByBytes, "right: 1";

        election::one_leads_in_order: QueuesAreTurnedRound, "right: \\\"first";
        election::the_leader_publishes: ConditionsAreIgnored, "Ok(";
        election::observe_ends_in_the_newest: DeletesAreMissed, "not within 10s";
        election::resign_hands_over: DeleteDoesNothing, "not within 10s";
        election::a_removed_leader_key_ends_the_leadership: WatchesSayNothing, "not within 10s";
        election::a_candidate_that_stops_leaves_no_trace: DeleteDoesNothing, "not within 10s";
        election::close_with_a_candidate_waiting_returns: CloseDoesNothing, "not within 10s";
        election::equal_values_are_other_candidates: QueuesAreTurnedRound, "the predecessor still leads|right";
        election::a_leader_can_lead_again: RevisionIsStuck, "right";
        election::others_change_nothing_for_the_leader: QueuesAreTurnedRound, "not within 10s|another leads";
        election::an_old_leaders_end_leaves_the_present_one: SessionsAreShared, "is closed";
        election::who_lost_it_can_lead_again: WatchesSayNothing, "not within 10s";
        election::a_closed_handle_never_leads: CloseDoesNothing, "a closed handle leads";
        election::a_removal_racing_the_election_is_noticed: WatchesSayNothing, "not within 10s";
        election::closing_on_the_loss_ends_it: CloseDoesNothing, "a closed handle leads";

        recipe::a_registration_stays_and_goes: KindIsIgnored, "Ok(";
        recipe::a_registration_comes_back_when_deleted: WatchesSayNothing, "not within 10s";
        recipe::a_registration_takes_over_when_asked: TakeOverIsRefused, "it belongs to session";
        recipe::a_mirror_is_current: FirstIsLost, "it is there";

        failure::health_answers: HealthSaysNothing, "endpoint";
        failure::wait_connected_returns: CloseDoesNothing, "Err(Error::Closed)";
        failure::connect_again_finds_all: WritesAreForgotten, "right: 50";
    }
}

/// Those that only a killed, paused or cut off server shows.
fn fault_cases() -> Vec<Case> {
    cases! {
        Served;

        failure::acknowledged_is_durable: RestartsForget, "was acknowledged and is lost";
        failure::calls_end_in_time_without_a_store: CallsHang, "not within 6s";
        failure::a_store_that_is_down_is_told_at_connect: ErrorsNameNobody, "it names no endpoint";
        failure::the_same_handle_works_again: RestartsForget, "it stays";
        failure::a_short_cut_loses_no_session: SessionsDie, "not within 20s|has expired";
        failure::a_long_cut_loses_it_before_others_can_hold: SessionsEndEarly, "before the loss was told";
        failure::a_dead_holder_is_replaced_in_time: ConditionsAreIgnored, "already";
        failure::a_watch_goes_on_over_a_restart: WatchesEnd, "a watch goes on|it is still there";
        failure::a_watch_bridges_a_cut: DeletesAreMissed, "created twice|right";
        failure::a_waiter_learns_of_its_sessions_end: SessionsNeverEnd, "not within 20s";
        failure::a_leader_learns_of_its_sessions_end: SessionsNeverEnd, "not within 20s";
        failure::a_registration_ends_though_the_store_is_away: DeleteDoesNothing, "not within 20s";
        failure::a_campaign_goes_on_over_a_restart: DeleteDoesNothing, "not within 20s";
        failure::an_expired_registration_comes_back: SessionsNeverEnd, "not within 20s";
        failure::a_paused_store_loses_nothing_acknowledged: UnknownIsTakenForDone, "Ok(";
    }
}

/// What is wrong with a case, if it does not fail as it should.
async fn wrong(case: Case) -> Option<String> {
    let said = match tokio::spawn((case.run)(case.fault)).await {
        Ok(Ok(())) => return Some(format!("{} holds under {:?}", case.property, case.fault)),
        Ok(Err(error)) => error.to_string(),
        Err(panicked) => panicked.to_string(),
    };
    let as_it_should = case.says.split('|').any(|says| said.contains(says));
    (!as_it_should).then(|| {
        format!(
            "{} under {:?} says {said:?}, not {:?}",
            case.property, case.fault, case.says
        )
    })
}

/// A machine that is busy elsewhere may hide what is broken, or break something else: what is seen once is enough.
async fn wrong_thrice(case: Case) -> Option<String> {
    for _ in 0..2 {
        eprintln!("again: {}", wrong(case).await?);
    }
    wrong(case).await
}

async fn all_fail(cases: Vec<Case>) {
    let judged = stream::iter(cases).map(wrong_thrice).buffer_unordered(AT_ONCE);
    let wrong: Vec<_> = judged.filter_map(std::future::ready).collect().await;
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_property_fails_when_its_sentence_is_broken() {
    all_fail(cases()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_property_of_faults_fails_when_its_sentence_is_broken() {
    all_fail(fault_cases()).await;
}

#[test]
fn no_property_is_left_out() {
    // Parsing asks no store: broken by the tests of the type itself, in registry-api.
    let apart = "keys::bad_keys_are_refused_before_anything_is_sent";
    let cases = cases().into_iter().chain(fault_cases());
    let broken: BTreeSet<_> = cases.map(|case| case.property).chain([apart]).collect();
    let left: Vec<_> = registry_tests::names()
        .into_iter()
        .filter(|name| !broken.contains(name))
        .collect();
    assert!(left.is_empty(), "never seen to fail: {left:?}");
}
