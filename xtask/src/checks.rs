//! `cargo xtask test`: everything that can be checked without a GPU, in the order in which it fails soonest.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::audit;
use crate::core_source;
use crate::process::{self, Error};
use crate::workspace;

/// Runs every step; with `quick`, all but the two that take long and seldom fail: `cargo doc` and ptxas.
///
/// # Errors
///
/// The first step's that fails.
pub fn run(quick: bool) -> Result<(), Error> {
    let start = Instant::now();
    let mut steps = Steps { done: 0 };
    steps.run("setup", || core_source::setup().map(drop))?;
    steps.cargo("fmt", "fmt --all --check")?;
    steps.cargo("clippy", "clippy --workspace --all-targets -- -D warnings")?;
    // With the tests: without, cargo takes dependencies with fewer features, and builds nearly everything twice.
    steps.cargo("build", "build --workspace --bins --tests")?;
    steps.run("libcuda", gamma_starts_without_libcuda)?;
    steps.run("interface", || audit::interface(false))?;
    steps.run("test", || {
        // Of the tests of the command line: they would build it with yet other features.
        let gamma = workspace::target().join("debug/gamma");
        process::step("test", workspace::cargo("test --workspace").env("GAMMA_BIN", gamma))
    })?;
    if !quick {
        steps.run("doc", || {
            process::step("doc", workspace::cargo("doc --workspace --no-deps").env("RUSTDOCFLAGS", "-D warnings"))
        })?;
        steps.run("ptxas", audit::assembled)?;
    }
    let left_out = if quick { "; doc and ptxas left out" } else { "" };
    eprintln!("xtask: {} steps passed in {:.0} s{left_out}", steps.done, start.elapsed().as_secs_f64());
    Ok(())
}

struct Steps {
    done: u32,
}

impl Steps {
    fn cargo(&mut self, name: &'static str, arguments: &str) -> Result<(), Error> {
        self.run(name, || process::step(name, &mut workspace::cargo(arguments)))
    }

    fn run(&mut self, name: &'static str, step: impl FnOnce() -> Result<(), Error>) -> Result<(), Error> {
        let start = Instant::now();
        eprintln!("xtask: {name}");
        step().map_err(|error| match error {
            Error::Found(text) => Error::Found(format!("{name} failed:\n{text}")),
            other => other,
        })?;
        self.done += 1;
        eprintln!("xtask: {name} passed in {:.1} s", start.elapsed().as_secs_f64());
        Ok(())
    }
}

/// The binary must start where there is no driver: the loader must not ask for `libcuda`.
fn gamma_starts_without_libcuda() -> Result<(), Error> {
    let gamma = workspace::target().join("debug/gamma");
    let (needed, _) = process::output(Command::new("ldd").arg(&gamma), Duration::from_secs(60))?;
    check_needed(&gamma, &needed)
}

fn check_needed(binary: &Path, needed: &str) -> Result<(), Error> {
    match needed.lines().find(|line| line.contains("libcuda")) {
        None => Ok(()),
        Some(line) => Err(Error::Found(format!(
            "{} needs {}; expected none: cuda_loader supplies the driver's functions",
            binary.display(),
            line.trim()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_binary_that_needs_libcuda_is_refused() {
        let libc = "\tlinux-vdso.so.1 (0x0)\n\tlibc.so.6 => /lib/libc.so.6 (0x0)\n";
        assert!(check_needed(Path::new("gamma"), libc).is_ok());
        let error = check_needed(Path::new("gamma"), &format!("{libc}\tlibcuda.so.1 => not found\n"));
        assert!(
            error.expect_err("it needs the driver").to_string().starts_with("gamma needs libcuda.so.1 => not found")
        );
    }
}
