//! One member of the cluster, and what is checked of it before it is used.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use etcd_client::proto::PbResponseHeader;
use etcd_client::{Client, Compare, CompareOp, GetOptions, KvClient, Txn, TxnOp};
use registry_api::{Read, Result};
use tokio::time::{Instant, timeout};

use crate::config::config;
use crate::error::{self, Trouble, Verdict, verdict};
use crate::plan::MAX_OPS;
use crate::range::freshness;

/// After so long without a response, a connection is checked before a request is sent on it: a gateway may have
/// forgotten it. HTTP/2 pings can't do that, since etcd counts the pings of an idle connection as abuse.
const IDLE: Duration = Duration::from_secs(10);
/// How long an idle connection has for the response to that check.
const IDLE_PATIENCE: Duration = Duration::from_secs(1);
/// How long a member has to show that it reaches a quorum, where it does not say whether it knows a leader.
const QUORUM_PATIENCE: Duration = Duration::from_secs(1);

/// A member of the cluster, and the client that talks to it alone.
pub(crate) struct Member {
    pub(crate) index: usize,
    pub(crate) endpoint: String,
    pub(crate) cluster: u64,
    /// `None` if the user may not ask for it.
    pub(crate) version: Option<String>,
    pub(crate) client: Client,
    kv: KvClient,
    /// Whether it is a voter that knows a leader.
    pub(crate) has_leader: bool,
    sign: Vec<u8>,
    suspect: AtomicBool,
    answered: Mutex<Instant>,
}

impl Member {
    /// Checks a member that was just connected to.
    ///
    /// # Errors
    /// [`registry_api::Error::AccessDenied`] for a user that may not read in the namespace.
    pub(crate) async fn check(
        (index, endpoint): (usize, &str),
        client: Client,
        kv: KvClient,
        sign: Vec<u8>,
    ) -> Result<Self> {
        let mut member = Self {
            index,
            endpoint: endpoint.to_owned(),
            cluster: 0,
            version: None,
            client,
            kv,
            has_leader: false,
            sign,
            suspect: AtomicBool::new(false),
            answered: Mutex::new(Instant::now()),
        };
        let header = match member.client.maintenance_client().status().await {
            Ok(status) => {
                member.version = Some(status.version().to_owned());
                member.has_leader = status.leader() != 0 && !status.is_learner();
                status.0.header
            }
            // With authentication on, etcd 3.5.28 and later let only administrators ask for the status.
            Err(error) if matches!(verdict(&error), Verdict::Denied | Verdict::Refused) => {
                let (header, has_leader) = member.probe().await?;
                member.has_leader = has_leader;
                Some(header)
            }
            Err(error) => return Err(error::read(error)),
        };
        member.cluster = header.unwrap_or_default().cluster_id;
        Ok(member)
    }

    /// Whether the member reaches a quorum, from what every user of the namespace may ask: a learner, or a member without
    /// a leader, responds only to serializable reads.
    async fn probe(&self) -> Result<(PbResponseHeader, bool)> {
        match timeout(QUORUM_PATIENCE, self.sign_of_life(Read::Linearizable)).await {
            Ok(Ok(header)) => Ok((header, true)),
            Ok(Err(error)) if matches!(verdict(&error), Verdict::Denied | Verdict::Refused) => Err(error::read(error)),
            Ok(Err(_)) | Err(_) => {
                let header = self.sign_of_life(Read::Stale).await.map_err(error::read)?;
                Ok((header, false))
            }
        }
    }

    /// Checks that the member takes transactions of the size that the registry sends, by one that writes nothing.
    ///
    /// # Errors
    /// [`registry_api::Error::Config`] for a member whose `--max-txn-ops` is below the default.
    pub(crate) async fn check_bounds(&self) -> Result<()> {
        let compares = (0..MAX_OPS).map(|_| Compare::create_revision(self.sign.clone(), CompareOp::Equal, 0));
        let options = GetOptions::new().with_count_only().with_serializable();
        let gets = (0..MAX_OPS).map(|_| TxnOp::get(self.sign.clone(), Some(options.clone())));
        let request = Txn::new()
            .when(compares.collect::<Vec<_>>())
            .and_then(gets.collect::<Vec<_>>());
        match self.kv().txn(request).await {
            Ok(_) => Ok(()),
            Err(error) => Err(match self.is_of_the_request(&error).await {
                true => config(
                    "the server's --max-txn-ops",
                    format!(
                        "{} takes fewer than {MAX_OPS} operations a transaction: {error}",
                        self.endpoint
                    ),
                ),
                false => error::read(error),
            }),
        }
    }

    /// Whether an error is about what a request holds and not about its sender: etcd has one code for a request that is
    /// larger than it takes, for a user that it does not know, and for an outdated token.
    pub(crate) async fn is_of_the_request(&self, error: &etcd_client::Error) -> bool {
        verdict(error) == Verdict::Refused && self.sign_of_life(Read::Stale).await.is_ok()
    }

    /// Counts the keys at a name that no key has.
    pub(crate) async fn sign_of_life(&self, read: Read) -> Result<PbResponseHeader, etcd_client::Error> {
        let options = freshness(GetOptions::new().with_count_only(), read);
        let response = self.kv().get(self.sign.clone(), Some(options)).await?;
        Ok(response.0.header.unwrap_or_default())
    }

    pub(crate) fn kv(&self) -> KvClient {
        self.kv.clone()
    }

    /// Something went wrong there: the next request looks for another.
    pub(crate) fn suspect(&self) {
        self.suspect.store(true, Ordering::Release);
    }

    pub(crate) fn is_suspect(&self) -> bool {
        self.suspect.load(Ordering::Acquire)
    }

    /// Notes that the connection carried a response.
    pub(crate) fn answered(&self) {
        *self.answered.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    /// Whether the connection was idle for so long that it may be dead.
    pub(crate) fn is_idle(&self) -> bool {
        self.answered.lock().unwrap_or_else(PoisonError::into_inner).elapsed() > IDLE
    }

    /// Whether an idle connection still carries anything.
    pub(crate) async fn still_answers(&self, deadline: Instant) -> bool {
        let patience = IDLE_PATIENCE.min((deadline - Instant::now()) / 3);
        let lives = match timeout(patience, self.sign_of_life(Read::Stale)).await {
            Ok(Ok(_)) => true,
            Ok(Err(error)) => !matches!(verdict(&error), Verdict::NotSent | Verdict::Unknown),
            Err(_) => false,
        };
        if lives {
            self.answered();
        }
        lives
    }

    pub(crate) fn silent(&self) -> Trouble {
        Trouble::Silent {
            endpoint: self.endpoint.clone(),
        }
    }
}
