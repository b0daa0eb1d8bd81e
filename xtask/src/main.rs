//! The project's chores: `cargo xtask setup | run | test | audit | bundle | plot | random-model`.
//!
//! Progress and errors go to standard error; standard output carries tables and what `run` runs. Exit 0: done; 1: a
//! step failed; 2: wrong usage; `run` and `random-model` pass on their program's.

mod audit;
mod bundle;
mod checks;
mod core_source;
mod debian;
mod plot;
mod process;
mod ptx;
mod ptxas;
mod record;
mod workspace;

use std::ffi::OsString;
use std::process::ExitCode;

use lexopt::{Arg, Parser};
use process::Error;

const USAGE: &str = "\
USAGE:
  cargo xtask setup              find or fetch the source of core, which device code is compiled with
  cargo xtask run [-- ARGS]      setup, build gamma in release and run it with ARGS
  cargo xtask test [--quick]     setup, then everything that needs no GPU; --quick leaves out docs and ptxas
  cargo xtask audit [--bless]    assemble the PTX and compare it with docs/; --bless writes docs/ anew
  cargo xtask bundle [--benches] gather tests, models and gamma, or the benches, for a GPU host without Rust
  cargo xtask plot               draw what benches/record/ holds, as SVG beside it
  cargo xtask random-model SHAPE OUT.gguf [--layers N] [--seed N]
                                 write a published model's shapes and types with random weights; SHAPE is gpt2,
                                 gpt2-medium, gpt2-large, gpt2-xl or gpt-oss-20b
";

fn main() -> ExitCode {
    match parse(Parser::from_env()).map(Task::perform) {
        Ok(Ok(code)) => code,
        Ok(Err(error)) => {
            eprintln!("xtask: {error}");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("xtask: {error}\n\n{USAGE}");
            ExitCode::from(2)
        }
    }
}

enum Task {
    Help,
    Setup,
    Run { arguments: Vec<OsString> },
    Test { quick: bool },
    Audit { bless: bool },
    Bundle { what: bundle::Contents },
    Plot,
    RandomModel { arguments: Vec<OsString> },
}

impl Task {
    fn perform(self) -> Result<ExitCode, Error> {
        match self {
            Task::Help => print!("{USAGE}"),
            Task::Setup => {
                let source = core_source::setup()?;
                eprintln!("core's source: {}", source.display());
            }
            Task::Run { arguments } => {
                core_source::setup()?;
                return workspace::run("gpt-gamma", "gamma", arguments);
            }
            Task::Test { quick } => checks::run(quick)?,
            Task::Audit { bless } => {
                core_source::setup()?;
                workspace::build()?;
                audit::interface(bless)?;
                audit::assembled()?;
            }
            Task::Bundle { what } => {
                core_source::setup()?;
                bundle::make(what)?;
            }
            Task::Plot => plot::draw_records(&workspace::root().join("benches/record"))?,
            Task::RandomModel { arguments } => {
                core_source::setup()?;
                return workspace::run("gamma-tests", "random-model", arguments);
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn parse(mut parser: Parser) -> Result<Task, lexopt::Error> {
    let mut task = match parser.next()? {
        None | Some(Arg::Short('h') | Arg::Long("help")) => return Ok(Task::Help),
        Some(Arg::Value(name)) => match name.to_str() {
            Some("setup") => Task::Setup,
            Some("run") => return passed_on(parser).map(|arguments| Task::Run { arguments }),
            Some("random-model") => return passed_on(parser).map(|arguments| Task::RandomModel { arguments }),
            Some("test") => Task::Test { quick: false },
            Some("audit") => Task::Audit { bless: false },
            Some("plot") => Task::Plot,
            Some("bundle") => Task::Bundle { what: bundle::Contents::Tests },
            _ => return Err(format!("unknown task '{}'", name.display()).into()),
        },
        Some(argument) => return Err(argument.unexpected()),
    };
    while let Some(argument) = parser.next()? {
        match (argument, &mut task) {
            (Arg::Short('h') | Arg::Long("help"), _) => return Ok(Task::Help),
            (Arg::Long("quick"), Task::Test { quick }) => *quick = true,
            (Arg::Long("bless"), Task::Audit { bless }) => *bless = true,
            (Arg::Long("benches"), Task::Bundle { what }) => *what = bundle::Contents::Benches,
            (argument, _) => return Err(argument.unexpected()),
        }
    }
    Ok(task)
}

/// Everything after the task, less a `--` in front.
fn passed_on(mut parser: Parser) -> Result<Vec<OsString>, lexopt::Error> {
    let mut arguments: Vec<OsString> = parser.raw_args()?.collect();
    if arguments.first().is_some_and(|first| first == "--") {
        arguments.remove(0);
    }
    Ok(arguments)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn run_passes_every_argument_on() {
        for line in [&["run", "--", "-p", "--", "text"][..], &["run", "-p", "--", "text"]] {
            let Ok(Task::Run { arguments }) = parse(Parser::from_args(line)) else {
                panic!("{line:?} is not taken as run");
            };
            assert_eq!(arguments, ["-p", "--", "text"]);
        }
    }

    #[test]
    fn random_model_checks_its_arguments_itself() {
        let line = ["random-model", "gpt2", "--help", "--layers", "x"];
        let Ok(Task::RandomModel { arguments }) = parse(Parser::from_args(line)) else {
            panic!("{line:?} is not taken as random-model");
        };
        assert_eq!(arguments, line[1..]);
    }

    #[test]
    fn flags_belong_to_their_task() {
        assert!(matches!(parse(Parser::from_args(["test", "--quick"])), Ok(Task::Test { quick: true })));
        assert!(matches!(parse(Parser::from_args(["audit", "--bless"])), Ok(Task::Audit { bless: true })));
        for line in [&["setup", "--quick"][..], &["test", "--bless"], &["tests"], &["--quick"], &["bundle", "x"]] {
            assert!(parse(Parser::from_args(line)).is_err(), "{line:?}");
        }
    }
}
