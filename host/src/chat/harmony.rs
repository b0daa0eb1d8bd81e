//! Conversations to ids, in the format that gpt-oss was trained on.

use jiff::civil::Date;

use super::{Channel, ContentType, Message, Parser, Role, Tool, typescript};
use crate::tokenizer::Tokenizer;

/// The harmony format over one vocabulary.
///
/// A message is `<|start|>`, header, `<|message|>`, content, `<|end|>`, with nothing between messages. A header is role,
/// ` to=` and recipient, `<|channel|>` and channel, content type, of which only the role must be there. Ids agree with
/// crate `openai-harmony` 0.0.8. Source: OpenAI, *Harmony response format*,
/// <https://github.com/openai/harmony/blob/main/docs/format.md>.
///
/// ```
/// # use gpt_gamma::chat::{Harmony, Message, MissingMarker, Options};
/// # use gpt_gamma::tokenizer::Tokenizer;
/// # fn prompt(tokenizer: &Tokenizer) -> Result<Vec<u32>, MissingMarker> {
/// let harmony = Harmony::new(tokenizer)?;
/// let prompt = harmony.render(&[Message::user("What is 2 + 2?")], &Options::default());
/// # Ok(prompt)
/// # }
/// ```
#[derive(Debug, Clone, Copy)]
pub struct Harmony<'t> {
    pub(super) tokenizer: &'t Tokenizer,
    pub(super) markers: Markers,
}

/// The ids of the format's control tokens.
#[derive(Debug, Clone, Copy)]
pub(super) struct Markers {
    pub(super) start: u32,
    pub(super) channel: u32,
    pub(super) constrain: u32,
    pub(super) message: u32,
    pub(super) end: u32,
    pub(super) call: u32,
    pub(super) return_: u32,
    /// No part of the format, but models end with it.
    pub(super) end_of_text: Option<u32>,
}

/// A vocabulary is not made for harmony.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the vocabulary has no control token {name}, which the harmony format needs; use the model's chat template")]
pub struct MissingMarker {
    /// The control token's text.
    pub name: &'static str,
}

/// What [`Harmony::render`] says besides the messages. The default has no date and no tools and asks for medium effort.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// First line of the system message; gpt-oss was trained on the default. Say who the model is to play as the
    /// developer.
    pub identity: Option<String>,
    /// When the training data ends; default `2024-06`.
    pub knowledge_cutoff: Option<String>,
    /// Today, if the model is to know.
    pub date: Option<Date>,
    /// How long to think.
    pub reasoning: Reasoning,
    /// Functions that the model may call.
    pub tools: Vec<Tool>,
    /// How much earlier thinking to repeat.
    pub analysis: AnalysisHistory,
    /// Whether to end with `<|start|>assistant`, so that the model answers; default true.
    pub generation_prompt: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            identity: Some("You are ChatGPT, a large language model trained by OpenAI.".to_owned()),
            knowledge_cutoff: Some("2024-06".to_owned()),
            date: None,
            reasoning: Reasoning::default(),
            tools: Vec::new(),
            analysis: AnalysisHistory::default(),
            generation_prompt: true,
        }
    }
}

/// How long the model is to think.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Reasoning {
    /// Hardly.
    Low,
    /// The default.
    #[default]
    Medium,
    /// At length.
    High,
}

impl Reasoning {
    /// From little to much.
    pub const ALL: [Reasoning; 3] = [Reasoning::Low, Reasoning::Medium, Reasoning::High];

    /// The word in the system message.
    pub fn name(self) -> &'static str {
        match self {
            Reasoning::Low => "low",
            Reasoning::Medium => "medium",
            Reasoning::High => "high",
        }
    }
}

/// Which analysis messages of the past the model sees again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum AnalysisHistory {
    /// Those after the last final message, so that thinking survives between a function's call and its answer, and ends
    /// with the turn. This is what the format asks for.
    #[default]
    Unfinished,
    /// As crate `openai-harmony` does it: all, or those after the first final message if the model's last message is
    /// final.
    AfterFirstFinal,
    /// All.
    All,
}

impl AnalysisHistory {
    /// Number of messages at the front among which analysis is left out.
    fn n_without(self, conversation: &[Message]) -> usize {
        let is_final = |message: &Message| message.channel == Some(Channel::Final);
        let last_final = || conversation.iter().rposition(is_final);
        match self {
            AnalysisHistory::All => 0,
            AnalysisHistory::Unfinished => last_final().unwrap_or(0),
            AnalysisHistory::AfterFirstFinal => {
                let last_said = conversation.iter().rfind(|message| message.role == Role::Assistant);
                let first_final = conversation.iter().position(is_final);
                first_final.filter(|_| last_said.is_some_and(is_final)).unwrap_or(0)
            }
        }
    }
}

/// A stretch of a rendered conversation.
enum Piece<'a> {
    Marker(u32),
    /// Encoded alone: no token spans two pieces.
    Text(&'a str),
}

impl<'t> Harmony<'t> {
    /// The format in `tokenizer`'s ids.
    ///
    /// # Errors
    ///
    /// [`MissingMarker`] if one of the format's seven markers is no control token of the vocabulary.
    pub fn new(tokenizer: &'t Tokenizer) -> Result<Harmony<'t>, MissingMarker> {
        let id = |name| tokenizer.special(name).ok_or(MissingMarker { name });
        let markers = Markers {
            start: id("<|start|>")?,
            channel: id("<|channel|>")?,
            constrain: id("<|constrain|>")?,
            message: id("<|message|>")?,
            end: id("<|end|>")?,
            call: id("<|call|>")?,
            return_: id("<|return|>")?,
            end_of_text: tokenizer.special("<|endoftext|>"),
        };
        Ok(Harmony { tokenizer, markers })
    }

    /// The ids of `conversation`: the system message made from `options`, the messages, the generation prompt.
    ///
    /// - A message of the system or the developer becomes a developer message with its text as instructions. The first
    ///   of them also lists the tools; without any, a message of its own does.
    /// - Analysis goes as [`Options::analysis`] says. No message ends with `<|return|>`, which belongs to generation only:
    ///   calls end with `<|call|>`, all others with `<|end|>`.
    pub fn render(&self, conversation: &[Message], options: &Options) -> Vec<u32> {
        let mut ids = Vec::new();
        self.pieces(conversation, options, &mut |piece| match piece {
            Piece::Marker(id) => ids.push(id),
            Piece::Text(text) => ids.extend(self.tokenizer.encode(text)),
        });
        ids
    }

    /// As [`Harmony::render`], the ids decoded: for people and logs. Encoding this text again would turn markers that a
    /// message only quotes into real ones.
    pub fn render_text(&self, conversation: &[Message], options: &Options) -> String {
        let mut text = String::new();
        self.pieces(conversation, options, &mut |piece| match piece {
            Piece::Marker(id) => text += &String::from_utf8_lossy(self.tokenizer.token_bytes(id).unwrap_or_default()),
            Piece::Text(piece) => text += piece,
        });
        text
    }

    /// Reads what the model writes after a generation prompt.
    pub fn parser(&self) -> Parser<'t> {
        Parser::new(*self)
    }

    fn pieces(&self, conversation: &[Message], options: &Options, sink: &mut dyn FnMut(Piece)) {
        self.message(&Message::new(Role::System, system_text(options)), sink);
        let is_instruction = |message: &Message| matches!(message.role, Role::System | Role::Developer);
        let mut tools = Some(options.tools.as_slice()).filter(|tools| !tools.is_empty());
        if tools.is_some() && !conversation.iter().any(is_instruction) {
            self.message(&Message::new(Role::Developer, developer_text(None, tools.take())), sink);
        }
        let n_without = options.analysis.n_without(conversation);
        for (index, message) in conversation.iter().enumerate() {
            if index < n_without && message.channel == Some(Channel::Analysis) {
                continue;
            }
            if is_instruction(message) {
                let content = developer_text(Some(&message.content), tools.take());
                self.message(&Message { role: Role::Developer, content, ..message.clone() }, sink);
            } else {
                self.message(message, sink);
            }
        }
        if options.generation_prompt {
            sink(Piece::Marker(self.markers.start));
            sink(Piece::Text(Role::Assistant.name()));
        }
    }

    /// One message as it stands.
    fn message(&self, message: &Message, sink: &mut dyn FnMut(Piece)) {
        let markers = &self.markers;
        sink(Piece::Marker(markers.start));
        sink(Piece::Text(message.role.name()));
        // `all` is the default recipient, which is not written.
        if let Some(recipient) = message.recipient.as_deref().filter(|&recipient| recipient != "all") {
            sink(Piece::Text(&format!(" to={recipient}")));
        }
        if let Some(channel) = &message.channel {
            sink(Piece::Marker(markers.channel));
            sink(Piece::Text(channel.name()));
        }
        match &message.content_type {
            None => {}
            Some(ContentType::Named(name)) => sink(Piece::Text(&format!(" {name}"))),
            Some(ContentType::Constrained(name)) => {
                sink(Piece::Text(" "));
                sink(Piece::Marker(markers.constrain));
                sink(Piece::Text(name));
            }
        }
        sink(Piece::Marker(markers.message));
        sink(Piece::Text(&message.content));
        let is_call = message.role == Role::Assistant && message.recipient.is_some();
        sink(Piece::Marker(if is_call { markers.call } else { markers.end }));
    }
}

fn system_text(options: &Options) -> String {
    let facts = [
        options.identity.clone(),
        options.knowledge_cutoff.as_ref().map(|month| format!("Knowledge cutoff: {month}")),
        options.date.map(|date| format!("Current date: {date}")),
    ];
    let facts: Vec<String> = facts.into_iter().flatten().collect();
    let mut sections = Vec::new();
    if !facts.is_empty() {
        sections.push(facts.join("\n"));
    }
    sections.push(format!("Reasoning: {}", options.reasoning.name()));
    let mut channels =
        "# Valid channels: analysis, commentary, final. Channel must be included for every message.".to_owned();
    if !options.tools.is_empty() {
        channels += "\nCalls to these tools must go to the commentary channel: 'functions'.";
    }
    sections.push(channels);
    sections.join("\n\n")
}

fn developer_text(instructions: Option<&str>, tools: Option<&[Tool]>) -> String {
    let instructions = instructions.map(|text| format!("# Instructions\n\n{text}"));
    let tools = tools.map(typescript::tools_section);
    [instructions, tools].into_iter().flatten().collect::<Vec<_>>().join("\n\n")
}
