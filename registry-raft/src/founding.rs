//! How a group comes to be, and how a member finds its own again.
//!
//! A member's id is drawn with its directory and never given to another, so an id is one disk's: a disk that was lost has
//! no successor that could vote in its name. The members of a founding list greet each other until each knows the id of
//! every other. The group they found is named after the list and these ids: whoever founds it founds the same one, and
//! who comes later with another disk is in none. Before that nobody has a log, and afterwards nobody waits for all.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use openraft::Membership;
use openraft::async_runtime::WatchReceiver;
use parking_lot::Mutex;
use registry_api::{Error, Result};
use tokio::sync::watch;
use tonic::Status;
use uuid::Uuid;

use crate::config::check_reachable;
use crate::directory::Directory;
use crate::link::BACKEND;
use crate::member::Core;
use crate::network::Lane;
use crate::proto::registry::peer::v1 as message;
use crate::transport::Transport;
use crate::types::Peer;
use crate::wire;

/// How long a greeting may take, and the pause before the next.
const GREETING: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_millis(100);
/// How often a member looks whether it is still one.
const LOOK: Duration = Duration::from_secs(1);
/// How often it is said for whom the founding waits.
const REMINDER: Duration = Duration::from_secs(5);

/// A group, as it was founded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Group {
    pub(crate) cluster: [u8; 16],
    pub(crate) members: BTreeMap<u64, Peer>,
    /// Whether the membership is in the log of the member that reported it. The Raft leader replicates it then, and the
    /// group's first entry may have been another one.
    pub(crate) has_log: bool,
}

/// What stands behind a member's address from the first moment on; the member itself comes later.
#[derive(Clone, Debug)]
pub(crate) struct Door(Arc<Behind>);

#[derive(Debug)]
struct Behind {
    id: u64,
    name: String,
    list: BTreeMap<String, String>,
    transport: Transport,
    decision: Mutex<Decision>,
    /// Where the others reach this member.
    address: OnceLock<String>,
    /// Where other members said they are, if that is news.
    claims: Mutex<BTreeMap<u64, String>>,
    core: OnceLock<Core>,
}

/// What this process has decided about the group that it founds.
#[derive(Debug, Default)]
struct Decision {
    /// The group that it is about to found. A greeting that proposes another one takes this back.
    proposed: Option<[u8; 16]>,
    group: Option<Group>,
}

/// The result of greeting everybody on the list once.
enum Round {
    /// A member has the group already.
    Founded(Group),
    /// All responded, and none of them is in a group.
    All(BTreeMap<String, u64>),
    Missing(Vec<String>),
}

impl Round {
    /// Whether it found the same members as the round before, and no group.
    fn confirms(&self, first: &BTreeMap<String, u64>) -> bool {
        matches!(self, Self::All(again) if again == first)
    }
}

impl Door {
    pub(crate) fn new(id: u64, name: &str, list: &BTreeMap<String, String>, transport: Transport) -> Self {
        Self(Arc::new(Behind {
            id,
            name: name.into(),
            list: list.clone(),
            transport,
            decision: Mutex::default(),
            address: OnceLock::new(),
            claims: Mutex::default(),
            core: OnceLock::new(),
        }))
    }

    pub(crate) fn core(&self) -> Option<&Core> {
        self.0.core.get()
    }

    /// Says where the others reach this member.
    pub(crate) fn locate(&self, address: &str) {
        // There is one address as long as the process runs.
        let _ = self.0.address.set(address.to_owned());
    }

    /// Where members of the group say that they are, if they were not found there yet.
    pub(crate) fn claims(&self) -> BTreeMap<u64, String> {
        std::mem::take(&mut *self.0.claims.lock())
    }

    /// Notes where a member of the group says that it is. It is believed once it responds there.
    fn note_claim(&self, core: &Core, theirs: &message::Greeting) {
        let known = core.network().addresses().of(theirs.id);
        let news = known.is_some_and(|known| known != theirs.address);
        if news && *theirs.cluster == core.identity().cluster && check_reachable("advertise", &theirs.address).is_ok() {
            self.0.claims.lock().insert(theirs.id, theirs.address.clone());
        }
    }

    /// From now on requests are answered.
    pub(crate) fn open(&self, core: Core) {
        // There is only one to open it.
        let _ = self.0.core.set(core);
    }

    /// Who is here, and what group it knows.
    pub(crate) fn greeting(&self) -> message::Greeting {
        let decision = self.0.decision.lock();
        self.greeting_of(&decision)
    }

    /// The response to the greeting of another member.
    pub(crate) fn respond(&self, theirs: &message::Greeting) -> message::Greeting {
        let mut decision = self.0.decision.lock();
        let same_list = is_list(&theirs.list, &self.0.list);
        if same_list && !theirs.proposed.is_empty() && decision.proposed.is_some_and(|own| *theirs.proposed != own) {
            decision.proposed = None;
        }
        let mut greeting = self.greeting_of(&decision);
        drop(decision);
        if let Some(core) = self.core() {
            self.note_claim(core, theirs);
        }
        greeting.removed = self.core().is_some_and(|core| {
            *theirs.cluster == core.identity().cluster
                && core.store().read(|inner| inner.state.removed.contains(&theirs.id))
        });
        greeting
    }

    fn greeting_of(&self, decision: &Decision) -> message::Greeting {
        let mut greeting = message::Greeting {
            id: self.0.id,
            name: self.0.name.clone(),
            list: self.0.list.clone().into_iter().collect(),
            address: self.0.address.get().cloned().unwrap_or_default(),
            proposed: decision
                .proposed
                .map_or_else(Bytes::new, |proposed| Bytes::copy_from_slice(&proposed)),
            ..message::Greeting::default()
        };
        if let Some(core) = self.core() {
            let (at, membership) = core.membership();
            greeting.cluster = Bytes::copy_from_slice(&core.identity().cluster);
            greeting.membership_log_id = at.as_ref().map(wire::log_id_to);
            greeting.membership = (at.is_some()).then(|| wire::membership_to(&membership));
        }
        if let Some(group) = decision.group.as_ref().filter(|_| greeting.membership.is_none()) {
            greeting.cluster = Bytes::copy_from_slice(&group.cluster);
            greeting.membership = group.membership().ok().as_ref().map(wire::membership_to);
        }
        greeting
    }

    /// Greets everybody on the list, round after round, until all respond in one round or one of them has the group.
    ///
    /// It waits for all, however long: with fewer, a member that lost its disk could not be told from one that is new.
    ///
    /// Ids of an earlier round do not count: their members may have founded the group since. When a round has found all,
    /// the member proposes the group to all of them in a second round, and founds it only if all respond as before. A
    /// member that receives another proposal takes its own back and begins again. So of two members that propose
    /// different groups at most one founds its own: the second rounds would each have to begin after the other's
    /// greeting. And a group that acknowledged anything before a disk was replaced is found in the second round, which
    /// begins after the new disk was seen.
    ///
    /// # Errors
    /// [`Error::Config`] if another has another list, or is not who it should be; [`Error::Storage`] if the group knows
    /// another disk under this member's name.
    pub(crate) async fn found(&self) -> Result<Group> {
        let (me, list) = (&self.0, &self.0.list);
        if let Some(group) = me.decision.lock().group.clone() {
            return Ok(group);
        }
        let lanes: Vec<_> = list
            .iter()
            .filter(|(name, _)| **name != me.name)
            .map(|(name, address)| (name.as_str(), Lane::new(&me.transport, address)))
            .collect();
        let mut reminded = Instant::now();
        loop {
            match self.greet_all(&lanes).await? {
                Round::Founded(group) => return Ok(group),
                Round::Missing(missing) if reminded.elapsed() > REMINDER => {
                    reminded = Instant::now();
                    tracing::warn!(?missing, "the group is founded when all on the list are there");
                }
                Round::Missing(_) => {}
                Round::All(ids) => {
                    let group = self.group_of_list(&ids);
                    self.propose(&group);
                    match self.greet_all(&lanes).await? {
                        Round::Founded(group) => return Ok(group),
                        second if second.confirms(&ids) && self.decide(&group) => return Ok(group),
                        _ => me.decision.lock().proposed = None,
                    }
                }
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Greets everybody on the list once.
    async fn greet_all(&self, lanes: &[(&str, Lane)]) -> Result<Round> {
        let (me, list) = (&self.0, &self.0.list);
        let mut ids = BTreeMap::from([(me.name.clone(), me.id)]);
        let mut missing = Vec::new();
        for (name, lane) in lanes {
            let Ok(greeting) = greet(lane, self.greeting()).await else {
                missing.push((*name).to_owned());
                continue;
            };
            if greeting.name != *name {
                let reason = format!("at {} is member {:?}, not {name:?}", list[*name], greeting.name);
                return Err(refused("cluster", reason));
            }
            if let Some(group) = self.known_to(&greeting)? {
                return Ok(Round::Founded(group));
            }
            if !is_list(&greeting.list, list) {
                let reason = format!("member {name} has another list: {}", shown(&greeting.list));
                return Err(refused("cluster", reason));
            }
            ids.insert((*name).to_owned(), greeting.id);
        }
        Ok(match missing.is_empty() {
            true => Round::All(ids),
            false => Round::Missing(missing),
        })
    }

    fn group_of_list(&self, ids: &BTreeMap<String, u64>) -> Group {
        let members = ids.iter().map(|(name, id)| {
            let (name, address) = (name.clone(), self.0.list[name].clone());
            (*id, Peer { name, address })
        });
        Group::of(members.collect())
    }

    pub(crate) fn propose(&self, group: &Group) {
        self.0.decision.lock().proposed = Some(group.cluster);
    }

    /// Founds the group, unless another member has proposed another one since this member proposed it.
    pub(crate) fn decide(&self, group: &Group) -> bool {
        let mut decision = self.0.decision.lock();
        let stands = decision.proposed == Some(group.cluster);
        if stands {
            decision.group = Some(group.clone());
        }
        stands
    }

    /// Asks the members at these addresses for the group that they are. Who is in it is not asked: the one that answers
    /// may lag behind, and the Raft leader decides whom it takes in.
    pub(crate) async fn group_at(&self, addresses: &[String]) -> Result<Group> {
        let lanes: Vec<_> = addresses
            .iter()
            .map(|address| Lane::new(&self.0.transport, address))
            .collect();
        let mut said = Instant::now();
        loop {
            let mut causes = Vec::new();
            for lane in &lanes {
                match greet(lane, self.greeting()).await {
                    Ok(greeting) => {
                        if let Some(group) = self.group_of(&greeting)? {
                            return Ok(group);
                        }
                        causes.push(format!("member {} is in no group yet", greeting.name));
                    }
                    Err(status) => causes.push(status.message().to_owned()),
                }
            }
            if said.elapsed() > REMINDER {
                said = Instant::now();
                tracing::warn!(causes = causes.join("; "), "no member of the group answers");
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// The group that another tells of, if it is in one, and this member is too.
    fn known_to(&self, greeting: &message::Greeting) -> Result<Option<Group>> {
        let Some(group) = self.group_of(greeting)? else {
            return Ok(None);
        };
        refuse_namesake(&group.members, self.0.id, &self.0.name)?;
        match group.members.contains_key(&self.0.id) {
            true => Ok(Some(group)),
            false => Err(Error::Config {
                field: "registry.raft.cluster".into(),
                reason: format!(
                    "the group is founded and does not know member {:?}; to add it, give `join` instead of `cluster`",
                    self.0.name
                ),
            }),
        }
    }

    fn group_of(&self, greeting: &message::Greeting) -> Result<Option<Group>> {
        let Some(membership) = greeting.membership.clone() else {
            return Ok(None);
        };
        let cluster = Uuid::from_slice(&greeting.cluster).map_err(unavailable)?.into_bytes();
        let membership = wire::membership_from(membership).map_err(unavailable)?;
        let members: BTreeMap<_, _> = membership.nodes().map(|(id, peer)| (*id, peer.clone())).collect();
        Ok(Some(Group {
            cluster,
            members,
            has_log: greeting.membership_log_id.is_some(),
        }))
    }
}

impl Group {
    /// The group of these members: the same on each of them.
    pub(crate) fn of(members: BTreeMap<u64, Peer>) -> Self {
        let text: String = members
            .iter()
            .map(|(id, peer)| format!("{id} {} {}\n", peer.name, peer.address))
            .collect();
        let cluster = Uuid::new_v5(&Uuid::NAMESPACE_OID, text.as_bytes()).into_bytes();
        Self {
            cluster,
            members,
            has_log: false,
        }
    }

    fn membership(&self) -> std::io::Result<Membership<u64, Peer>> {
        let voters: BTreeSet<u64> = self.members.keys().copied().collect();
        Membership::new(vec![voters], self.members.clone()).map_err(std::io::Error::other)
    }
}

/// A name that belongs to another disk is not given twice.
pub(crate) fn refuse_namesake(members: &BTreeMap<u64, Peer>, id: u64, name: &str) -> Result<()> {
    match members.iter().find(|(other, peer)| peer.name == name && **other != id) {
        None => Ok(()),
        Some((other, peer)) => Err(Error::Storage {
            place: format!("member {name}"),
            reason: format!(
                "the group knows {name:?} at {} with other data (id {other}), and this directory is new: what is lost \
                 can't come back under its name. Remove it (`registry members remove {name}`), then `join` with an \
                 empty directory",
                peer.address
            ),
        }),
    }
}

/// Greets a member, within a deadline.
pub(crate) async fn greet(lane: &Lane, greeting: message::Greeting) -> Result<message::Greeting, Status> {
    lane.ask(GREETING, |mut client| async move { client.greet(greeting).await })
        .await
}

impl Core {
    /// Ends the member once its log has failed, or the group has removed it: no other member tells it.
    pub(crate) async fn keep_company(
        self,
        door: Door,
        directory: Option<Arc<Directory>>,
        mut stopping: watch::Receiver<bool>,
    ) {
        let mut turn = 0;
        let mut tick = tokio::time::interval(LOOK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                // An error says that the member is gone.
                _ = stopping.changed() => return,
            }
            let failed = {
                let metrics = self.raft().metrics();
                let metrics = metrics.borrow_watched();
                metrics.running_state.as_ref().err().map(ToString::to_string)
            };
            if let Some(failed) = failed {
                return self.fail(failed);
            }
            if self.was_removed(&door, turn).await {
                if let Some(Err(error)) = directory.as_ref().map(|directory| directory.removed()) {
                    tracing::error!(%error, "the directory does not know that its member was removed");
                }
                return self.fail(format!("member {:?} was removed from its group", door.0.name));
            }
            turn += 1;
        }
    }

    /// Warns if the group is not the one of the founding list any more: who changes the list expects something of it.
    pub(crate) fn compare_list(&self, list: &BTreeMap<String, String>) {
        let (at, membership) = self.membership();
        if list.is_empty() || at.is_none() {
            return;
        }
        let differences = differences(list, membership.nodes().map(|(_, peer)| peer));
        if !differences.is_empty() {
            tracing::warn!(
                "registry.raft.cluster founded the group and changes it no more (`registry members` does): {}",
                differences.join(", ")
            );
        }
    }

    /// Whether the group has removed this member, as far as its own state or one other member's says.
    ///
    /// A membership without this member is no proof: a member that joins applies those from before its admission, and
    /// one that starts again may have applied less than it has in its log. The state has the ids of all that were removed.
    /// One member is asked in each turn, since openraft does not forget a leader that has become silent.
    async fn was_removed(&self, door: &Door, turn: usize) -> bool {
        let us = self.identity().member;
        let (removed, others) = self.store().read(|inner| {
            let others = inner.membership.nodes().filter(|(id, _)| **id != us);
            let others: Vec<_> = others.map(|(id, peer)| (*id, peer.address.clone())).collect();
            (inner.state.removed.contains(&us), others)
        });
        if removed {
            // A Raft leader that is removed first replicates that to the others.
            return self.leads().is_none();
        }
        let Some((id, address)) = others.get(turn % others.len().max(1)) else {
            return false;
        };
        let lane = self.network().lane(*id, address);
        match greet(&lane, door.greeting()).await {
            Ok(greeting) => *greeting.cluster == self.identity().cluster && greeting.removed,
            Err(_) => false,
        }
    }
}

/// What a founding list says otherwise than the group, which has gone on without it.
fn differences<'a>(list: &BTreeMap<String, String>, members: impl Iterator<Item = &'a Peer>) -> Vec<String> {
    let members: BTreeMap<_, _> = members.map(|peer| (&peer.name, &peer.address)).collect();
    let listed = list.iter().filter_map(|(name, address)| match members.get(name) {
        None => Some(format!("{name} is no member any more")),
        Some(now) if *now != address => Some(format!("{name} is at {now}, not at {address}")),
        Some(_) => None,
    });
    let others = members.iter().filter(|(name, _)| !list.contains_key(**name));
    listed
        .chain(others.map(|(name, address)| format!("{name} at {address} is a member")))
        .collect()
}

fn is_list(theirs: &std::collections::HashMap<String, String>, list: &BTreeMap<String, String>) -> bool {
    theirs.len() == list.len() && list.iter().all(|(name, address)| theirs.get(name) == Some(address))
}

fn shown(list: &std::collections::HashMap<String, String>) -> String {
    let list: BTreeMap<_, _> = list.iter().collect();
    let pairs: Vec<_> = list
        .iter()
        .map(|(name, address)| format!("{name} = {address}"))
        .collect();
    if pairs.is_empty() {
        "none".into()
    } else {
        pairs.join(", ")
    }
}

fn refused(field: &str, reason: String) -> Error {
    Error::Config {
        field: format!("registry.raft.{field}"),
        reason,
    }
}

fn unavailable(cause: impl Into<registry_api::BoxError>) -> Error {
    Error::Unavailable {
        backend: BACKEND,
        source: cause.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whoever is silent in the second round may have the group by now, or may have lost its disk.
    #[test]
    fn only_the_same_members_confirm_a_group() {
        let ids = |c| BTreeMap::from([("a".to_owned(), 1), ("c".to_owned(), c)]);
        assert!(Round::All(ids(3)).confirms(&ids(3)));
        assert!(!Round::All(ids(4)).confirms(&ids(3)));
        assert!(!Round::Missing(vec!["c".into()]).confirms(&ids(3)));
        let members = BTreeMap::from([(1, Peer::default())]);
        assert!(!Round::Founded(Group::of(members)).confirms(&ids(3)));
    }

    #[test]
    fn a_list_and_a_group_that_differ_are_told_apart() {
        let list = |members: &[(&str, &str)]| -> BTreeMap<String, String> {
            let owned = members
                .iter()
                .map(|(name, address)| ((*name).into(), (*address).into()));
            owned.collect()
        };
        let group: Vec<_> = list(&[("a", "h1:1"), ("b", "h2:2"), ("d", "h4:4")])
            .into_iter()
            .map(|(name, address)| Peer { name, address })
            .collect();
        assert_eq!(
            differences(&list(&[("a", "h1:1"), ("b", "h2:9"), ("c", "h3:3")]), group.iter()),
            [
                "b is at h2:2, not at h2:9",
                "c is no member any more",
                "d at h4:4 is a member"
            ]
        );
        let same = list(&[("a", "h1:1"), ("b", "h2:2"), ("d", "h4:4")]);
        assert!(differences(&same, group.iter()).is_empty());
    }
}
