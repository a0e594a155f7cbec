//! Where members are reached: at the addresses that the group has recorded, or where they were found since.
//!
//! A member that starts at another address than the recorded one has the group record the new one, by an ordinary
//! conditional change of the membership, as soon as a Raft leader can be asked. The others need not wait for that. Each
//! greeting says where its sender is reached, and each member greets the addresses of its own config while it hears no
//! Raft leader. An address counts once the member with that id has responded there. So a group whose members all moved
//! finds itself by the new list, elects, and records where its members are now.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::config::RaftConfig;
use crate::founding::{Door, greet};
use crate::member::Core;
use crate::network::Lane;
use crate::proto::registry::peer::v1 as message;
use crate::types::Peer;

/// How often a member checks where the others are.
const CHECK: Duration = Duration::from_millis(500);
/// How long a change of the own address may take.
const CHANGE: Duration = Duration::from_secs(5);
/// How often a warning is repeated.
const REMINDER: Duration = Duration::from_secs(10);

/// Where each member is reached. Clones share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Addresses(Arc<Mutex<HashMap<u64, Place>>>);

#[derive(Debug)]
struct Place {
    recorded: String,
    /// Where it responded last, if that is elsewhere.
    found: Option<String>,
}

impl Addresses {
    /// Notes the address that the group has recorded. Another one than before is newer than what was found.
    pub(crate) fn record(&self, member: u64, address: &str) {
        let mut places = self.0.lock();
        match places.get(&member) {
            Some(place) if place.recorded == address => {}
            _ => {
                let recorded = address.to_owned();
                places.insert(member, Place { recorded, found: None });
            }
        }
    }

    /// Notes that the member has responded there.
    pub(crate) fn find(&self, member: u64, address: &str) {
        if let Some(place) = self.0.lock().get_mut(&member) {
            place.found = (place.recorded != address).then(|| address.to_owned());
        }
    }

    /// Notes that the member does not respond where it was found: the recorded address is tried again.
    pub(crate) fn forget(&self, member: u64) {
        if let Some(place) = self.0.lock().get_mut(&member) {
            place.found = None;
        }
    }

    /// Where the member is reached.
    pub(crate) fn of(&self, member: u64) -> Option<String> {
        let places = self.0.lock();
        let place = places.get(&member)?;
        Some(place.found.as_ref().unwrap_or(&place.recorded).clone())
    }
}

impl Core {
    /// Finds the others where they are now, and has the group record where this member is.
    pub(crate) async fn keep_addresses(
        self,
        door: Door,
        config: RaftConfig,
        own: String,
        mut stopping: watch::Receiver<bool>,
    ) {
        let listed: Vec<_> = config.cluster.values().chain(&config.join).cloned().collect();
        let mut tick = tokio::time::interval(CHECK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let (mut turn, mut reminded, mut checked) = (0, None::<Instant>, false);
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                // An error says that the member is gone.
                _ = stopping.changed() => return,
            }
            let others = self.others();
            for (id, peer) in &others {
                self.network().addresses().record(*id, &peer.address);
            }
            for (id, address) in door.claims() {
                self.seek(&door, Some(id), &address).await;
            }
            if self.present_leader().is_none() {
                for address in listed.iter().filter(|address| **address != own) {
                    self.seek(&door, None, address).await;
                }
                for (id, peer) in &others {
                    self.check(&door, *id, &peer.address).await;
                }
            }
            if !std::mem::replace(&mut checked, true) && !self.is_reached_at(&own).await {
                tracing::warn!(
                    address = own,
                    "this member does not respond at the address that it gives to the others; set \
                     registry.raft.advertise, or its entry of registry.raft.cluster, to where they reach it"
                );
            }
            let Some(recorded) = self.recorded_elsewhere(&own) else {
                continue;
            };
            let why = match self.record_own(&others, turn, &recorded, &own).await {
                Ok(()) => {
                    tracing::info!(
                        from = recorded.address,
                        to = own,
                        "the group has recorded the new address"
                    );
                    continue;
                }
                Err(status) => status.message().to_owned(),
            };
            turn += 1;
            if reminded.is_none_or(|at| at.elapsed() > REMINDER) {
                reminded = Some(Instant::now());
                tracing::warn!(
                    recorded = recorded.address,
                    now = own,
                    why,
                    "the group has another address for this member, and has not recorded the present one yet"
                );
            }
        }
    }

    fn others(&self) -> Vec<(u64, Peer)> {
        let us = self.identity().member;
        let (_, membership) = self.membership();
        let others = membership.nodes().filter(|(id, _)| **id != us);
        others.map(|(id, peer)| (*id, peer.clone())).collect()
    }

    /// This member as the group has it, if it is somewhere else now.
    fn recorded_elsewhere(&self, own: &str) -> Option<Peer> {
        let (_, membership) = self.membership();
        let recorded = membership.get_node(&self.identity().member)?;
        (recorded.address != own).then(|| recorded.clone())
    }

    /// Greets who is there, and notes it if it is a member of the group, and the one that was expected.
    async fn seek(&self, door: &Door, expected: Option<u64>, address: &str) {
        let lane = self.network().new_lane(address);
        if let Ok(greeting) = greet(&lane, door.greeting()).await
            && *greeting.cluster == self.identity().cluster
            && expected.is_none_or(|id| id == greeting.id)
        {
            self.network().addresses().find(greeting.id, address);
        }
    }

    /// Greets a member where it is reached, and goes back to the recorded address if that is elsewhere and it is not there.
    async fn check(&self, door: &Door, id: u64, recorded: &str) {
        let lane = self.network().lane(id, recorded);
        let there = greet(&lane, door.greeting()).await;
        if !there.is_ok_and(|greeting| greeting.id == id) {
            self.network().addresses().forget(id);
        }
    }

    /// Whether this member responds at the address that it gives to the others.
    async fn is_reached_at(&self, own: &str) -> bool {
        let lane = Lane::new(self.network().transport(), own);
        let greeting = greet(&lane, message::Greeting::default()).await;
        greeting.is_ok_and(|greeting| greeting.id == self.identity().member)
    }

    /// Has the Raft leader record where this member is, over one of the others.
    async fn record_own(
        &self,
        others: &[(u64, Peer)],
        turn: usize,
        recorded: &Peer,
        own: &str,
    ) -> Result<(), tonic::Status> {
        let admission = message::Admission {
            cluster: Bytes::copy_from_slice(&self.identity().cluster),
            id: self.identity().member,
            name: recorded.name.clone(),
            address: own.to_owned(),
            forwarded: false,
        };
        if self.leads().is_some() || others.is_empty() {
            return self.admit(admission).await;
        }
        let (id, peer) = &others[turn % others.len()];
        let lane = self.network().lane(*id, &peer.address);
        let asked = lane.ask(CHANGE, |mut client| async move { client.admit(admission).await });
        asked.await.map(drop)
    }
}
