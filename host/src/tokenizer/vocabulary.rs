//! What a model file says about its tokens, and whether that makes sense.

use std::collections::{HashMap, HashSet};
use std::fmt;

use rayon::prelude::*;

use super::merges::Merges;
use super::pre_tokenizer::byte_of;
use super::{Error, PreTokenizer};

/// A GGUF file's `tokenizer.*` metadata as it stands there, unchecked; [`Tokenizer::from_vocabulary`] checks it.
///
/// [`Tokenizer::from_vocabulary`]: super::Tokenizer::from_vocabulary
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Vocabulary {
    /// `tokenizer.ggml.model`; must be `gpt2`, which means byte-level BPE.
    pub model: String,
    /// `tokenizer.ggml.pre`: a name of [`PreTokenizer`].
    pub pre: Option<String>,
    /// `tokenizer.ggml.tokens`, index = id, UTF-8: normal tokens in GPT-2's byte alphabet, others as plain text.
    pub tokens: Vec<Vec<u8>>,
    /// `tokenizer.ggml.token_type`, one per token. Without it, the ids below and tokens of the form `<|…|>` are control
    /// tokens and all others normal.
    pub token_types: Option<Vec<i32>>,
    /// `tokenizer.ggml.merges`: `left right`, index = rank, UTF-8.
    pub merges: Vec<Vec<u8>>,
    /// `tokenizer.ggml.bos_token_id`.
    pub bos: Option<u32>,
    /// `tokenizer.ggml.eos_token_id`.
    pub eos: Option<u32>,
    /// `tokenizer.ggml.eot_token_id`: end of turn.
    pub eot: Option<u32>,
    /// `tokenizer.ggml.eom_token_id`: end of message.
    pub eom: Option<u32>,
    /// `tokenizer.ggml.unknown_token_id`; byte-level BPE never needs it.
    pub unknown: Option<u32>,
    /// `tokenizer.ggml.padding_token_id`.
    pub padding: Option<u32>,
    /// `tokenizer.ggml.add_bos_token`; false where the file says nothing.
    pub add_bos: bool,
    /// `tokenizer.ggml.add_eos_token`; false where the file says nothing.
    pub add_eos: bool,
    /// Whether a piece that is a token as a whole skips the merges. False for GGUF; `tokenizer.json` may say true.
    pub ignore_merges: bool,
    /// `tokenizer.chat_template`, in Jinja.
    pub chat_template: Option<String>,
}

/// What a token is for: `tokenizer.ggml.token_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TokenKind {
    /// Type 1: a byte string, made by merging.
    Normal,
    /// Type 2: stands for what cannot be encoded; never produced here.
    Unknown,
    /// Type 3: steers the model, such as `<|start|>`.
    Control,
    /// Type 4: text that is always one token.
    UserDefined,
    /// Type 5: an id without a token, which fills up the embedding matrix; decodes to nothing.
    Unused,
}

impl TokenKind {
    /// In the order of their numbers.
    pub const ALL: [TokenKind; 5] =
        [TokenKind::Normal, TokenKind::Unknown, TokenKind::Control, TokenKind::UserDefined, TokenKind::Unused];

    /// The kind with that number in `tokenizer.ggml.token_type`; 0 (undefined) and 6 (byte, of SentencePiece
    /// vocabularies) are none.
    pub fn from_number(number: i32) -> Option<TokenKind> {
        let index = usize::try_from(number.checked_sub(1)?).ok()?;
        TokenKind::ALL.get(index).copied()
    }
}

impl fmt::Display for TokenKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            TokenKind::Normal => "normal",
            TokenKind::Unknown => "unknown",
            TokenKind::Control => "control",
            TokenKind::UserDefined => "user-defined",
            TokenKind::Unused => "unused",
        })
    }
}

/// What a sound vocabulary comes to.
pub(super) struct Checked<'v> {
    pub(super) texts: Vec<&'v str>,
    pub(super) pre: PreTokenizer,
    pub(super) kinds: Vec<TokenKind>,
    pub(super) bytes: Vec<Box<[u8]>>,
    pub(super) byte_ids: [u32; 256],
    /// Of normal tokens alone, so that no merge can produce a control token.
    pub(super) merges: Merges,
}

impl Vocabulary {
    pub(super) fn check(&self) -> Result<Checked<'_>, Error> {
        if self.model != "gpt2" {
            return Err(Error::UnsupportedModel { found: self.model.clone() });
        }
        let name = self.pre.as_deref().ok_or(Error::MissingPreTokenizer)?;
        let pre = PreTokenizer::from_name(name).ok_or_else(|| Error::UnknownPreTokenizer { found: name.to_owned() })?;
        self.check_special_ids()?;
        let texts = self.texts()?;
        let kinds = self.kinds(&texts)?;
        let (by_text, bytes) = rayon::join(|| by_text(&texts, &kinds), || all_bytes(&texts, &kinds));
        let (by_text, bytes) = (by_text?, bytes?);

        let mut byte_ids = [None; 256];
        for ((id, token), kind) in (0u32..).zip(&bytes).zip(&kinds) {
            if let (TokenKind::Normal, [byte]) = (kind, &**token) {
                byte_ids[usize::from(*byte)] = Some(id);
            }
        }
        // Without its token a byte would vanish from the text: the BPE model skips what it does not know.
        let mut complete = [0; 256];
        for ((byte, id), slot) in (0..=u8::MAX).zip(byte_ids).zip(&mut complete) {
            *slot = id.ok_or(Error::MissingByte { byte })?;
        }
        let merges = self.parse_merges(&by_text, &kinds)?;
        Ok(Checked { texts, pre, kinds, bytes, byte_ids: complete, merges })
    }

    fn roles(&self) -> [(&'static str, Option<u32>); 6] {
        [
            ("bos_token_id", self.bos),
            ("eos_token_id", self.eos),
            ("eot_token_id", self.eot),
            ("eom_token_id", self.eom),
            ("unknown_token_id", self.unknown),
            ("padding_token_id", self.padding),
        ]
    }

    fn check_special_ids(&self) -> Result<(), Error> {
        let n_vocab = self.tokens.len();
        for (role, id) in self.roles() {
            if let Some(id) = id.filter(|&id| id as usize >= n_vocab) {
                return Err(Error::SpecialOutsideVocabulary { role, id, n_vocab });
            }
        }
        if self.add_bos && self.bos.is_none() {
            return Err(Error::MissingSpecial { flag: "add_bos_token", role: "bos_token_id" });
        }
        if self.add_eos && self.eos.is_none() {
            return Err(Error::MissingSpecial { flag: "add_eos_token", role: "eos_token_id" });
        }
        Ok(())
    }

    fn texts(&self) -> Result<Vec<&str>, Error> {
        let texts = (0u32..).zip(&self.tokens);
        texts.map(|(id, bytes)| str::from_utf8(bytes).map_err(|_| Error::TokenNotUtf8 { id })).collect()
    }

    fn kinds(&self, texts: &[&str]) -> Result<Vec<TokenKind>, Error> {
        let Some(types) = &self.token_types else {
            let named: HashSet<u32> = self.roles().into_iter().filter_map(|(_, id)| id).collect();
            let is_control = |id, text: &str| named.contains(&id) || is_marked_as_control(text);
            let kind =
                |(id, text): (u32, &&str)| if is_control(id, text) { TokenKind::Control } else { TokenKind::Normal };
            return Ok((0u32..).zip(texts).map(kind).collect());
        };
        if types.len() != self.tokens.len() {
            return Err(Error::TypeCount { n_types: types.len(), n_tokens: self.tokens.len() });
        }
        let kind = |(id, &found)| TokenKind::from_number(found).ok_or(Error::UnknownTokenType { id, found });
        (0u32..).zip(types).map(kind).collect()
    }

    fn parse_merges(&self, by_text: &HashMap<&str, u32>, kinds: &[TokenKind]) -> Result<Merges, Error> {
        let halves = |rank: usize| {
            let merge = str::from_utf8(&self.merges[rank]).map_err(|_| Error::MergeNotUtf8 { rank })?;
            // The search starts at the second byte: a left half is never empty.
            let separator = merge.bytes().skip(1).position(|byte| byte == b' ').map(|at| at + 1);
            match separator {
                Some(at) if at + 1 < merge.len() => Ok((&merge[..at], &merge[at + 1..])),
                _ => Err(Error::MergeWithoutSeparator { rank, merge: merge.to_owned() }),
            }
        };
        let parse = |rank: usize| {
            let (left, right) = halves(rank)?;
            let id_of = |token: &str| {
                let id = by_text.get(token).copied().filter(|&id| kinds[id as usize] == TokenKind::Normal);
                id.ok_or_else(|| Error::MergeOutsideVocabulary { rank, token: token.to_owned() })
            };
            Ok((id_of(left)?, id_of(right)?, id_of(&[left, right].concat())?))
        };
        // 446,189 for gpt-oss: on all cores. The first error is the one that is told.
        let parsed: Vec<Result<_, Error>> = (0..self.merges.len()).into_par_iter().map(parse).collect();
        let parsed = parsed.into_iter().collect::<Result<Vec<_>, _>>()?;
        Merges::new(&parsed).map_err(|rank| match halves(rank) {
            Ok((left, right)) => Error::DuplicateMerge { rank, left: left.to_owned(), right: right.to_owned() },
            Err(error) => error,
        })
    }
}

/// Ids by text, which is there once.
fn by_text<'t>(texts: &[&'t str], kinds: &[TokenKind]) -> Result<HashMap<&'t str, u32>, Error> {
    let mut seen: HashMap<&str, u32> = HashMap::with_capacity(texts.len());
    for ((second, &text), kind) in (0u32..).zip(texts).zip(kinds) {
        if text.is_empty() && *kind != TokenKind::Unused {
            return Err(Error::EmptyToken { id: second });
        }
        if let Some(first) = seen.insert(text, second) {
            return Err(Error::DuplicateToken { first, second, text: text.to_owned() });
        }
    }
    Ok(seen)
}

/// What each id stands for.
fn all_bytes(texts: &[&str], kinds: &[TokenKind]) -> Result<Vec<Box<[u8]>>, Error> {
    let bytes = |((id, &text), kind): ((u32, &&str), &TokenKind)| match kind {
        TokenKind::Normal => normal_bytes(id, text),
        TokenKind::Unused => Ok(Box::default()),
        TokenKind::Unknown | TokenKind::Control | TokenKind::UserDefined => Ok(text.as_bytes().into()),
    };
    (0u32..).zip(texts).zip(kinds).map(bytes).collect()
}

/// A normal token's bytes.
fn normal_bytes(id: u32, text: &str) -> Result<Box<[u8]>, Error> {
    let byte = |letter| byte_of(letter).ok_or_else(|| Error::NotByteLevel { id, text: text.to_owned(), letter });
    text.chars().map(byte).collect()
}

fn is_marked_as_control(text: &str) -> bool {
    text.len() > "<||>".len() && text.starts_with("<|") && text.ends_with("|>")
}
