//! Mutation testing of the safety argument: applies each mutant of `registry-tests/mutants` to a copy of the workspace and
//! runs the test that must fail. Called by `scripts/mutants`.

#[path = "../../tests/mutants/mutant.rs"]
mod mutant;

use std::collections::BTreeSet;
use std::fmt::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};
use std::{env, fs, io};

use mutant::Mutant;

/// A test that takes longer with a mutant than this waits for what the mutant prevents.
const TIMEOUT: Duration = Duration::from_secs(300);
/// The part of the page that is replaced by the table.
const TABLE: (&str, &str) = ("<!-- mutants: begin -->\n", "<!-- mutants: end -->");

/// What became of a mutant.
#[derive(Clone, Copy, PartialEq)]
enum Verdict {
    Killed,
    /// The test did not end.
    TimedOut,
    /// The test passed, or no test ran.
    Survived,
    /// It proves nothing.
    DoesNotCompile,
}

fn main() -> ExitCode {
    let mut only = Vec::new();
    let mut write = false;
    for argument in env::args().skip(1) {
        match argument.as_str() {
            "--bench" => {}
            "--write" => write = true,
            part => only.push(part.to_owned()),
        }
    }
    let is_wanted = |mutant: &Mutant| {
        let parts = [&mutant.name, &mutant.file, &mutant.guarantee];
        only.is_empty() || only.iter().any(|part| parts.iter().any(|text| text.contains(part)))
    };
    let mutants: Vec<Mutant> = mutant::all().into_iter().filter(is_wanted).collect();
    match run(&mutants, write && only.is_empty()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("mutants: {error}");
            ExitCode::from(2)
        }
    }
}

/// Runs all; `false` if one survived that is not known to.
fn run(mutants: &[Mutant], write: bool) -> io::Result<bool> {
    let work = mutant::root().join("target/mutants");
    let tree = work.join("tree");
    fs::create_dir_all(&tree)?;
    let mut table = String::from("| mutant | guarantee | killed by |\n| --- | --- | --- |\n");
    let mut survivors = Vec::new();
    for (number, mutant) in mutants.iter().enumerate() {
        copy(&tree)?;
        let began = Instant::now();
        let verdict = match &mutant.survives {
            Some(_) => Verdict::Survived,
            None => judge(mutant, &tree, &work.join("target"))?,
        };
        let said = match (verdict, &mutant.survives) {
            (Verdict::Killed, _) => format!("`{}`", mutant.test),
            (Verdict::TimedOut, _) => format!("`{}`, which does not end", mutant.test),
            (Verdict::Survived, Some(reason)) => format!("no test: {reason}"),
            (Verdict::Survived, None) => "NO TEST".to_owned(),
            (Verdict::DoesNotCompile, _) => "nothing: IT DOES NOT COMPILE".to_owned(),
        };
        println!(
            "{}/{} {} ({}): {said}, {} s",
            number + 1,
            mutants.len(),
            mutant.name,
            mutant.guarantee,
            began.elapsed().as_secs()
        );
        let _ = writeln!(table, "| {} | {} | {said} |", mutant.name, mutant.guarantee);
        let is_fine = matches!(verdict, Verdict::Killed | Verdict::TimedOut) || mutant.survives.is_some();
        if !is_fine {
            survivors.push(mutant.name.as_str());
        }
    }
    copy(&tree)?;
    println!(
        "{} mutants, of which {} survived: {}",
        mutants.len(),
        survivors.len(),
        survivors.join(" ")
    );
    if write {
        publish(&mutant::root().join("docs/verification.md"), &table)?;
    }
    Ok(survivors.is_empty() && !mutants.is_empty())
}

/// Makes the copy what the workspace is now. Only files that differ are written, so that only they are compiled again.
fn copy(tree: &Path) -> io::Result<()> {
    let listed = Command::new("git")
        .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .current_dir(mutant::root())
        .output()?;
    let listed = String::from_utf8_lossy(&listed.stdout);
    let names: BTreeSet<&Path> = listed.split_terminator('\0').map(Path::new).collect();
    remove_others(tree, tree, &names)?;
    for name in names {
        let Ok(wanted) = fs::read(mutant::root().join(name)) else {
            continue;
        };
        let to = tree.join(name);
        if fs::read(&to).is_ok_and(|present| present == wanted) {
            continue;
        }
        fs::create_dir_all(to.parent().expect("a file lies in a folder"))?;
        fs::copy(mutant::root().join(name), to)?;
    }
    Ok(())
}

/// Removes what the workspace has no more: cargo would compile it.
fn remove_others(folder: &Path, tree: &Path, names: &BTreeSet<&Path>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            remove_others(&path, tree, names)?;
        } else if !path.strip_prefix(tree).is_ok_and(|name| names.contains(name)) {
            fs::remove_file(path)?;
        }
    }
    Ok(())
}

fn judge(mutant: &Mutant, tree: &Path, target: &Path) -> io::Result<Verdict> {
    let file = tree.join(&mutant.file);
    let edited = mutant.apply(&fs::read_to_string(&file)?).map_err(io::Error::other)?;
    fs::write(&file, edited)?;
    let cargo = |more: &[&str]| {
        let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command
            .args(["test", "--quiet", "--locked"])
            .args(more)
            .args(mutant.test.split_whitespace())
            .current_dir(tree)
            .env("CARGO_TARGET_DIR", target)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command
    };
    let compiled = cargo(&["--no-run"]).stderr(Stdio::piped()).output()?;
    if !compiled.status.success() {
        eprintln!("{}", String::from_utf8_lossy(&compiled.stderr));
        return Ok(Verdict::DoesNotCompile);
    }
    // A group of its own, so that a test that hangs is ended with the servers that it started.
    let mut test = cargo(&[]).process_group(0).spawn()?;
    let began = Instant::now();
    loop {
        if let Some(status) = test.try_wait()? {
            return Ok(if status.success() {
                Verdict::Survived
            } else {
                Verdict::Killed
            });
        }
        if began.elapsed() > TIMEOUT {
            if let Some(group) = rustix::process::Pid::from_raw(test.id().cast_signed()) {
                let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
            }
            test.wait()?;
            return Ok(Verdict::TimedOut);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Replaces the page's table.
fn publish(page: &Path, table: &str) -> io::Result<()> {
    let text = fs::read_to_string(page)?;
    let part = text
        .split_once(TABLE.0)
        .and_then(|(before, rest)| Some((before, rest.split_once(TABLE.1)?.1)));
    let Some((before, after)) = part else {
        return Err(io::Error::other(format!(
            "{} has no place for the table",
            page.display()
        )));
    };
    fs::write(page, format!("{before}{}{table}{}{after}", TABLE.0, TABLE.1))
}
