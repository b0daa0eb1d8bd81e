//! Conversations to ids and ids to messages: rendering against the reference renderer's ids, a parser that nothing
//! stops, and Jinja templates against Python's Jinja.

#![expect(clippy::unwrap_used, reason = "a test that panics fails, which is what it should do")]

mod parsing;
mod rendering;
mod templates;
mod vocabularies;

use gpt_gamma::chat::{Channel, ContentType, Message, Role, Tool};
use serde_json::Value;

/// The cases of a golden file.
fn golden(name: &str) -> Vec<Value> {
    let path = format!("{}/chat/golden/{name}.json", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_slice(&std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}"))).unwrap()
}

/// A golden case's `messages`.
fn messages(case: &Value) -> Vec<Message> {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let message = |message: &Value| Message {
        role: match message["role"].as_str().unwrap() {
            "tool" => Role::Tool(text(&message["name"]).unwrap()),
            name => Role::from_name(name).unwrap(),
        },
        channel: message["channel"].as_str().map(Channel::from_name),
        recipient: text(&message["recipient"]),
        content_type: text(&message["content_type"]).map(|name| match name.strip_prefix("<|constrain|>") {
            Some(name) => ContentType::Constrained(name.to_owned()),
            None => ContentType::Named(name),
        }),
        content: text(&message["content"]).unwrap(),
    };
    case["messages"].as_array().unwrap().iter().map(message).collect()
}

/// A golden case's `tools`.
fn tools(case: &Value) -> Vec<Tool> {
    let tool = |tool: &Value| Tool {
        name: tool["name"].as_str().unwrap().to_owned(),
        description: tool["description"].as_str().unwrap().to_owned(),
        parameters: Some(tool["parameters"].clone()).filter(|schema| !schema.is_null()),
    };
    case["tools"].as_array().into_iter().flatten().map(tool).collect()
}
