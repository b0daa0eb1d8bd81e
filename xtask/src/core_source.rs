//! Makes sure that the source of `core` for exactly this rustc is there: device code is compiled together with it.
//!
//! It is looked for where `cuda_builder` looks, in the same order: the toolchain's `rust-src` component,
//! `$RUST_SRC_PATH`, and the cache. Where it is nowhere, rustup is asked first and Debian's archive second.

use std::env;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::debian;
use crate::process::{self, Error, at};
use crate::workspace;

/// Long enough for 3 MB on a slow line, short enough to wait for where there is none.
const RUSTUP_LIMIT: Duration = Duration::from_secs(60);

/// Finds or fetches the source, and returns the `library` folder.
///
/// # Errors
///
/// [`Error::Found`] if it is nowhere and cannot be fetched, naming every way and why it failed, or if `$RUST_SRC_PATH`
/// is set and does not hold it.
pub fn setup() -> Result<PathBuf, Error> {
    let version = rustc_version()?;
    let component = PathBuf::from(workspace::rustc(&["--print", "sysroot"])?).join("lib/rustlib/src/rust/library");
    let cached = workspace::cache()?.join(format!("rust-src-{version}"));
    if let Some(library) = find(&component, env::var_os("RUST_SRC_PATH").map(PathBuf::from), &cached, &version)? {
        return Ok(library);
    }

    eprintln!("fetching the source of core {version} with rustup");
    let rustup = match add_component() {
        Ok(()) if is_library(&component) => return Ok(component),
        Ok(()) => format!("rustup reports success, but {} has no core/Cargo.toml", component.display()),
        Err(error) => error.to_string(),
    };
    eprintln!("fetching the source of core {version} from Debian's archive, since rustup could not");
    let debian = match fill(&cached, &version) {
        Ok(()) => return Ok(cached.join("library")),
        Err(error) => error,
    };
    Err(Error::Found(format!(
        "the source of core {version} is missing; any of these provides it:\n  \
         rustup component add rust-src\n    tried: {rustup}\n  \
         a Debian mirror among apt's sources, with rust-src {version} in {suite}\n    tried: {debian}\n  \
         RUST_SRC_PATH, set to the `library` folder of rustc {version}'s source\n    not set",
        suite = debian::SUITE,
    )))
}

/// The `library` folder among the three places it may be in.
fn find(
    component: &Path,
    rust_src_path: Option<PathBuf>,
    cached: &Path,
    version: &str,
) -> Result<Option<PathBuf>, Error> {
    if is_library(component) {
        return Ok(Some(component.to_owned()));
    }
    if let Some(path) = rust_src_path {
        if is_library(&path) {
            return Ok(Some(path));
        }
        let found = format!("RUST_SRC_PATH: no core/Cargo.toml in {}; expected a `library` folder", path.display());
        return Err(Error::Found(found));
    }
    let library = cached.join("library");
    let complete = is_library(&library) && marker(cached).is_ok_and(|marker| marker.trim() == version);
    Ok(complete.then_some(library))
}

fn is_library(folder: &Path) -> bool {
    folder.join("core/Cargo.toml").is_file()
}

/// The version that a complete cache folder says it holds.
fn marker(cached: &Path) -> io::Result<String> {
    fs::read_to_string(cached.join("version"))
}

/// rustc's release, as `1.95.0`.
fn rustc_version() -> Result<String, Error> {
    let text = workspace::rustc(&["-vV"])?;
    let release = text.lines().find_map(|line| line.strip_prefix("release: "));
    release.map(str::to_owned).ok_or_else(|| Error::Found(format!("`rustc -vV` names no release: {text}")))
}

fn add_component() -> Result<(), Error> {
    let mut command = Command::new("rustup");
    // Without a toolchain named, rustup takes the one of this folder, which is the one that builds here. Its retries
    // would make a machine without a network wait for minutes.
    command.current_dir(workspace::root()).args(["component", "add", "rust-src"]).env("RUSTUP_MAX_RETRIES", "0");
    process::output(&mut command, RUSTUP_LIMIT)?;
    Ok(())
}

/// Fills the cache from Debian. The folder appears under its name only when it is complete.
fn fill(cached: &Path, version: &str) -> Result<(), Error> {
    let partial = cached.with_extension(format!("partial-{}", std::process::id()));
    let filled = fill_partial(&partial, cached, version);
    // Gone already if it was renamed; otherwise the error that matters is the one above.
    let _ = fs::remove_dir_all(&partial);
    filled
}

fn fill_partial(partial: &Path, cached: &Path, version: &str) -> Result<(), Error> {
    fs::create_dir_all(partial).map_err(at(partial))?;
    let source = debian::rust_src(version, partial)?;
    let complete = partial.join("complete");
    fs::create_dir(&complete).map_err(at(&complete))?;
    fs::rename(source.join("library"), complete.join("library")).map_err(at(&source))?;
    let marker = complete.join("version");
    fs::write(&marker, format!("{version}\n")).map_err(at(&marker))?;
    if cached.exists() {
        // Incomplete, or it would have been found.
        fs::remove_dir_all(cached).map_err(at(cached))?;
    }
    fs::rename(&complete, cached).map_err(at(cached))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_component_comes_before_the_variable_and_the_cache() {
        let folder = Scratch::new("order");
        let (component, variable, cached) = (folder.library("component"), folder.library("variable"), folder.cached());
        let found = |component: &Path, variable: Option<&PathBuf>| {
            find(component, variable.cloned(), &cached, "1.95.0").expect("all are well formed")
        };
        assert_eq!(found(&component, Some(&variable)), Some(component.clone()));
        fs::remove_dir_all(&component).expect("it is there");
        assert_eq!(found(&component, Some(&variable)), Some(variable));
        assert_eq!(found(&component, None), Some(cached.join("library")));
    }

    #[test]
    fn a_cache_of_another_version_or_cut_short_does_not_count() {
        let folder = Scratch::new("cache");
        let (nowhere, cached) = (folder.0.join("nowhere"), folder.cached());
        assert_eq!(find(&nowhere, None, &cached, "1.96.0").expect("no variable is set"), None);
        fs::remove_file(cached.join("version")).expect("it is there");
        assert_eq!(find(&nowhere, None, &cached, "1.95.0").expect("no variable is set"), None);
    }

    #[test]
    fn a_variable_that_points_elsewhere_is_an_error() {
        let folder = Scratch::new("variable");
        let error = find(&folder.0.join("nowhere"), Some(folder.0.clone()), &folder.cached(), "1.95.0");
        let text = error.expect_err("it holds no core").to_string();
        assert!(text.starts_with("RUST_SRC_PATH: no core/Cargo.toml in "), "{text}");
    }

    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let folder = env::temp_dir().join(format!("xtask-core-source-{name}-{}", std::process::id()));
            fs::create_dir_all(&folder).expect("the temporary folder is writable");
            Self(folder)
        }

        fn library(&self, name: &str) -> PathBuf {
            let library = self.0.join(name);
            fs::create_dir_all(library.join("core")).expect("the temporary folder is writable");
            fs::write(library.join("core/Cargo.toml"), "").expect("it still is");
            library
        }

        /// A complete cache of 1.95.0.
        fn cached(&self) -> PathBuf {
            self.library("cached/library");
            fs::write(self.0.join("cached/version"), "1.95.0\n").expect("the temporary folder is writable");
            self.0.join("cached")
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).expect("this test made it");
        }
    }
}
