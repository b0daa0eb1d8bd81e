//! Conversations on a loaded model: how it wants them written, and what it answers, token by token.

use std::time::Instant;

use gpt_gamma::chat::{
    Assembler, Channel, ChatTemplate, Event, Harmony, Header, Input, Message, Options, Parser, Reasoning, Role, Stop,
};
use gpt_gamma::engine::Engine;
use gpt_gamma::sampler::{Sampled, SamplerOptions};
use gpt_gamma::tokenizer::{self, StreamDecoder};
use jiff::Zoned;
use serde_json::{Map, json};

use super::chooser::{Chooser, Interrupts};
use super::error::Error;
use super::model::{self, Model};
use super::session;

/// What was said so far.
pub struct Conversation {
    /// Instructions before the first message.
    pub system: Option<String>,
    /// How long the model is to think.
    pub reasoning: Reasoning,
    /// The messages of both sides.
    pub messages: Vec<Message>,
}

impl Conversation {
    /// Adds what the user says. Thinking belongs to the turn that it was done in, finished or not, so it goes.
    pub fn say(&mut self, text: String) {
        self.messages.retain(|message| message.channel != Some(Channel::Analysis));
        self.messages.push(Message::user(text));
    }

    fn all(&self) -> Vec<Message> {
        let system = self.system.iter().map(|text| Message::new(Role::System, text));
        system.chain(self.messages.iter().cloned()).collect()
    }
}

/// How a model wants conversations written.
pub enum Format<'m> {
    Harmony(Harmony<'m>),
    Template(Box<ChatTemplate>),
}

impl<'m> Format<'m> {
    /// Harmony if the vocabulary has its markers, else the template in the file.
    pub fn of(model: &'m Model) -> Result<Self, Error> {
        if let Ok(harmony) = Harmony::new(&model.tokenizer) {
            return Ok(Self::Harmony(harmony));
        }
        let file = model::name(&model.file);
        let Some(source) = model.tokenizer.chat_template() else { return Err(Error::NoChatFormat { file }) };
        let template = ChatTemplate::new(source).map_err(|source| Error::Template { file, source })?;
        Ok(Self::Template(Box::new(template)))
    }

    /// The ids of `conversation`, up to where the model's answer begins.
    pub fn render(&self, model: &Model, conversation: &Conversation) -> Result<Vec<u32>, Error> {
        let (tokenizer, messages) = (&model.tokenizer, conversation.all());
        let template = match self {
            Self::Harmony(harmony) => {
                let options = Options { reasoning: conversation.reasoning, ..Options::default() };
                return Ok(harmony.render(&messages, &options));
            }
            Self::Template(template) => template,
        };
        let text = |id: Option<u32>| {
            let bytes = id.and_then(|id| tokenizer.token_bytes(id).ok()).unwrap_or_default();
            String::from_utf8_lossy(bytes).into_owned()
        };
        let input = Input {
            generation_prompt: true,
            bos: &text(tokenizer.bos()),
            eos: &text(tokenizer.eos()),
            now: Zoned::now().datetime(),
            tools: &[],
            extra: Map::from_iter([("reasoning_effort".to_owned(), json!(conversation.reasoning.name()))]),
        };
        let failed = |source| Error::Template { file: model::name(&model.file), source };
        let mut tokens = template.encode(&messages, &input, tokenizer).map_err(failed)?;
        // Some templates write the beginning token themselves, others leave it to the tokenizer.
        if let Some(bos) = tokenizer.bos().filter(|&bos| tokenizer.adds_bos() && tokens.first() != Some(&bos)) {
            tokens.insert(0, bos);
        }
        Ok(tokens)
    }

    /// Reads an answer.
    fn reader(&self, model: &'m Model) -> Reader<'m> {
        match self {
            Self::Harmony(harmony) => Reader::Harmony(harmony.parser()),
            Self::Template(_) => {
                Reader::Plain { model, decoder: StreamDecoder::new(&model.tokenizer), has_begun: false }
            }
        }
    }
}

/// Makes messages of tokens: those of harmony, or one that holds all text.
enum Reader<'m> {
    Harmony(Parser<'m>),
    Plain { model: &'m Model, decoder: StreamDecoder<'m>, has_begun: bool },
}

impl Reader<'_> {
    fn push(&mut self, id: u32) -> Result<Vec<Event>, tokenizer::Error> {
        let (model, decoder, has_begun) = match self {
            Self::Harmony(parser) => return parser.push(id),
            Self::Plain { model, decoder, has_begun } => (model, decoder, has_begun),
        };
        let mut events = Vec::new();
        if !*has_begun {
            let (role, text) = (Role::Assistant, Vec::new());
            let header = Header { role, channel: Some(Channel::Final), recipient: None, content_type: None, text };
            events.push(Event::MessageStart(header));
            *has_begun = true;
        }
        if model.tokenizer.eog_ids().contains(&id) {
            events.extend([Event::MessageEnd, Event::Stop(Stop::EndOfText)]);
        } else if !model.tokenizer.is_special(id) {
            let bytes = decoder.push(id)?;
            events.extend((!bytes.is_empty()).then(|| Event::Text(bytes.to_vec())));
        }
        Ok(events)
    }

    fn finish(self) -> Vec<Event> {
        match self {
            Self::Harmony(parser) => parser.finish(),
            Self::Plain { decoder, .. } => {
                let rest = decoder.finish();
                let text = (!rest.is_empty()).then_some(Event::Text(rest));
                text.into_iter().chain([Event::MessageEnd]).collect()
            }
        }
    }
}

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    Stop { token: u32 },
    Length,
    Context,
    ReversePrompt,
    Interrupt,
}

impl Reason {
    /// Its name in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stop { .. } => "stop",
            Self::Length => "length",
            Self::Context => "context",
            Self::ReversePrompt => "reverse-prompt",
            Self::Interrupt => "interrupt",
        }
    }
}

/// Part of an answer: a token and what it brought about, or what is left after the last.
pub struct Step<'a> {
    pub chosen: Option<&'a Sampled>,
    pub events: &'a [Event],
}

/// An answer that has ended.
pub struct Answer {
    pub reason: Reason,
    /// What goes into the conversation.
    pub messages: Vec<Message>,
    pub n_prompt: usize,
    /// Tokens of the prompt that the cache held already.
    pub n_reused: usize,
    /// Tokens chosen, without the one that ended the answer.
    pub n_generated: usize,
    pub prefill_seconds: f64,
    pub decode_seconds: f64,
    pub seed: u64,
}

/// A model that answers.
pub struct Dialogue<'m> {
    model: &'m Model,
    format: &'m Format<'m>,
    engine: Engine,
    interrupts: Interrupts,
    sampling: SamplerOptions,
    wants_logprobs: bool,
    n_predict: Option<usize>,
    /// The tokens that the engine has read.
    cached: Vec<u32>,
}

impl<'m> Dialogue<'m> {
    /// `engine` has read nothing yet. No answer is longer than `n_predict` tokens.
    pub fn new(
        model: &'m Model,
        format: &'m Format<'m>,
        engine: Engine,
        interrupts: Interrupts,
        n_predict: Option<usize>,
    ) -> Self {
        let sampling = SamplerOptions::default();
        let (wants_logprobs, cached) = (false, Vec::new());
        Self { model, format, engine, interrupts, sampling, wants_logprobs, n_predict, cached }
    }

    /// How to choose tokens. `wants_logprobs`: whether [`Sampled::logprob`] will be used.
    pub fn sampling(self, sampling: SamplerOptions, wants_logprobs: bool) -> Self {
        Self { sampling, wants_logprobs, ..self }
    }

    /// The next answer's seed, if it was given one, becomes the following one: equal questions may get other answers.
    pub fn advance_seed(&mut self) {
        self.sampling.seed = self.sampling.seed.map(|seed| seed.wrapping_add(1));
    }

    /// Lets the model answer `prompt`, which fits the context and is not empty, and tells `each` of every token.
    pub fn answer(
        &mut self,
        prompt: &[u32],
        each: &mut dyn FnMut(&Step) -> Result<(), Error>,
    ) -> Result<Answer, Error> {
        let model = self.model;
        let mut chooser = Chooser::new(self.sampling.clone(), self.wants_logprobs, model)?;
        for &token in prompt {
            chooser.sampler.accept(token)?;
        }
        self.interrupts.take();
        let n_reused = self.reuse(prompt);
        let start = Instant::now();
        let is_read = self.read(&prompt[n_reused..])?;
        let prefill_seconds = start.elapsed().as_secs_f64();

        let start = Instant::now();
        let (mut reader, mut assembler) = (self.format.reader(model), Assembler::default());
        let mut n_generated = 0;
        let reason = loop {
            if self.interrupts.raised() || !is_read {
                break Reason::Interrupt;
            }
            if self.n_predict.is_some_and(|n| n_generated >= n) {
                break Reason::Length;
            }
            // The token that filled the context gave one more.
            if self.cached.len() < prompt.len() + n_generated {
                break Reason::Context;
            }
            let chosen = chooser.choose(&mut self.engine, model)?;
            let failed = |source| Error::Tokenizer { file: model::name(&model.file), source };
            let events = reader.push(chosen.id).map_err(failed)?;
            events.iter().for_each(|event| assembler.push(event));
            let ends = model.tokenizer.eog_ids().contains(&chosen.id);
            each(&Step { chosen: Some(&chosen), events: &events })?;
            if ends {
                break Reason::Stop { token: chosen.id };
            }
            chooser.sampler.accept(chosen.id)?;
            n_generated += 1;
            if self.cached.len() < model.options.n_ctx {
                self.engine.decode(chosen.id).map_err(|error| model.engine_error(error))?;
                self.cached.push(chosen.id);
            }
        };
        let decode_seconds = start.elapsed().as_secs_f64();
        let events = reader.finish();
        events.iter().for_each(|event| assembler.push(event));
        each(&Step { chosen: None, events: &events })?;
        let (messages, n_prompt, seed) = (assembler.finish(), prompt.len(), chooser.sampler.seed());
        Ok(Answer { reason, messages, n_prompt, n_reused, n_generated, prefill_seconds, decode_seconds, seed })
    }

    /// How many tokens of `prompt` need not be read, since the engine has read them already. It forgets what it has read
    /// beyond them, or everything where it cannot go back that far.
    fn reuse(&mut self, prompt: &[u32]) -> usize {
        let n_same = self.cached.iter().zip(prompt).take_while(|(cached, token)| cached == token).count();
        // Logits exist after the last token read only, so at least one is left to read.
        let n_kept = n_same.min(prompt.len() - 1);
        match self.engine.rewind(n_kept) {
            Ok(()) => self.cached.truncate(n_kept),
            Err(_) => {
                self.engine.reset();
                self.cached.clear();
            }
        }
        self.cached.len()
    }

    /// Reads `tokens`, and tells whether that was not interrupted.
    fn read(&mut self, tokens: &[u32]) -> Result<bool, Error> {
        let bar = session::bar("prompt", "{pos}/{len} tokens");
        bar.set_length(tokens.len() as u64);
        // The engine takes no interrupts: it gets no more than it does at once.
        for chunk in tokens.chunks(self.model.options.n_batch) {
            if self.interrupts.raised() {
                bar.finish_and_clear();
                return Ok(false);
            }
            self.engine.prefill(chunk, &mut |_| {}).map_err(|error| self.model.engine_error(error))?;
            self.cached.extend_from_slice(chunk);
            bar.inc(chunk.len() as u64);
        }
        bar.finish_and_clear();
        Ok(true)
    }
}
