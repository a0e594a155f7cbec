//! `/metrics`: how the member stands, in the text format of Prometheus.

use axum::body::Body;
use axum::http::{HeaderValue, Response, header};
use registry_raft::Status;

pub(super) fn response(status: &Status) -> Response<Body> {
    let mut response = Response::new(Body::from(text(status)));
    let format = HeaderValue::from_static("text/plain; version=0.0.4");
    response.headers_mut().insert(header::CONTENT_TYPE, format);
    response
}

fn text(status: &Status) -> String {
    let leads = |member: &&registry_raft::MemberStatus| member.role == "leader";
    let leader = status.members.iter().find(leads);
    let gauges = [
        (
            "leader",
            "Whether this member is the Raft leader.",
            u64::from(leader.is_some_and(|leader| leader.id == status.answered_by)),
        ),
        (
            "has_leader",
            "Whether there is a Raft leader that this member hears.",
            u64::from(leader.is_some()),
        ),
        ("members", "Members of the group.", status.members.len() as u64),
        ("term", "The Raft term.", status.term),
        (
            "applied_index",
            "The last entry of the log that is applied here.",
            status.applied,
        ),
        ("revision", "The newest revision.", status.revision),
        (
            "compacted_revision",
            "The oldest revision a watch can start after.",
            status.compacted,
        ),
        ("keys", "Keys, the recipes' own included.", status.keys),
        ("sessions", "Open sessions.", status.sessions),
        ("watches", "Watches that this member serves.", status.watches),
        ("log_bytes", "The log that no snapshot covers.", status.log_bytes),
        ("snapshot_bytes", "The newest snapshot.", status.snapshot_bytes),
    ];
    let mut text = String::new();
    for (name, help, value) in gauges {
        text.push_str(&format!(
            "# HELP registry_{name} {help}\n# TYPE registry_{name} gauge\nregistry_{name} {value}\n"
        ));
    }
    text.push_str(
        "# HELP registry_member_lag Entries of the log that a member lacks; the Raft leader tells.\n\
         # TYPE registry_member_lag gauge\n",
    );
    let lags = status
        .members
        .iter()
        .filter_map(|member| Some((&member.name, member.lag?)));
    for (name, lag) in lags {
        // A name has no character that would have to be escaped.
        text.push_str(&format!("registry_member_lag{{member=\"{name}\"}} {lag}\n"));
    }
    text
}
