//! `gamma logits`: what the model makes of every position of a text, for comparison with other engines.

use std::fs::Permissions;
use std::io::{self, Write, stderr};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::json;
use tempfile::NamedTempFile;

use super::args::Logits;
use super::error::Error;
use super::model::{self, Model};
use super::{Out, session};

/// Runs the command.
pub fn run(args: &Logits) -> Result<(), Error> {
    let model = Model::open(&args.model, &args.engine, &args.device)?;
    let n_vocab = model.spec().n_vocab;
    let tokens = match &args.tokens_file {
        Some(path) => tokens_of(path, n_vocab)?,
        None => model.prompt_tokens(&model::prompt(&args.prompt)?, args.prompt.specials)?,
    };
    model.check_length(tokens.len())?;
    // Before the work, so that a wrong path costs none of it.
    let output = Output::create(&args.output)?;

    let stats = session::talks(args.stats);
    let mut engine = session::load(&model, &args.device, stats)?;
    let mut logits: Vec<u8> = Vec::with_capacity(tokens.len() * n_vocab * size_of::<f32>());
    let bar = session::bar("logits", "{pos}/{len} tokens");
    bar.set_length(tokens.len() as u64);
    let start = Instant::now();
    let mut each = |position: usize, row: &[f32]| {
        logits.extend(row.iter().flat_map(|logit| logit.to_le_bytes()));
        bar.set_position(position as u64 + 1);
    };
    engine.prefill_all(&tokens, &mut each).map_err(|error| model.engine_error(error))?;
    bar.finish_and_clear();
    if stats && let Some(rate) = session::rate(tokens.len(), start.elapsed().as_secs_f64()) {
        let _ = writeln!(stderr(), "{} tokens, {rate:.1} tokens/s", tokens.len());
    }

    // Ids are below the vocabulary's size, which the adapter keeps in 31 bits.
    let ids: Vec<u8> = tokens.iter().flat_map(|id| id.to_le_bytes()).collect();
    output.write([
        ("tokens", Dtype::I32, vec![tokens.len()], &ids),
        ("logits", Dtype::F32, vec![tokens.len(), n_vocab], &logits),
    ])?;
    if args.json {
        let mut out = Out::new();
        let path = args.output.to_string_lossy();
        out.json(&json!({"output": path, "n_tokens": tokens.len(), "n_vocab": n_vocab}))?;
        out.flush()?;
    }
    Ok(())
}

fn tokens_of(path: &Path, n_vocab: usize) -> Result<Vec<u32>, Error> {
    let path = path.to_owned();
    let tokens: Vec<u32> = match serde_json::from_slice(&model::read(&path)?) {
        Ok(tokens) => tokens,
        Err(source) => return Err(Error::TokensFile { path, source }),
    };
    match tokens.iter().position(|&id| id as usize >= n_vocab) {
        _ if tokens.is_empty() => Err(Error::NoTokens { path }),
        Some(idx) => Err(Error::TokenOutsideVocabulary { path, id: tokens[idx], idx, n_vocab }),
        None => Ok(tokens),
    }
}

/// A file to be: written under another name and moved to its own when complete; gone if that never happens.
struct Output {
    path: PathBuf,
    part: NamedTempFile,
}

impl Output {
    fn create(path: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Io { path: path.to_owned(), source };
        if path.is_dir() {
            return Err(failed(io::ErrorKind::IsADirectory.into()));
        }
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        // As for any new file: the umask decides.
        let permissions = Permissions::from_mode(0o666);
        let part = tempfile::Builder::new().permissions(permissions).tempfile_in(folder).map_err(failed)?;
        Ok(Self { path: path.to_owned(), part })
    }

    fn write<const N: usize>(self, tensors: [(&str, Dtype, Vec<usize>, &[u8]); N]) -> Result<(), Error> {
        let Self { path, part } = self;
        let views = tensors.map(|(name, dtype, shape, bytes)| {
            (name, TensorView::new(dtype, shape, bytes).expect("as many bytes as the shape says"))
        });
        if let Err(source) = safetensors::serialize_to_file(views, None, part.path()) {
            return Err(Error::Safetensors { path, source });
        }
        match part.persist(&path) {
            Ok(_) => Ok(()),
            Err(error) => Err(Error::Io { path, source: error.error }),
        }
    }
}
