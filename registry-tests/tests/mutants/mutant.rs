//! A mutant: one line on which a guarantee rests, broken on purpose.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;

/// One edit, and the test that must fail with it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Mutant {
    /// Unique, in kebab-case.
    pub(crate) name: String,
    /// Its number in docs/guarantees.md.
    pub(crate) guarantee: String,
    /// From the workspace's root.
    pub(crate) file: String,
    /// The name of the function that is edited: unlike a line's number it stays true when the code is moved.
    pub(crate) function: String,
    /// Occurs exactly once in that function.
    pub(crate) find: String,
    pub(crate) replace: String,
    /// Arguments of `cargo test`, the test's name last.
    pub(crate) test: String,
    /// Why no test can kill it, if none can.
    pub(crate) survives: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    mutant: Vec<Mutant>,
}

/// The root of the workspace.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the crate lies in the workspace")
}

/// All mutants, by file and then as they are written. Panics on what can't be read: a list with an error proves nothing.
pub(crate) fn all() -> Vec<Mutant> {
    let dir = root().join("registry-tests/mutants");
    let files = fs::read_dir(&dir).expect("the folder of the mutants can be read");
    let mut paths: Vec<PathBuf> = files
        .map(|file| file.expect("its entries can be read").path())
        .collect();
    paths.sort();
    let mut names = BTreeSet::new();
    let mut mutants = Vec::new();
    for path in paths {
        let text = fs::read_to_string(&path).expect("a file of mutants can be read");
        let file: File = toml::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        for mutant in file.mutant {
            assert!(
                names.insert(mutant.name.clone()),
                "two mutants are named {}",
                mutant.name
            );
            mutants.push(mutant);
        }
    }
    mutants
}

impl Mutant {
    /// Returns the file's text with the edit, given its text without it.
    pub(crate) fn apply(&self, text: &str) -> Result<String, String> {
        let name = format!("fn {}", self.function);
        let is_whole = |at: &usize| {
            let next = text[at + name.len()..].chars().next();
            !next.is_some_and(|next| next.is_alphanumeric() || next == '_')
        };
        let starts: Vec<usize> = text.match_indices(&name).map(|(at, _)| at).filter(is_whole).collect();
        let mut found = Vec::new();
        for start in &starts {
            let body = &text[*start..*start + length(text, *start)];
            found.extend(body.match_indices(&self.find).map(|(at, _)| start + at));
        }
        match found.as_slice() {
            [at] if self.find != self.replace => {
                let mut edited = text.to_owned();
                edited.replace_range(*at..at + self.find.len(), &self.replace);
                Ok(edited)
            }
            [_] => Err(format!("{}: the replacement changes nothing", self.name)),
            places => Err(format!(
                "{}: in {}, {} functions are named {}, and the text to replace occurs {} times in them instead of once",
                self.name,
                self.file,
                starts.len(),
                self.function,
                places.len()
            )),
        }
    }
}

/// Returns the length of the function that begins at `start`: up to the brace that closes it, in formatted code the first
/// line that is a brace alone, no further in than the function itself.
fn length(text: &str, start: usize) -> usize {
    let line = text[..start].rfind('\n').map_or(0, |at| at + 1);
    let indent = text[line..].chars().take_while(|next| *next == ' ').count();
    let end = format!("\n{}}}", " ".repeat(indent));
    let rest = &text[start..];
    rest.find(&end).map_or(rest.len(), |at| at + end.len())
}
