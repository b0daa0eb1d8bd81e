//! Text to token ids and back: byte-level BPE as GPT-2 and gpt-oss use it.
//!
//! Invariants: pure, so no I/O and no device; a malformed vocabulary yields an [`Error`], never a panic; no input is
//! lost or altered, so `decode(encode_bytes(b)) == b` for every byte string `b`, valid UTF-8 or not. What a user types
//! never becomes a control token ([`Tokenizer::encode`]); only a template's own text does
//! ([`Tokenizer::encode_with_specials`]).
//!
//! All of it is ours, and is tested against the `tokenizers` crate. That crate's pre-tokenizer stops at a regex error without
//! a word, its added-token table cannot hold ids that the BPE vocabulary does not have, and it takes several times as long
//! to make its table of merges of a vocabulary as 200,000 tokens leave for a start.

mod error;
mod json;
mod merges;
mod metadata;
mod pre_tokenizer;
mod stream;
mod vocabulary;

use std::collections::HashMap;

use aho_corasick::{AhoCorasick, MatchKind};

pub use self::error::Error;
pub use self::pre_tokenizer::PreTokenizer;
pub use self::stream::StreamDecoder;
pub use self::vocabulary::{TokenKind, Vocabulary};

use self::merges::Merges;
use self::pre_tokenizer::Splitter;

/// A vocabulary ready to encode and decode; cheap to share between threads behind a reference.
#[derive(Debug)]
pub struct Tokenizer {
    /// What each id stands for, as bytes; empty for unused ids.
    bytes: Vec<Box<[u8]>>,
    kinds: Vec<TokenKind>,
    /// Id of the normal token that is exactly this byte; every byte has one.
    byte_ids: [u32; 256],
    merges: Merges,
    /// The normal tokens, where a piece that is one as a whole skips the merges.
    whole_pieces: Option<HashMap<Box<[u8]>, u32>>,
    splitter: Splitter,
    /// Tokens cut out of any text before BPE: the user-defined ones.
    user_defined: Markers,
    /// Tokens cut out of template text before BPE: user-defined, control and unknown.
    all_markers: Markers,
    specials: HashMap<String, u32>,
    bos: Option<u32>,
    eos: Option<u32>,
    padding: Option<u32>,
    eog: Vec<u32>,
    adds_bos: bool,
    adds_eos: bool,
    chat_template: Option<String>,
}

impl Tokenizer {
    /// Builds the tokenizer that a GGUF file's `tokenizer.*` metadata describes.
    ///
    /// # Errors
    ///
    /// - [`Error::UnsupportedModel`], [`Error::MissingPreTokenizer`], [`Error::UnknownPreTokenizer`]: the vocabulary is
    ///   of a kind that this engine would tokenize wrongly.
    /// - [`Error::TokenNotUtf8`], [`Error::TypeCount`], [`Error::UnknownTokenType`], [`Error::EmptyToken`],
    ///   [`Error::DuplicateToken`], [`Error::NotByteLevel`], [`Error::MissingByte`]: the token list is inconsistent.
    /// - [`Error::MergeNotUtf8`], [`Error::MergeWithoutSeparator`], [`Error::MergeOutsideVocabulary`],
    ///   [`Error::DuplicateMerge`]: a merge is.
    /// - [`Error::SpecialOutsideVocabulary`], [`Error::MissingSpecial`]: a special id is.
    /// - [`Error::TooManyMarkers`] if the control and user-defined tokens do not fit one search automaton.
    pub fn from_vocabulary(mut vocabulary: Vocabulary) -> Result<Tokenizer, Error> {
        let chat_template = vocabulary.chat_template.take();
        let checked = vocabulary.check()?;
        let text_of = |id: u32| checked.texts[id as usize];
        let of_kind = |wanted: &[TokenKind]| -> Vec<u32> {
            (0u32..).zip(&checked.kinds).filter(|(_, kind)| wanted.contains(kind)).map(|(id, _)| id).collect()
        };
        let special_ids = of_kind(&[TokenKind::Control, TokenKind::Unknown]);
        let user_defined_ids = of_kind(&[TokenKind::UserDefined]);
        let all_ids = [special_ids.as_slice(), &user_defined_ids].concat();

        let specials: HashMap<String, u32> = special_ids.iter().map(|&id| (text_of(id).to_owned(), id)).collect();
        let eog = end_of_generation(&vocabulary, &specials);
        let user_defined = Markers::new(user_defined_ids, text_of)?;
        let all_markers = Markers::new(all_ids, text_of)?;

        let whole_pieces = vocabulary.ignore_merges.then(|| {
            let normal = of_kind(&[TokenKind::Normal]).into_iter();
            normal.map(|id| (checked.bytes[id as usize].clone(), id)).collect()
        });
        Ok(Tokenizer {
            bytes: checked.bytes,
            kinds: checked.kinds,
            byte_ids: checked.byte_ids,
            merges: checked.merges,
            whole_pieces,
            splitter: Splitter::new(checked.pre),
            user_defined,
            all_markers,
            specials,
            bos: vocabulary.bos,
            eos: vocabulary.eos,
            padding: vocabulary.padding,
            eog,
            adds_bos: vocabulary.add_bos,
            adds_eos: vocabulary.add_eos,
            chat_template,
        })
    }

    /// Builds the tokenizer that a Hugging Face `tokenizer.json` describes. That file does not say which token begins
    /// or ends a text, so `bos` and `eos` name them (`tokenizer_config.json` has the names).
    ///
    /// # Errors
    ///
    /// - [`Error::Json`] if `json` is no such file.
    /// - [`Error::UnsupportedStep`] if it asks for a step that byte-level BPE with a known pre-tokenizer has not.
    /// - [`Error::MissingId`], [`Error::IdTakenTwice`] if its ids are not 0 to n − 1, each once.
    /// - [`Error::UnknownSpecial`] if `bos` or `eos` is not one of its added tokens.
    /// - As [`Tokenizer::from_vocabulary`].
    pub fn from_json(json: &[u8], bos: Option<&str>, eos: Option<&str>) -> Result<Tokenizer, Error> {
        Tokenizer::from_vocabulary(Vocabulary::from_json(json, bos, eos)?)
    }

    /// The ids of `text`, in which control tokens are ordinary characters: `<|start|>` typed by a user becomes the
    /// tokens of its nine characters. User-defined tokens do match. Adds neither beginning nor end of text.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        let mut ids = Vec::new();
        self.append(text, &self.user_defined, &mut ids);
        ids
    }

    /// As [`Tokenizer::encode`] for bytes that need not be UTF-8. Valid stretches are encoded as text; each byte
    /// between them becomes the token of that one byte, so decoding gives back `bytes` exactly.
    pub fn encode_bytes(&self, bytes: &[u8]) -> Vec<u32> {
        let mut ids = Vec::new();
        for chunk in bytes.utf8_chunks() {
            self.append(chunk.valid(), &self.user_defined, &mut ids);
            ids.extend(chunk.invalid().iter().map(|&byte| self.byte_ids[usize::from(byte)]));
        }
        ids
    }

    /// As [`Tokenizer::encode`], but the text of a control token becomes that token, the longest where several match.
    /// For a chat template's own text only: with a user's words in it, the user can forge messages.
    pub fn encode_with_specials(&self, text: &str) -> Vec<u32> {
        let mut ids = Vec::new();
        self.append(text, &self.all_markers, &mut ids);
        ids
    }

    /// The bytes that `ids` stand for, control tokens as their text (filter with [`Tokenizer::is_special`] to hide
    /// them). They need not be UTF-8: a token may hold part of a character.
    ///
    /// # Errors
    ///
    /// [`Error::IdOutsideVocabulary`] for an id that is not below [`Tokenizer::n_vocab`].
    pub fn decode(&self, ids: &[u32]) -> Result<Vec<u8>, Error> {
        let mut bytes = Vec::new();
        for &id in ids {
            bytes.extend_from_slice(self.token_bytes(id)?);
        }
        Ok(bytes)
    }

    /// The bytes that `id` stands for; none for an unused id.
    ///
    /// # Errors
    ///
    /// [`Error::IdOutsideVocabulary`] if `id` is not below [`Tokenizer::n_vocab`].
    pub fn token_bytes(&self, id: u32) -> Result<&[u8], Error> {
        match self.bytes.get(id as usize) {
            Some(bytes) => Ok(bytes),
            None => Err(Error::IdOutsideVocabulary { id, n_vocab: self.n_vocab() }),
        }
    }

    /// What sort of token `id` is.
    ///
    /// # Errors
    ///
    /// [`Error::IdOutsideVocabulary`] if `id` is not below [`Tokenizer::n_vocab`].
    pub fn kind(&self, id: u32) -> Result<TokenKind, Error> {
        let kind = self.kinds.get(id as usize).copied();
        kind.ok_or(Error::IdOutsideVocabulary { id, n_vocab: self.n_vocab() })
    }

    /// Whether `id` steers the model instead of being text: control and unknown tokens. False outside the vocabulary.
    pub fn is_special(&self, id: u32) -> bool {
        matches!(self.kinds.get(id as usize), Some(TokenKind::Control | TokenKind::Unknown))
    }

    /// The id of the control token whose text is `name`, such as `<|start|>`.
    pub fn special(&self, name: &str) -> Option<u32> {
        self.specials.get(name).copied()
    }

    /// Number of ids, unused ones included.
    pub fn n_vocab(&self) -> usize {
        self.bytes.len()
    }

    /// The token that begins a text, if the model has one.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The token that ends a text, if the model has one.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// The token that fills up batches, if the model has one.
    pub fn padding(&self) -> Option<u32> {
        self.padding
    }

    /// Whether the model wants [`Tokenizer::bos`] before a prompt; the encoders do not add it.
    pub fn adds_bos(&self) -> bool {
        self.adds_bos
    }

    /// Whether the model wants [`Tokenizer::eos`] after a text; the encoders do not add it.
    pub fn adds_eos(&self) -> bool {
        self.adds_eos
    }

    /// The ids that end generation, ascending: the file's eos, eot and eom, and the control tokens `<|endoftext|>`,
    /// `<|return|>`, `<|call|>` and `<|end|>`. Where `<|return|>` and `<|call|>` exist, `<|end|>` only separates
    /// messages, so it is none of them then, whatever role the file gives it.
    pub fn eog_ids(&self) -> &[u32] {
        &self.eog
    }

    /// How text is cut before merging.
    pub fn pre_tokenizer(&self) -> PreTokenizer {
        self.splitter.kind()
    }

    /// The chat template that the file carries, in Jinja.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// One line on what this tokenizer is, such as `byte-level BPE, pre-tokenizer gpt-2, 50257 tokens (50256 normal, 1
    /// control), 50000 merges, bos 50256 <|endoftext|>, eos 50256 <|endoftext|>, ends at 50256 <|endoftext|>`.
    pub fn description(&self) -> String {
        let named = |id: u32| format!("{id} {}", String::from_utf8_lossy(&self.bytes[id as usize]));
        let counts: Vec<String> = TokenKind::ALL
            .into_iter()
            .map(|kind| (self.kinds.iter().filter(|&&other| other == kind).count(), kind))
            .filter(|&(n, _)| n > 0)
            .map(|(n, kind)| format!("{n} {kind}"))
            .collect();
        let mut line = format!(
            "byte-level BPE, pre-tokenizer {}, {} tokens ({}), {} merges",
            self.pre_tokenizer().name(),
            self.n_vocab(),
            counts.join(", "),
            self.merges.len()
        );
        for (label, id) in [("bos", self.bos), ("eos", self.eos), ("padding", self.padding)] {
            if let Some(id) = id {
                line += &format!(", {label} {}", named(id));
            }
        }
        let stops: Vec<String> = self.eog.iter().map(|&id| named(id)).collect();
        line + ", ends at " + &if stops.is_empty() { "nothing".to_owned() } else { stops.join(", ") }
    }

    /// Appends the ids of `text`, cut at `markers` first.
    fn append(&self, text: &str, markers: &Markers, ids: &mut Vec<u32>) {
        let mut at = 0;
        if let Some(automaton) = &markers.automaton {
            for found in automaton.find_iter(text) {
                self.append_ordinary(&text[at..found.start()], ids);
                ids.push(markers.ids[found.pattern().as_usize()]);
                at = found.end();
            }
        }
        self.append_ordinary(&text[at..], ids);
    }

    fn append_ordinary(&self, text: &str, ids: &mut Vec<u32>) {
        for piece in self.splitter.pieces(text) {
            let whole = self.whole_pieces.as_ref().and_then(|pieces| pieces.get(piece.as_bytes()));
            match whole {
                Some(&id) => ids.push(id),
                None => self.merges.apply(piece.bytes().map(|byte| self.byte_ids[usize::from(byte)]), ids),
            }
        }
    }
}

/// Tokens found in text before BPE: leftmost first, the longest where several start at one place.
#[derive(Debug)]
struct Markers {
    /// None where there is nothing to find.
    automaton: Option<AhoCorasick>,
    /// Id of each of the automaton's patterns.
    ids: Vec<u32>,
}

impl Markers {
    fn new<'t>(ids: Vec<u32>, text_of: impl Fn(u32) -> &'t str) -> Result<Markers, Error> {
        if ids.is_empty() {
            return Ok(Markers { automaton: None, ids });
        }
        let built = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(ids.iter().map(|&id| text_of(id)))
            .map_err(|error| Error::TooManyMarkers { n_markers: ids.len(), reason: error.to_string() })?;
        Ok(Markers { automaton: Some(built), ids })
    }
}

fn end_of_generation(vocabulary: &Vocabulary, specials: &HashMap<String, u32>) -> Vec<u32> {
    let named = |name: &str| specials.get(name).copied();
    let mut ids: Vec<u32> = [vocabulary.eos, vocabulary.eot, vocabulary.eom].into_iter().flatten().collect();
    ids.extend(["<|endoftext|>", "<|return|>", "<|call|>", "<|end|>"].into_iter().filter_map(named));
    if named("<|return|>").is_some() && named("<|call|>").is_some() {
        ids.retain(|&id| Some(id) != named("<|end|>"));
    }
    ids.sort_unstable();
    ids.dedup();
    ids
}
