//! Conversations as models read and write them: the harmony format of gpt-oss, and other models' Jinja templates.
//!
//! Invariants: pure, so no I/O, no clock and no device. Only a format's own markers become control tokens; whatever a
//! message says, `<|start|>` included, is encoded as the text it is. What a model writes is never refused and never
//! lost, however badly it is formed: [`Parser`] turns ids into messages and gives back every byte of text.

mod harmony;
mod parser;
mod template;
mod typescript;

use std::fmt;

pub use self::harmony::{AnalysisHistory, Harmony, MissingMarker, Options, Reasoning};
pub use self::parser::{Assembler, Event, Header, Parser, Stop};
pub use self::template::{ChatTemplate, Error as TemplateError, Input};

/// Who speaks. In harmony, a text before others weighs more where they conflict.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Role {
    /// What users of other formats call the system prompt. Harmony keeps its own system message (see [`Options`]) and
    /// says this one as the developer.
    System,
    /// Instructions to the model.
    Developer,
    /// The person.
    User,
    /// The model.
    Assistant,
    /// What a tool answered, by the tool's full name, such as `functions.weather`.
    Tool(String),
}

impl Role {
    /// The name in a harmony header: the tool's own for a tool.
    pub fn name(&self) -> &str {
        match self {
            Role::System => "system",
            Role::Developer => "developer",
            Role::User => "user",
            Role::Assistant => "assistant",
            Role::Tool(name) => name,
        }
    }

    /// The role with that fixed name; `None` for the name of a tool.
    pub fn from_name(name: &str) -> Option<Role> {
        [Role::System, Role::Developer, Role::User, Role::Assistant].into_iter().find(|role| role.name() == name)
    }
}

/// What a message of the model is for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Channel {
    /// Thinking, not meant for the user.
    Analysis,
    /// Calls of functions, and what the model says about them.
    Commentary,
    /// The answer.
    Final,
    /// A channel that the format does not know, by its name.
    Other(String),
}

impl Channel {
    /// The name in a harmony header.
    pub fn name(&self) -> &str {
        match self {
            Channel::Analysis => "analysis",
            Channel::Commentary => "commentary",
            Channel::Final => "final",
            Channel::Other(name) => name,
        }
    }

    /// The channel of that name, known or not.
    pub fn from_name(name: &str) -> Channel {
        let known = [Channel::Analysis, Channel::Commentary, Channel::Final];
        let found = known.into_iter().find(|channel| channel.name() == name);
        found.unwrap_or_else(|| Channel::Other(name.to_owned()))
    }
}

impl fmt::Display for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a message's text is written in, as its header says.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ContentType {
    /// A bare word, such as `code`.
    Named(String),
    /// After `<|constrain|>`, such as `json`.
    Constrained(String),
}

/// One message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Who says it.
    pub role: Role,
    /// The channel; formats without channels do not write it.
    pub channel: Option<Channel>,
    /// Whom it is for, where that is not the other side: the function that the model calls, such as
    /// `functions.weather`, or `assistant` for a tool's answer.
    pub recipient: Option<String>,
    /// What the text is written in.
    pub content_type: Option<ContentType>,
    /// The text.
    pub content: String,
}

impl Message {
    /// A message without channel, recipient and content type.
    pub fn new(role: Role, content: impl Into<String>) -> Message {
        Message { role, channel: None, recipient: None, content_type: None, content: content.into() }
    }

    /// A message of the user.
    pub fn user(content: impl Into<String>) -> Message {
        Message::new(Role::User, content)
    }

    /// A message of the model on `channel`.
    pub fn assistant(channel: Channel, content: impl Into<String>) -> Message {
        Message { channel: Some(channel), ..Message::new(Role::Assistant, content) }
    }
}

/// A function that the model may call.
#[derive(Debug, Clone, PartialEq)]
pub struct Tool {
    /// Its name without namespace, such as `weather`.
    pub name: String,
    /// What it does, in any number of lines.
    pub description: String,
    /// Its parameters, in the JSON schema of one object, whose properties keep their order; `None` if it takes none.
    pub parameters: Option<serde_json::Value>,
}
