//! Finds and runs the executable.

use std::ffi::OsStr;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::{env, thread};

/// What a run left behind.
pub struct Run {
    pub code: i32,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

impl Run {
    /// Asserts exit code 0 and returns the output.
    #[track_caller]
    pub fn succeeded(self) -> Vec<u8> {
        assert_eq!(self.code, 0, "{}", self.stderr);
        self.stdout
    }

    /// As [`succeeded`](Self::succeeded), as text.
    #[track_caller]
    pub fn text(self) -> String {
        String::from_utf8(self.succeeded()).unwrap()
    }

    /// As [`succeeded`](Self::succeeded), a JSON value per line.
    #[track_caller]
    pub fn json(self) -> Vec<serde_json::Value> {
        let text = self.text();
        assert!(text.ends_with('\n'), "the last line is not complete: {text}");
        text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect()
    }

    /// Asserts exit code 1 and one line on standard error, and returns that without `gamma: `.
    #[track_caller]
    pub fn refused(self) -> String {
        assert_eq!(self.code, 1, "{}", self.stderr);
        let line = self.stderr.strip_suffix('\n').unwrap_or_else(|| panic!("no whole line: {:?}", self.stderr));
        assert!(!line.contains('\n'), "more than one line: {line}");
        line.strip_prefix("gamma: ").unwrap_or_else(|| panic!("{line}")).to_owned()
    }
}

/// A process that is not started yet, with the standard streams piped.
pub fn command<I: AsRef<OsStr>>(args: impl IntoIterator<Item = I>) -> Command {
    let mut command = Command::new(executable());
    // Neither the terminal that the tests run in nor a GPU is to make a difference.
    command.args(args).env_remove("COLUMNS").env("CUDA_VISIBLE_DEVICES", "");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Runs with nothing on standard input.
#[track_caller]
pub fn gamma<I: AsRef<OsStr>>(args: impl IntoIterator<Item = I>) -> Run {
    finish(command(args).spawn().unwrap())
}

/// Runs with `input` on standard input.
#[track_caller]
pub fn gamma_with_input<I: AsRef<OsStr>>(args: impl IntoIterator<Item = I>, input: &[u8]) -> Run {
    let mut child = command(args).stdin(Stdio::piped()).spawn().unwrap();
    let (mut stdin, input) = (child.stdin.take().unwrap(), input.to_vec());
    // From another thread: output that nobody reads yet may fill its pipe.
    let writer = thread::spawn(move || stdin.write_all(&input));
    let run = finish(child);
    writer.join().unwrap().unwrap();
    run
}

/// Runs `gamma generate` in the emulator with these arguments.
#[track_caller]
pub fn generate(args: &[&str]) -> Run {
    gamma(["generate", "--device", "cpu"].iter().chain(args))
}

/// Waits for the end.
#[track_caller]
pub fn finish(child: Child) -> Run {
    let output = child.wait_with_output().unwrap();
    Run {
        code: output.status.code().unwrap_or_else(|| panic!("{}", output.status)),
        stdout: output.stdout,
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// `$GAMMA_BIN`; else what cargo builds now beside this test; else, where there is no build folder, the executable in
/// the folder above, as `cargo xtask bundle` lays it out.
fn executable() -> &'static Path {
    static EXECUTABLE: OnceLock<PathBuf> = OnceLock::new();
    EXECUTABLE.get_or_init(|| {
        if let Some(path) = env::var_os("GAMMA_BIN") {
            return path.into();
        }
        // TARGET_DIR/PROFILE/deps/cli-HASH
        let test = env::current_exe().unwrap();
        let folder = test.parent().unwrap();
        let path = folder.parent().unwrap().join("gamma");
        if folder.file_name() == Some(OsStr::new("deps")) {
            build(folder.parent().unwrap());
        }
        assert!(path.is_file(), "{} is missing; GAMMA_BIN can name another", path.display());
        path
    })
}

/// Builds the executable into `profile`, the folder that this test was built into. A test cannot have cargo do so:
/// `CARGO_BIN_EXE_gamma` exists for tests of the executable's own package only.
fn build(profile: &Path) {
    let name = profile.file_name().unwrap().to_str().unwrap();
    let name = if name == "debug" { "dev" } else { name };
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.current_dir(env!("CARGO_MANIFEST_DIR")).args([
        "build",
        "--quiet",
        "--package",
        "gpt-gamma",
        "--bin",
        "gamma",
    ]);
    command.args(["--profile", name, "--target-dir"]).arg(profile.parent().unwrap());
    let status = command.status().unwrap_or_else(|error| panic!("cargo does not start: {error}; set GAMMA_BIN"));
    assert!(status.success(), "gamma does not build: {status}");
}
