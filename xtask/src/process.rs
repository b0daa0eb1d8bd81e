//! Starts other programs, and says which failed and how to repeat it.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// Why a task failed.
#[derive(Debug)]
pub enum Error {
    /// A program of ours said so itself, on standard error.
    Step {
        /// The step's name.
        name: &'static str,
        /// What to type to see it fail again.
        repeat: String,
    },
    /// A program failed without having shown why.
    Program {
        /// What was started.
        command: String,
        /// Its exit status and its last words, or why it did not start.
        reason: String,
    },
    /// A file could not be read or written.
    File {
        /// Which.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// Something is not as it must be; the text names it and the next step.
    Found(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Error::Step { name, repeat } => write!(f, "{name} failed; repeat it with `{repeat}`"),
            Error::Program { command, reason } => write!(f, "`{command}`: {reason}"),
            Error::File { path, source } => write!(f, "{}: {source}", path.display()),
            Error::Found(text) => f.write_str(text),
        }
    }
}

/// Makes an [`Error::File`] about `path`.
pub fn at(path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_path_buf();
    move |source| Error::File { path, source }
}

/// Runs `command` with our own terminal.
///
/// # Errors
///
/// [`Error::Step`] if it fails; [`Error::Program`] if it does not start.
pub fn step(name: &'static str, command: &mut Command) -> Result<(), Error> {
    match command.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(_) => Err(Error::Step { name, repeat: shown(command) }),
        Err(error) => Err(Error::Program { command: shown(command), reason: error.to_string() }),
    }
}

/// Runs `command` and returns what it wrote to standard output and standard error.
///
/// # Errors
///
/// [`Error::Program`] if it does not start, fails, or takes longer than `limit` and is stopped.
pub fn output(command: &mut Command, limit: Duration) -> Result<(String, String), Error> {
    let command_line = shown(command);
    let failure = |reason: String| Error::Program { command: command_line, reason };
    let (status, stdout, stderr) = match limited(command, limit) {
        Ok(Some(Output { status, stdout, stderr })) => (status, stdout, stderr),
        Ok(None) => return Err(failure(format!("stopped after {} s without an end", limit.as_secs()))),
        Err(error) => return Err(failure(error.to_string())),
    };
    let (stdout, stderr) = (text(stdout), text(stderr));
    if status.success() {
        return Ok((stdout, stderr));
    }
    let last = stderr.trim_end().lines().rev().take(3).collect::<Vec<_>>();
    let last = last.into_iter().rev().collect::<Vec<_>>().join("; ");
    Err(failure(if last.is_empty() { status.to_string() } else { format!("{status}: {last}") }))
}

/// Runs `command` to its end, or kills it after `limit` and returns nothing.
fn limited(command: &mut Command, limit: Duration) -> io::Result<Option<Output>> {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    // Both pipes are drained meanwhile, or a talkative child would wait for room for ever.
    let stdout = child.stdout.take().map(drain);
    let stderr = child.stderr.take().map(drain);
    let end = Instant::now() + limit;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if Instant::now() >= end {
            child.kill()?;
            child.wait()?;
            // Its own children may hold the pipes open; the readers end with this process.
            return Ok(None);
        }
        thread::sleep(Duration::from_millis(20));
    };
    let join = |reader: Option<thread::JoinHandle<Vec<u8>>>| {
        reader.map(|reader| reader.join().expect("the reader does not panic")).unwrap_or_default()
    };
    Ok(Some(Output { status, stdout: join(stdout), stderr: join(stderr) }))
}

fn drain(mut pipe: impl io::Read + Send + 'static) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        // A pipe that breaks ends the text; the exit status tells the rest.
        let _ = pipe.read_to_end(&mut bytes);
        bytes
    })
}

fn text(bytes: Vec<u8>) -> String {
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The command as one would type it, with the variables it sets.
pub fn shown(command: &Command) -> String {
    let variables = command
        .get_envs()
        .filter_map(|(name, value)| Some(format!("{}={}", name.to_string_lossy(), quoted(&value?.to_string_lossy()))));
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    variables.chain(words.map(|word| quoted(&word.to_string_lossy()))).collect::<Vec<_>>().join(" ")
}

fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,+@*".contains(c);
    if !word.is_empty() && word.chars().all(plain) { word.to_owned() } else { format!("'{word}'") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_does_not_end_is_stopped() {
        let start = Instant::now();
        let error = output(Command::new("sleep").arg("60"), Duration::from_millis(200)).expect_err("it is stopped");
        assert!(matches!(&error, Error::Program { reason, .. } if reason.contains("stopped after")), "{error}");
        assert!(start.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn a_failure_brings_the_last_words() {
        let script = "echo first >&2; echo last >&2; exit 3";
        let error = output(Command::new("sh").args(["-c", script]), Duration::from_secs(60)).expect_err("it fails");
        let text = error.to_string();
        assert!(text.starts_with(&format!("`sh -c '{script}'`: ")) && text.ends_with("3: first; last"), "{text}");
    }

    #[test]
    fn more_output_than_a_pipe_holds_is_read() {
        let mut command = Command::new("sh");
        command.args(["-c", "head -c 1000000 /dev/zero | tr '\\0' x; head -c 1000000 /dev/zero >&2"]);
        let (stdout, stderr) = output(&mut command, Duration::from_secs(60)).expect("it succeeds");
        assert_eq!((stdout.len(), stderr.len()), (1_000_000, 1_000_000));
    }

    #[test]
    fn commands_are_shown_as_typed() {
        let mut command = Command::new("cargo");
        command.args(["doc", "a b", ""]).env("RUSTDOCFLAGS", "-D warnings");
        assert_eq!(shown(&command), "RUSTDOCFLAGS='-D warnings' cargo doc 'a b' ''");
    }
}
