//! Vocabularies and files that must not load, each by the variant that says why; and near misses that must.

use gpt_gamma::tokenizer::{Error, PreTokenizer, Tokenizer, Vocabulary};
use serde_json::{Value, json};

use crate::{alphabet, small_vocabulary, spell};

#[track_caller]
fn check(change: impl FnOnce(&mut Vocabulary), expected: Error) {
    let mut vocabulary = small_vocabulary();
    change(&mut vocabulary);
    assert_eq!(Tokenizer::from_vocabulary(vocabulary).unwrap_err(), expected);
}

fn text(text: &str) -> String {
    text.to_owned()
}

#[test]
fn the_small_vocabulary_works() {
    let tokenizer = Tokenizer::from_vocabulary(small_vocabulary()).unwrap();
    assert_eq!(tokenizer.encode("abcab"), [257, 256]);
    assert_eq!(tokenizer.encode("a<user defined>b"), [97, 260, 98]);
    assert_eq!(tokenizer.encode("<|end|>"), b"<|end|>".map(u32::from));
    assert_eq!(tokenizer.encode_with_specials("ab<|end|>c"), [256, 259, 99]);
    assert_eq!(tokenizer.eog_ids(), [258, 259], "without <|return|> and <|call|>, <|end|> ends");
    assert_eq!(tokenizer.encode_bytes(b"a\xf0\x9f b"), [97, 0xf0, 0x9f, 32, 98]);
    assert_eq!(tokenizer.decode(&[260, 261, 259]).unwrap(), b"<user defined><|end|>");
    assert_eq!(
        tokenizer.description(),
        "byte-level BPE, pre-tokenizer gpt-2, 262 tokens (258 normal, 2 control, 1 user-defined, 1 unused), 2 merges, \
         eos 258 <|endoftext|>, ends at 258 <|endoftext|>, 259 <|end|>"
    );
}

#[test]
fn the_longest_marker_wins() {
    let mut vocabulary = small_vocabulary();
    vocabulary.tokens.push(b"<|end|><|end|>".to_vec());
    vocabulary.token_types.as_mut().unwrap().push(3);
    let tokenizer = Tokenizer::from_vocabulary(vocabulary).unwrap();
    assert_eq!(tokenizer.encode_with_specials("<|end|><|end|><|end|>"), [262, 259]);
}

#[test]
fn other_models_and_pre_tokenizers() {
    check(|v| v.model = text("llama"), Error::UnsupportedModel { found: text("llama") });
    check(|v| v.pre = None, Error::MissingPreTokenizer);
    check(|v| v.pre = Some(text("llama-bpe")), Error::UnknownPreTokenizer { found: text("llama-bpe") });
    let message = Error::UnknownPreTokenizer { found: text("llama-bpe") }.to_string();
    assert_eq!(message, r#"tokenizer.ggml.pre "llama-bpe" is not supported; gpt-2, gpt-4o are"#);
}

#[test]
fn special_ids_outside_the_vocabulary() {
    let n_vocab = 262;
    let outside = |role, id| Error::SpecialOutsideVocabulary { role, id, n_vocab };
    check(|v| v.bos = Some(262), outside("bos_token_id", 262));
    check(|v| v.eos = Some(u32::MAX), outside("eos_token_id", u32::MAX));
    check(|v| v.eot = Some(262), outside("eot_token_id", 262));
    check(|v| v.eom = Some(262), outside("eom_token_id", 262));
    check(|v| v.unknown = Some(262), outside("unknown_token_id", 262));
    check(|v| v.padding = Some(262), outside("padding_token_id", 262));
}

#[test]
fn a_flag_that_needs_a_token_the_file_has_not() {
    check(|v| v.add_bos = true, Error::MissingSpecial { flag: "add_bos_token", role: "bos_token_id" });
    let without_eos = |v: &mut Vocabulary| (v.eos, v.add_eos) = (None, true);
    check(without_eos, Error::MissingSpecial { flag: "add_eos_token", role: "eos_token_id" });
}

#[test]
fn token_types_that_do_not_fit() {
    let types = |v: &mut Vocabulary| v.token_types.take().unwrap();
    let n_tokens = 262;
    check(|v| v.token_types = Some(types(v)[..261].to_vec()), Error::TypeCount { n_types: 261, n_tokens });
    check(|v| v.token_types.as_mut().unwrap().push(1), Error::TypeCount { n_types: 263, n_tokens });
    for found in [0, 6, -1, i32::MIN, i32::MAX] {
        check(|v| v.token_types.as_mut().unwrap()[7] = found, Error::UnknownTokenType { id: 7, found });
    }
}

#[test]
fn tokens_that_cannot_be() {
    check(|v| v.tokens[256] = b"\xff".to_vec(), Error::TokenNotUtf8 { id: 256 });
    check(|v| v.tokens[256].clear(), Error::EmptyToken { id: 256 });
    check(|v| v.tokens[259].clear(), Error::EmptyToken { id: 259 });
    check(|v| v.tokens[258] = b"ab".to_vec(), Error::DuplicateToken { first: 256, second: 258, text: text("ab") });
    let spaced = Error::NotByteLevel { id: 256, text: text("a b"), letter: ' ' };
    check(|v| v.tokens[256] = b"a b".to_vec(), spaced);
    check(|v| v.tokens[0xff] = "ÿÿ".into(), Error::MissingByte { byte: 0xff });
    check(|v| v.token_types.as_mut().unwrap()[0] = 3, Error::MissingByte { byte: 0 });
    check(|v| v.tokens.truncate(0), Error::SpecialOutsideVocabulary { role: "eos_token_id", id: 258, n_vocab: 0 });
}

#[test]
fn merges_that_cannot_be() {
    let merge = |line: &[u8]| {
        let line = line.to_vec();
        move |v: &mut Vocabulary| v.merges[1] = line
    };
    let bare = |line| Error::MergeWithoutSeparator { rank: 1, merge: text(line) };
    check(merge(b"abc"), bare("abc"));
    check(merge(b""), bare(""));
    check(merge(b" "), bare(" "));
    check(merge(b"ab "), bare("ab "));
    check(merge(b" ab"), bare(" ab"));
    check(merge(b"ab\xff c"), Error::MergeNotUtf8 { rank: 1 });
    let outside = |token| Error::MergeOutsideVocabulary { rank: 1, token: text(token) };
    check(merge(b"xy c"), outside("xy"));
    check(merge(b"ab cd"), outside("cd"));
    check(merge(b"a b c"), outside("b c"));
    check(merge(b"c c"), outside("cc"));
    // Merging to a control token would let a user type it.
    check(|v| (v.tokens[257], v.merges[1]) = (b"<|end|".to_vec(), b"<|end| >".to_vec()), outside("<|end|>"));
    check(|v| v.merges.push(b"a b".to_vec()), Error::DuplicateMerge { rank: 2, left: text("a"), right: text("b") });
}

#[test]
fn without_types_marked_and_named_tokens_are_control_tokens() {
    let mut vocabulary = small_vocabulary();
    vocabulary.tokens.truncate(260);
    vocabulary.tokens.push(b"[EOT]".to_vec());
    vocabulary.token_types = None;
    vocabulary.eot = Some(260);
    let tokenizer = Tokenizer::from_vocabulary(vocabulary).unwrap();
    assert!([258, 259, 260].into_iter().all(|id| tokenizer.is_special(id)));
    assert!((0..258).all(|id| !tokenizer.is_special(id)));
    assert_eq!(tokenizer.eog_ids(), [258, 259, 260]);
}

/// A `tokenizer.json` with the content of [`small_vocabulary`].
fn small_json() -> Value {
    let mut vocab = json!({"ab": 256, "abc": 257, "<|endoftext|>": 258});
    for (byte, letter) in alphabet().into_iter().enumerate() {
        vocab[letter.to_string()] = json!(byte);
    }
    json!({
        "added_tokens": [
            {"id": 258, "content": "<|endoftext|>", "special": true},
            {"id": 259, "content": "<user defined>", "special": false, "normalized": true},
        ],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true},
        "model": {"unk_token": null, "continuing_subword_prefix": "", "vocab": vocab, "merges": ["a b", "ab c"]},
    })
}

fn load(json: &Value) -> Result<Tokenizer, Error> {
    Tokenizer::from_json(json.to_string().as_bytes(), None, Some("<|endoftext|>"))
}

#[test]
fn a_file_in_the_old_form_loads() {
    let tokenizer = load(&small_json()).unwrap();
    assert_eq!(tokenizer.pre_tokenizer(), PreTokenizer::Gpt2);
    assert_eq!(tokenizer.encode("abcab<user defined>"), [257, 256, 259]);
    assert_eq!(tokenizer.eog_ids(), [258]);
}

#[test]
fn ignored_merges_take_a_piece_that_is_a_token() {
    let mut json = small_json();
    json["model"]["merges"] = json!(["b c"]);
    json["model"]["vocab"].as_object_mut().unwrap().remove("ab");
    json["model"]["vocab"]["bc"] = json!(256);
    assert_eq!(load(&json).unwrap().encode("abc"), [97, 256]);
    json["model"]["ignore_merges"] = json!(true);
    let tokenizer = load(&json).unwrap();
    assert_eq!(tokenizer.encode("abc"), [257]);
    // But not one that is a control token.
    json["added_tokens"][0]["content"] = json!("zz");
    json["model"]["vocab"].as_object_mut().unwrap().remove("<|endoftext|>");
    json["model"]["vocab"]["zz"] = json!(258);
    let tokenizer = Tokenizer::from_json(json.to_string().as_bytes(), None, Some("zz")).unwrap();
    assert_eq!(tokenizer.encode("zz"), [122, 122]);
    assert_eq!(tokenizer.encode_with_specials("zz"), [258]);
}

#[test]
fn files_that_ask_for_more_than_byte_level_bpe() {
    let cases = [
        ("/normalizer", json!({"type": "NFC"}), "normalizer"),
        ("/post_processor", json!({"type": "TemplateProcessing"}), "post_processor"),
        ("/decoder", json!({"type": "Metaspace"}), "decoder"),
        ("/pre_tokenizer", json!(null), "pre_tokenizer"),
        ("/pre_tokenizer/add_prefix_space", json!(true), "pre_tokenizer"),
        ("/pre_tokenizer", json!({"type": "Whitespace"}), "pre_tokenizer"),
        ("/model/unk_token", json!("<unk>"), "model.unk_token"),
        ("/model/continuing_subword_prefix", json!("##"), "model.continuing_subword_prefix"),
        (
            "/added_tokens/0",
            json!({"id": 258, "content": "<|endoftext|>", "special": true, "lstrip": true}),
            "added token",
        ),
    ];
    for (pointer, value, expected) in cases {
        let mut json = small_json();
        *json.pointer_mut(pointer).unwrap() = value;
        match load(&json) {
            Err(Error::UnsupportedStep { step, .. }) => assert_eq!(step, expected),
            other => panic!("{pointer}: {other:?}"),
        }
    }
    for (key, value) in
        [("byte_fallback", json!(true)), ("fuse_unk", json!(true)), ("type", json!("Unigram")), ("dropout", json!(0.1))]
    {
        let mut json = small_json();
        json["model"][key] = value;
        assert!(matches!(load(&json), Err(Error::UnsupportedStep { .. })), "{key}");
    }
}

#[test]
fn a_pattern_that_is_not_o200k() {
    let mut json = small_json();
    let split = |pattern: &str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "use_regex": false});
    json["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": [split(r"\p{N}{1,3}"), bytes]});
    assert!(matches!(load(&json), Err(Error::UnsupportedStep { step: "pre_tokenizer", .. })));
}

#[test]
fn ids_with_gaps_or_taken_twice() {
    let mut json = small_json();
    json["added_tokens"][1]["id"] = json!(u32::MAX);
    assert_eq!(load(&json).unwrap_err(), Error::MissingId { id: 259, n_tokens: 260 });
    json["added_tokens"][1]["id"] = json!(97);
    let expected = Error::IdTakenTwice { id: 97, first: text("a"), second: text("<user defined>") };
    assert_eq!(load(&json).unwrap_err(), expected);
}

#[test]
fn files_that_are_no_tokenizer() {
    for bytes in [b"".as_slice(), b"{}", b"\xff", br#"{"model": {"vocab": {"a": -1}, "merges": []}}"#] {
        assert!(matches!(Tokenizer::from_json(bytes, None, None), Err(Error::Json { .. })));
    }
    let unknown = Tokenizer::from_json(small_json().to_string().as_bytes(), Some("<bos>"), None).unwrap_err();
    assert_eq!(unknown, Error::UnknownSpecial { role: "bos", name: text("<bos>") });
    assert_eq!(spell(b" \n"), "ĠĊ");
}
