//! GPT-2's and gpt-oss's real vocabularies, rebuilt from tiktoken's ranks, against tiktoken's own encoder.

use std::collections::HashMap;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use gpt_gamma::tokenizer::{TokenKind, Tokenizer, Vocabulary};
use proptest::prelude::*;
use tiktoken_rs::CoreBPE;

use crate::{corpus, spell};

const N_GPT2: u32 = 50_256;
const N_O200K: u32 = 199_998;
const N_GPT_OSS: u32 = 201_088;

static GPT2: LazyLock<(Tokenizer, &CoreBPE)> = LazyLock::new(|| {
    let theirs = tiktoken_rs::r50k_base_singleton();
    let tokens = ranked(theirs, N_GPT2);
    let merges = merges_by_replay(&tokens);
    assert_eq!(merges.len(), 50_000, "GPT-2's vocab.bpe has as many lines");
    let vocabulary = Vocabulary { bos: Some(N_GPT2), ..assemble("gpt-2", &tokens, merges, &["<|endoftext|>"], N_GPT2) };
    (Tokenizer::from_vocabulary(vocabulary).unwrap(), theirs)
});

static GPT_OSS: LazyLock<(Tokenizer, &CoreBPE)> = LazyLock::new(|| {
    let theirs = tiktoken_rs::o200k_harmony_singleton();
    let tokens = ranked(theirs, N_O200K);
    let merges = merges_by_splits(&tokens);
    assert_eq!(merges.len(), 446_189, "the published gpt-oss tokenizer has as many");
    let names: Vec<String> =
        (N_O200K..200_019).map(|id| String::from_utf8(theirs.decode_bytes(&[id]).unwrap()).unwrap()).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut vocabulary = assemble("gpt-4o", &tokens, merges, &names, 200_002);
    vocabulary.tokens.extend((200_019..N_GPT_OSS).map(|id| format!("[PAD{id}]").into_bytes()));
    vocabulary.token_types.as_mut().unwrap().resize(N_GPT_OSS as usize, 5);
    vocabulary.bos = Some(199_998);
    vocabulary.padding = Some(199_999);
    // llama.cpp may name `<|end|>` here; it must not stop generation all the same.
    vocabulary.eot = Some(200_007);
    let begin = Instant::now();
    let tokenizer = Tokenizer::from_vocabulary(vocabulary).unwrap();
    println!("gpt-oss vocabulary checked and indexed in {:?}", begin.elapsed());
    (tokenizer, theirs)
});

fn ranked(theirs: &CoreBPE, n: u32) -> Vec<Vec<u8>> {
    (0..n).map(|id| theirs.decode_bytes(&[id]).unwrap()).collect()
}

fn assemble(pre: &str, ranked: &[Vec<u8>], merges: Vec<Vec<u8>>, specials: &[&str], eos: u32) -> Vocabulary {
    let mut tokens: Vec<Vec<u8>> = ranked.iter().map(|token| spell(token).into_bytes()).collect();
    let mut types = vec![1; tokens.len()];
    tokens.extend(specials.iter().map(|name| name.as_bytes().to_vec()));
    types.resize(tokens.len(), 3);
    Vocabulary {
        model: "gpt2".to_owned(),
        pre: Some(pre.to_owned()),
        tokens,
        token_types: Some(types),
        merges,
        eos: Some(eos),
        ..Vocabulary::default()
    }
}

fn merge_line(left: &[u8], right: &[u8]) -> Vec<u8> {
    format!("{} {}", spell(left), spell(right)).into_bytes()
}

/// The original merges: a token was made of the two tokens that all earlier merges leave of it.
fn merges_by_replay(tokens: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let ranks: HashMap<&[u8], usize> =
        tokens.iter().enumerate().map(|(rank, token)| (token.as_slice(), rank)).collect();
    let halves = |rank: usize, token: &[u8]| {
        let mut cuts: Vec<usize> = (0..=token.len()).collect();
        while cuts.len() > 3 {
            let merged = |at: &usize| ranks.get(&token[cuts[*at]..cuts[at + 2]]).copied().filter(|&made| made < rank);
            let best = (0..cuts.len() - 2).filter(|at| merged(at).is_some()).min_by_key(merged).unwrap();
            cuts.remove(best + 1);
        }
        merge_line(&token[..cuts[1]], &token[cuts[1]..])
    };
    let made = tokens.iter().enumerate().filter(|(_, token)| token.len() > 1);
    made.map(|(rank, token)| halves(rank, token)).collect()
}

/// As Hugging Face converts tiktoken ranks: every split of a token into two tokens, by its rank, then theirs.
fn merges_by_splits(tokens: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let ranks: HashMap<&[u8], usize> =
        tokens.iter().enumerate().map(|(rank, token)| (token.as_slice(), rank)).collect();
    let mut merges = Vec::new();
    for token in tokens {
        let mut splits: Vec<(usize, usize, usize)> = (1..token.len())
            .filter_map(|at| Some((*ranks.get(&token[..at])?, *ranks.get(&token[at..])?, at)))
            .collect();
        splits.sort_unstable();
        merges.extend(splits.iter().map(|&(_, _, at)| merge_line(&token[..at], &token[at..])));
    }
    merges
}

#[test]
fn gpt2_agrees_with_tiktoken() {
    for text in corpus::texts() {
        assert_eq!(GPT2.0.encode(&text), GPT2.1.encode_ordinary(&text), "on {text:?}");
    }
}

#[test]
fn gpt_oss_agrees_with_tiktoken() {
    for text in corpus::texts() {
        assert_eq!(GPT_OSS.0.encode(&text), GPT_OSS.1.encode_ordinary(&text), "on {text:?}");
        let with_specials = GPT_OSS.1.encode_with_special_tokens(&text);
        assert_eq!(GPT_OSS.0.encode_with_specials(&text), with_specials, "with specials on {text:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn any_text_agrees_with_tiktoken(text in corpus::hostile_text()) {
        prop_assert_eq!(GPT2.0.encode(&text), GPT2.1.encode_ordinary(&text));
        prop_assert_eq!(GPT_OSS.0.encode(&text), GPT_OSS.1.encode_ordinary(&text));
        let with_specials = GPT_OSS.1.encode_with_special_tokens(&text);
        prop_assert_eq!(GPT_OSS.0.encode_with_specials(&text), with_specials);
    }

    #[test]
    fn any_bytes_survive(bytes in corpus::hostile_bytes()) {
        for tokenizer in [&GPT2.0, &GPT_OSS.0] {
            prop_assert_eq!(tokenizer.decode(&tokenizer.encode_bytes(&bytes)).unwrap(), &*bytes);
        }
    }
}

#[test]
fn known_ids() {
    let vectors: [(&str, &[u32]); 11] = [
        ("analysis", &[35644]),
        ("final", &[17196]),
        ("commentary", &[12606, 815]),
        ("assistant", &[173781]),
        ("system", &[17360]),
        ("user", &[1428]),
        ("developer", &[77944]),
        ("json", &[4108]),
        (" to=functions.get_weather", &[316, 28, 44580, 775, 170154]),
        ("Hello world", &[13225, 2375]),
        ("camelCase 12345\n\n  x", &[178067, 6187, 220, 7633, 2548, 279, 220, 1215]),
    ];
    for (text, ids) in vectors {
        assert_eq!(GPT_OSS.0.encode(text), ids, "{text:?}");
    }
    assert_eq!(GPT2.0.encode("Hello world"), [15496, 995]);
    let conversation = "<|start|>user<|message|>What is 2 + 2?<|end|><|start|>assistant";
    let ids = [200006, 1428, 200008, 4827, 382, 220, 17, 659, 220, 17, 30, 200007, 200006, 173781];
    assert_eq!(GPT_OSS.0.encode_with_specials(conversation), ids);
}

#[test]
fn generation_ends_where_the_models_mean_it_to() {
    assert_eq!(GPT2.0.eog_ids(), [50256]);
    assert_eq!(GPT_OSS.0.eog_ids(), [199999, 200002, 200012]);
    assert_eq!(GPT_OSS.0.special("<|end|>"), Some(200007));
}

#[test]
fn padding_rows_decode_to_nothing_and_are_never_encoded() {
    let tokenizer = &GPT_OSS.0;
    assert_eq!(tokenizer.n_vocab(), N_GPT_OSS as usize);
    assert_eq!(tokenizer.kind(201_087), Ok(TokenKind::Unused));
    assert_eq!(tokenizer.decode(&[200_019, 13225, 201_087]).unwrap(), b"Hello");
    assert!(tokenizer.encode_with_specials("[PAD200019]").iter().all(|&id| id < N_O200K));
}

#[test]
fn a_megabyte_of_one_character_takes_linear_time() {
    // A pattern engine that backtracks gives up here or takes hours; seconds leave room for a slow machine.
    for unit in [" ", "a", "\n", "!", "\u{301}", "é "] {
        let text = unit.repeat(1_000_000 / unit.len()) + "x";
        for tokenizer in [&GPT2.0, &GPT_OSS.0] {
            let begin = Instant::now();
            let ids = tokenizer.encode(&text);
            assert!(begin.elapsed() < Duration::from_secs(20), "{unit:?} took {:?}", begin.elapsed());
            assert!(tokenizer.decode(&ids).unwrap() == text.as_bytes(), "{unit:?} changed");
        }
    }
}
