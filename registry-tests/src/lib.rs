//! The conformance suite: what every backend must do, sentence by sentence of the book's page on guarantees, run against
//! real servers.
//!
//! A backend offers itself to be tested by implementing [`Cluster`] and writing `registry_tests::conformance!(MyCluster);`,
//! which makes every property a test of that backend, so that one failure hides no other. The list of properties is
//! written once, below.

pub mod certificate;
pub mod cluster;
pub mod cost;
pub mod dice;
pub mod disk;
pub mod election;
pub mod failure;
pub mod history;
pub mod keys;
pub mod lock;
pub mod net;
pub mod process;
pub mod proxy;
pub mod recipe;
pub mod revisions;
pub mod session;
pub mod system;
pub mod torture;
pub mod watch;

pub use cluster::{Cluster, Members, TTL, key, prefix, refusal, within};
pub use dice::Dice;
pub use net::Net;
pub use process::Process;
pub use proxy::{Direction, Wire};
pub use system::System;

/// Every property, by subject. The second list needs a connection that can be cut, or a store that can be killed.
#[macro_export]
macro_rules! properties {
    ($use:ident, $cluster:ty) => {
        $crate::$use! { $cluster,
            keys: bad_keys_are_refused_before_anything_is_sent, odd_keys_are_plain, keys_differ_by_bytes,
                values_are_any_bytes, too_large_is_refused_before_anything_is_sent, namespaces_never_meet,
                parents_need_not_exist, nothing_is_left_behind, below_goes_by_whole_segments,
                delete_leaves_what_is_below, delete_of_what_is_missing_is_no_error, ephemeral_keys_are_leaves,
                kind_and_owner_never_change_in_silence, a_take_over_makes_the_key_anew, children_are_sorted_and_direct,
                lists_come_in_pages, a_list_of_children_has_their_values, count_counts, recipes_are_not_in_the_users_tree;
            revisions: revisions_grow, entries_carry_their_revisions, conditions_are_checked,
                an_old_key_never_passes_for_a_new_one, a_transaction_happens_wholly_or_not_at_all,
                a_transaction_has_one_revision, bad_transactions_are_refused, conditions_on_children,
                one_counter_by_many, reads_see_every_acknowledged_write, a_stale_read_never_goes_back,
                a_listing_follows_a_commit;
            session: the_granted_ttl_is_reported, keep_alives_need_no_call, a_dropped_handle_ends_its_session,
                close_frees_the_keys_before_it_returns, a_closed_handle_refuses_calls, sessions_have_their_own_ids,
                an_old_sessions_end_leaves_a_newer_key;
            watch: begins_with_the_present_then_follows, a_missing_key_can_be_watched, scopes_cover_what_they_say,
                a_delete_does_not_end_it_and_carries_the_last_value, an_expiry_is_told_once_with_the_last_value,
                several_watches_on_one_key, one_transaction_comes_together, every_change_in_order,
                after_a_revision, after_revision_zero_no_key_is_left_out, after_a_revision_still_to_come_is_refused,
                a_slow_reader_sees_the_end, a_picture_equals_the_store, ends_with_the_handle,
                a_listing_follows_the_end_of_a_key;
            lock: one_holds_at_a_time, waiters_come_in_their_order, try_acquire_never_waits, a_deadline_leaves_the_queue,
                a_dropped_wait_leaves_the_queue, dropping_outside_a_runtime_leaves_the_queue,
                a_runtime_that_stopped_frees_its_locks, tokens_only_grow, tokens_grow_over_a_raised_epoch, a_lost_lock_writes_nothing,
                one_handle_is_two_contenders, a_reentrant_lock_counts, a_removed_reentrant_lock_is_lost,
                a_release_that_finds_nothing_says_so, dropping_releases, closing_releases,
                removed_by_another_hand_is_lost, release_of_a_lost_lock_touches_nothing, labels_are_seen,
                locks_below_locks_are_apart;
            election: one_leads_in_order, the_leader_publishes, observe_ends_in_the_newest, resign_hands_over,
                a_removed_leader_key_ends_the_leadership, a_candidate_that_stops_leaves_no_trace,
                close_with_a_candidate_waiting_returns, equal_values_are_other_candidates, a_leader_can_lead_again,
                others_change_nothing_for_the_leader, an_old_leaders_end_leaves_the_present_one,
                who_lost_it_can_lead_again, a_closed_handle_never_leads, a_removal_racing_the_election_is_noticed,
                closing_on_the_loss_ends_it;
            recipe: a_registration_stays_and_goes, a_registration_comes_back_when_deleted,
                a_registration_takes_over_when_asked, a_mirror_is_current;
            failure: health_answers, wait_connected_returns, connect_again_finds_all;
        }
    };
    (faults $use:ident, $cluster:ty) => {
        $crate::$use! { $cluster,
            failure: acknowledged_is_durable, calls_end_in_time_without_a_store, a_store_that_is_down_is_told_at_connect,
                the_same_handle_works_again, a_short_cut_loses_no_session, a_long_cut_loses_it_before_others_can_hold,
                a_dead_holder_is_replaced_in_time, a_watch_goes_on_over_a_restart, a_watch_bridges_a_cut,
                a_waiter_learns_of_its_sessions_end, a_leader_learns_of_its_sessions_end, an_expired_registration_comes_back,
                a_registration_ends_though_the_store_is_away,
                a_campaign_goes_on_over_a_restart, a_paused_store_loses_nothing_acknowledged;
        }
    };
}

/// Makes a module for each subject, with a test for each property.
#[macro_export]
macro_rules! tests_of {
    ($cluster:ty, $($subject:ident: $($property:ident),+;)+) => {
        $(
            mod $subject {
                #[allow(unused_imports)]
                use super::*;
                $(
                    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                    async fn $property() {
                        let cluster = <$cluster as $crate::Cluster>::start().await;
                        let tested = $crate::$subject::$property(&cluster);
                        match tokio::time::timeout($crate::cluster::LONGEST, tested).await {
                            Ok(done) => done.expect("the property holds"),
                            Err(_) => panic!("not done within {:?}", $crate::cluster::LONGEST),
                        }
                    }
                )+
            }
        )+
    };
}

/// All properties as tests of a backend. With `local`, only those that need no connection to cut: for a handle in the
/// process of the store.
#[macro_export]
macro_rules! conformance {
    ($cluster:ty) => {
        mod conformance {
            use super::*;
            $crate::properties!(tests_of, $cluster);
        }
        mod faults {
            use super::*;
            $crate::properties!(faults tests_of, $cluster);
        }
    };
    ($cluster:ty, local) => {
        mod conformance {
            use super::*;
            $crate::properties!(tests_of, $cluster);
        }
    };
}

/// Runs of everything at once while things break, as tests of a backend. How long, and from what seed, is the
/// environment's to say: see [`torture::Plan`].
#[macro_export]
macro_rules! torture {
    ($cluster:ty) => {
        mod torture {
            #[allow(unused_imports)]
            use super::*;
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn promises_hold_while_connections_break() {
                let cluster = <$cluster as $crate::Cluster>::start().await;
                $crate::torture::run(&cluster, $crate::torture::Plan::of_wires()).await;
            }
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn promises_hold_while_everything_breaks() {
                let cluster = <$cluster as $crate::Cluster>::start().await;
                $crate::torture::run(&cluster, $crate::torture::Plan::of_everything()).await;
            }
        }
    };
}

/// The names of all properties.
#[macro_export]
macro_rules! names_of {
    ($cluster:ty, $($subject:ident: $($property:ident),+;)+) => {
        [$($(concat!(stringify!($subject), "::", stringify!($property)),)+)+]
    };
}

/// The names of all properties, as the book's page on guarantees gives them.
pub fn names() -> Vec<&'static str> {
    let faults = properties!(faults names_of, ());
    properties!(names_of, ()).into_iter().chain(faults).collect()
}
