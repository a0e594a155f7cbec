//! The book's page on guarantees and the list of properties are about the same.

use std::collections::BTreeSet;

#[test]
fn every_property_is_in_the_book_and_every_test_there_exists() {
    let page = include_str!("../../docs/guarantees.md");
    let in_book: BTreeSet<_> = page
        .split('`')
        .skip(1)
        .step_by(2)
        .filter(|text| is_property(text))
        .collect();
    let in_list: BTreeSet<_> = registry_tests::names().into_iter().collect();
    let only_list: Vec<_> = in_list.difference(&in_book).collect();
    let only_book: Vec<_> = in_book.difference(&in_list).collect();
    assert!(
        only_list.is_empty(),
        "in no sentence of docs/guarantees.md: {only_list:?}"
    );
    assert!(
        only_book.is_empty(),
        "in docs/guarantees.md, and no test: {only_book:?}"
    );
    assert!(in_list.len() > 80);
}

/// `subject::name`, of one of the suite's subjects.
fn is_property(text: &str) -> bool {
    let subjects = [
        "keys",
        "revisions",
        "session",
        "watch",
        "lock",
        "election",
        "recipe",
        "failure",
    ];
    text.split_once("::")
        .is_some_and(|(subject, _)| subjects.contains(&subject))
}
