//! registry-mysql
