//! registry-zk
