//! `gamma generate`: a prompt and what follows from it.

use std::io::{IsTerminal, Write, stderr, stdout};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use gpt_gamma::engine::Engine;
use gpt_gamma::sampler::{Sampled, Sampler, SamplerOptions};
use gpt_gamma::tokenizer::StreamDecoder;
use serde::Serialize;

use super::args::Generate;
use super::error::Error;
use super::model::{self, Model};
use super::{Out, note, session};

/// Runs the command.
pub fn run(args: &Generate) -> Result<(), Error> {
    let prompt = model::prompt(&args.prompt)?;
    let model = Model::open(&args.model, &args.engine)?;
    let tokens = model.prompt_tokens(&prompt, args.prompt.specials)?;
    model.check_length(tokens.len())?;
    let mut chooser = Chooser::new(args, &model)?;
    for &token in &tokens {
        chooser.sampler.accept(token)?;
    }

    let stats = session::talks(args.stats);
    let mut engine = session::load(&model, &args.device, stats)?;
    let prefill_seconds = session::prefill(&mut engine, &model, &tokens)?;

    let mut printer = Printer::new(&model, args);
    printer.prompt(&tokens)?;
    let interrupted = watch_interrupts()?;
    let start = Instant::now();
    let mut n_generated = 0;
    let reason = loop {
        if args.n_predict.0.is_some_and(|n| n_generated >= n) {
            break Reason::Length;
        }
        if interrupted.load(Ordering::Relaxed) {
            break Reason::Interrupt;
        }
        let chosen = chooser.choose(&mut engine, &model)?;
        if model.tokenizer.eog_ids().contains(&chosen.id) {
            break Reason::Stop { token: chosen.id };
        }
        chooser.sampler.accept(chosen.id)?;
        n_generated += 1;
        if printer.token(&chosen)? {
            break Reason::ReversePrompt;
        }
        // The last token need not be computed on, unless another is to follow.
        if args.n_predict.0.is_some_and(|n| n_generated >= n) {
            break Reason::Length;
        }
        if engine.n_past() == model.options.n_ctx {
            break Reason::Context;
        }
        engine.decode(chosen.id).map_err(|error| model.engine_error(error))?;
    };
    let decode_seconds = start.elapsed().as_secs_f64();

    let finish = Finish {
        kind: "finish",
        reason: reason.name(),
        stop_id: if let Reason::Stop { token } = reason { Some(token) } else { None },
        n_prompt: tokens.len(),
        n_generated,
        prefill_tokens_per_s: session::rate(tokens.len(), prefill_seconds),
        decode_tokens_per_s: session::rate(n_generated, decode_seconds),
        seed: chooser.sampler.seed(),
    };
    printer.finish(&finish)?;
    if let Reason::Context = reason {
        let (n_ctx, most) = (model.options.n_ctx, model.spec().n_ctx);
        let advice = if n_ctx < most { format!("; -c allows up to {most}") } else { String::new() };
        note(&format!("context of {n_ctx} tokens is full: stopped after {n_generated} new tokens{advice}"));
    }
    if stats {
        finish.print();
    }
    Ok(())
}

/// Why generation ended.
#[derive(Clone, Copy)]
enum Reason {
    Stop { token: u32 },
    Length,
    Context,
    ReversePrompt,
    Interrupt,
}

impl Reason {
    fn name(self) -> &'static str {
        match self {
            Self::Stop { .. } => "stop",
            Self::Length => "length",
            Self::Context => "context",
            Self::ReversePrompt => "reverse-prompt",
            Self::Interrupt => "interrupt",
        }
    }
}

/// Chooses tokens: on the device where the likeliest is all that is wanted, else from the logits.
struct Chooser {
    sampler: Sampler,
    on_device: bool,
}

impl Chooser {
    fn new(args: &Generate, model: &Model) -> Result<Self, Error> {
        let mut options = args.sampling.options(args.top_logprobs);
        // Ids that the model has and its tokenizer does not mean nothing, so they cannot be chosen.
        let (known, all) = (model.tokenizer.n_vocab(), model.spec().n_vocab);
        options.logit_bias.extend((known..all).map(|id| (id as u32, f32::NEG_INFINITY)));
        let on_device = is_plain_greedy(&options) && !args.json;
        Ok(Self { sampler: Sampler::new(options, all, model.tokenizer.eog_ids())?, on_device })
    }

    fn choose(&mut self, engine: &mut Engine, model: &Model) -> Result<Sampled, Error> {
        if self.on_device {
            let id = engine.greedy().map_err(|error| model.engine_error(error))?;
            // Nobody asked for the probability.
            return Ok(Sampled { id, logprob: f32::NAN, top: Vec::new() });
        }
        let logits = engine.logits().map_err(|error| model.engine_error(error))?;
        Ok(self.sampler.sample(&logits)?)
    }
}

/// Whether `options` come down to the largest logit as the model made it.
fn is_plain_greedy(options: &SamplerOptions) -> bool {
    let penalizes =
        options.repeat_penalty != 1.0 || options.presence_penalty != 0.0 || options.frequency_penalty != 0.0;
    options.temp == 0.0 && !penalizes && options.logit_bias.is_empty() && !options.ignore_eos
}

/// Writes what is generated, as text or as JSON, and looks out for reverse prompts.
struct Printer<'a> {
    out: Out,
    model: &'a Model,
    decoder: StreamDecoder<'a>,
    json: bool,
    shows_prompt: bool,
    stops: Vec<&'a [u8]>,
    /// The end of the generated text, as long as a stop can have begun in it.
    tail: Vec<u8>,
}

/// A line of JSON for a token.
#[derive(Serialize)]
struct TokenLine<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    id: u32,
    bytes: &'a [u8],
    text: &'a str,
    logprob: f32,
    top: Vec<Alternative>,
}

#[derive(Serialize)]
struct Alternative {
    id: u32,
    logprob: f32,
}

impl<'a> Printer<'a> {
    fn new(model: &'a Model, args: &'a Generate) -> Self {
        Self {
            out: Out::new(),
            model,
            decoder: StreamDecoder::new(&model.tokenizer),
            json: args.json,
            shows_prompt: !args.no_display_prompt && !args.json,
            stops: args.reverse_prompt.iter().map(|text| text.as_bytes()).collect(),
            tail: Vec::new(),
        }
    }

    fn tokenizer_error(&self) -> impl Fn(gpt_gamma::tokenizer::Error) -> Error + use<> {
        let file = model::name(&self.model.file);
        move |source| Error::Tokenizer { file: file.clone(), source }
    }

    /// Writes the prompt. A character that it leaves incomplete is held back, for the model may complete it.
    fn prompt(&mut self, tokens: &[u32]) -> Result<(), Error> {
        if !self.shows_prompt {
            return Ok(());
        }
        let failed = self.tokenizer_error();
        for &token in tokens {
            self.out.write(self.decoder.push(token).map_err(&failed)?)?;
        }
        self.out.flush()
    }

    /// Writes a token. True if the text has come to a reverse prompt.
    fn token(&mut self, chosen: &Sampled) -> Result<bool, Error> {
        let failed = self.tokenizer_error();
        let bytes = self.model.tokenizer.token_bytes(chosen.id).map_err(&failed)?;
        let certain = self.decoder.push(chosen.id).map_err(&failed)?;
        if self.json {
            let top = chosen.top.iter().map(|&(id, logprob)| Alternative { id, logprob }).collect();
            let text = &String::from_utf8_lossy(certain);
            self.out.json(&TokenLine { kind: "token", id: chosen.id, bytes, text, logprob: chosen.logprob, top })?;
        } else {
            self.out.write(certain)?;
        }
        self.out.flush()?;
        Ok(self.stops_with(bytes))
    }

    /// Whether a reverse prompt ends in `bytes`, which come after the tail.
    fn stops_with(&mut self, bytes: &[u8]) -> bool {
        self.tail.extend_from_slice(bytes);
        let found = self.stops.iter().any(|stop| self.tail.windows(stop.len()).any(|window| window == *stop));
        // An earlier match would have stopped earlier, so only what can begin a match is kept.
        let longest = self.stops.iter().map(|stop| stop.len()).max().unwrap_or(0);
        let excess = self.tail.len().saturating_sub(longest.saturating_sub(1));
        self.tail.drain(..excess);
        found
    }

    /// Writes what was held back: bytes that no further token will complete.
    fn finish(&mut self, finish: &Finish) -> Result<(), Error> {
        if self.json {
            self.out.json(finish)?;
        } else {
            let rest = self.decoder.clone().finish();
            self.out.write(&rest)?;
            // So that neither the timings nor the shell's prompt continue the text; never into a file or a pipe.
            if stdout().is_terminal() {
                self.out.write(b"\n")?;
            }
        }
        self.out.flush()
    }
}

/// The last line of JSON.
#[derive(Serialize)]
struct Finish {
    #[serde(rename = "type")]
    kind: &'static str,
    reason: &'static str,
    /// The token that ended the text, for reason `stop`.
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_id: Option<u32>,
    n_prompt: usize,
    n_generated: usize,
    prefill_tokens_per_s: Option<f64>,
    decode_tokens_per_s: Option<f64>,
    seed: u64,
}

impl Finish {
    fn print(&self) {
        let speed = |speed: Option<f64>| speed.map_or("nothing to measure".to_owned(), |x| format!("{x:.1} tokens/s"));
        let mut err = stderr();
        let _ = writeln!(err, "prompt     {} tokens, {}", self.n_prompt, speed(self.prefill_tokens_per_s));
        let _ = writeln!(err, "generated  {} tokens, {}", self.n_generated, speed(self.decode_tokens_per_s));
        let _ = writeln!(err, "ended by   {}; seed {}", self.reason, self.seed);
    }
}

/// A flag that the first Ctrl-C from here on sets. The second ends the process.
fn watch_interrupts() -> Result<Arc<AtomicBool>, Error> {
    /// What shells report for a process that SIGINT killed.
    const KILLED_BY_SIGINT: i32 = 130;
    let interrupted = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&interrupted);
    ctrlc::set_handler(move || {
        if flag.swap(true, Ordering::Relaxed) {
            std::process::exit(KILLED_BY_SIGINT);
        }
    })
    .map_err(Error::Interrupt)?;
    Ok(interrupted)
}
