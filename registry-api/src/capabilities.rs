//! What a backend gives beyond the least that the contract asks.

/// What one backend can do, in code; its page in the book says why.
///
/// Where a field is `false` the weaker behaviour is documented, and asserted by the conformance suite.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Capabilities {
    /// The word that selects it: `raft`, `etcd`, `zk` or `mysql`.
    pub backend: &'static str,
    /// Watches deliver every change, in the order of the whole namespace, while the reader keeps up (W2).
    pub every_change: bool,
    /// A watch can start after a revision that is still kept (W4). Otherwise every revision counts as compacted.
    pub watch_from_revision: bool,
    /// A page of a listing is one consistent snapshot (K8).
    pub consistent_pages: bool,
    /// A delete event tells expiry from deletion (W5).
    pub tells_expiry: bool,
    /// All ephemeral keys of an expired session go at one revision (S2).
    pub atomic_expiry: bool,
    /// `delete_prefix` deletes everything at one revision.
    pub atomic_delete_prefix: bool,
    /// A key that keeps children when it is deleted has a new `create_revision` when it is put again (R1).
    pub fresh_create_revision: bool,
    /// A condition on a contender's key of a lock or an election tells it from a later one of its name, so that a handle
    /// uses names again. Otherwise each name is used once.
    pub reuses_names: bool,
    /// Stale reads are answered without the quorum (R4, F6).
    pub stale_without_quorum: bool,
    /// A commit and the listing that follows it take one round trip, as long as the page is small
    /// ([`crate::Registry::commit_and_list`]). Otherwise they are two.
    pub lists_along: bool,
    /// The most children one key may have, where there is a bound (K8).
    pub max_children: Option<u64>,
}
