//! Where settings come from: a file, then the environment, then overrides, each over the one before.

use std::path::Path;

use config::{File, FileFormat, FileSourceString};
use registry_api::Result;

use super::{Config, Document, MEMORY, refused};

/// What the names of the environment begin with.
const VARIABLES: &str = "REGISTRY__";

/// The settings that are lists, which the environment and an override give with commas.
const LISTS: &[&str] = &["raft.endpoints", "raft.join", "etcd.endpoints"];

/// The settings that are paths.
const PATHS: &[&str] = &[
    "raft.data_dir",
    "raft.token_file",
    "raft.tls.ca",
    "raft.tls.cert",
    "raft.tls.key",
    "etcd.tls.ca",
    "etcd.tls.cert",
    "etcd.tls.key",
    "zk.tls.ca",
    "zk.tls.cert",
    "zk.tls.key",
    "mysql.tls.ca",
    "mysql.tls.cert",
    "mysql.tls.key",
];

/// All that was given.
pub(super) struct Sources<'a> {
    /// The file, and the paths in it as they are seen from where the program runs.
    file: Option<(&'a Path, File<FileSourceString, FileFormat>, config::Config)>,
    /// Variables of the environment, by their names there, sorted.
    variables: Vec<(String, String)>,
    overrides: &'a [(String, String)],
}

impl<'a> Sources<'a> {
    pub(super) fn read(file: Option<&'a Path>, overrides: &'a [(String, String)]) -> Result<Self> {
        let file = file.map(read).transpose()?;
        let mut variables = Vec::new();
        for (name, value) in std::env::vars_os() {
            let Some(name) = name.to_str().filter(|name| name.to_uppercase().starts_with(VARIABLES)) else {
                continue;
            };
            match value.into_string() {
                Ok(value) => variables.push((name.to_owned(), value)),
                Err(_) => return Err(refused(variable(name), "is no UTF-8".into())),
            }
        }
        variables.sort();
        if overrides.iter().any(|(name, _)| name.is_empty()) {
            return Err(refused("--set", "a setting is given as NAME=VALUE".into()));
        }
        Ok(Self {
            file,
            variables,
            overrides,
        })
    }

    /// The config of all sources. An error names the source that brings it about.
    pub(super) fn config(&self) -> Result<Config> {
        let all = self.variables.len() + self.overrides.len();
        let reason = match self.config_of(all) {
            Ok(config) => return Ok(config),
            Err(reason) => reason,
        };
        // The first setting with which the same is wrong as with all of them.
        let wrong = |count: &usize| self.config_of(*count).is_err_and(|other| other == reason);
        let first = (0..all).find(wrong).unwrap_or(all);
        Err(refused(self.place(first), reason))
    }

    /// What is said to be wrong when the last of so many settings makes it so.
    fn place(&self, count: usize) -> String {
        let Some(last) = count.checked_sub(1) else {
            let file = self.file.as_ref().map(|(path, ..)| path.display().to_string());
            return file.unwrap_or_else(|| "the settings".into());
        };
        match self.variables.get(last) {
            Some((name, _)) => variable(name),
            // The name alone: a value may be a secret.
            None => format!("--set {}", self.overrides[last - self.variables.len()].0),
        }
    }

    /// The config of the file and of the first so many other settings, or what is wrong.
    fn config_of(&self, count: usize) -> Result<Config, String> {
        let document = self.document(count).map_err(|error| described(&error))?;
        document.registry.into_config()
    }

    fn document(&self, count: usize) -> Result<Document, config::ConfigError> {
        let mut builder = config::Config::builder();
        if let Some((_, file, paths)) = &self.file {
            builder = builder.add_source(file.clone()).add_source(paths.clone());
        }
        let (variables, overrides) = match count.checked_sub(self.variables.len()) {
            Some(overrides) => (&self.variables[..], &self.overrides[..overrides]),
            None => (&self.variables[..count], &self.overrides[..0]),
        };
        let variables = variables
            .iter()
            .map(|(name, value)| (name[VARIABLES.len()..].to_lowercase().replace("__", "."), value));
        let overrides = overrides.iter().map(|(name, value)| (name.clone(), value));
        for (name, value) in variables.chain(overrides) {
            let setting = format!("registry.{name}");
            // As text, whatever it looks like: a password may be a number, and a name begin with a zero.
            builder = match is_list(&name) {
                true => builder.set_override(setting, items(value))?,
                false => builder.set_override(setting, value.as_str())?,
            };
        }
        builder.build()?.try_deserialize()
    }
}

/// What is wrong, without the value: it may be a secret.
fn described(error: &config::ConfigError) -> String {
    use config::ConfigError;
    let for_key = |key: &Option<String>| key.as_ref().map_or_else(String::new, |key| format!(" for key `{key}`"));
    match error {
        ConfigError::Type {
            unexpected,
            expected,
            key,
            ..
        } => without_value(&format!("invalid type: {unexpected}, expected {expected}")) + &for_key(key),
        ConfigError::At { error, key, .. } => described(error) + &for_key(key),
        error => without_value(&error.to_string()),
    }
}

/// serde's message of a wrong type, such as `invalid type: string "secret", expected a boolean`, without what was found.
fn without_value(message: &str) -> String {
    let wrong_type = ["invalid type: ", "invalid value: "];
    match message.rsplit_once(", expected ") {
        Some((found, expected)) if wrong_type.iter().any(|begin| found.starts_with(begin)) => {
            let found = found.split(['"', '`']).next().unwrap_or_default().trim_end();
            format!("{found}, expected {expected}")
        }
        _ => message.to_owned(),
    }
}

/// Refuses TOML that can't be parsed, without the line itself: it may hold a secret.
fn parsed(toml: &str) -> Result<(), String> {
    let Err(error) = toml.parse::<toml::Table>() else {
        return Ok(());
    };
    let at = error.span().map_or(0, |span| span.start);
    let before = toml.get(..at).unwrap_or_default();
    let column = before.len() - before.rfind('\n').map_or(0, |end| end + 1) + 1;
    let line = before.matches('\n').count() + 1;
    Err(format!(
        "TOML parse error at line {line}, column {column}: {}",
        error.message()
    ))
}

fn variable(name: &str) -> String {
    format!("{name} in the environment")
}

fn is_list(setting: &str) -> bool {
    LISTS.contains(&setting)
}

/// The items of a list with commas, without the blanks around them.
fn items(list: &str) -> Vec<String> {
    list.split(',').map(|item| item.trim().to_owned()).collect()
}

fn read(path: &Path) -> Result<(&Path, File<FileSourceString, FileFormat>, config::Config)> {
    let text = std::fs::read_to_string(path).map_err(|e| refused(path.display(), format!("can't be read: {e}")))?;
    let format = format(path)?;
    if format == FileFormat::Yaml {
        shallow(&text).map_err(|reason| refused(path.display(), reason))?;
    }
    if format == FileFormat::Toml {
        parsed(&text).map_err(|reason| refused(path.display(), reason))?;
    }
    let file = File::from_str(&text, format);
    let paths = beside(path, &file).map_err(|error| refused(path.display(), described(&error)))?;
    Ok((path, file, paths))
}

/// The paths that a file gives, taken from the directory of the file: it means the same wherever a program is started.
fn beside(path: &Path, file: &File<FileSourceString, FileFormat>) -> Result<config::Config, config::ConfigError> {
    let given = config::Config::builder().add_source(file.clone()).build()?;
    let directory = path.parent().unwrap_or(Path::new(""));
    let mut builder = config::Config::builder();
    for name in PATHS.iter().map(|name| format!("registry.{name}")) {
        if let Ok(text) = given.get_string(&name)
            && text != MEMORY
        {
            builder = builder.set_override(name, directory.join(text).to_string_lossy().into_owned())?;
        }
    }
    builder.build()
}

fn format(path: &Path) -> Result<FileFormat> {
    match path.extension().and_then(|ending| ending.to_str()) {
        Some("toml") => Ok(FileFormat::Toml),
        Some("yaml" | "yml") => Ok(FileFormat::Yaml),
        Some("json") => Ok(FileFormat::Json),
        _ => Err(refused(
            path.display(),
            "a config file ends with .toml, .yaml, .yml or .json".into(),
        )),
    }
}

/// The columns by which a line of YAML may be indented.
const INDENT: usize = 128;

/// Refuses YAML whose blocks are nested so deep that its parser, which calls itself for each, would run out of stack: each
/// block begins further to the right than the one around it. Brackets, and the other formats, are bounded by their parsers.
fn shallow(yaml: &str) -> Result<(), String> {
    let indent = |line: &str| line.len() - line.trim_start_matches([' ', '\t', '-', '?', ':']).len();
    match yaml.lines().position(|line| indent(line) > INDENT) {
        Some(line) => Err(format!("line {} is indented by more than {INDENT} columns", line + 1)),
        None => Ok(()),
    }
}
