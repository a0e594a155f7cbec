//! Locks, elections, registrations and mirrors, each written once over the primitives of [`crate::Registry`].
//!
//! Locks and elections are one idea: a queue of ephemeral keys, in which a contender's place is the `create_revision`
//! of its own key, and the first holds.

mod cleanup;
mod election;
mod epoch;
mod lock;
mod mirror;
mod name;
mod opening;
mod queue;
mod reentrant;
mod register;

pub use election::{Campaign, Election, Leader, Leadership};
pub use epoch::{Epoch, Raise};
pub(crate) use epoch::{Epochs, epoch, raise_epoch};
pub use lock::{Held, Lock};
pub use mirror::Mirror;
pub(crate) use name::Names;
pub use queue::Contender;
pub(crate) use reentrant::Owners;
pub use reentrant::{ReentrantHeld, ReentrantLock};
pub use register::{Registered, Registration};
