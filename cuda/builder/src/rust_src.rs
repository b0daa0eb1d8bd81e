//! Finds the source of `core`, which a device build compiles.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs, io};

use crate::Error;

/// The `library` folder of exactly the running rustc's version: the toolchain's `rust-src` component, else
/// `$RUST_SRC_PATH`, else the cache that `cargo xtask setup` fills.
///
/// # Errors
///
/// - [`Error::NoRustSrc`] if none of the three is there; it names them.
/// - [`Error::Start`] if rustc cannot be run.
pub fn find_rust_src() -> Result<PathBuf, Error> {
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let ask = |argument: &[&str]| {
        let output = Command::new(&rustc).args(argument).output();
        output
            .and_then(|output| String::from_utf8(output.stdout).map_err(io::Error::other))
            .map_err(|source| Error::Start { program: rustc.to_string_lossy().into_owned(), source })
    };
    let sysroot = ask(&["--print", "sysroot"])?;
    let version = ask(&["--version"])?.split(' ').nth(1).unwrap_or_default().trim().to_owned();

    let toolchain = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library");
    let variable = env::var_os("RUST_SRC_PATH").map(PathBuf::from);
    let cache = rust_src_cache(&version).map(|folder| folder.join("library"));
    let shown = |path: &Option<PathBuf>| path.as_ref().map_or("not set".to_owned(), |path| path.display().to_string());
    let error = Error::NoRustSrc {
        version,
        toolchain: toolchain.display().to_string(),
        variable: shown(&variable),
        cache: shown(&cache),
    };
    [Some(toolchain), variable, cache]
        .into_iter()
        .flatten()
        .find(|library| library.join("core/Cargo.toml").is_file())
        .and_then(|library| fs::canonicalize(library).ok())
        .ok_or(error)
}

/// Where `cargo xtask setup` keeps Rust's source of this version: `$XDG_CACHE_HOME`, or `~/.cache`, and
/// `gpt-gamma/rust-src-VERSION`; it holds `library`.
pub fn rust_src_cache(version: &str) -> Option<PathBuf> {
    let base = env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .or_else(|| env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")))?;
    Some(base.join("gpt-gamma").join(format!("rust-src-{version}")))
}
