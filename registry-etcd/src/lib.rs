//! registry-etcd
