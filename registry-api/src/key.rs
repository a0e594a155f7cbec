//! Names: keys, prefixes and namespaces.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// The longest key, in bytes.
pub const MAX_KEY: usize = 1024;
const MAX_SEGMENT: usize = 255;
const MAX_SEGMENTS: usize = 32;
/// What a recipe may add to a name: its own segments and a contender's id.
const RECIPE_EXTRA: usize = 128;

/// The name of an entry: an absolute path such as `/jobs/compact`.
///
/// 1 to 32 segments of 1 to 255 bytes of UTF-8 each, 1,024 bytes in all. Refused are empty segments, a trailing `/`,
/// `.` and `..`, control and private-use characters, and what ZooKeeper forbids (`U+FFF0` to `U+FFFF` and everything
/// beyond `U+FFFF`), so that a key that one backend takes is taken by all (K1). Keys compare by their bytes.
///
/// Cloning is cheap.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key(Arc<str>);

impl Key {
    /// Parses a path.
    ///
    /// # Errors
    /// [`KeyError`] with the reason.
    pub fn parse(path: &str) -> Result<Self, KeyError> {
        let refused = |reason| KeyError {
            path: shown(path),
            reason,
        };
        let rest = path.strip_prefix('/').ok_or_else(|| refused(Reason::NotAbsolute))?;
        if path.len() > MAX_KEY {
            return Err(refused(Reason::TooLong { bytes: path.len() }));
        }
        if rest.is_empty() {
            return Err(refused(Reason::Root));
        }
        if rest.ends_with('/') {
            return Err(refused(Reason::TrailingSlash));
        }
        let mut segments = 0;
        for segment in rest.split('/') {
            segments += 1;
            check_segment(segment).map_err(refused)?;
        }
        if segments > MAX_SEGMENTS {
            return Err(refused(Reason::TooDeep { segments }));
        }
        Ok(Self(path.into()))
    }

    /// A key as a backend stored it: one that [`Key::parse`] takes, or one of a recipe's own (K9).
    ///
    /// For backends, which read back what they wrote.
    ///
    /// # Errors
    /// [`KeyError`] for what neither a user nor a recipe can have written.
    pub fn from_store(stored: &str) -> Result<Self, KeyError> {
        match stored.strip_prefix(RECIPE_TREE).and_then(|path| path.strip_prefix('/')) {
            Some(path)
                if stored.len() <= MAX_KEY + RECIPE_EXTRA && path.split('/').all(|s| check_segment(s).is_ok()) =>
            {
                Ok(Self(stored.into()))
            }
            _ => Self::parse(stored),
        }
    }

    /// A key of the recipes' own tree, which no user key can name: the user's tree begins with `/`, this one with `~/`.
    pub(crate) fn of_recipe(path: &str) -> Self {
        debug_assert!(path.starts_with('/') && path.len() <= MAX_KEY + RECIPE_EXTRA);
        Self(format!("{RECIPE_TREE}{path}").into())
    }

    /// The path.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The last segment.
    pub fn name(&self) -> &str {
        self.0.rsplit('/').next().unwrap_or_default()
    }

    /// The number of segments.
    pub fn depth(&self) -> usize {
        self.0.bytes().filter(|&b| b == b'/').count()
    }

    /// The key one segment up, or the root.
    pub fn parent(&self) -> Prefix {
        let end = self.0.rfind('/').unwrap_or_default();
        Prefix(self.0[..end].into())
    }

    /// The key one segment down.
    ///
    /// # Errors
    /// [`KeyError`] if `segment` is not one, or the whole is too long or too deep.
    pub fn child(&self, segment: &str) -> Result<Self, KeyError> {
        Prefix::from(self).child(segment)
    }

    /// The keys above this one, the nearest first: those that must not be ephemeral when this one is put (K6).
    ///
    /// None for a recipe's own key: recipes put nothing above their keys, so backends are spared the question.
    pub fn ancestors(&self) -> impl Iterator<Item = Key> + '_ {
        let path = if self.is_recipe() { "" } else { &*self.0 };
        path.match_indices('/')
            .rev()
            .filter(|&(at, _)| at > 0)
            .map(|(at, _)| Self(self.0[..at].into()))
    }

    /// Whether the key is a recipe's own, outside the user's tree.
    pub fn is_recipe(&self) -> bool {
        self.0.starts_with(RECIPE_TREE)
    }
}

const RECIPE_TREE: &str = "~";

fn check_segment(segment: &str) -> Result<(), Reason> {
    match segment {
        "" => return Err(Reason::EmptySegment),
        "." | ".." => return Err(Reason::Dots),
        _ => {}
    }
    if segment.len() > MAX_SEGMENT {
        return Err(Reason::LongSegment { bytes: segment.len() });
    }
    // Nearly all are plain, and a byte is sooner looked at than a character.
    if segment.bytes().all(|byte| matches!(byte, b' '..=b'~')) {
        return Ok(());
    }
    match segment.chars().find(|&c| forbidden(c)) {
        Some(character) => Err(Reason::Character { character }),
        None => Ok(()),
    }
}

/// Control characters, private use, and what ZooKeeper refuses: it looks at UTF-16 units, so everything beyond the
/// basic plane looks like a surrogate to it (`PathUtils.validatePath`).
fn forbidden(c: char) -> bool {
    c.is_control() || matches!(c, '\u{e000}'..='\u{f8ff}' | '\u{fff0}'..='\u{ffff}' | '\u{10000}'..)
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&*self.0, f)
    }
}

impl FromStr for Key {
    type Err = KeyError;

    fn from_str(path: &str) -> Result<Self, KeyError> {
        Self::parse(path)
    }
}

impl TryFrom<&str> for Key {
    type Error = KeyError;

    fn try_from(path: &str) -> Result<Self, KeyError> {
        Self::parse(path)
    }
}

/// Where a listing or a watch looks: a key and what is below it, or the root of the user's tree.
///
/// "Below" goes by whole segments (K5): `/a/b` is below `/a`; `/ab`, `/a!` and `/a.b` are not.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Prefix(Arc<str>);

impl Prefix {
    /// Everything in the namespace.
    pub fn root() -> Self {
        Self("".into())
    }

    /// Parses `/` as the root and anything else as a [`Key`].
    ///
    /// # Errors
    /// [`KeyError`] with the reason.
    pub fn parse(path: &str) -> Result<Self, KeyError> {
        match path {
            "/" => Ok(Self::root()),
            path => Ok(Key::parse(path)?.into()),
        }
    }

    /// A prefix as a backend sent it: the root as the empty string, or a key as [`Key::from_store`] takes it.
    ///
    /// # Errors
    /// [`KeyError`] for what neither a user nor a recipe can have written.
    pub fn from_store(stored: &str) -> Result<Self, KeyError> {
        match stored {
            "" => Ok(Self::root()),
            stored => Ok(Key::from_store(stored)?.into()),
        }
    }

    /// The path without a trailing `/`: the empty string for the root.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The key itself; `None` for the root, which holds no value.
    pub fn key(&self) -> Option<Key> {
        (!self.0.is_empty()).then(|| Key(self.0.clone()))
    }

    /// The half-open range of the names below: from `prefix/` up to `prefix0`, `0` being the byte after `/`.
    ///
    /// The key itself is not in it, and one range over both would take in `/a!` with `/a`.
    pub fn below(&self) -> std::ops::Range<String> {
        format!("{}/", self.0)..format!("{}0", self.0)
    }

    /// Whether the key is this one or below it.
    pub fn covers(&self, key: &Key) -> bool {
        match key.0.strip_prefix(&*self.0) {
            Some(rest) => rest.is_empty() || rest.starts_with('/'),
            None => false,
        }
    }

    /// The segment of a direct child on the way to `key`, and whether `key` is that child itself. `None` if `key` is
    /// not below.
    pub fn child_of<'k>(&self, key: &'k Key) -> Option<(&'k str, bool)> {
        let rest = key.0.strip_prefix(&*self.0)?.strip_prefix('/')?;
        Some(match rest.split_once('/') {
            Some((segment, _)) => (segment, false),
            None => (rest, true),
        })
    }

    /// The key one segment down.
    ///
    /// # Errors
    /// [`KeyError`] if `segment` is not one, or the whole is too long or too deep.
    pub fn child(&self, segment: &str) -> Result<Key, KeyError> {
        let path = format!("{}/{segment}", self.0);
        match segment.contains('/') {
            true => Err(KeyError {
                path: shown(&path),
                reason: Reason::SlashInSegment,
            }),
            false => Key::from_store(&path),
        }
    }
}

impl From<Key> for Prefix {
    fn from(key: Key) -> Self {
        Self(key.0)
    }
}

impl From<&Key> for Prefix {
    fn from(key: &Key) -> Self {
        Self(key.0.clone())
    }
}

impl FromStr for Prefix {
    type Err = KeyError;

    fn from_str(path: &str) -> Result<Self, KeyError> {
        Self::parse(path)
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_empty() { "/" } else { &self.0 })
    }
}

impl fmt::Debug for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.to_string(), f)
    }
}

/// The part of a store that belongs to one application: `/` and a single segment, `/registry` by default.
///
/// One segment, so that no namespace can lie within another (K3). `~` is kept for the recipes, which store beside the
/// user's tree, under the namespace's name and `~`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Namespace(Arc<str>);

impl Namespace {
    /// Parses `/name`.
    ///
    /// # Errors
    /// [`NamespaceError`] with the reason.
    pub fn parse(path: &str) -> Result<Self, NamespaceError> {
        let key = Key::parse(path)?;
        if key.depth() > 1 {
            return Err(NamespaceError::Nested(shown(path)));
        }
        if path.contains('~') {
            return Err(NamespaceError::Tilde(shown(path)));
        }
        if path == "/zookeeper" {
            return Err(NamespaceError::Zookeeper);
        }
        Ok(Self(key.0))
    }

    /// The path, `/` first.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name under which a store without namespaces of its own keeps a key: `/myapp/a/b`, or `/myapp~/lock/...`.
    pub fn qualify(&self, name: &str) -> String {
        [&*self.0, name].concat()
    }

    /// The key back from [`Namespace::qualify`]; `None` for what is not in this namespace.
    pub fn strip<'n>(&self, qualified: &'n str) -> Option<&'n str> {
        qualified
            .strip_prefix(&*self.0)
            .filter(|rest| rest.is_empty() || rest.starts_with(['/', '~']))
    }
}

impl Default for Namespace {
    fn default() -> Self {
        Self("/registry".into())
    }
}

impl fmt::Display for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&*self.0, f)
    }
}

impl FromStr for Namespace {
    type Err = NamespaceError;

    fn from_str(path: &str) -> Result<Self, NamespaceError> {
        Self::parse(path)
    }
}

impl TryFrom<String> for Namespace {
    type Error = NamespaceError;

    fn try_from(path: String) -> Result<Self, NamespaceError> {
        Self::parse(&path)
    }
}

impl From<Namespace> for String {
    fn from(namespace: Namespace) -> Self {
        namespace.0.as_ref().into()
    }
}

/// Why a path is no key. Nothing was sent.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("bad key {path}: {reason}")]
pub struct KeyError {
    path: String,
    reason: Reason,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
enum Reason {
    #[error("a key begins with `/`")]
    NotAbsolute,
    #[error("the root holds no value")]
    Root,
    #[error("a key does not end with `/`")]
    TrailingSlash,
    #[error("a segment is empty")]
    EmptySegment,
    #[error("`.` and `..` are no segments")]
    Dots,
    #[error("a segment holds a `/`")]
    SlashInSegment,
    #[error("it has {bytes} bytes, at most {MAX_KEY} are allowed")]
    TooLong { bytes: usize },
    #[error("it has {segments} segments, at most {MAX_SEGMENTS} are allowed")]
    TooDeep { segments: usize },
    #[error("a segment has {bytes} bytes, at most {MAX_SEGMENT} are allowed")]
    LongSegment { bytes: usize },
    #[error("the character {character:?} is not allowed")]
    Character { character: char },
}

/// Why a path is no namespace.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NamespaceError {
    /// It is not even a key.
    #[error("bad namespace: {0}")]
    Key(#[from] KeyError),
    /// It has more than one segment.
    #[error("bad namespace {0}: one segment only, so that no namespace lies within another")]
    Nested(String),
    /// It holds a `~`.
    #[error("bad namespace {0}: `~` is kept for the registry's own keys")]
    Tilde(String),
    /// It is ZooKeeper's own tree.
    #[error("bad namespace /zookeeper: ZooKeeper keeps its own state there")]
    Zookeeper,
}

/// A path as an error shows it: quoted, escaped, and no longer than a line.
fn shown(path: &str) -> String {
    match path.char_indices().nth(80) {
        Some((end, _)) => format!("{:?}...", &path[..end]),
        None => format!("{path:?}"),
    }
}
