//! What a model writes in harmony, id by id, to messages: tolerant, since models err and users want the text anyway.

use std::mem;

use super::{Channel, ContentType, Harmony, Message, Role};
use crate::tokenizer::Error;

/// Reads ids as a model writes them and tells messages, channels and text apart, by id and never by text.
///
/// Nothing is refused and nothing lost: [`Event::bytes`] of all events, concatenated, are the bytes of all ids that are
/// not special ([`Tokenizer::is_special`]). Where the format is broken, the parser goes on as follows.
///
/// - Text that cannot be a header any more becomes the content of a message. So does a header that ends without
///   `<|message|>`. After `<|start|>`, a known role or channel in front still counts as header.
/// - `<|start|>` or `<|channel|>` inside a message ends it and begins the next; the latter keeps the role.
/// - A header without role is the assistant's; without channel, [`Header::is_answer`] holds. An unknown channel keeps its
///   name.
/// - `<|message|>`, `<|constrain|>` and reserved tokens inside content are skipped.
///
/// The parser starts where a generation prompt ends, inside the header of a message of the assistant.
///
/// [`Tokenizer::is_special`]: crate::tokenizer::Tokenizer::is_special
#[derive(Debug, Clone)]
pub struct Parser<'t> {
    harmony: Harmony<'t>,
    state: State,
}

/// What one id brought about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A message begins.
    MessageStart(Header),
    /// Content of the message that has begun: whole characters, and such bytes as are no UTF-8. Never empty.
    Text(Vec<u8>),
    /// The message that has begun is over.
    MessageEnd,
    /// The model has nothing more to say. Comes after [`Event::MessageEnd`].
    Stop(Stop),
}

impl Event {
    /// The text that the event stands for: of a header as it was written, without markers, or of content.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Event::MessageStart(header) => &header.text,
            Event::Text(bytes) => bytes,
            Event::MessageEnd | Event::Stop(_) => &[],
        }
    }
}

/// How the model stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stop {
    /// `<|return|>`: the answer is complete.
    Return,
    /// `<|call|>`: a function is to be called, and the model wants its result.
    Call,
    /// `<|endoftext|>`, which the format does not provide for.
    EndOfText,
}

/// What stands before a message's content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Who speaks.
    pub role: Role,
    /// The channel, if one was named.
    pub channel: Option<Channel>,
    /// Whom the message is for; a function if the model calls one.
    pub recipient: Option<String>,
    /// What the content is written in, if that was said.
    pub content_type: Option<ContentType>,
    /// The header as it was written, without markers.
    pub text: Vec<u8>,
}

impl Header {
    /// Whether the content is for the user: on the final channel, or without channel and recipient.
    pub fn is_answer(&self) -> bool {
        match self.channel {
            Some(Channel::Final) => true,
            None => self.recipient.is_none(),
            _ => false,
        }
    }
}

#[derive(Debug, Clone)]
enum State {
    Header(Pending),
    /// `held`: the start of a character whose rest has not come yet.
    Content {
        role: Role,
        held: Vec<u8>,
    },
}

/// A header as far as it has come.
#[derive(Debug, Clone)]
struct Pending {
    /// Whose message it is if it names no role.
    role: Role,
    /// Whether `<|start|>` came, so that the first word is a role or a tool.
    after_start: bool,
    /// White space before the header.
    lead: Vec<u8>,
    /// Sections in order, the first being of [`Kind::Role`]. All but the last are sound.
    sections: Vec<(Kind, Vec<u8>)>,
}

/// What a section of a header comes after.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// `<|start|>`, or nothing.
    Role,
    /// `<|channel|>`.
    Channel,
    /// `<|constrain|>`.
    Constrain,
}

/// What a section says.
#[derive(Debug, Default)]
struct Fields<'a> {
    /// The role or channel.
    name: Option<&'a str>,
    recipient: Option<&'a str>,
    content_type: Option<&'a str>,
}

/// Longer sections are text: real ones have at most a few words, and text should not be held back for long.
const MAX_SECTION_BYTES: usize = 256;

impl<'t> Parser<'t> {
    pub(super) fn new(harmony: Harmony<'t>) -> Parser<'t> {
        Parser { harmony, state: State::Header(Pending::new(Role::Assistant, false)) }
    }

    /// What `id` brings about; often nothing, while a header or a character is incomplete.
    ///
    /// # Errors
    ///
    /// [`Error::IdOutsideVocabulary`] if `id` is not below the size of the vocabulary; the parser is then as before.
    pub fn push(&mut self, id: u32) -> Result<Vec<Event>, Error> {
        let bytes = self.harmony.tokenizer.token_bytes(id)?;
        let mut events = Vec::new();
        if !self.harmony.tokenizer.is_special(id) {
            self.text(bytes, &mut events);
            return Ok(events);
        }
        let markers = self.harmony.markers;
        let stop = match id {
            _ if id == markers.return_ => Some(Stop::Return),
            _ if id == markers.call => Some(Stop::Call),
            _ if Some(id) == markers.end_of_text => Some(Stop::EndOfText),
            _ => None,
        };
        let is_marker = [markers.start, markers.channel, markers.constrain, markers.message, markers.end].contains(&id);
        if !is_marker && stop.is_none() {
            return Ok(events);
        }
        if let State::Header(pending) = &self.state
            && !pending.is_sound(false)
        {
            self.give_up_header(&mut events);
        }
        match &self.state {
            _ if id == markers.start => self.start(&mut events),
            _ if id == markers.channel => self.section(Kind::Channel, &mut events),
            State::Header(_) if id == markers.constrain => self.section(Kind::Constrain, &mut events),
            State::Header(pending) if id == markers.message => {
                let header = pending.header(pending.text().len());
                self.state = State::Content { role: header.role.clone(), held: Vec::new() };
                events.push(Event::MessageStart(header));
            }
            _ if id == markers.end || stop.is_some() => self.end(&mut events),
            // `<|constrain|>` or `<|message|>` in content.
            _ => {}
        }
        events.extend(stop.map(Event::Stop));
        Ok(events)
    }

    /// What is left when no more ids come: text held back, and the end of a message that has none.
    pub fn finish(mut self) -> Vec<Event> {
        let mut events = Vec::new();
        self.end(&mut events);
        events
    }

    fn text(&mut self, bytes: &[u8], events: &mut Vec<Event>) {
        match &mut self.state {
            State::Header(pending) => {
                pending.last().extend_from_slice(bytes);
                if !pending.is_sound(true) {
                    self.give_up_header(events);
                }
            }
            State::Content { held, .. } => {
                held.extend_from_slice(bytes);
                let rest = held.split_off(held.len() - incomplete_tail(held));
                let whole = mem::replace(held, rest);
                if !whole.is_empty() {
                    events.push(Event::Text(whole));
                }
            }
        }
    }

    /// Makes the header that is no header a message of which only a known role and channel are header.
    fn give_up_header(&mut self, events: &mut Vec<Event>) {
        let State::Header(pending) = &self.state else { return };
        let mut text = pending.text();
        let content = text.split_off(pending.n_known());
        let header = pending.header(text.len());
        self.state = State::Content { role: header.role.clone(), held: Vec::new() };
        events.push(Event::MessageStart(header));
        self.text(&content, events);
    }

    /// `<|start|>`.
    fn start(&mut self, events: &mut Vec<Event>) {
        let lead = match &self.state {
            // A line break before `<|start|>`, say, is not worth a message.
            State::Header(pending) if pending.is_blank() => pending.text(),
            _ => Vec::new(),
        };
        if lead.is_empty() {
            self.end(events);
        }
        self.state = State::Header(Pending { lead, ..Pending::new(Role::Assistant, true) });
    }

    /// `<|channel|>`, or `<|constrain|>` in a header.
    fn section(&mut self, kind: Kind, events: &mut Vec<Event>) {
        if let State::Content { role, .. } = &self.state {
            let role = role.clone();
            self.end(events);
            self.state = State::Header(Pending::new(role, false));
        }
        if let State::Header(pending) = &mut self.state {
            pending.sections.push((kind, Vec::new()));
        }
    }

    /// The end of a message, of whatever there is of it.
    fn end(&mut self, events: &mut Vec<Event>) {
        if let State::Header(pending) = &self.state {
            if pending.text().is_empty() {
                self.state = State::Header(Pending::new(Role::Assistant, false));
                return;
            }
            self.give_up_header(events);
        }
        let next = State::Header(Pending::new(Role::Assistant, false));
        if let State::Content { held, .. } = mem::replace(&mut self.state, next) {
            if !held.is_empty() {
                events.push(Event::Text(held));
            }
            events.push(Event::MessageEnd);
        }
    }
}

impl Pending {
    fn new(role: Role, after_start: bool) -> Pending {
        Pending { role, after_start, lead: Vec::new(), sections: vec![(Kind::Role, Vec::new())] }
    }

    fn last(&mut self) -> &mut Vec<u8> {
        &mut self.sections.last_mut().expect("there is always the section of the role").1
    }

    /// All of the text, in order.
    fn text(&self) -> Vec<u8> {
        self.sections.iter().fold(self.lead.clone(), |text, (_, section)| [text.as_slice(), section].concat())
    }

    /// Whether there is nothing but white space, in no section but the first.
    fn is_blank(&self) -> bool {
        self.sections.len() == 1 && self.text().iter().all(u8::is_ascii_whitespace)
    }

    /// Whether the last section reads as one; with `grows`, whether it can still become one.
    fn is_sound(&self, grows: bool) -> bool {
        self.sections.last().is_some_and(|(kind, section)| self.read(*kind, section, grows).is_some())
    }

    /// What a section says; `None` if it cannot be one.
    fn read<'a>(&self, kind: Kind, section: &'a [u8], grows: bool) -> Option<Fields<'a>> {
        let text = match str::from_utf8(section) {
            Ok(text) => text,
            Err(error) if grows && error.error_len().is_none() => {
                str::from_utf8(&section[..error.valid_up_to()]).ok()?
            }
            Err(_) => return None,
        };
        let words_only = text.trim_start();
        if text.len() > MAX_SECTION_BYTES || words_only.contains(char::is_control) {
            return None;
        }
        let n_words = text.split_whitespace().count();
        let mut fields = Fields::default();
        for (index, word) in text.split_whitespace().enumerate() {
            let grows = grows && index + 1 == n_words && text.ends_with(word);
            let is_name = index == 0
                && match kind {
                    Kind::Role => self.after_start && is_word(word) || is_role(word, grows),
                    Kind::Channel => is_word(word),
                    Kind::Constrain => false,
                };
            if let Some(recipient) = word.strip_prefix("to=").filter(|_| fields.recipient.is_none()) {
                fields.recipient = Some(recipient);
            } else if is_name {
                fields.name = Some(word);
            } else if grows && "to=".starts_with(word) && fields.recipient.is_none() {
                // Complete only with the next ids.
            } else if is_word(word)
                && fields.content_type.is_none()
                && (kind != Kind::Role || fields.recipient.is_some())
            {
                fields.content_type = Some(word);
            } else {
                return None;
            }
        }
        Some(fields)
    }

    /// The header that the first `n` bytes are, all of their sections being sound.
    fn header(&self, n: usize) -> Header {
        let mut text = self.text();
        text.truncate(n);
        let mut header = Header { role: self.role.clone(), channel: None, recipient: None, content_type: None, text };
        let mut begin = self.lead.len();
        for (kind, section) in &self.sections {
            let section_end = begin + section.len();
            let within = &section[..n.clamp(begin, section_end) - begin];
            begin = section_end;
            let Some(fields) = self.read(*kind, within, false) else { continue };
            match (kind, fields.name) {
                (Kind::Role, Some(name)) => header.role = role_of(name),
                (Kind::Channel, Some(name)) => header.channel = Some(Channel::from_name(name)),
                _ => {}
            }
            if let Some(recipient) = fields.recipient.filter(|recipient| !recipient.is_empty()) {
                header.recipient = Some(recipient.to_owned());
            }
            if let Some(name) = fields.content_type.map(str::to_owned) {
                let is_constrained = *kind == Kind::Constrain;
                header.content_type =
                    Some(if is_constrained { ContentType::Constrained(name) } else { ContentType::Named(name) });
            }
        }
        header
    }

    /// How much at the front is header although no `<|message|>` follows: all sections but the last, and of that a role
    /// after `<|start|>`, a known channel, or white space alone.
    fn n_known(&self) -> usize {
        let Some(((kind, section), before)) = self.sections.split_last() else { return 0 };
        let n_before = self.lead.len() + before.iter().map(|(_, section)| section.len()).sum::<usize>();
        let text = section.utf8_chunks().next().map_or("", |chunk| chunk.valid());
        if section.iter().all(u8::is_ascii_whitespace) {
            return n_before + section.len();
        }
        let blank = text.len() - text.trim_start().len();
        let word = text.split_whitespace().next().unwrap_or_default();
        let n_name = match kind {
            Kind::Role if !self.after_start => 0,
            Kind::Role if is_role(word, false) => word.len(),
            // `assistantHello`: the role is what must come here.
            Kind::Role if word.starts_with(Role::Assistant.name()) => Role::Assistant.name().len(),
            Kind::Channel if !matches!(Channel::from_name(word), Channel::Other(_)) => word.len(),
            _ => 0,
        };
        if n_name == 0 { n_before } else { n_before + blank + n_name }
    }
}

/// The fixed role that `name` is, with `:` and the speaker's own name behind it or not; else the tool of that name.
fn role_of(name: &str) -> Role {
    let bare = name.split_once(':').map_or(name, |(role, _)| role);
    Role::from_name(bare).unwrap_or_else(|| Role::Tool(name.to_owned()))
}

/// Whether `word` is a fixed role; with `grows`, whether it can become one.
fn is_role(word: &str, grows: bool) -> bool {
    let roles = [Role::System, Role::Developer, Role::User, Role::Assistant];
    !matches!(role_of(word), Role::Tool(_)) || grows && roles.iter().any(|role| role.name().starts_with(word))
}

/// Whether `word` can be the name of a tool, a channel or a content type, and not just any text.
fn is_word(word: &str) -> bool {
    word.chars().all(|letter| letter.is_alphanumeric() || "_-.:/+".contains(letter))
}

/// Length of the longest end of `bytes` that more bytes could complete to a character.
fn incomplete_tail(bytes: &[u8]) -> usize {
    let tail = bytes.utf8_chunks().last().map_or(&[][..], |chunk| chunk.invalid());
    if str::from_utf8(tail).is_err_and(|error| error.error_len().is_none()) { tail.len() } else { 0 }
}

/// Makes the messages that go into the history out of a parser's events.
///
/// Messages without text are left out, since nothing was said. What the assistant says without channel is final: the
/// format wants a channel for every message. Bytes that are no UTF-8 become U+FFFD.
#[derive(Debug, Clone, Default)]
pub struct Assembler {
    messages: Vec<Message>,
    open: Option<(Header, Vec<u8>)>,
}

impl Assembler {
    /// Takes the next event.
    pub fn push(&mut self, event: &Event) {
        match event {
            Event::MessageStart(header) => {
                self.close();
                self.open = Some((header.clone(), Vec::new()));
            }
            Event::Text(bytes) => {
                if let Some((_, content)) = &mut self.open {
                    content.extend_from_slice(bytes);
                }
            }
            Event::MessageEnd => self.close(),
            Event::Stop(_) => {}
        }
    }

    /// The messages; one that has not ended is among them.
    pub fn finish(mut self) -> Vec<Message> {
        self.close();
        self.messages
    }

    fn close(&mut self) {
        let Some((header, content)) = self.open.take().filter(|(_, content)| !content.is_empty()) else { return };
        let fallback = (header.role == Role::Assistant && header.recipient.is_none()).then_some(Channel::Final);
        self.messages.push(Message {
            role: header.role,
            channel: header.channel.or(fallback),
            recipient: header.recipient,
            content_type: header.content_type,
            content: String::from_utf8_lossy(&content).into_owned(),
        });
    }
}
