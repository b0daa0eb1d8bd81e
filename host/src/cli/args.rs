//! What can be typed: names, values and help texts. Names are llama.cpp's where it has one.
//!
//! Values out of range are refused here and never clamped; what depends on a model is checked once its file is open.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use gpt_gamma::chat::Reasoning;
use gpt_gamma::device::PtxBuild;
use gpt_gamma::engine::{Gelu, KvType};
use gpt_gamma::sampler::SamplerOptions;

/// Runs GPT models from GGUF files on one NVIDIA GPU.
///
/// Every line of code that runs on the GPU is Rust. Where there is no GPU, the same kernels run, slowly, in an emulator
/// on the CPU.
#[derive(Debug, Parser)]
#[command(name = "gamma", version, max_term_width = 100, after_help = AFTER_HELP, after_long_help = AFTER_LONG_HELP)]
pub struct CommandLine {
    #[command(subcommand)]
    pub command: Command,
}

const AFTER_HELP: &str = "`gamma COMMAND --help` tells more.";
const AFTER_LONG_HELP: &str = "\
Standard output carries results only; progress, timings and errors go to standard error. Without -m, the tiny model \
bundled into the executable runs.

Exit codes: 0 done, 1 the run failed, 2 wrong usage. A closed pipe is no failure.";

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Continue a prompt
    ///
    /// Prints the prompt and what the model makes of it, byte for byte what the tokens decode to, as it is generated.
    /// Stops where the model ends its text, at a reverse prompt, after -n tokens, or when the context is full. Ctrl-C
    /// ends the text early; a second one ends the program at once.
    Generate(Box<Generate>),
    /// Talk with a model
    ///
    /// Reads a message per line from the terminal or standard input, and prints what the model answers as it is written.
    /// Models whose vocabulary has the markers of harmony, such as gpt-oss, are talked to in that format, others by the
    /// chat template in their file. Whatever a message says is text: it cannot contain control tokens.
    ///
    /// A line that begins with / is a command; /help lists them. Ctrl-C ends the answer; Ctrl-D ends the chat.
    Chat(Box<Chat>),
    /// Print what is in a model file; needs no GPU
    ///
    /// Metadata, tensors, sizes by type, whether this engine can run it, and its tokenizer. Works on every GGUF file that
    /// can be read, vocabulary-only files and unsupported architectures included.
    Inspect(Inspect),
    /// Print token ids, one per line; needs no GPU
    ///
    /// Takes TEXT, or standard input byte for byte, and adds neither a beginning nor an end token. Needs the vocabulary
    /// only, so it works on files without tensors.
    Tokenize(Tokenize),
    /// Write the logits of every position of a text to a file
    ///
    /// Writes a safetensors file with `tokens` (i32, T) and `logits` (f32, T × V): row t follows from tokens 0 to t.
    Logits(Logits),
    /// Measure how well a model predicts a text
    ///
    /// As llama-perplexity: the text's tokens are cut into windows of -c tokens, each is read from an empty context, and
    /// the tokens of its second half are scored. What does not fill a window is left out. Prints `PPL = x +/- y`; y is
    /// the standard error. Running values go to standard error.
    #[command(mut_arg("ctx_size", |arg| arg.default_value("512").help("Tokens per window; 0 takes all that the model was made for")))]
    Perplexity(Perplexity),
    /// Measure how fast a model runs
    ///
    /// As llama-bench: a test ppN reads a prompt of N tokens, a test tgN generates N tokens one by one; `@ dD` means behind
    /// D tokens that are there already. Tokens are random, others each time, and drawn from the whole vocabulary; every token
    /// generated is waited for, and so is what the model makes of it. Each test runs once untimed, then -r times.
    ///
    /// Beside the speed stands what a generated token makes the memory move: all weights that it uses, of experts only its
    /// own, and the keys and values before it; and the share that this is of what the same memory was measured to read at
    /// best when the tests were done. The emulator has no such share, and says nothing about a GPU's speed.
    Bench(Bench),
    /// Print how much memory a model takes, and whether it fits
    ///
    /// The same plan that is made before a model is loaded; nothing is loaded here, and no GPU is needed. Exits with 1 if
    /// the model does not fit the budget: the device's free memory, --vram-limit, or the smaller if both are known.
    Plan(Plan),
    /// Check driver, devices and kernels
    ///
    /// Tells which driver and devices there are, which build of the kernels they would run, whether those load and give
    /// the right result, and what to do where something is missing. Exits with 0 if models can run, be it in the
    /// emulator.
    Doctor(Doctor),
}

#[derive(Debug, Args)]
pub struct Generate {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub prompt: PromptArgs,
    /// Tokens to generate; -1 goes on until the text ends or the context is full
    #[arg(short, long, value_name = "N", default_value = "-1", value_parser = minus_one_or::<usize>, allow_negative_numbers = true)]
    pub n_predict: OrMinusOne<usize>,
    /// Stop once the generated text has this in it; may be given several times
    ///
    /// Matched against the bytes of the generated text only, not against the prompt, and across tokens.
    #[arg(short, long, value_name = "TEXT", allow_hyphen_values = true)]
    pub reverse_prompt: Vec<OsString>,
    /// Leave the prompt out of the output
    #[arg(long)]
    pub no_display_prompt: bool,
    /// Take the prompt as a message of a chat, and print the answer only
    ///
    /// What the model thinks goes to standard error if that is a terminal, or with --stats. With --json every token, the
    /// one that ends the answer included, tells its `channel`, null outside of messages, and `text` leaves out what only
    /// marks messages. Text that is left when no more tokens come is {"type":"rest","text","channel"}.
    #[arg(long, conflicts_with_all = ["specials", "reverse_prompt"], help_heading = "Chat")]
    pub chat: bool,
    #[command(flatten)]
    pub instructions: ChatArgs,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    #[command(flatten)]
    pub engine: EngineArgs,
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Print one JSON object per line: every token, then how it ended
    ///
    /// Tokens: {"type":"token","id","bytes","text","logprob","top"}. `bytes` are the token's own; `text` is what became
    /// certain with it, whole characters only, and may be empty; `logprob` is the natural logarithm of the probability
    /// that the model gave it, before temperature, penalties and filters. Last comes {"type":"finish","reason",...} with
    /// reason stop, length, context, reverse-prompt or interrupt. The prompt is not printed.
    #[arg(long, help_heading = "Output")]
    pub json: bool,
    /// List the K likeliest tokens at every position; needs --json
    #[arg(long, value_name = "K", default_value_t = 0, requires = "json", help_heading = "Output")]
    pub top_logprobs: u32,
    /// Print memory plan and speed to standard error
    ///
    /// On by itself where standard error is a terminal.
    #[arg(short = 'v', long, visible_alias = "verbose", help_heading = "Output")]
    pub stats: bool,
}

#[derive(Debug, Args)]
pub struct Chat {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Tokens to generate per answer; -1 goes on until it ends or the context is full
    #[arg(short, long, help_heading = "Chat", value_name = "N", default_value = "-1", value_parser = minus_one_or::<usize>, allow_negative_numbers = true)]
    pub n_predict: OrMinusOne<usize>,
    #[command(flatten)]
    pub instructions: ChatArgs,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    #[command(flatten)]
    pub engine: EngineArgs,
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Do not print what the model thinks
    #[arg(long, help_heading = "Output", conflicts_with = "raw")]
    pub hide_analysis: bool,
    /// Print all tokens as they are, control tokens included
    #[arg(long, help_heading = "Output")]
    pub raw: bool,
    /// Print memory plan, and speed after every answer, to standard error
    #[arg(short = 'v', long, visible_alias = "verbose", help_heading = "Output")]
    pub stats: bool,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Chat")]
pub struct ChatArgs {
    /// Instructions to the model, before the first message
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub system: Option<String>,
    /// How long the model is to think, if it can
    #[arg(long, value_name = "EFFORT", default_value = "medium")]
    pub reasoning: Effort,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Effort {
    Low,
    Medium,
    High,
}

impl From<Effort> for Reasoning {
    fn from(effort: Effort) -> Self {
        match effort {
            Effort::Low => Self::Low,
            Effort::Medium => Self::Medium,
            Effort::High => Self::High,
        }
    }
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Model")]
pub struct ModelArgs {
    /// GGUF file, or the first file of a split model [default: the bundled tiny gpt-oss]
    #[arg(short, long, value_name = "FILE")]
    pub model: Option<PathBuf>,
    /// Hugging Face tokenizer.json to use in place of the file's own vocabulary
    ///
    /// Beginning and end tokens remain those that the GGUF file names by id.
    #[arg(long, value_name = "FILE")]
    pub tokenizer: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Text")]
pub struct PromptArgs {
    /// The text [default: standard input, unless it is a terminal]
    ///
    /// Taken as it is, without escapes; need not be UTF-8. An empty prompt starts from the model's beginning token.
    #[arg(short, long, value_name = "TEXT", allow_hyphen_values = true, conflicts_with = "file")]
    pub prompt: Option<OsString>,
    /// Read the text from a file, byte for byte
    #[arg(short, long, value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// Let control tokens such as <|endoftext|> in the text be control tokens
    ///
    /// Without it they are ordinary characters: a text from elsewhere cannot steer the model.
    #[arg(long)]
    pub specials: bool,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArgs {
    /// Seed of the random choice; -1 takes one from the system
    ///
    /// The same seed, model, device and options give the same text.
    #[arg(short, long, value_name = "N", default_value = "-1", value_parser = minus_one_or::<u64>, allow_negative_numbers = true)]
    pub seed: OrMinusOne<u64>,
    /// Temperature; 0 takes the likeliest token
    #[arg(long, value_name = "X", default_value_t = 0.8, allow_negative_numbers = true)]
    pub temp: f32,
    /// Choose among the K likeliest tokens; 0 among all
    #[arg(long, value_name = "K", default_value_t = 40, allow_negative_numbers = true)]
    pub top_k: u32,
    /// Choose among the fewest tokens with probability P together; 1 among all
    #[arg(long, value_name = "P", default_value_t = 0.95, allow_negative_numbers = true)]
    pub top_p: f32,
    /// Leave out tokens less than P times as likely as the likeliest; 0 none
    #[arg(long, value_name = "P", default_value_t = 0.05, allow_negative_numbers = true)]
    pub min_p: f32,
    /// Divide the logits of repeated tokens by this (multiply negative ones); 1 is off
    #[arg(long, value_name = "X", default_value_t = 1.0, allow_negative_numbers = true)]
    pub repeat_penalty: f32,
    /// How many of the last tokens count as repeated; 0 none, -1 all
    #[arg(long, value_name = "N", default_value = "64", value_parser = minus_one_or::<u32>, allow_negative_numbers = true)]
    pub repeat_last_n: OrMinusOne<u32>,
    /// Subtract this from the logits of repeated tokens; 0 is off
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_negative_numbers = true)]
    pub presence_penalty: f32,
    /// Subtract this from the logits of repeated tokens for every time they occur; 0 is off
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_negative_numbers = true)]
    pub frequency_penalty: f32,
    /// Add BIAS to the logit of token ID, as in 262+1.5 or 262-1.5; 262-inf bans it
    ///
    /// May be given several times; biases of one token add up.
    #[arg(short, long, value_name = "ID(+|-)BIAS", value_parser = logit_bias)]
    pub logit_bias: Vec<(u32, f32)>,
    /// Never choose a token that ends the text
    #[arg(long)]
    pub ignore_eos: bool,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Engine")]
pub struct EngineArgs {
    /// Tokens of prompt and continuation together; 0 takes all that the model was made for
    #[arg(short, long, value_name = "N", default_value_t = 0, allow_negative_numbers = true)]
    pub ctx_size: usize,
    /// Prompt tokens to process at once
    #[arg(short, long, value_name = "N", default_value = "512", value_parser = batch_size, allow_negative_numbers = true)]
    pub batch_size: usize,
    /// Type of the KV cache
    #[arg(long, value_name = "TYPE", default_value = "f16")]
    pub kv: Kv,
    /// Form of GELU; GPT-2 checkpoints by OpenAI were trained with tanh
    ///
    /// `exact` is x · Φ(x), by the error function; `tanh` is the approximation that Hugging Face calls gelu_new. No GGUF
    /// file says which one its model wants.
    #[arg(long, value_name = "FORM", default_value = "exact")]
    pub gelu: GeluForm,
    /// Round the bounds of YaRN to whole dimensions, as llama.cpp does
    ///
    /// gpt-oss was trained without. For comparing with llama.cpp; models without YaRN do not mind.
    #[arg(long)]
    pub yarn_truncate: bool,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Device")]
pub struct DeviceArgs {
    /// Where to run
    ///
    /// `auto` takes the GPU if there is a driver and a device, and else says so and takes the emulator; `cuda` fails where
    /// there is none; `cpu` takes the emulator. --gpu and --ptx turn auto into cuda.
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: DeviceChoice,
    /// Number of the GPU, as the driver counts [default: 0]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub gpu: Option<u32>,
    /// Build of the kernels: sm_80 or sm_90a [default: what suits the GPU]
    #[arg(long, value_name = "BUILD", value_parser = ptx_build)]
    pub ptx: Option<PtxBuild>,
    /// Behave as if the device had only so much memory, as in 24GiB
    ///
    /// KiB, MiB, GiB count in powers of 1024, KB, MB, GB in powers of 1000; a number alone is bytes.
    #[arg(long, value_name = "SIZE", value_parser = memory_size, allow_negative_numbers = true)]
    pub vram_limit: Option<u64>,
}

#[derive(Debug, Args)]
pub struct Inspect {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Print one JSON object
    ///
    /// Arrays are given as their length and first elements.
    #[arg(long, help_heading = "Output")]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct Tokenize {
    /// The text [default: standard input]
    pub text: Option<OsString>,
    #[command(flatten)]
    pub model: ModelArgs,
    /// Let control tokens such as <|endoftext|> in the text be control tokens
    #[arg(long, help_heading = "Text")]
    pub specials: bool,
    /// Print one JSON object per token: its id, bytes, text if they are UTF-8, and kind
    #[arg(long, help_heading = "Output")]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct Logits {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub prompt: PromptArgs,
    /// Take the ids from a JSON array instead of tokenizing a text
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompt", "file", "specials"])]
    pub tokens_file: Option<PathBuf>,
    /// Safetensors file to write
    #[arg(short, long, value_name = "FILE", help_heading = "Output")]
    pub output: PathBuf,
    #[command(flatten)]
    pub engine: EngineArgs,
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Print one JSON object on what was written
    #[arg(long, help_heading = "Output")]
    pub json: bool,
    /// Print memory plan and speed to standard error
    #[arg(short = 'v', long, visible_alias = "verbose", help_heading = "Output")]
    pub stats: bool,
}

#[derive(Debug, Args)]
pub struct Perplexity {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub prompt: PromptArgs,
    /// Score the first K windows only; -1 scores all
    #[arg(long, value_name = "K", default_value = "-1", value_parser = minus_one_or::<usize>, allow_negative_numbers = true)]
    pub chunks: OrMinusOne<usize>,
    #[command(flatten)]
    pub engine: EngineArgs,
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Print one JSON object
    ///
    /// {"ppl","error","n_chunks","n_ctx","n_scored","running"}; `running` has the value after every window.
    #[arg(long, help_heading = "Output")]
    pub json: bool,
    /// Print memory plan and speed to standard error
    #[arg(short = 'v', long, visible_alias = "verbose", help_heading = "Output")]
    pub stats: bool,
}

#[derive(Debug, Args)]
pub struct Bench {
    /// GGUF file, or the first file of a split model [default: the bundled tiny gpt-oss]
    #[arg(short, long, value_name = "FILE", help_heading = "Model")]
    pub model: Option<PathBuf>,
    /// Lengths of prompts to read; 0 for none [default: 512; in the emulator 16]
    #[arg(short = 'p', long, value_name = "N,...", value_delimiter = ',', value_parser = n_tokens, allow_negative_numbers = true)]
    pub n_prompt: Option<Vec<usize>>,
    /// Numbers of tokens to generate; 0 for none [default: 128; in the emulator 8]
    #[arg(short, long, value_name = "N,...", value_delimiter = ',', value_parser = n_tokens, allow_negative_numbers = true)]
    pub n_gen: Option<Vec<usize>>,
    /// Tokens that are in the context before the test begins
    #[arg(short = 'd', long, value_name = "N,...", value_delimiter = ',', default_value = "0", value_parser = n_tokens, allow_negative_numbers = true)]
    pub n_depth: Vec<usize>,
    /// How often each test is timed [default: 5; in the emulator 2]
    #[arg(short, long, value_name = "N", value_parser = repetitions, allow_negative_numbers = true)]
    pub repetitions: Option<usize>,
    /// Prompt tokens to process at once
    #[arg(short, long, value_name = "N", default_value = "512", value_parser = batch_size, allow_negative_numbers = true, help_heading = "Engine")]
    pub batch_size: usize,
    /// Type of the KV cache
    #[arg(long, value_name = "TYPE", default_value = "f16", help_heading = "Engine")]
    pub kv: Kv,
    #[command(flatten)]
    pub device: DeviceArgs,
    /// As what to print the results
    ///
    /// `md` is a table; `csv` has a header and a line per test; `json` is an array with an object per test, which has the
    /// times of single runs, too. Columns that llama-bench has are named as there: n_prompt, n_gen, n_depth, avg_ts and
    /// stddev_ts, in tokens per second. Both tell how long it took until the first token.
    #[arg(short, long, value_name = "FORMAT", default_value = "md", help_heading = "Output")]
    pub output: BenchFormat,
    /// Print how long it took until the first token, too
    #[arg(long, help_heading = "Output")]
    pub load: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BenchFormat {
    Md,
    Json,
    Csv,
}

#[derive(Debug, Args)]
pub struct Plan {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub engine: EngineArgs,
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Print one JSON object
    #[arg(long, help_heading = "Output")]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct Doctor {
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DeviceChoice {
    Auto,
    Cuda,
    Cpu,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Kv {
    F16,
    F32,
}

impl From<Kv> for KvType {
    fn from(kv: Kv) -> Self {
        match kv {
            Kv::F16 => Self::F16,
            Kv::F32 => Self::F32,
        }
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum GeluForm {
    Exact,
    Tanh,
}

impl From<GeluForm> for Gelu {
    fn from(form: GeluForm) -> Self {
        match form {
            GeluForm::Exact => Self::Exact,
            GeluForm::Tanh => Self::Tanh,
        }
    }
}

/// A number whose -1 means something else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OrMinusOne<T>(pub Option<T>);

impl CommandLine {
    /// What was typed, or what clap has to say of it: help, version, or wrong usage.
    pub fn read() -> Result<Self, clap::Error> {
        let line = Self::try_parse()?;
        line.check()?;
        Ok(line)
    }

    /// What spans several flags, or has its range stated elsewhere.
    fn check(&self) -> Result<(), clap::Error> {
        let (name, device) = match &self.command {
            Command::Generate(args) => ("generate", &args.device),
            Command::Chat(args) => ("chat", &args.device),
            Command::Logits(args) => ("logits", &args.device),
            Command::Perplexity(args) => ("perplexity", &args.device),
            Command::Bench(args) => ("bench", &args.device),
            Command::Plan(args) => ("plan", &args.device),
            Command::Inspect(_) | Command::Tokenize(_) | Command::Doctor(_) => return Ok(()),
        };
        let refuse = |kind, text: String| {
            let mut command = Self::command();
            command.build();
            command.find_subcommand_mut(name).expect("it was parsed").error(kind, text)
        };
        if device.device == DeviceChoice::Cpu && (device.gpu.is_some() || device.ptx.is_some()) {
            let flag = if device.gpu.is_some() { "--gpu" } else { "--ptx" };
            let text = format!("--device cpu runs in the emulator, so {flag} cannot be used with it");
            return Err(refuse(ErrorKind::ArgumentConflict, text));
        }
        let sampling = match &self.command {
            Command::Generate(args) => Some(&args.sampling),
            Command::Chat(args) => Some(&args.sampling),
            _ => None,
        };
        if let Some(sampling) = sampling {
            let checked = sampling.options(0).validate();
            checked.map_err(|error| refuse(ErrorKind::ValueValidation, error.to_string()))?;
        }
        if let Command::Perplexity(Perplexity { chunks: OrMinusOne(Some(0)), .. }) = &self.command {
            return Err(refuse(
                ErrorKind::ValueValidation,
                "--chunks: '0' scores nothing; expected -1 or more than 0".to_owned(),
            ));
        }
        if let Command::Bench(Bench { n_prompt: Some(prompts), n_gen: Some(generated), .. }) = &self.command
            && prompts.iter().chain(generated).all(|&n| n == 0)
        {
            let text = "-p and -n: 0 leaves no test; expected a number of tokens in one of them".to_owned();
            return Err(refuse(ErrorKind::ValueValidation, text));
        }
        if let Command::Generate(args) = &self.command {
            if !args.chat && (args.instructions.system.is_some() || args.instructions.reasoning != Effort::Medium) {
                let text = "--system and --reasoning are for --chat, which is missing".to_owned();
                return Err(refuse(ErrorKind::MissingRequiredArgument, text));
            }
            if args.reverse_prompt.iter().any(|text| text.is_empty()) {
                let text = "--reverse-prompt: '' would stop at once; expected some text".to_owned();
                return Err(refuse(ErrorKind::ValueValidation, text));
            }
        }
        Ok(())
    }
}

impl SamplingArgs {
    /// The sampler's options, with `n_probs` alternatives per token.
    pub fn options(&self, n_probs: u32) -> SamplerOptions {
        SamplerOptions {
            temp: self.temp,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            seed: self.seed.0,
            repeat_last_n: self.repeat_last_n.0,
            repeat_penalty: self.repeat_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            logit_bias: self.logit_bias.clone(),
            ignore_eos: self.ignore_eos,
            n_probs,
        }
    }
}

fn minus_one_or<T: std::str::FromStr>(text: &str) -> Result<OrMinusOne<T>, String> {
    match text {
        "-1" => Ok(OrMinusOne(None)),
        _ => text.parse().map(|n| OrMinusOne(Some(n))).map_err(|_| "expected -1 or a whole number from 0".to_owned()),
    }
}

fn batch_size(text: &str) -> Result<usize, String> {
    let size = text.parse().ok().filter(|size| (1..=MAX_BATCH).contains(size));
    size.ok_or_else(|| format!("expected a whole number from 1 to {MAX_BATCH}"))
}

fn n_tokens(text: &str) -> Result<usize, String> {
    let n = text.parse().ok().filter(|n| (0..=MAX_BATCH).contains(n));
    n.ok_or_else(|| format!("expected a whole number from 0 to {MAX_BATCH}, or several with commas between"))
}

fn repetitions(text: &str) -> Result<usize, String> {
    let n = text.parse().ok().filter(|n| (1..=MAX_REPETITIONS).contains(n));
    n.ok_or_else(|| format!("expected a whole number from 1 to {MAX_REPETITIONS}"))
}

/// More would take hours and tell nothing new.
const MAX_REPETITIONS: usize = 1000;

/// Far above any use, and small enough that sizes computed from it stay in 64 bits.
const MAX_BATCH: usize = 1 << 20;

fn logit_bias(text: &str) -> Result<(u32, f32), String> {
    const EXPECTED: &str = "expected a token id, + or -, and a number, as in 262+1.5";
    let at = text.find(['+', '-']).ok_or(EXPECTED)?;
    let (id, bias) = text.split_at(at);
    // A second sign would pass as part of the number.
    if bias[1..].starts_with(['+', '-']) {
        return Err(EXPECTED.to_owned());
    }
    Ok((id.parse().map_err(|_| EXPECTED)?, bias.parse().map_err(|_| EXPECTED)?))
}

fn ptx_build(text: &str) -> Result<PtxBuild, String> {
    PtxBuild::from_name(text).ok_or_else(|| "expected sm_80 or sm_90a".to_owned())
}

fn memory_size(text: &str) -> Result<u64, String> {
    let size = parse_size::parse_size(text).ok().filter(|&size| size > 0);
    size.ok_or_else(|| "expected a number of bytes above 0, or one with KiB, MiB, GiB, KB, MB or GB".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_consistent() {
        CommandLine::command().debug_assert();
    }

    #[test]
    fn memory_sizes_count_as_their_unit_says() {
        let sizes = ["1", "2KiB", "24GiB", "24 GiB", "24GB", "1.5MiB", "3MB", "7KB"].map(memory_size);
        let expected = [1, 2 << 10, 24 << 30, 24 << 30, 24_000_000_000, 3 << 19, 3_000_000, 7_000];
        assert_eq!(sizes, expected.map(Ok));
        for refused in ["", "0", "-1", "GiB", "1XiB", "99999999999GiB", "1e30"] {
            assert!(memory_size(refused).is_err(), "{refused:?}");
        }
    }

    #[test]
    fn a_logit_bias_is_an_id_and_a_signed_number() {
        assert_eq!(logit_bias("262+1.5"), Ok((262, 1.5)));
        assert_eq!(logit_bias("0-2"), Ok((0, -2.0)));
        assert_eq!(logit_bias("7-inf"), Ok((7, f32::NEG_INFINITY)));
        for refused in ["", "262", "262+", "+1", "262--1", "262-+1", "a+1", "262+x", "-1+1"] {
            assert!(logit_bias(refused).is_err(), "{refused:?}");
        }
    }
}
