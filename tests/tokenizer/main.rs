//! Text to ids and back: the bundled and the published vocabularies against other implementations, streaming, and
//! vocabularies that must be refused.

#![expect(clippy::unwrap_used, reason = "a test that panics fails, which is what it should do")]

mod bundled;
mod corpus;
mod published;
mod refusals;
mod streaming;

use gpt_gamma::tokenizer::Vocabulary;

/// GPT-2's byte alphabet as its authors' `bytes_to_unicode` builds it.
fn alphabet() -> Vec<char> {
    let mut letters: Vec<Option<char>> = vec![None; 256];
    for range in ['!'..='~', '¡'..='¬', '®'..='ÿ'] {
        for letter in range {
            letters[letter as usize] = Some(letter);
        }
    }
    let mut others = '\u{100}'..;
    letters.into_iter().map(|letter| letter.unwrap_or_else(|| others.next().unwrap())).collect()
}

/// `bytes` spelled in that alphabet, as GGUF files have it.
fn spell(bytes: &[u8]) -> String {
    let alphabet = alphabet();
    bytes.iter().map(|&byte| alphabet[usize::from(byte)]).collect()
}

/// The smallest sound vocabulary with a bit of everything: 256 bytes in byte order, `ab` (256), `abc` (257), control
/// tokens `<|endoftext|>` (258) and `<|end|>` (259), user-defined `<user defined>` (260), unused `[PAD261]`.
fn small_vocabulary() -> Vocabulary {
    let mut tokens: Vec<Vec<u8>> = (0..=255).map(|byte| spell(&[byte]).into_bytes()).collect();
    let added = ["ab", "abc", "<|endoftext|>", "<|end|>", "<user defined>", "[PAD261]"];
    tokens.extend(added.map(|text| text.as_bytes().to_vec()));
    let mut types = vec![1; 258];
    types.extend([3, 3, 4, 5]);
    Vocabulary {
        model: "gpt2".to_owned(),
        pre: Some("gpt-2".to_owned()),
        tokens,
        token_types: Some(types),
        merges: vec![b"a b".to_vec(), b"ab c".to_vec()],
        eos: Some(258),
        ..Vocabulary::default()
    }
}
