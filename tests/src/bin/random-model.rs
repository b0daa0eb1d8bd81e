//! `random-model SHAPE OUT.gguf`: see `gamma_tests::random_model`. Exit 0: done; 1: not written; 2: wrong usage.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use gamma_tests::random_model::{MAX_LAYERS, NAMES, RandomModel};
use lexopt::{Arg, Parser, ValueExt};

const USAGE: &str = "\
USAGE:
  random-model SHAPE OUT.gguf [OPTIONS]   write a model of SHAPE with random weights

SHAPES:
  gpt2, gpt2-medium, gpt2-large, gpt2-xl  in the types of llama.cpp's Q4_K_M
  gpt-oss-20b                             experts MXFP4, the rest Q8_0

OPTIONS:
      --layers N    so many layers [default: as published]
  -s, --seed N      same shape and seed: same file [default: 0]
";

fn main() -> ExitCode {
    let arguments = match parse(Parser::from_env()) {
        Ok(Some(arguments)) => arguments,
        Ok(None) => {
            print!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("random-model: {error}\n\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let Arguments { model, path, seed } = arguments;
    let (start, megabytes) = (Instant::now(), model.n_bytes() as f64 / 1e6);
    match model.write(&path, seed) {
        Ok(()) => {
            println!("{}: {megabytes:.1} MB in {:.1} s", path.display(), start.elapsed().as_secs_f64());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("random-model: {}: {error}; the file takes {megabytes:.1} MB", path.display());
            ExitCode::FAILURE
        }
    }
}

struct Arguments {
    model: RandomModel,
    path: PathBuf,
    seed: u64,
}

/// `None` if help was asked for.
fn parse(mut parser: Parser) -> Result<Option<Arguments>, lexopt::Error> {
    let (mut shape, mut path, mut n_layer, mut seed) = (None, None, None, 0);
    while let Some(argument) = parser.next()? {
        match argument {
            Arg::Short('h') | Arg::Long("help") => return Ok(None),
            Arg::Long("layers") => n_layer = Some(layers(&parser.value()?.string()?)?),
            Arg::Short('s') | Arg::Long("seed") => seed = parser.value()?.parse()?,
            Arg::Value(value) if shape.is_none() => shape = Some(value.string()?),
            Arg::Value(value) if path.is_none() => path = Some(PathBuf::from(value)),
            argument => return Err(argument.unexpected()),
        }
    }
    let shape = shape.ok_or("SHAPE is missing")?;
    let model = RandomModel::published(&shape, n_layer)
        .ok_or_else(|| format!("SHAPE is '{shape}', expected one of {}", NAMES.join(", ")))?;
    Ok(Some(Arguments { model, path: path.ok_or("OUT.gguf is missing")?, seed }))
}

fn layers(value: &str) -> Result<usize, String> {
    match value.parse() {
        Ok(n_layer @ 1..=MAX_LAYERS) => Ok(n_layer),
        _ => Err(format!("--layers: '{value}' is out of range; expected 1 to {MAX_LAYERS}")),
    }
}
