//! The coordination API of `registry`: keys and values, ephemeral keys, watches, locks and leader election, the same
//! over every store.
//!
//! A backend implements one object-safe trait, [`Registry`]: reads, transactions, a session, watches. Everything else
//! (locks, elections, registrations, mirrors) is a recipe written once over that trait, in [`recipe`], and found as a
//! method on the trait object. What a caller may rely on, sentence by sentence, is the book's page on guarantees; the
//! identifiers in these docs (K1, W3, ...) are its sentences.
//!
//! Read in this order: [`Key`], [`Entry`], [`Txn`], [`Registry`], [`Session`], [`Watch`], then the recipes.

mod background;
mod boot;
mod capabilities;
mod entry;
mod error;
mod key;
mod options;
pub mod recipe;
mod registry;
mod session;
mod token;
mod txn;
pub mod watch;

pub use background::spawn;
pub use boot::BootInstant;
pub use capabilities::Capabilities;
pub use entry::{Entry, MAX_VALUE, Revision};
pub use error::{BoxError, Error, Refusal, Result, with_causes};
pub use key::{Key, KeyError, MAX_KEY, Namespace, NamespaceError, Prefix};
pub use options::{Options, SessionTtl, TtlBounds};
pub use recipe::{
    Campaign, Contender, Election, Epoch, Held, Leader, Leadership, Lock, Mirror, Raise, ReentrantHeld, ReentrantLock,
    Registered, Registration,
};
pub use registry::{Depth, Health, List, Page, Read, Registry};
pub use session::{Grant, Session, SessionId, SessionState, SessionStore};
pub use token::{Token, TokenError};
pub use txn::{Committed, Condition, Existing, Expect, Kind, MAX_OPERATIONS, MAX_TXN, Operation, Txn};
pub use watch::{DeleteCause, Event, Watch, WatchFrom, WatchItem, WatchRequest, WatchScope};
