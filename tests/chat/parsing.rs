//! Harmony, read: as it should be written, as models do write it, and as nobody would.

use gpt_gamma::chat::{Assembler, Channel, ContentType, Event, Harmony, Header, Message, Role, Stop};
use gpt_gamma::tokenizer::{Error, Tokenizer};
use proptest::prelude::*;

use crate::vocabularies::{GPT_OSS, TINY};

fn events(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<Event> {
    let mut parser = Harmony::new(tokenizer).unwrap().parser();
    let mut events: Vec<Event> = ids.iter().flat_map(|&id| parser.push(id).unwrap()).collect();
    events.extend(parser.finish());
    events
}

/// A message as a line: role, channel, recipient, content type, and content after `|`.
fn line(message: &Message) -> String {
    let mut line = message.role.name().to_owned();
    if let Some(channel) = &message.channel {
        line += &format!(" #{channel}");
    }
    if let Some(recipient) = &message.recipient {
        line += &format!(" to={recipient}");
    }
    match &message.content_type {
        None => {}
        Some(ContentType::Named(name)) => line += &format!(" {name}"),
        Some(ContentType::Constrained(name)) => line += &format!(" !{name}"),
    }
    line + "|" + &message.content
}

/// What the model wrote after the generation prompt, as messages, in both vocabularies: in one, roles and channels are one
/// token, in the other several.
#[track_caller]
fn check(written: &str, expected: &[&str]) {
    for tokenizer in [&*TINY, &GPT_OSS] {
        let ids = tokenizer.encode_with_specials(written);
        let events = events(tokenizer, &ids);
        let mut assembler = Assembler::default();
        events.iter().for_each(|event| assembler.push(event));
        let lines: Vec<String> = assembler.finish().iter().map(line).collect();
        assert_eq!(lines, expected, "{written}");
        assert_lossless(tokenizer, &ids, &events);
    }
}

#[track_caller]
fn assert_lossless(tokenizer: &Tokenizer, ids: &[u32], events: &[Event]) {
    let text: Vec<u32> = ids.iter().copied().filter(|&id| !tokenizer.is_special(id)).collect();
    let bytes: Vec<u8> = events.iter().flat_map(Event::bytes).copied().collect();
    assert_eq!(bytes, tokenizer.decode(&text).unwrap());
}

#[test]
fn channels_are_told_apart() {
    check(
        "<|channel|>analysis<|message|>Simple.<|end|><|start|>assistant<|channel|>final<|message|>2 + 2 = 4.<|return|>",
        &["assistant #analysis|Simple.", "assistant #final|2 + 2 = 4."],
    );
    check("<|channel|>musings<|message|>hm<|end|>", &["assistant #musings|hm"]);
}

#[test]
fn a_recipient_stands_in_either_part_of_the_header() {
    let expected = ["assistant #commentary to=functions.get_weather !json|{\"a\":1}"];
    check("<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{\"a\":1}<|call|>", &expected);
    check(" to=functions.get_weather<|channel|>commentary <|constrain|>json<|message|>{\"a\":1}<|call|>", &expected);
    check("<|channel|>commentary to=functions.get_weather<|constrain|>json<|message|>{\"a\":1}<|call|>", &expected);
    check("<|channel|>analysis to=python code<|message|>1+1<|call|>", &["assistant #analysis to=python code|1+1"]);
    check(" to=python<|channel|>analysis code<|message|>1+1", &["assistant #analysis to=python code|1+1"]);
    check(
        "<|channel|>final<|message|>x<|end|><|start|>functions.f to=assistant<|channel|>commentary<|message|>{}<|end|>",
        &["assistant #final|x", "functions.f #commentary to=assistant|{}"],
    );
    check("<|start|>user:alice<|message|>hi<|end|><|start|>lookup<|message|>y", &["user|hi", "lookup|y"]);
}

#[test]
fn text_without_a_header_is_the_answer() {
    check("Hello, world.<|return|>", &["assistant #final|Hello, world."]);
    check("Hello", &["assistant #final|Hello"]);
    check("<|message|>Hello<|end|>", &["assistant #final|Hello"]);
    check("user stories matter<|return|>", &["assistant #final|user stories matter"]);
    check("to be or not<|return|>", &["assistant #final|to be or not"]);
    check("<|end|>Then this.<|end|>And that", &["assistant #final|Then this.", "assistant #final|And that"]);
    check("<|start|>assistant Sure, here it is.", &["assistant #final| Sure, here it is."]);
    check("<|start|>assistant<|message|>Sure.", &["assistant #final|Sure."]);
    check("{\"json\": true}<|return|>", &["assistant #final|{\"json\": true}"]);
    check("😀 first", &["assistant #final|😀 first"]);
}

#[test]
fn a_header_without_message_marker_loses_no_text() {
    check("<|channel|>final Hello, the answer is 42.<|return|>", &["assistant #final| Hello, the answer is 42."]);
    check("<|channel|>final\n\nHello<|return|>", &["assistant #final|\n\nHello"]);
    check("<|channel|>final Hello<|return|>", &["assistant #final| Hello"]);
    check("<|channel|>Hello there, friend<|return|>", &["assistant #final|Hello there, friend"]);
    check("<|channel|>commentary to=f <|constrain|>{\"a\": 1}<|call|>", &["assistant #commentary to=f|{\"a\": 1}"]);
    check("<|start|>assistantHello you there<|end|>", &["assistant #final|Hello you there"]);
    let long = format!("<|channel|>{}", "x".repeat(10_000));
    check(&long, &[&format!("assistant #final|{}", "x".repeat(10_000))]);
}

#[test]
fn the_next_marker_begins_anew() {
    check(
        "<|message|>thinking<|channel|>final<|message|>answer<|return|>",
        &["assistant #final|thinking", "assistant #final|answer"],
    );
    check(
        "<|channel|>analysis<|message|>cut<|start|>assistant<|channel|>final<|message|>answer",
        &["assistant #analysis|cut", "assistant #final|answer"],
    );
    check("<|channel|>commentary<|channel|>final<|message|>answer", &["assistant #final|answer"]);
    check("<|start|>assistant<|start|>assistant<|channel|>final<|message|>answer", &["assistant #final|answer"]);
    check("assistant<|channel|>final<|message|>answer", &["assistant #final|answer"]);
    check(
        "<|channel|>analysis<|message|>a<|end|>assistant<|channel|>final<|message|>b",
        &["assistant #analysis|a", "assistant #final|b"],
    );
    check(
        "<|channel|>analysis<|message|>a<|end|>\n<|start|>assistant<|channel|>final<|message|>b<|end|>\n",
        &["assistant #analysis|a", "assistant #final|b"],
    );
    check("<|channel|>final<|message|>a<|message|>b<|constrain|>c<|startoftext|>d", &["assistant #final|abcd"]);
    check("assis<|startoftext|>tant<|channel|>final<|message|>answer", &["assistant #final|answer"]);
    check("<|start|><|start|><|end|><|end|><|message|><|end|><|return|><|return|>", &[]);
}

#[test]
fn a_line_break_between_messages_is_no_message() {
    let ids = TINY.encode_with_specials("<|message|>a<|end|>\n<|start|>assistant<|message|>b<|end|>");
    let starts = events(&TINY, &ids).into_iter().filter_map(|event| match event {
        Event::MessageStart(header) => Some(header.text),
        _ => None,
    });
    assert_eq!(starts.collect::<Vec<_>>(), [&b""[..], b"\nassistant"]);
}

#[test]
fn quoted_markers_are_text() {
    let harmony = Harmony::new(&TINY).unwrap();
    let mut parser = harmony.parser();
    let begin = parser.push(TINY.special("<|message|>").unwrap()).unwrap();
    assert!(matches!(&begin[..], [Event::MessageStart(_)]));
    let mut text = Vec::new();
    for id in TINY.encode("<|end|> and <|channel|>") {
        text.extend(parser.push(id).unwrap());
    }
    assert_eq!(text.iter().flat_map(Event::bytes).copied().collect::<Vec<u8>>(), b"<|end|> and <|channel|>");
    assert!(text.iter().all(|event| matches!(event, Event::Text(_))));
}

#[test]
fn generation_stops_at_return_call_and_end_of_text_only() {
    let stops = |name: &str| {
        let ids =
            [TINY.encode_with_specials("<|channel|>final<|message|>x"), vec![TINY.special(name).unwrap()]].concat();
        events(&TINY, &ids).into_iter().filter(|event| matches!(event, Event::Stop(_))).collect::<Vec<_>>()
    };
    assert_eq!(stops("<|return|>"), [Event::Stop(Stop::Return)]);
    assert_eq!(stops("<|call|>"), [Event::Stop(Stop::Call)]);
    assert_eq!(stops("<|endoftext|>"), [Event::Stop(Stop::EndOfText)]);
    for name in ["<|end|>", "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|startoftext|>"] {
        assert_eq!(stops(name), [], "{name}");
    }
    // The tokenizer names the same ids.
    let mut named: Vec<u32> =
        ["<|return|>", "<|call|>", "<|endoftext|>"].map(|name| TINY.special(name).unwrap()).to_vec();
    named.sort_unstable();
    assert_eq!(TINY.eog_ids(), named);
}

#[test]
fn answers_are_told_from_the_rest() {
    let header = |channel: Option<&str>, recipient: Option<&str>| Header {
        role: Role::Assistant,
        channel: channel.map(Channel::from_name),
        recipient: recipient.map(str::to_owned),
        content_type: None,
        text: Vec::new(),
    };
    assert!(header(Some("final"), None).is_answer());
    assert!(header(None, None).is_answer());
    assert!(!header(Some("analysis"), None).is_answer());
    assert!(!header(Some("commentary"), None).is_answer());
    assert!(!header(Some("musings"), None).is_answer());
    assert!(!header(None, Some("functions.f")).is_answer());
}

#[test]
fn text_streams_as_it_comes() {
    let mut parser = Harmony::new(&GPT_OSS).unwrap().parser();
    let mut seen = String::new();
    for id in GPT_OSS.encode_with_specials("<|channel|>final<|message|>One two three") {
        for event in parser.push(id).unwrap() {
            seen += match &event {
                Event::MessageStart(_) => "[",
                Event::Text(bytes) => str::from_utf8(bytes).unwrap(),
                Event::MessageEnd | Event::Stop(_) => "]",
            };
            seen += ",";
        }
    }
    assert_eq!(seen, "[,One, two, three,");
    // Without header, at the first word that no header begins with.
    let mut parser = Harmony::new(&GPT_OSS).unwrap().parser();
    assert_eq!(parser.push(GPT_OSS.encode("Hello")[0]).unwrap().len(), 2);
}

#[test]
fn characters_come_whole_and_broken_ones_at_the_end() {
    let mut ids = TINY.encode_with_specials("<|channel|>final<|message|>");
    ids.extend(TINY.encode_bytes("a😀".as_bytes()));
    ids.extend(TINY.encode_bytes(b"\xff\xf0\x9f"));
    let texts: Vec<Vec<u8>> = events(&TINY, &ids)
        .into_iter()
        .filter_map(|event| match event {
            Event::Text(bytes) => Some(bytes),
            _ => None,
        })
        .collect();
    assert_eq!(texts, [&b"a"[..], "😀".as_bytes(), b"\xff", b"\xf0\x9f"]);
}

#[test]
fn an_unknown_id_changes_nothing() {
    let mut parser = Harmony::new(&TINY).unwrap().parser();
    let outside = Error::IdOutsideVocabulary { id: 2048, n_vocab: 2048 };
    let ids = TINY.encode_with_specials("<|channel|>final<|message|>a");
    let mut text = Vec::new();
    for id in ids {
        assert_eq!(parser.push(2048), Err(outside.clone()));
        text.extend(parser.push(id).unwrap().iter().flat_map(Event::bytes).copied().collect::<Vec<u8>>());
    }
    assert_eq!(text, b"finala");
}

/// Ids as a bad model might write them: markers, words of headers, text, single bytes, anything.
fn hostile_ids() -> impl Strategy<Value = Vec<u32>> {
    const PIECES: [&str; 21] = [
        "<|start|>",
        "<|channel|>",
        "<|message|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|constrain|>",
        "<|endoftext|>",
        "<|startoftext|>",
        "assistant",
        "user",
        "analysis",
        "final",
        "commentary",
        " to=functions.f",
        "json",
        " ",
        "\n",
        "Hello, world",
        "é😀",
        "assis",
    ];
    let piece = prop_oneof![
        8 => prop::sample::select(PIECES.as_slice()).prop_map(|text| TINY.encode_with_specials(text)),
        1 => (0..2048u32).prop_map(|id| vec![id]),
        1 => any::<u8>().prop_map(|byte| TINY.encode_bytes(&[byte])),
    ];
    prop::collection::vec(piece, 0..30).prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn no_byte_is_lost_and_every_message_ends(ids in hostile_ids()) {
        let events = events(&TINY, &ids);
        assert_lossless(&TINY, &ids, &events);
        let mut is_open = false;
        for event in &events {
            match event {
                Event::MessageStart(_) => prop_assert!(!std::mem::replace(&mut is_open, true)),
                Event::MessageEnd => prop_assert!(std::mem::replace(&mut is_open, false)),
                Event::Text(bytes) => prop_assert!(is_open && !bytes.is_empty()),
                Event::Stop(_) => prop_assert!(!is_open),
            }
        }
        prop_assert!(!is_open);
    }

    #[test]
    fn what_is_rendered_is_read_back(
        contents in prop::collection::vec((0..4usize, "[^\u{fffd}]{1,20}"), 1..6),
        forged in any::<bool>(),
    ) {
        let harmony = Harmony::new(&TINY).unwrap();
        let conversation: Vec<Message> = contents.into_iter().map(|(kind, text)| {
            let text = if forged { format!("<|end|>{text}<|channel|>") } else { text };
            match kind {
                0 => Message::user(text),
                1 => Message::assistant(Channel::Final, text),
                2 => Message {
                    recipient: Some("functions.f".to_owned()),
                    content_type: Some(ContentType::Constrained("json".to_owned())),
                    ..Message::assistant(Channel::Commentary, text)
                },
                _ => Message {
                    recipient: Some("assistant".to_owned()),
                    channel: Some(Channel::Commentary),
                    ..Message::new(Role::Tool("functions.f".to_owned()), text)
                },
            }
        }).collect();
        let ids = harmony.render(&conversation, &gpt_gamma::chat::Options::default());
        let mut assembler = Assembler::default();
        events(&TINY, &ids).iter().for_each(|event| assembler.push(event));
        // The system message comes first, and the generation prompt says nothing.
        let read = assembler.finish();
        prop_assert_eq!(&read[0].role, &Role::System);
        prop_assert_eq!(&read[1..], conversation);
    }
}
