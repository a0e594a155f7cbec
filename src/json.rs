//! Entries and events as JSON: as the command prints them and HTTP answers them.

use base64::Engine;
use registry_api::{DeleteCause, Entry, Event};
use serde_json::{Value, json};

/// A value: `value` where it is text, `value_base64` where it is not.
pub fn value(value: &[u8]) -> (&'static str, Value) {
    match std::str::from_utf8(value) {
        Ok(text) => ("value", json!(text)),
        Err(_) => (
            "value_base64",
            json!(base64::engine::general_purpose::STANDARD.encode(value)),
        ),
    }
}

/// An entry.
pub fn entry(entry: &Entry) -> Value {
    let (name, value) = value(&entry.value);
    json!({
        "key": entry.key.as_str(),
        name: value,
        "create_revision": entry.create_revision.0,
        "mod_revision": entry.mod_revision.0,
        "session": entry.session.map(|session| session.to_string()),
    })
}

/// What happened: `created`, `updated`, `deleted` or `expired`.
pub fn kind(event: &Event) -> &'static str {
    match event {
        Event::Created(_) => "created",
        Event::Updated(_) => "updated",
        Event::Deleted {
            cause: DeleteCause::SessionEnded,
            ..
        } => "expired",
        Event::Deleted { .. } => "deleted",
    }
}

/// An event.
pub fn event(event: &Event) -> Value {
    json!({ "type": kind(event), "revision": event.revision().0, "entry": entry(event.entry()) })
}
