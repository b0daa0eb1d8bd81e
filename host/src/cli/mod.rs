//! The command line: the only module that reads arguments or prints.
//!
//! Standard output carries results, standard error everything else. Exit codes: 0 done, 1 failed, 2 wrong usage; a
//! closed standard output is 0.

mod args;
mod bench;
mod chat;
mod chooser;
mod dialogue;
mod doctor;
mod error;
mod generate;
mod inspect;
mod logits;
mod model;
mod perplexity;
mod plan;
mod screen;
mod session;
mod tokenize;

use std::io::{self, BufWriter, StdoutLock, Write};
use std::process::ExitCode;

use serde::Serialize;

use args::{Command, CommandLine};
use error::Error;

/// Runs the command that was typed.
pub fn main() -> ExitCode {
    let line = match CommandLine::read() {
        Ok(line) => line,
        Err(error) => {
            // Help goes to standard output, whose reader may have left: nothing to tell anybody then.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
        }
    };
    let result = match &line.command {
        Command::Generate(args) => generate::run(args),
        Command::Chat(args) => chat::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Tokenize(args) => tokenize::run(args),
        Command::Logits(args) => logits::run(args),
        Command::Perplexity(args) => perplexity::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Plan(args) => plan::run(args),
        Command::Doctor(args) => doctor::run(args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is_broken_pipe() => ExitCode::SUCCESS,
        Err(error) => {
            note(&error::one_line(&error));
            ExitCode::FAILURE
        }
    }
}

/// One line on standard error, under the program's name.
fn note(text: &str) {
    // Standard error may be closed; then there is nobody to tell.
    let _ = writeln!(io::stderr(), "gamma: {text}");
}

/// Standard output, whose errors are [`Error::Output`].
struct Out(BufWriter<StdoutLock<'static>>);

impl Out {
    fn new() -> Self {
        Self(BufWriter::new(io::stdout().lock()))
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.0.write_all(bytes).map_err(Error::Output)
    }

    fn line(&mut self, text: &str) -> Result<(), Error> {
        self.write(text.as_bytes())?;
        self.write(b"\n")
    }

    /// `value` as JSON on a line of its own.
    fn json(&mut self, value: &impl Serialize) -> Result<(), Error> {
        self.line(&serde_json::to_string(value).expect("no map has keys other than texts"))
    }

    fn flush(&mut self) -> Result<(), Error> {
        self.0.flush().map_err(Error::Output)
    }
}
