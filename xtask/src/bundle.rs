//! `cargo xtask bundle`: one folder that runs the tests and benches on a GPU host which has no Rust.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::process::{self, Error, at};
use crate::workspace;

/// What such a host may have to be sent at most.
const MOST_BYTES: u64 = 60_000_000;

const RUN: &str = include_str!("bundle.sh");

/// What to gather: both together are larger than such a folder may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contents {
    /// Kernel and model tests, their models, `gamma`, and `random-model`.
    Tests,
    /// Benches, and the models that those of the engine time.
    Benches,
}

/// Builds what runs on a GPU in release and gathers it in `bundle/`, whose former contents go.
///
/// # Errors
///
/// - [`Error::Step`] or [`Error::Program`] if something does not build or cannot be stripped or compressed.
/// - [`Error::Found`] if there is no executable, or the folder is larger than 60 MB.
pub fn make(what: Contents) -> Result<(), Error> {
    let folder = workspace::root().join("bundle");
    if folder.exists() {
        fs::remove_dir_all(&folder).map_err(at(&folder))?;
    }
    let executables = match what {
        Contents::Tests => {
            let targets = "test --release --no-run --package gamma-tests --test kernels --test models";
            let mut tests = executables("tests", targets)?;
            // Cargo builds a package's programs for its tests.
            tests.retain(|executable| executable.is_test);
            copy_stripped(&tests, &folder.join("tests"))?;
            pack(&tests, &folder.join("tests"))?;
            copy_stripped(&executables("gamma", "build --release --bin gamma")?, &folder)?;
            // Larger models than a bundle may hold are made where they are measured.
            let targets = "build --release --package gamma-tests --bin random-model";
            copy_stripped(&executables("random-model", targets)?, &folder)?;
            copy_models(&folder.join("models"), is_wanted_model)?;
            tests
        }
        Contents::Benches => {
            let benches = executables("benches", "bench --no-run --package gamma-benches --benches")?;
            copy_stripped(&benches, &folder.join("benches"))?;
            copy_models(&folder.join("models"), |name| is_wanted_model(name) && name.ends_with(".gguf"))?;
            benches
        }
    };
    if executables.is_empty() {
        return Err(Error::Found("cargo named no executable".into()));
    }
    let script = folder.join("run.sh");
    fs::write(&script, RUN).map_err(at(&script))?;
    make_executable(&script)?;

    let bytes = size(&folder)?;
    let megabytes = bytes as f64 / 1e6;
    println!("{}: {megabytes:.1} MB, {} executables", folder.display(), executables.len());
    if bytes > MOST_BYTES {
        let most = MOST_BYTES / 1_000_000;
        return Err(Error::Found(format!("{} has {megabytes:.1} MB; expected {most} at most", folder.display())));
    }
    Ok(())
}

/// An executable and the name of its cargo target.
struct Executable {
    name: String,
    /// A test or a program.
    is_test: bool,
    path: PathBuf,
}

/// Runs cargo with `arguments` and returns the executables it reports.
fn executables(name: &'static str, arguments: &str) -> Result<Vec<Executable>, Error> {
    let mut command = workspace::cargo(arguments);
    command.arg("--message-format=json-render-diagnostics").stdout(Stdio::piped());
    let failure = |error: std::io::Error| Error::Program { command: arguments.to_owned(), reason: error.to_string() };
    let output = command.spawn().and_then(|child| child.wait_with_output()).map_err(failure)?;
    if !output.status.success() {
        return Err(Error::Step { name, repeat: process::shown(&workspace::cargo(arguments)) });
    }
    let messages = String::from_utf8_lossy(&output.stdout);
    Ok(messages.lines().filter_map(executable).collect())
}

/// The executable that a line of cargo's messages announces, if it does.
fn executable(message: &str) -> Option<Executable> {
    let message: Value = serde_json::from_str(message).ok()?;
    if message["reason"] != "compiler-artifact" {
        return None;
    }
    let (name, path) = (message["target"]["name"].as_str()?, message["executable"].as_str()?);
    // The unit tests of a package's library have nothing to do on a GPU.
    let is = |wanted| message["target"]["kind"].as_array().is_some_and(|kinds| kinds.iter().any(|kind| kind == wanted));
    (!is("lib")).then(|| Executable { name: name.to_owned(), is_test: is("test"), path: path.into() })
}

fn copy_stripped(executables: &[Executable], folder: &Path) -> Result<(), Error> {
    fs::create_dir_all(folder).map_err(at(folder))?;
    for Executable { name, path, .. } in executables {
        let mut strip = Command::new("strip");
        process::output(strip.arg("-o").arg(folder.join(name)).arg(path), Duration::from_secs(60))?;
    }
    Ok(())
}

/// Replaces the copies in `folder` by compressed ones, half the size; `run.sh` unpacks them.
fn pack(executables: &[Executable], folder: &Path) -> Result<(), Error> {
    for Executable { name, .. } in executables {
        process::output(Command::new("gzip").arg("-n").arg(folder.join(name)), Duration::from_secs(60))?;
    }
    Ok(())
}

/// Copies the wanted files of `models/`.
fn copy_models(folder: &Path, is_wanted: impl Fn(&str) -> bool) -> Result<(), Error> {
    fs::create_dir_all(folder).map_err(at(folder))?;
    let models = workspace::root().join("models");
    for entry in fs::read_dir(&models).map_err(at(&models))? {
        let entry = entry.map_err(at(&models))?;
        let name = entry.file_name();
        if name.to_str().is_some_and(&is_wanted) {
            fs::copy(entry.path(), folder.join(&name)).map_err(at(&entry.path()))?;
        }
    }
    Ok(())
}

/// What tests read: the models, their reference logits and tokenizers, but not the f16 originals.
fn is_wanted_model(name: &str) -> bool {
    name.ends_with(".gguf") && !name.ends_with("-f16.gguf")
        || name.ends_with(".reference.safetensors")
        || name.ends_with(".tokenizer.json")
}

fn make_executable(path: &Path) -> Result<(), Error> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).map_err(at(path))
}

/// The bytes of all files below `folder`.
fn size(folder: &Path) -> Result<u64, Error> {
    let mut bytes = 0;
    for entry in fs::read_dir(folder).map_err(at(folder))? {
        let entry = entry.map_err(at(folder))?;
        let metadata = entry.metadata().map_err(at(&entry.path()))?;
        bytes += if metadata.is_dir() { size(&entry.path())? } else { metadata.len() };
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn executables_are_found_among_cargo_s_messages() {
        let message = |kind: &str, executable: &str| {
            format!(
                r#"{{"reason":"compiler-artifact","target":{{"kind":["{kind}"],"name":"gguf"}},"executable":{executable}}}"#
            )
        };
        let found = executable(&message("test", r#""/t/gguf-0123""#)).expect("it is an executable");
        assert_eq!((found.name.as_str(), found.is_test, found.path), ("gguf", true, PathBuf::from("/t/gguf-0123")));
        assert!(!executable(&message("bin", r#""/t/gamma""#)).expect("it is an executable").is_test);
        for other in [message("test", "null"), message("lib", r#""/t/x""#), r#"{"reason":"build-finished"}"#.into()] {
            assert!(executable(&other).is_none(), "{other}");
        }
    }

    #[test]
    fn f16_originals_stay_behind() {
        let wanted = ["tiny-gpt2-q4_k_m.gguf", "tiny-gpt2-mxfp4.reference.safetensors", "tiny-gpt2.tokenizer.json"];
        assert!(wanted.into_iter().all(is_wanted_model));
        assert!(!["tiny-gpt2-f16.gguf", "README.md"].into_iter().any(is_wanted_model));
    }
}
