//! Keys, prefixes and namespaces: what parses prints back the same, and every bad form is refused with its reason.

// A test may fail.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use registry_api::{Key, MAX_KEY, Namespace, Prefix};

/// A segment that is allowed.
fn segment() -> impl Strategy<Value = String> {
    let allowed = prop::char::ranges(vec![' '..='.', '0'..='~', '\u{a0}'..='\u{d7ff}', '\u{f900}'..='\u{ffef}'].into());
    let short = prop::collection::vec(allowed, 1..12).prop_map(|characters| characters.into_iter().collect::<String>());
    short.prop_filter("dots are no segment", |segment| segment != "." && segment != "..")
}

fn path() -> impl Strategy<Value = String> {
    let path = prop::collection::vec(segment(), 1..=32).prop_map(|segments| format!("/{}", segments.join("/")));
    path.prop_filter("it fits", |path| path.len() <= MAX_KEY)
}

proptest! {
    #[test]
    fn what_parses_prints_back_the_same(path in path()) {
        let key = Key::parse(&path).unwrap();
        prop_assert_eq!(key.to_string(), &*path);
        prop_assert_eq!(Key::parse(key.as_str()).unwrap(), key.clone());
        prop_assert_eq!(Key::from_store(&path).unwrap(), key.clone());
        prop_assert_eq!(key.depth(), path.split('/').count() - 1);
        prop_assert_eq!(key.parent().child(key.name()).unwrap(), key);
    }

    #[test]
    fn below_is_what_the_range_says(prefix in path(), other in path(), name in segment()) {
        let prefix = Prefix::parse(&prefix).unwrap();
        let keys = [Key::parse(&other).ok(), prefix.child(&name).ok(), Key::parse(&format!("{prefix}{name}")).ok()];
        for key in keys.into_iter().flatten() {
            let below = prefix.below().contains(&key.as_str().to_owned());
            prop_assert_eq!(prefix.covers(&key), below || prefix.key().as_ref() == Some(&key));
            prop_assert_eq!(prefix.child_of(&key).is_some(), below);
            prop_assert!(Prefix::root().covers(&key));
            for above in key.ancestors() {
                prop_assert!(Prefix::from(&above).covers(&key) && above != key);
            }
            prop_assert_eq!(key.ancestors().count(), key.depth() - 1);
        }
    }

    #[test]
    fn namespaces_keep_keys_apart(one in "/[a-z]{1,3}", other in "/[a-z]{1,3}", path in path()) {
        let (one, other) = (Namespace::parse(&one).unwrap(), Namespace::parse(&other).unwrap());
        for name in [path.clone(), format!("~/lock{path}")] {
            let qualified = one.qualify(&name);
            prop_assert_eq!(one.strip(&qualified), Some(&*name));
            prop_assert!(one == other || other.strip(&qualified).is_none());
        }
    }
}

/// Any text is a key, a prefix, a namespace, or refused in one line.
fn is_taken(input: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(input) else {
        return false;
    };
    let printed = [
        Key::parse(text)
            .map(|key| key.to_string())
            .map_err(|error| error.to_string()),
        Key::from_store(text)
            .map(|key| key.to_string())
            .map_err(|error| error.to_string()),
        Prefix::parse(text)
            .map(|prefix| prefix.to_string())
            .map_err(|error| error.to_string()),
        Prefix::from_store(text)
            .map(|prefix| prefix.as_str().to_owned())
            .map_err(|error| error.to_string()),
        Namespace::parse(text)
            .map(|namespace| namespace.to_string())
            .map_err(|error| error.to_string()),
    ];
    for printed in &printed {
        match printed {
            Ok(printed) => assert_eq!(printed, text),
            Err(refusal) => assert!(!refusal.contains('\n') && refusal.len() < 1_000, "{refusal}"),
        }
    }
    if let Ok(key) = Key::parse(text) {
        assert_eq!(key.parent().child(key.name()).unwrap(), key);
        assert!(key.ancestors().all(|above| Key::parse(above.as_str()).is_ok()));
    }
    printed.iter().any(Result::is_ok)
}

#[test]
fn whatever_a_text_is_it_prints_back_the_same_or_is_refused_in_one_line() {
    bolero::check!(name = "keys")
        .with_iterations(10_000)
        .for_each(|input: &[u8]| {
            is_taken(input);
        });
}

#[test]
fn every_bad_form_is_refused_with_its_reason() {
    let cases = [
        ("", "a key begins with `/`"),
        ("a/b", "a key begins with `/`"),
        ("/", "the root holds no value"),
        ("/a/", "does not end with `/`"),
        ("//", "does not end with `/`"),
        ("//a", "a segment is empty"),
        ("/a//b", "a segment is empty"),
        ("/.", "`.` and `..` are no segments"),
        ("/a/../b", "`.` and `..` are no segments"),
        ("/a\0", "'\\0' is not allowed"),
        ("/a\u{7f}", "'\\u{7f}' is not allowed"),
        ("/a\u{85}", "'\\u{85}' is not allowed"),
        ("/\u{e000}", "'\\u{e000}' is not allowed"),
        ("/\u{ffff}", "'\\u{ffff}' is not allowed"),
        ("/\u{1f980}", "is not allowed"),
    ];
    for (bad, reason) in cases {
        let error = Key::parse(bad).expect_err(bad).to_string();
        assert!(
            error.starts_with("bad key ") && error.contains(reason),
            "{bad:?}: {error}"
        );
    }
    let long = format!("/{}", "é".repeat(128));
    assert!(
        Key::parse(&long)
            .unwrap_err()
            .to_string()
            .contains("a segment has 256 bytes, at most 255")
    );
    let deep = "/a".repeat(33);
    assert!(
        Key::parse(&deep)
            .unwrap_err()
            .to_string()
            .contains("33 segments, at most 32")
    );
    let large = format!("/{}", vec!["a".repeat(255); 5].join("/"));
    let error = Key::parse(&large).unwrap_err().to_string();
    assert!(
        error.contains("1280 bytes, at most 1024") && error.len() < 200,
        "{error}"
    );
    assert!(
        Key::parse("/a")
            .unwrap()
            .child("b/c")
            .unwrap_err()
            .to_string()
            .contains("holds a `/`")
    );
}

#[test]
fn recipe_keys_are_read_back_and_never_parsed() {
    for path in ["~/lock/1/a/0123", "~/a"] {
        assert!(Key::from_store(path).unwrap().is_recipe());
        assert!(Key::parse(path).is_err());
    }
    for bad in ["~", "~/", "~a/b", "~/a/../b", "~//a"] {
        assert!(Key::from_store(bad).is_err(), "{bad}");
    }
    assert_eq!(Key::from_store("~/lock/1/a/0123").unwrap().ancestors().count(), 0);
}

#[test]
fn bad_namespaces_are_refused_with_their_reason() {
    for (bad, reason) in [
        ("/a/b", "one segment only"),
        ("/a~b", "`~` is kept"),
        ("/zookeeper", "ZooKeeper"),
        ("a", "begins with `/`"),
    ] {
        let error = Namespace::parse(bad).expect_err(bad).to_string();
        assert!(error.contains(reason), "{bad}: {error}");
    }
}
