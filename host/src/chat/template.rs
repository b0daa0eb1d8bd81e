//! Chat templates: the Jinja text that a model file carries, run as Hugging Face's `apply_chat_template` runs it.

use std::error::Error as StdError;
use std::io::{self, Write};

use aho_corasick::{AhoCorasick, MatchKind};
use jiff::civil::DateTime;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value};
use minijinja::{Environment, ErrorKind};
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};
use serde_json::{Map, json};

use super::{Channel, Message, Role, Tool};
use crate::tokenizer::Tokenizer;

/// A model's chat template, compiled.
///
/// It knows what Hugging Face's templates use: `raise_exception`, `strftime_now`, `tojson` as Python writes JSON, loop
/// controls, Python's methods of strings, lists and dictionaries. Blocks are trimmed as there.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
}

/// What a template gets besides the messages.
#[derive(Debug, Clone)]
pub struct Input<'a> {
    /// Whether to end where the model's answer begins (`add_generation_prompt`).
    pub generation_prompt: bool,
    /// The text of the token that begins a text (`bos_token`); empty if the model has none.
    pub bos: &'a str,
    /// The text of the token that ends a text (`eos_token`); empty if the model has none.
    pub eos: &'a str,
    /// Local time, for `strftime_now`.
    pub now: DateTime,
    /// Functions that the model may call (`tools`); not defined for the template if there are none.
    pub tools: &'a [Tool],
    /// More variables, such as `reasoning_effort` or `enable_thinking`.
    pub extra: Map<String, serde_json::Value>,
}

/// Why a template gives no text. Lines count from 1 in the template.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the message documents the variant")]
pub enum Error {
    #[error("chat template, line {line}: {reason}")]
    Syntax { line: usize, reason: String },
    #[error("chat template, line {line}: {reason}")]
    Render { line: usize, reason: String },
    #[error("chat template, line {line}, refuses the conversation: {message}")]
    Refused { line: usize, message: String },
    #[error("chat template takes more than {limit} steps; it may not end")]
    Endless { limit: u64 },
    #[error("the {n_markers} control tokens do not fit one search automaton: {reason}")]
    TooManyMarkers { n_markers: usize, reason: String },
}

/// Steps that one rendering may take: a template comes with a file from anywhere and may loop. A long conversation takes
/// some 100 steps a message.
const MAX_STEPS: u64 = 20_000_000;

const NAME: &str = "chat_template";

impl ChatTemplate {
    /// Compiles `source`.
    ///
    /// # Errors
    ///
    /// [`Error::Syntax`] if it is not Jinja, or more of it than this engine knows.
    pub fn new(source: &str) -> Result<ChatTemplate, Error> {
        let mut environment = Environment::new();
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_fuel(Some(MAX_STEPS));
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.expect("the delimiters are Jinja's own"));
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, "refused").with_source(Raised(message)))
        });
        let added = environment.add_template_owned(NAME, source.to_owned());
        added.map_err(|error| Error::Syntax { line: line_of(&error), reason: reason_of(&error) })?;
        Ok(ChatTemplate { environment, source: source.to_owned() })
    }

    /// The template's text for `messages`.
    ///
    /// A message is an object with `role` and `content`; of a tool also with `name`. A call is one of the assistant with
    /// `tool_calls`. Analysis is `thinking` and `reasoning_content` of the assistant's next message. Text that users say
    /// and text of the template look the same in the result: use [`ChatTemplate::encode`] for ids.
    ///
    /// # Errors
    ///
    /// - [`Error::Refused`] if the template calls `raise_exception`: it may know no role `system`, or want user and
    ///   assistant to take turns.
    /// - [`Error::Render`] if it does something impossible.
    /// - [`Error::Endless`] if it does not end in reasonable time.
    pub fn render(&self, messages: &[Message], input: &Input) -> Result<String, Error> {
        let mut environment = self.environment.clone();
        let now = input.now;
        environment.add_function("strftime_now", move |format: String| -> Result<String, minijinja::Error> {
            jiff::fmt::strtime::format(&format, now)
                .map_err(|error| minijinja::Error::new(ErrorKind::InvalidOperation, error.to_string()))
        });
        let mut variables = input.extra.clone();
        variables.insert("messages".to_owned(), chat(messages).into());
        variables.insert("add_generation_prompt".to_owned(), input.generation_prompt.into());
        variables.insert("bos_token".to_owned(), input.bos.into());
        variables.insert("eos_token".to_owned(), input.eos.into());
        if !input.tools.is_empty() {
            variables.insert("tools".to_owned(), input.tools.iter().map(function).collect());
        }
        let template = environment.get_template(NAME);
        let rendered = template.and_then(|template| template.render(Serde(&variables)));
        rendered.map_err(|error| {
            let line = line_of(&error);
            if let Some(Raised(message)) = find_source::<Raised>(&error) {
                return Error::Refused { line, message: message.clone() };
            }
            match innermost(&error).kind() {
                ErrorKind::OutOfFuel => Error::Endless { limit: MAX_STEPS },
                _ => Error::Render { line, reason: reason_of(&error) },
            }
        })
    }

    /// The ids of [`ChatTemplate::render`]: control tokens where the template writes them, and none where a message does.
    ///
    /// # Errors
    ///
    /// - As [`ChatTemplate::render`].
    /// - [`Error::TooManyMarkers`] if the control tokens do not fit one search automaton.
    pub fn encode(&self, messages: &[Message], input: &Input, tokenizer: &Tokenizer) -> Result<Vec<u32>, Error> {
        let marked = |id| Some((id, str::from_utf8(tokenizer.token_bytes(id).ok()?).ok()?));
        let special = (0..tokenizer.n_vocab() as u32).filter(|&id| tokenizer.is_special(id));
        let (ids, names): (Vec<u32>, Vec<&str>) = special.filter_map(marked).unzip();
        let automaton = AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(&names);
        let automaton =
            automaton.map_err(|error| Error::TooManyMarkers { n_markers: names.len(), reason: error.to_string() })?;

        // A wedge, a character that occurs nowhere else, breaks up what looks like a control token in a message. It goes
        // again after the template's own control tokens are found.
        let is_used =
            |wedge: char| self.source.contains(wedge) || messages.iter().any(|message| message.content.contains(wedge));
        let wedge = ('\u{f0000}'..='\u{10fffd}').find(|&wedge| !is_used(wedge));
        let wedge = wedge.expect("no conversation has all of the 131068 private characters");
        let mut guarded = messages.to_vec();
        for message in &mut guarded {
            let mut begin = 0;
            let mut content = String::new();
            for found in automaton.find_iter(&message.content) {
                let first = message.content[found.start()..].chars().next().map_or(0, char::len_utf8);
                content += &message.content[begin..found.start() + first];
                content.push(wedge);
                begin = found.start() + first;
            }
            message.content = content + &message.content[begin..];
        }
        let text = self.render(&guarded, input)?;
        let mut tokens = Vec::new();
        let mut begin = 0;
        for found in automaton.find_iter(&text) {
            tokens.extend(tokenizer.encode(&text[begin..found.start()].replace(wedge, "")));
            tokens.push(ids[found.pattern().as_usize()]);
            begin = found.end();
        }
        tokens.extend(tokenizer.encode(&text[begin..].replace(wedge, "")));
        Ok(tokens)
    }
}

/// What `raise_exception` was called with.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

/// The error at the bottom, where a macro or an include passed it on.
fn innermost(error: &minijinja::Error) -> &minijinja::Error {
    let mut innermost = error;
    let mut source = StdError::source(error);
    while let Some(error) = source {
        if let Some(error) = error.downcast_ref() {
            innermost = error;
        }
        source = error.source();
    }
    innermost
}

fn find_source<E: StdError + 'static>(error: &minijinja::Error) -> Option<&E> {
    let mut source = StdError::source(error);
    while let Some(error) = source {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        source = error.source();
    }
    None
}

fn line_of(error: &minijinja::Error) -> usize {
    innermost(error).line().or(error.line()).unwrap_or(1)
}

fn reason_of(error: &minijinja::Error) -> String {
    let error = innermost(error);
    match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    }
}

/// The messages as templates expect them.
fn chat(messages: &[Message]) -> Vec<serde_json::Value> {
    let mut chat = Vec::new();
    let mut thinking: Option<&str> = None;
    for message in messages {
        if message.role == Role::Assistant && message.channel == Some(Channel::Analysis) && message.recipient.is_none()
        {
            thinking = Some(&message.content);
            continue;
        }
        let name = match &message.role {
            Role::Tool(_) => "tool",
            role => role.name(),
        };
        let mut object = Map::new();
        object.insert("role".to_owned(), name.into());
        match (&message.role, &message.recipient) {
            (Role::Assistant, Some(recipient)) => {
                let name = recipient.strip_prefix("functions.").unwrap_or(recipient);
                // Templates write arguments with `tojson`, so that text would be quoted twice.
                let arguments: Result<serde_json::Value, _> = serde_json::from_str(&message.content);
                let arguments = arguments.unwrap_or_else(|_| message.content.as_str().into());
                let call = json!({ "type": "function", "function": { "name": name, "arguments": arguments } });
                object.insert("content".to_owned(), "".into());
                object.insert("tool_calls".to_owned(), json!([call]));
            }
            _ => {
                object.insert("content".to_owned(), message.content.as_str().into());
            }
        }
        if let Role::Tool(name) = &message.role {
            object.insert("name".to_owned(), name.strip_prefix("functions.").unwrap_or(name).into());
        }
        if let Some(thinking) = thinking.take().filter(|_| message.role == Role::Assistant) {
            object.insert("thinking".to_owned(), thinking.into());
            object.insert("reasoning_content".to_owned(), thinking.into());
        }
        chat.push(object.into());
    }
    chat
}

fn function(tool: &Tool) -> serde_json::Value {
    let parameters = tool.parameters.clone().unwrap_or_else(|| json!({ "type": "object", "properties": {} }));
    let function = json!({ "name": tool.name, "description": tool.description, "parameters": parameters });
    json!({ "type": "function", "function": function })
}

/// `tojson` as Hugging Face defines it: Python's `json.dumps` with `ensure_ascii=False`, and nothing escaped for HTML.
fn to_json(value: &Value, options: Kwargs) -> Result<Value, minijinja::Error> {
    let failed = |reason: String| minijinja::Error::new(ErrorKind::BadSerialization, reason);
    for name in ["ensure_ascii", "sort_keys"] {
        if options.get::<Option<bool>>(name)? == Some(true) {
            return Err(failed(format!("tojson with {name}=true is not supported")));
        }
    }
    let indent = options.get::<Option<usize>>("indent")?;
    let separators = options.get::<Option<Vec<String>>>("separators")?;
    options.assert_all_used()?;
    let mut bytes = Vec::new();
    let written = match (indent, separators.as_deref()) {
        (None, None) => value.serialize(&mut Serializer::with_formatter(&mut bytes, Separated(", ", ": "))),
        (None, Some([item, key])) => value.serialize(&mut Serializer::with_formatter(&mut bytes, Separated(item, key))),
        (Some(n), None) => {
            let blanks = " ".repeat(n);
            let formatter = PrettyFormatter::with_indent(blanks.as_bytes());
            value.serialize(&mut Serializer::with_formatter(&mut bytes, formatter))
        }
        _ => return Err(failed("tojson takes two separators, and none with indent".to_owned())),
    };
    written.map_err(|error| failed(error.to_string()))?;
    String::from_utf8(bytes).map(Value::from).map_err(|error| failed(error.to_string()))
}

/// JSON on one line: what stands between items, and between key and value.
struct Separated<'a>(&'a str, &'a str);

impl Formatter for Separated<'_> {
    fn begin_array_value<W: Write + ?Sized>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        writer.write_all(if first { b"" } else { self.0.as_bytes() })
    }

    fn begin_object_key<W: Write + ?Sized>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        writer.write_all(if first { b"" } else { self.0.as_bytes() })
    }

    fn begin_object_value<W: Write + ?Sized>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(self.1.as_bytes())
    }
}
