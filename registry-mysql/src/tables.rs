//! The names of the tables, and values as SQL takes them.

use std::fmt;

use registry_api::{Error, Key, Prefix, Result};
use serde::Deserialize;

/// What the names of the tables begin with: `registry_` by default, at most 32 letters, digits and `_`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct TablePrefix(String);

impl TablePrefix {
    /// Takes a prefix.
    ///
    /// # Errors
    /// [`Error::Config`] for one that is too long or has other characters.
    pub fn new(prefix: &str) -> Result<Self> {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
        match prefix.len() <= 32 && prefix.chars().all(plain) {
            true => Ok(Self(prefix.into())),
            false => Err(Error::Config {
                field: "registry.mysql.table_prefix".into(),
                reason: format!("{prefix:?} is not at most 32 letters, digits and `_`"),
            }),
        }
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for TablePrefix {
    fn default() -> Self {
        Self("registry_".into())
    }
}

impl TryFrom<String> for TablePrefix {
    type Error = String;

    fn try_from(prefix: String) -> Result<Self, String> {
        Self::new(&prefix).map_err(|e| e.to_string())
    }
}

/// The tables of `schema/`, and the number of the namespace within them.
#[derive(Clone, Debug)]
pub(crate) struct Tables {
    pub(crate) namespaces: String,
    pub(crate) entries: String,
    pub(crate) changes: String,
    pub(crate) sessions: String,
    pub(crate) namespace: u64,
}

impl Tables {
    pub(crate) fn new(prefix: &TablePrefix) -> Self {
        let name = |table: &str| format!("{}{table}", prefix.0);
        Self {
            namespaces: name("namespaces"),
            entries: name("entries"),
            changes: name("changes"),
            sessions: name("sessions"),
            namespace: 0,
        }
    }

    /// The condition on a row of `entries` that its key is this one or below it.
    pub(crate) fn covered(&self, prefix: &Prefix) -> String {
        let below = self.below(prefix);
        match prefix.key() {
            Some(key) => format!(
                "namespace = {} AND (name = {} OR ({below}))",
                self.namespace,
                Hex::key(&key)
            ),
            None => format!("namespace = {} AND {below}", self.namespace),
        }
    }

    /// The condition that a name lies below a prefix.
    pub(crate) fn below(&self, prefix: &Prefix) -> String {
        let below = prefix.below();
        format!(
            "name >= {} AND name < {}",
            Hex(below.start.as_bytes()),
            Hex(below.end.as_bytes())
        )
    }
}

/// Bytes as a literal, which needs no escaping whatever they are and whatever mode the server is in.
pub(crate) struct Hex<'b>(pub(crate) &'b [u8]);

impl<'k> Hex<'k> {
    pub(crate) fn key(key: &'k Key) -> Self {
        Self(key.as_str().as_bytes())
    }
}

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        f.write_str("X'")?;
        // Piece by piece over the stack: a call for each byte would be the dearest part of a large put.
        let mut digits = [0; 512];
        for piece in self.0.chunks(digits.len() / 2) {
            for (byte, pair) in piece.iter().zip(digits.chunks_mut(2)) {
                pair[0] = DIGITS[usize::from(byte >> 4)];
                pair[1] = DIGITS[usize::from(byte & 15)];
            }
            let text = std::str::from_utf8(&digits[..2 * piece.len()]).map_err(|_| fmt::Error)?;
            f.write_str(text)?;
        }
        f.write_str("'")
    }
}

/// A number or NULL.
pub(crate) struct Nullable(pub(crate) Option<u64>);

impl fmt::Display for Nullable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(number) => write!(f, "{number}"),
            None => f.write_str("NULL"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_become_a_literal() {
        assert_eq!(Hex(b"").to_string(), "X''");
        assert_eq!(Hex(b"/a'\\\x00\xff").to_string(), "X'2f61275c00ff'");
        let long: Vec<u8> = (0..=255).cycle().take(1000).collect();
        let text = Hex(&long).to_string();
        assert_eq!(text.len(), 2003);
        assert!(text.ends_with("e5e6e7'"), "{text}");
    }

    #[test]
    fn a_prefix_is_part_of_a_name_and_nothing_else() {
        for wrong in ["a b", "a`", "a;", "ä", "a.b", &"a".repeat(33)] {
            assert!(TablePrefix::new(wrong).is_err(), "{wrong}");
        }
        assert!(TablePrefix::new("").is_ok() && TablePrefix::new("my_app_2").is_ok());
    }
}
