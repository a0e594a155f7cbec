//! registry-raft
