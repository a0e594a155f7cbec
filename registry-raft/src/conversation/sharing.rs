//! What several watches of one conversation are told is made once, and told once for all of them.

use std::mem::{Discriminant, discriminant};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use prost::Message;
use registry_api::{Event, Key, Namespace, Result, Revision, WatchItem};

use crate::proto;
use crate::remote::to_messages;

/// More events than these are seldom told to several, and are not looked at for it.
const FEW: usize = 16;

/// The messages of an item, and the bytes of each.
pub(super) type Messages = Arc<[(proto::WatchResponse, usize)]>;

/// One of them.
pub(super) struct SharedItem(pub(super) Messages, pub(super) usize);

impl SharedItem {
    pub(super) fn each(messages: Messages) -> impl Iterator<Item = Self> {
        (0..messages.len()).map(move |at| Self(messages.clone(), at))
    }

    pub(super) fn message(&self) -> &proto::WatchResponse {
        &self.0[self.1].0
    }

    pub(super) fn bytes(&self) -> usize {
        self.0[self.1].1
    }

    /// Whether the other is the same, and not only equal.
    pub(super) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0) && self.1 == other.1
    }
}

pub(super) fn shared(messages: Vec<proto::WatchResponse>) -> Messages {
    let measured = messages.into_iter().map(|message| {
        let bytes = message.encoded_len();
        (message, bytes)
    });
    measured.collect()
}

/// What was said last, as long as somebody is about to be told.
#[derive(Default)]
pub(super) struct Lately(Mutex<Option<Said>>);

struct Said {
    namespace: Namespace,
    /// A key has one change of a revision.
    events: Vec<(Discriminant<Event>, Revision, Key)>,
    messages: Weak<[(proto::WatchResponse, usize)]>,
}

impl Said {
    fn is(&self, namespace: &Namespace, events: &[Event]) -> bool {
        let same = |(said, event): (&(Discriminant<Event>, Revision, Key), &Event)| {
            said.0 == discriminant(event) && said.1 == event.revision() && said.2 == *event.key()
        };
        self.namespace == *namespace && self.events.len() == events.len() && self.events.iter().zip(events).all(same)
    }
}

impl Lately {
    /// The messages of an item: those of the one before, if they are the same.
    pub(super) fn say(&self, namespace: &Namespace, item: Result<WatchItem>) -> Messages {
        let events = match &item {
            Ok(WatchItem::Changes(events)) if events.len() <= FEW => events,
            _ => return shared(to_messages(namespace, item)),
        };
        let mut said = self.0.lock();
        let before = said.as_ref().filter(|said| said.is(namespace, events));
        if let Some(messages) = before.and_then(|said| said.messages.upgrade()) {
            return messages;
        }
        let known = |event: &Event| (discriminant(event), event.revision(), event.key().clone());
        let events = events.iter().map(known).collect();
        let messages = shared(to_messages(namespace, item));
        *said = Some(Said {
            namespace: namespace.clone(),
            events,
            messages: Arc::downgrade(&messages),
        });
        messages
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use registry_api::{DeleteCause, Entry};

    use super::*;

    fn entry(key: &str, revision: u64) -> Entry {
        Entry {
            key: Key::parse(key).unwrap(),
            value: Bytes::from_static(b"1"),
            create_revision: Revision(1),
            mod_revision: Revision(revision),
            session: None,
        }
    }

    fn changes(events: impl Into<Vec<Event>>) -> Result<WatchItem> {
        Ok(WatchItem::Changes(events.into()))
    }

    fn same(one: &Messages, other: &Messages) -> bool {
        Arc::ptr_eq(one, other)
    }

    #[test]
    fn the_same_is_said_once_as_long_as_somebody_has_it() {
        let (lately, namespace) = (Lately::default(), Namespace::default());
        let say = |events: Vec<Event>| lately.say(&namespace, changes(events));
        let put = || Event::Updated(entry("/a", 2));
        let first = say(vec![put()]);
        assert!(same(&first, &say(vec![put()])));
        assert_eq!(first.len(), 1);
        let gone = |revision| Event::Deleted {
            last: entry("/a", 1),
            revision: Revision(revision),
            cause: DeleteCause::Deleted,
        };
        let others = [
            vec![Event::Created(entry("/a", 2))],
            vec![Event::Updated(entry("/a", 3))],
            vec![Event::Updated(entry("/b", 2))],
            vec![put(), Event::Updated(entry("/b", 2))],
            vec![gone(2)],
            vec![],
        ];
        for other in others {
            let first = say(vec![put()]);
            let said = say(other.clone());
            assert!(!same(&first, &said), "{other:?}");
            assert_eq!(*said, *shared(to_messages(&namespace, changes(other))));
        }
        let elsewhere = Namespace::parse("/elsewhere").unwrap();
        let first = say(vec![put()]);
        assert!(!same(&first, &lately.say(&elsewhere, changes([put()]))));
        let first = say(vec![put()]);
        let weak = Arc::downgrade(&first);
        drop(first);
        assert!(weak.upgrade().is_none(), "it is kept for nobody");
        assert_eq!(*say(vec![put()]), *shared(to_messages(&namespace, changes([put()]))));
    }
}
