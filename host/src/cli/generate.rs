//! `gamma generate`: a prompt and what follows from it.

use std::borrow::Cow;
use std::io::{IsTerminal, Write, stderr, stdout};
use std::os::unix::ffi::OsStrExt;
use std::time::Instant;

use gpt_gamma::chat::{Channel, Event, Message};
use gpt_gamma::sampler::Sampled;
use gpt_gamma::tokenizer::StreamDecoder;
use serde::Serialize;
use serde_json::json;

use super::args::Generate;
use super::chooser::{Chooser, Interrupts};
use super::dialogue::{Answer, Conversation, Dialogue, Format, Reason};
use super::error::Error;
use super::model::{self, Model};
use super::screen::Screen;
use super::{Out, note, session};

/// Runs the command.
pub fn run(args: &Generate) -> Result<(), Error> {
    if args.chat {
        return chat(args);
    }
    let prompt = model::prompt(&args.prompt)?;
    let model = Model::open(&args.model, &args.engine, &args.device)?;
    let tokens = model.prompt_tokens(&prompt, args.prompt.specials)?;
    model.check_length(tokens.len())?;
    let mut chooser = Chooser::new(args.sampling.options(args.top_logprobs), args.json, &model)?;
    for &token in &tokens {
        chooser.sampler.accept(token)?;
    }

    let stats = session::talks(args.stats);
    let mut engine = session::load(&model, &args.device, stats)?;
    let prefill_seconds = session::prefill(&mut engine, &model, &tokens)?;

    let mut printer = Printer::new(&model, args);
    printer.prompt(&tokens)?;
    let interrupts = Interrupts::watch()?;
    interrupts.take();
    let start = Instant::now();
    let (mut n_generated, mut first_token) = (0, None);
    let reason = loop {
        if args.n_predict.0.is_some_and(|n| n_generated >= n) {
            break Reason::Length;
        }
        if interrupts.raised() {
            break Reason::Interrupt;
        }
        let chosen = chooser.choose(&mut engine, &model)?;
        first_token.get_or_insert_with(|| model.times.begin.elapsed());
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
        note(&model.context_full(&format!("stopped after {n_generated} new tokens")));
    }
    if stats {
        if let Some(time) = first_token {
            let _ = writeln!(stderr(), "began      first token {:.2} s after the start", time.as_secs_f64());
        }
        finish.print();
    }
    Ok(())
}

/// Has the prompt answered as the first message of a chat.
fn chat(args: &Generate) -> Result<(), Error> {
    let text = String::from_utf8(model::prompt(&args.prompt)?).map_err(|_| Error::MessageNotUtf8)?;
    let model = Model::open(&args.model, &args.engine, &args.device)?;
    let format = Format::of(&model)?;
    let conversation = Conversation {
        system: args.instructions.system.clone(),
        reasoning: args.instructions.reasoning.into(),
        messages: vec![Message::user(text)],
    };
    let prompt = format.render(&model, &conversation)?;
    model.check_length(prompt.len())?;

    let sampling = args.sampling.options(args.top_logprobs);
    // What is wrong with it is told before the model is loaded.
    Chooser::new(sampling.clone(), args.json, &model)?;

    let stats = session::talks(args.stats);
    let engine = session::load(&model, &args.device, stats)?;
    let dialogue = Dialogue::new(&model, &format, engine, Interrupts::watch()?, args.n_predict.0);
    let mut dialogue = dialogue.sampling(sampling, args.json);
    let mut out = Out::new();
    let mut asides = Screen::new(stderr(), stderr().is_terminal(), |header| !header.is_answer());
    let mut open = Open::default();
    let answer = dialogue.answer(&prompt, &mut |step| {
        let text = open.read(step.events);
        match step.chosen {
            // The token that ends the answer, too: text that might have been a header may come with it.
            Some(chosen) if args.json => {
                let failed = |source| Error::Tokenizer { file: model::name(&model.file), source };
                let bytes = model.tokenizer.token_bytes(chosen.id).map_err(failed)?;
                out.json(&ChatLine { token: TokenLine::new(chosen, bytes, &text.all), channel: text.channel })?;
            }
            None if args.json && !text.all.is_empty() => {
                let rest = String::from_utf8_lossy(&text.all);
                out.json(&json!({"type": "rest", "text": rest, "channel": text.channel}))?;
            }
            None if args.json => {}
            _ => out.write(&text.answer)?,
        }
        out.flush()?;
        if stats && !args.json {
            // Standard error may be closed; the answer is what counts.
            let _ = step.events.iter().try_for_each(|event| asides.event(event));
        }
        Ok(())
    })?;
    let _ = asides.end_line();
    if args.json {
        out.json(&answer.finish())?;
    } else if stdout().is_terminal() {
        out.write(b"\n")?;
    }
    out.flush()?;
    if answer.reason == Reason::Context {
        note(&model.context_full(&format!("stopped after {} new tokens", answer.n_generated)));
    }
    if stats {
        answer.print();
    }
    Ok(())
}

/// The message that a chat's answer is in the middle of.
#[derive(Default)]
struct Open {
    /// Its channel, the final one if it has none; no message, no channel.
    channel: Option<Channel>,
    is_answer: bool,
}

/// What a token adds to the messages.
struct Added {
    channel: Option<String>,
    /// Of any message.
    all: Vec<u8>,
    /// Of messages for the user.
    answer: Vec<u8>,
}

impl Open {
    fn read(&mut self, events: &[Event]) -> Added {
        let (mut channel, mut all, mut answer) = (None, Vec::new(), Vec::new());
        for event in events {
            match event {
                Event::MessageStart(header) => {
                    self.is_answer = header.is_answer();
                    let named = header.channel.clone();
                    self.channel = named.or(self.is_answer.then_some(Channel::Final));
                }
                Event::Text(bytes) => {
                    channel = self.channel.clone();
                    all.extend_from_slice(bytes);
                    if self.is_answer {
                        answer.extend_from_slice(bytes);
                    }
                }
                Event::MessageEnd => self.channel = None,
                Event::Stop(_) => {}
            }
        }
        // A token that completes no character belongs to the message, too.
        let channel = channel.as_ref().or(self.channel.as_ref()).map(|channel| channel.name().to_owned());
        Added { channel, all, answer }
    }
}

/// A line of JSON for a token of a chat.
#[derive(Serialize)]
struct ChatLine<'a> {
    #[serde(flatten)]
    token: TokenLine<'a>,
    channel: Option<String>,
}

impl Answer {
    fn finish(&self) -> Finish {
        Finish {
            kind: "finish",
            reason: self.reason.name(),
            stop_id: if let Reason::Stop { token } = self.reason { Some(token) } else { None },
            n_prompt: self.n_prompt,
            n_generated: self.n_generated,
            prefill_tokens_per_s: session::rate(self.n_prompt - self.n_reused, self.prefill_seconds),
            decode_tokens_per_s: session::rate(self.n_generated, self.decode_seconds),
            seed: self.seed,
        }
    }

    /// Prints speeds to standard error.
    pub fn print(&self) {
        if self.n_reused > 0 {
            let _ = writeln!(stderr(), "reused     {} tokens of the conversation", self.n_reused);
        }
        self.finish().print();
    }
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
    text: Cow<'a, str>,
    logprob: f32,
    top: Vec<Alternative>,
}

#[derive(Serialize)]
struct Alternative {
    id: u32,
    logprob: f32,
}

impl<'a> TokenLine<'a> {
    /// `certain` is the text that became certain with the token.
    fn new(chosen: &Sampled, bytes: &'a [u8], certain: &'a [u8]) -> Self {
        let top = chosen.top.iter().map(|&(id, logprob)| Alternative { id, logprob }).collect();
        let text = String::from_utf8_lossy(certain);
        Self { kind: "token", id: chosen.id, bytes, text, logprob: chosen.logprob, top }
    }
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
            self.out.json(&TokenLine::new(chosen, bytes, certain))?;
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
