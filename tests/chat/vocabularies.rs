//! The vocabularies that the tests use.

use std::collections::HashMap;
use std::sync::LazyLock;

use gpt_gamma::gguf::{self, Strings};
use gpt_gamma::tokenizer::{Tokenizer, Vocabulary};

/// That of the bundled tiny gpt-oss, from its GGUF file.
pub static TINY: LazyLock<Tokenizer> = LazyLock::new(|| {
    let path = format!("{}/../models/tiny-gpt-oss-mxfp4.gguf", env!("CARGO_MANIFEST_DIR"));
    let file = std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    let metadata = gguf::parse(&file).unwrap().metadata;
    let strings = |name| metadata.required::<Strings>(name).unwrap().map(<[u8]>::to_vec).collect();
    let vocabulary = Vocabulary {
        model: "gpt2".to_owned(),
        pre: Some("gpt-4o".to_owned()),
        tokens: strings("tokenizer.ggml.tokens"),
        token_types: metadata.optional("tokenizer.ggml.token_type").unwrap(),
        merges: strings("tokenizer.ggml.merges"),
        ..Vocabulary::default()
    };
    Tokenizer::from_vocabulary(vocabulary).unwrap()
});

/// The bundled one as the model was trained with.
pub static TINY_JSON: LazyLock<Tokenizer> = LazyLock::new(|| {
    let path = format!("{}/../models/tiny-gpt-oss.tokenizer.json", env!("CARGO_MANIFEST_DIR"));
    let file = std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    Tokenizer::from_json(&file, Some("<|startoftext|>"), Some("<|return|>")).unwrap()
});

/// gpt-oss's real one, o200k_harmony, rebuilt from tiktoken's ranks.
pub static GPT_OSS: LazyLock<Tokenizer> = LazyLock::new(|| {
    let theirs = tiktoken_rs::o200k_harmony_singleton();
    let decode = |id: u32| theirs.decode_bytes(&[id]).unwrap();
    let ranked: Vec<Vec<u8>> = (0..199_998).map(decode).collect();
    let ranks: HashMap<&[u8], usize> = ranked.iter().enumerate().map(|(rank, token)| (&**token, rank)).collect();
    // Every split of a token into two, as Hugging Face converts ranks to merges.
    let mut merges = Vec::new();
    for token in &ranked {
        let rank = |part: &[u8]| ranks.get(part).copied();
        let splits = (1..token.len()).filter_map(|at| Some((rank(&token[..at])?, rank(&token[at..])?, at)));
        let mut splits: Vec<(usize, usize, usize)> = splits.collect();
        splits.sort_unstable();
        let line = |at: usize| format!("{} {}", spell(&token[..at]), spell(&token[at..])).into_bytes();
        merges.extend(splits.into_iter().map(|(_, _, at)| line(at)));
    }
    let mut tokens: Vec<Vec<u8>> = ranked.iter().map(|token| spell(token).into_bytes()).collect();
    let mut types = vec![1; tokens.len()];
    tokens.extend((199_998..200_019).map(decode));
    types.resize(tokens.len(), 3);
    let vocabulary = Vocabulary {
        model: "gpt2".to_owned(),
        pre: Some("gpt-4o".to_owned()),
        tokens,
        token_types: Some(types),
        merges,
        ..Vocabulary::default()
    };
    Tokenizer::from_vocabulary(vocabulary).unwrap()
});

/// `bytes` in GPT-2's alphabet: printable Latin-1 characters stand for themselves, the others for those from U+0100 on.
pub fn spell(bytes: &[u8]) -> String {
    static ALPHABET: LazyLock<Vec<char>> = LazyLock::new(|| {
        let stands_for_itself = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
        let mut others = '\u{100}'..;
        let letter = |byte| if stands_for_itself(byte) { char::from(byte) } else { others.next().unwrap() };
        (0..=255).map(letter).collect()
    });
    bytes.iter().map(|&byte| ALPHABET[usize::from(byte)]).collect()
}
