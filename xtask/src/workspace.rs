//! Where things are, and the cargo of this toolchain.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use crate::process::{self, Error};

/// The architectures that kernels are compiled for.
pub const ARCHITECTURES: [&str; 2] = ["sm_80", "sm_90a"];

/// The repository.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask is a folder of the repository")
}

/// Cargo's output folder.
pub fn target() -> PathBuf {
    match env::var_os("CARGO_TARGET_DIR") {
        // Cargo takes a relative one from where it is started, and so does `absolute`.
        Some(folder) if !folder.is_empty() => std::path::absolute(&folder).unwrap_or_else(|_| folder.into()),
        _ => root().join("target"),
    }
}

/// The PTX that the last build wrote for `architecture`.
pub fn ptx(architecture: &str) -> PathBuf {
    target().join("ptx").join(format!("kernels-{architecture}.ptx"))
}

/// Where fetched things are kept: `$XDG_CACHE_HOME` or `~/.cache`, then `gpt-gamma`.
///
/// # Errors
///
/// [`Error::Found`] if neither variable is an absolute path.
pub fn cache() -> Result<PathBuf, Error> {
    // A relative path is invalid here and ignored, says the XDG base directory specification; cuda_builder does the same.
    let absolute = |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let base = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")));
    match base {
        Some(base) => Ok(base.join("gpt-gamma")),
        None => Err(Error::Found("no folder for downloads: set HOME or XDG_CACHE_HOME to an absolute path".into())),
    }
}

/// Cargo with `arguments` (split at spaces), in the repository.
pub fn cargo(arguments: &str) -> Command {
    // The plain name, not `$CARGO`: the command is shown for repeating, and rustup picks the same toolchain by it.
    let mut command = Command::new("cargo");
    command.current_dir(root()).args(arguments.split(' '));
    command
}

/// Builds the whole workspace, and with it the PTX of every architecture.
///
/// # Errors
///
/// As [`process::step`].
pub fn build() -> Result<(), Error> {
    process::step("build", &mut cargo("build --workspace"))
}

/// Builds `program` of `package` in release and becomes it; returns only if it cannot be started.
///
/// # Errors
///
/// [`Error::Step`] if it does not build, [`Error::Program`] if it does not start.
pub fn run(package: &str, program: &str, arguments: Vec<OsString>) -> Result<ExitCode, Error> {
    use std::os::unix::process::CommandExt;
    process::step("build", &mut cargo(&format!("build --release --package {package} --bin {program}")))?;
    // Replacing this process passes on exit codes, signals and terminal as they are. The working directory stays the
    // user's, so that relative paths mean what they say.
    let mut command = Command::new(target().join("release").join(program));
    let error = command.args(arguments).exec();
    Err(Error::Program { command: process::shown(&command), reason: error.to_string() })
}

/// What rustc says when asked with `arguments`, trimmed.
///
/// # Errors
///
/// As [`process::output`].
pub fn rustc(arguments: &[&str]) -> Result<String, Error> {
    let mut command = Command::new("rustc");
    let (stdout, _) = process::output(command.current_dir(root()).args(arguments), Duration::from_secs(60))?;
    Ok(stdout.trim().to_owned())
}
