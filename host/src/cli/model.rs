//! A model as the commands need it: file, tokenizer, description.

use std::fs;
use std::io::{IsTerminal, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, Instant};

use gpt_gamma::adapter::{self, GptInferenceAdapter, InferenceAdapter, ModelSpec};
use gpt_gamma::engine::{self, MemoryPlan, Options};
use gpt_gamma::model_file::ModelFile;
use gpt_gamma::tokenizer::{Tokenizer, Vocabulary};

use super::args::{DeviceArgs, EngineArgs, ModelArgs, PromptArgs};
use super::error::Error;
use super::session::Opening;

/// What runs without `-m`.
static BUNDLED: &[u8] = include_bytes!("../../../models/tiny-gpt-oss-mxfp4.gguf");

/// Opens the file that `args` name, or the bundled model.
pub fn open(args: &ModelArgs) -> Result<ModelFile, Error> {
    Ok(match &args.model {
        Some(path) => ModelFile::open(path)?,
        None => ModelFile::from_static(BUNDLED)?,
    })
}

/// What to call `file` in messages.
pub fn name(file: &ModelFile) -> String {
    file.path().display().to_string()
}

/// What the engine has against `file`.
pub fn engine_error(file: &ModelFile, source: engine::Error) -> Error {
    Error::Engine { file: name(file), source }
}

/// The tokenizer in `--tokenizer`, or else in `file`.
pub fn tokenizer(args: &ModelArgs, file: &ModelFile) -> Result<Tokenizer, Error> {
    let in_gguf = |source| Error::Vocabulary { file: name(file), source };
    let (source, vocabulary) = match &args.tokenizer {
        None => (name(file), Vocabulary::from_metadata(file.metadata()).map_err(in_gguf)?),
        Some(path) => {
            let source = path.display().to_string();
            let refused = |error| Error::Tokenizer { file: source.clone(), source: error };
            let mut vocabulary = Vocabulary::from_json(&read(path)?, None, None).map_err(refused)?;
            // The file does not say which tokens begin and end a text, the GGUF's metadata does.
            vocabulary.name_specials(file.metadata()).map_err(in_gguf)?;
            (source, vocabulary)
        }
    };
    Tokenizer::from_vocabulary(vocabulary).map_err(|error| Error::Tokenizer { file: source, source: error })
}

/// What there is to compute, if this engine can.
pub fn describe(file: &ModelFile) -> Result<GptInferenceAdapter, Error> {
    // Whatever else such a file has or lacks, this is what its owner wants to know.
    if file.tensors().is_empty() {
        return Err(Error::NoTensors { file: name(file) });
    }
    adapter::detect(file.metadata(), file.tensors()).map_err(|source| Error::Adapter { file: name(file), source })
}

/// The engine's options, checked against the model, and the memory they take.
pub fn options(args: &EngineArgs, file: &ModelFile, spec: &ModelSpec) -> Result<(Options, MemoryPlan), Error> {
    let mut options = Options::for_model(spec);
    if args.ctx_size > 0 {
        options.n_ctx = args.ctx_size;
    }
    options.n_batch = args.batch_size;
    options.kv = args.kv.into();
    options.gelu = args.gelu.into();
    options.yarn_truncate = args.yarn_truncate;
    let plan = MemoryPlan::new(spec, file.tensors(), &options).map_err(|source| engine_error(file, source))?;
    Ok((options, plan))
}

/// A model that is to compute something, with its tokenizer.
pub struct Model {
    pub file: ModelFile,
    pub tokenizer: Tokenizer,
    pub adapter: GptInferenceAdapter,
    pub options: Options,
    pub plan: MemoryPlan,
    /// The device that it is to run on.
    pub device: Opening,
    pub times: OpenTimes,
}

/// When opening a model began, and how long its parts took.
pub struct OpenTimes {
    pub begin: Instant,
    pub file: Duration,
    pub tokenizer: Duration,
}

impl Model {
    /// Opens and checks everything that takes no device, and lets the device open meanwhile.
    pub fn open(args: &ModelArgs, engine: &EngineArgs, device: &DeviceArgs) -> Result<Self, Error> {
        let begin = Instant::now();
        let file = open(args)?;
        let adapter = describe(&file)?;
        let (options, plan) = options(engine, &file, adapter.spec())?;
        let file_time = begin.elapsed();
        let device = Opening::start(device);
        let tokenizer = tokenizer(args, &file)?;
        let times = OpenTimes { begin, file: file_time, tokenizer: begin.elapsed() - file_time };
        let (found, expected) = (tokenizer.n_vocab(), adapter.spec().n_vocab);
        if found > expected {
            let file = args.tokenizer.as_deref().map_or_else(|| name(&file), |path| path.display().to_string());
            return Err(Error::TokenizerTooLarge { file, found, expected });
        }
        Ok(Self { file, tokenizer, adapter, options, plan, device, times })
    }

    /// What the engine says, about this model.
    pub fn engine_error(&self, source: engine::Error) -> Error {
        engine_error(&self.file, source)
    }

    pub fn spec(&self) -> &ModelSpec {
        self.adapter.spec()
    }

    /// The ids of `prompt` behind the beginning token, if the model wants one; that token alone for an empty prompt.
    pub fn prompt_tokens(&self, prompt: &[u8], specials: bool) -> Result<Vec<u32>, Error> {
        let mut tokens = Vec::new();
        if self.tokenizer.adds_bos() || prompt.is_empty() {
            tokens.extend(self.tokenizer.bos());
        }
        tokens.extend(encode(&self.tokenizer, prompt, specials, "prompt")?);
        if tokens.is_empty() { Err(Error::EmptyPrompt) } else { Ok(tokens) }
    }

    /// What to say when the context is full; `then` is what that led to.
    pub fn context_full(&self, then: &str) -> String {
        let (n_ctx, most) = (self.options.n_ctx, self.spec().n_ctx);
        let advice = if n_ctx < most { format!("; -c allows up to {most}") } else { String::new() };
        format!("context of {n_ctx} tokens is full: {then}{advice}")
    }

    /// Refuses more tokens than the context holds, before anything is loaded.
    pub fn check_length(&self, n_tokens: usize) -> Result<(), Error> {
        let (n_ctx, most) = (self.options.n_ctx, self.spec().n_ctx);
        if n_tokens <= n_ctx {
            return Ok(());
        }
        let advice = if n_ctx < most { "; -c makes it larger" } else { ", all that the model was made for" };
        Err(Error::PromptTooLong { n_tokens, n_ctx, advice })
    }
}

/// The ids of `text`, which messages call `what`.
pub fn encode(tokenizer: &Tokenizer, text: &[u8], specials: bool, what: &'static str) -> Result<Vec<u32>, Error> {
    if specials {
        let text = str::from_utf8(text).map_err(|_| Error::SpecialsNotUtf8 { what })?;
        return Ok(tokenizer.encode_with_specials(text));
    }
    Ok(tokenizer.encode_bytes(text))
}

/// The bytes of the prompt: from `-p`, `-f`, or standard input if it is no terminal.
pub fn prompt(args: &PromptArgs) -> Result<Vec<u8>, Error> {
    match (&args.prompt, &args.file) {
        (Some(text), _) => Ok(text.as_bytes().to_vec()),
        (None, Some(path)) => read(path),
        (None, None) if std::io::stdin().is_terminal() => Err(Error::NoPrompt),
        (None, None) => standard_input(),
    }
}

/// All of standard input.
pub fn standard_input() -> Result<Vec<u8>, Error> {
    let mut bytes = Vec::new();
    std::io::stdin().lock().read_to_end(&mut bytes).map_err(Error::Input)?;
    Ok(bytes)
}

/// All of a file.
pub fn read(path: &Path) -> Result<Vec<u8>, Error> {
    fs::read(path).map_err(|source| Error::Io { path: path.to_owned(), source })
}
