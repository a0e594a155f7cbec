//! Faults of server versions that break the registry's guarantees (F4).

/// A fault: what it does, and in each minor version of etcd 3 that has it, the first patch that has it not.
struct Fault(&'static str, &'static [(u32, u32)]);

const FAULTS: &[Fault] = &[
    Fault(
        "a single member acknowledges writes before they are durable (etcd pull request 14423)",
        &[(4, 21), (5, 5)],
    ),
    Fault(
        "a member that crashed can come back with other data than the rest (etcd pull request 13908)",
        &[(5, 3)],
    ),
    Fault(
        "a leader that was deposed can revoke live leases, and end live sessions (etcd issue 15247)",
        &[(4, 31), (5, 13)],
    ),
    Fault(
        "a watch that lags can lose events when their revision is compacted (etcd pull request 17610)",
        &[(4, 31), (5, 13)],
    ),
    Fault(
        "a keep-alive can succeed on a lease that was revoked (fixed in 3.4.38)",
        &[(4, 38)],
    ),
];

/// What is wrong with this version of etcd; nothing, of a version that is not understood.
pub(crate) fn faults(version: &str) -> Vec<&'static str> {
    let mut numbers = version.split(['.', '-', '+']).map(str::parse::<u32>);
    let (Some(Ok(major)), Some(Ok(minor)), Some(Ok(patch))) = (numbers.next(), numbers.next(), numbers.next()) else {
        return Vec::new();
    };
    if (major, minor) < (3, 4) {
        return vec!["it is older than 3.4, on which nothing is tested"];
    }
    let has = |fixed: &[(u32, u32)]| major == 3 && fixed.iter().any(|&(of, first)| of == minor && patch < first);
    FAULTS
        .iter()
        .filter(|Fault(_, fixed)| has(fixed))
        .map(|Fault(what, _)| *what)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::faults;

    #[test]
    fn names_what_a_version_has() {
        for (version, count) in [
            ("3.3.27", 1),
            ("3.4.20", 4),
            ("3.4.23", 3),
            ("3.4.38", 0),
            ("3.5.0-rc.1", 4),
            ("3.5.21", 0),
            ("3.6.0", 0),
            ("4.0.0", 0),
            ("what", 0),
        ] {
            assert_eq!(faults(version).len(), count, "{version}");
        }
    }
}
