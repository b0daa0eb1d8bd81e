//! Decoding token by token.

use std::collections::HashSet;
use std::sync::LazyLock;

use gpt_gamma::tokenizer::{Error, StreamDecoder, Tokenizer};
use proptest::prelude::*;

use crate::bundled::cached;
use crate::{corpus, small_vocabulary};

/// The ids of the tokens that are one byte each: in [`small_vocabulary`], the bytes themselves.
fn byte_ids(bytes: &[u8]) -> Vec<u32> {
    bytes.iter().map(|&byte| u32::from(byte)).collect()
}

fn emissions(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<Vec<u8>> {
    let mut decoder = StreamDecoder::new(tokenizer);
    let mut emitted: Vec<Vec<u8>> = ids.iter().map(|&id| decoder.push(id).unwrap().to_vec()).collect();
    emitted.push(decoder.finish());
    emitted
}

/// How many of `bytes` are certain: all but an end that is the start of some character.
fn n_certain(bytes: &[u8]) -> usize {
    static STARTS: LazyLock<HashSet<Vec<u8>>> = LazyLock::new(|| {
        let characters = ('\0'..=char::MAX).map(|character| character.to_string().into_bytes());
        characters.flat_map(|bytes| (1..bytes.len()).map(|n| bytes[..n].to_vec()).collect::<Vec<_>>()).collect()
    });
    let held = (1..=3.min(bytes.len())).rev().find(|&n| STARTS.contains(&bytes[bytes.len() - n..]));
    bytes.len() - held.unwrap_or(0)
}

#[test]
fn a_character_appears_with_its_last_byte() {
    let tokenizer = Tokenizer::from_vocabulary(small_vocabulary()).unwrap();
    for text in ["👩‍👩‍👧‍👦", "日本語", "नमस्ते", "aé😀\0", "e\u{301}"] {
        let emitted = emissions(&tokenizer, &byte_ids(text.as_bytes()));
        let characters: Vec<Vec<u8>> = text.chars().map(|c| c.to_string().into_bytes()).collect();
        assert_eq!(emitted.iter().filter(|part| !part.is_empty()).cloned().collect::<Vec<_>>(), characters, "{text}");
        assert_eq!(emitted.last(), Some(&vec![]), "{text}");
    }
}

#[test]
fn bytes_that_cannot_become_utf8_are_not_held_back() {
    let tokenizer = Tokenizer::from_vocabulary(small_vocabulary()).unwrap();
    let check =
        |bytes: &[u8], expected: &[&[u8]]| assert_eq!(emissions(&tokenizer, &byte_ids(bytes)), expected, "{bytes:x?}");
    check(b"\xff", &[b"\xff", b""]);
    check(b"\x80a", &[b"\x80", b"a", b""]);
    check(b"\xc3a", &[b"", b"\xc3a", b""]);
    check(b"\xe0\x80", &[b"", b"\xe0\x80", b""]); // Overlong: no character starts so.
    check(b"\xed\xa0", &[b"", b"\xed\xa0", b""]); // A surrogate.
    check(b"\xf0\x9f\xf0\x9f\x98\x80", &[b"", b"", b"\xf0\x9f", b"", b"", "😀".as_bytes(), b""]);
    check(b"\xf0\x9f\x98", &[b"", b"", b"", b"\xf0\x9f\x98"]);
}

#[test]
fn an_unknown_id_changes_nothing() {
    let tokenizer = Tokenizer::from_vocabulary(small_vocabulary()).unwrap();
    let mut decoder = StreamDecoder::new(&tokenizer);
    assert_eq!(decoder.push(0xc3), Ok(b"".as_slice()));
    assert_eq!(decoder.push(262), Err(Error::IdOutsideVocabulary { id: 262, n_vocab: 262 }));
    assert_eq!(decoder.push(0xa9), Ok("é".as_bytes()));
    assert_eq!(decoder.finish(), b"");
    assert_eq!(tokenizer.decode(&[0, 262]), Err(Error::IdOutsideVocabulary { id: 262, n_vocab: 262 }));
}

fn check_stream(tokenizer: &Tokenizer, ids: &[u32]) -> Result<(), TestCaseError> {
    let emitted = emissions(tokenizer, ids);
    let batch = tokenizer.decode(ids).unwrap();
    prop_assert_eq!(emitted.concat(), &*batch);
    let mut so_far = 0;
    for (index, part) in emitted[..ids.len()].iter().enumerate() {
        so_far += part.len();
        prop_assert_eq!(so_far, n_certain(&tokenizer.decode(&ids[..=index]).unwrap()), "after id {}", index);
        prop_assert!(str::from_utf8(&batch).is_err() || str::from_utf8(part).is_ok());
    }
    Ok(())
}

/// Any byte, those of longer characters most often.
fn byte() -> impl Strategy<Value = u8> {
    prop_oneof![any::<u8>(), 0xc0u8.., 0x80u8..0xc0]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn random_ids_stream_to_what_they_decode_to(ids in prop::collection::vec(0u32..2048, 0..40)) {
        check_stream(cached("tiny-gpt-oss-mxfp4.gguf"), &ids)?;
    }

    #[test]
    fn random_bytes_stream_to_what_they_are(bytes in prop::collection::vec(byte(), 0..24)) {
        let tokenizer = cached("tiny-gpt2-f16.gguf");
        let ids: Vec<u32> = bytes.iter().flat_map(|&byte| tokenizer.encode_bytes(&[byte])).collect();
        check_stream(tokenizer, &ids)?;
    }

    #[test]
    fn text_streams_as_text(text in corpus::hostile_text()) {
        let tokenizer = cached("tiny-gpt2-f16.gguf");
        check_stream(tokenizer, &tokenizer.encode(&text))?;
    }
}
