//! The list of mutants is kept true: each edit still has its place in the code. `scripts/mutants` runs them.

#[path = "mutants/mutant.rs"]
mod mutant;

use std::fs;

/// A mutant whose place is gone would be left out in silence, and with it what its guarantee rests on.
#[test]
fn every_mutant_has_its_place_and_its_guarantee() {
    let guarantees = fs::read_to_string(mutant::root().join("docs/guarantees.md")).unwrap();
    let mut wrong = Vec::new();
    for mutant in mutant::all() {
        match fs::read_to_string(mutant::root().join(&mutant.file)) {
            Ok(text) => wrong.extend(mutant.apply(&text).err()),
            Err(error) => wrong.push(format!("{}: {}: {error}", mutant.name, mutant.file)),
        }
        if !guarantees.contains(&format!("**{}.**", mutant.guarantee)) {
            wrong.push(format!("{}: there is no guarantee {}", mutant.name, mutant.guarantee));
        }
        let last = mutant.test.split_whitespace().last();
        if mutant.survives.is_none() && last.is_none_or(|name| name.starts_with('-')) {
            wrong.push(format!("{}: names no test", mutant.name));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The edit is made in the named function alone, and refused where it is not clear which text is meant.
#[test]
fn an_edit_stays_in_its_function() {
    let text = "impl A {\n    fn one(&self) {\n        if x {\n            go();\n        }\n    }\n\n    fn one_more() {\n        go();\n    }\n}\n";
    let mut mutant = mutant::Mutant {
        name: "a".into(),
        guarantee: "S4".into(),
        file: "a.rs".into(),
        function: "one".into(),
        find: "go();".into(),
        replace: "stay();".into(),
        test: "one".into(),
        survives: None,
    };
    assert_eq!(mutant.apply(text).unwrap(), text.replacen("go();", "stay();", 1));
    mutant.find = "}".into();
    assert!(mutant.apply(text).is_err(), "two braces, and it is not said which");
    mutant.find = "leave();".into();
    assert!(mutant.apply(text).is_err());
    mutant.function = "two".into();
    assert!(mutant.apply(text).is_err());
}
