//! Hugging Face's `tokenizer.json`, of which byte-level BPE is the part that is read.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use super::{Error, PreTokenizer, Vocabulary};

const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    normalizer: Option<Value>,
    pre_tokenizer: Option<Value>,
    post_processor: Option<Value>,
    decoder: Option<Value>,
    model: Model,
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    special: bool,
}

/// The pre-tokenizers that the two known ones are made of.
#[derive(Deserialize)]
#[serde(tag = "type")]
enum Step {
    ByteLevel {
        add_prefix_space: bool,
        #[serde(default = "yes")]
        use_regex: bool,
    },
    Split {
        pattern: Pattern,
        behavior: String,
        invert: bool,
    },
    Sequence {
        pretokenizers: Vec<Step>,
    },
}

#[derive(Deserialize)]
enum Pattern {
    Regex(String),
}

fn yes() -> bool {
    true
}

#[derive(Deserialize)]
struct Model {
    /// Absent from GPT-2's own file.
    r#type: Option<String>,
    dropout: Option<f32>,
    unk_token: Option<String>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    #[serde(default)]
    fuse_unk: bool,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    ignore_merges: bool,
    vocab: BTreeMap<String, u32>,
    merges: Vec<Merge>,
}

/// Older files write `"left right"`, newer ones `["left", "right"]`.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Joined(String),
    Pair(String, String),
}

impl Vocabulary {
    /// What a Hugging Face `tokenizer.json` says in GGUF's terms; added tokens become control tokens if they are
    /// special and user-defined ones otherwise. `bos` and `eos` are names of added tokens.
    ///
    /// # Errors
    ///
    /// - [`Error::Json`] if `json` is no such file.
    /// - [`Error::UnsupportedStep`] if it asks for a step that byte-level BPE with a known pre-tokenizer has not.
    /// - [`Error::MissingId`], [`Error::IdTakenTwice`] if its ids are not 0 to n − 1, each once.
    /// - [`Error::UnknownSpecial`] if `bos` or `eos` is not one of its added tokens.
    pub fn from_json(json: &[u8], bos: Option<&str>, eos: Option<&str>) -> Result<Vocabulary, Error> {
        let file: File = serde_json::from_slice(json).map_err(|error| Error::Json { reason: error.to_string() })?;
        let pre = file.check()?;
        let added = |role, name: Option<&str>| {
            let Some(name) = name else { return Ok(None) };
            let token = file.added_tokens.iter().find(|token| token.content == name);
            token.map(|token| Some(token.id)).ok_or_else(|| Error::UnknownSpecial { role, name: name.to_owned() })
        };
        let (bos, eos) = (added("bos", bos)?, added("eos", eos)?);
        let ignore_merges = file.model.ignore_merges;

        let mut by_id: BTreeMap<u32, (String, i32)> = BTreeMap::new();
        let normal = file.model.vocab.into_iter().map(|(text, id)| (id, text, NORMAL));
        let added = file.added_tokens.into_iter().map(|token| {
            let kind = if token.special { CONTROL } else { USER_DEFINED };
            (token.id, token.content, kind)
        });
        for (id, text, kind) in normal.chain(added) {
            // An added token may stand in the vocabulary as well; it is then what it was added as.
            match by_id.insert(id, (text.clone(), kind)) {
                Some((first, _)) if first != text => return Err(Error::IdTakenTwice { id, first, second: text }),
                _ => {}
            }
        }
        let n_tokens = by_id.len();
        if let Some((id, _)) = (0u32..).zip(by_id.keys()).find(|(expected, found)| expected != *found) {
            return Err(Error::MissingId { id, n_tokens });
        }
        let (tokens, types) = by_id.into_values().map(|(text, kind)| (text.into_bytes(), kind)).unzip();
        let merge = |merge| match merge {
            Merge::Joined(merge) => merge.into_bytes(),
            Merge::Pair(left, right) => format!("{left} {right}").into_bytes(),
        };
        Ok(Vocabulary {
            model: "gpt2".to_owned(),
            pre: Some(pre.name().to_owned()),
            tokens,
            token_types: Some(types),
            merges: file.model.merges.into_iter().map(merge).collect(),
            bos,
            eos,
            ignore_merges,
            ..Vocabulary::default()
        })
    }
}

impl File {
    /// The pre-tokenizer of a file that is byte-level BPE and nothing else.
    fn check(&self) -> Result<PreTokenizer, Error> {
        let refuse = |step, found: String, expected| Err(Error::UnsupportedStep { step, found, expected });
        if let Some(normalizer) = &self.normalizer {
            return refuse("normalizer", type_of(normalizer), "null");
        }
        for (step, value) in [("post_processor", &self.post_processor), ("decoder", &self.decoder)] {
            if let Some(found) = value.as_ref().map(type_of).filter(|name| name != "ByteLevel") {
                return refuse(step, found, "null or ByteLevel");
            }
        }
        self.model.check()?;
        for token in &self.added_tokens {
            if token.single_word || token.lstrip || token.rstrip {
                let found = format!("{:?} with single_word, lstrip or rstrip", token.content);
                return refuse("added token", found, "none of the three");
            }
        }
        let found = self.pre_tokenizer.as_ref().unwrap_or(&Value::Null);
        match Step::deserialize(found).ok().as_ref().and_then(recognize) {
            Some(pre) => Ok(pre),
            None => refuse("pre_tokenizer", found.to_string(), "that of GPT-2 or of o200k (gpt-4o)"),
        }
    }
}

impl Model {
    fn check(&self) -> Result<(), Error> {
        let refuse = |step, found: String, expected| Err(Error::UnsupportedStep { step, found, expected });
        if let Some(found) = self.r#type.as_deref().filter(|&name| name != "BPE") {
            return refuse("model.type", found.to_owned(), "BPE");
        }
        if let Some(dropout) = self.dropout.filter(|&dropout| dropout != 0.0) {
            return refuse("model.dropout", dropout.to_string(), "null");
        }
        let affixes = [
            ("model.unk_token", &self.unk_token),
            ("model.continuing_subword_prefix", &self.continuing_subword_prefix),
            ("model.end_of_word_suffix", &self.end_of_word_suffix),
        ];
        for (step, affix) in affixes {
            if let Some(found) = affix.as_ref().filter(|affix| !affix.is_empty()) {
                return refuse(step, format!("{found:?}"), "null or empty");
            }
        }
        for (step, set) in [("model.fuse_unk", self.fuse_unk), ("model.byte_fallback", self.byte_fallback)] {
            if set {
                return refuse(step, "true".to_owned(), "false");
            }
        }
        Ok(())
    }
}

/// The name of a step; the step itself where it has none.
fn type_of(step: &Value) -> String {
    step["type"].as_str().map_or_else(|| step.to_string(), str::to_owned)
}

fn recognize(step: &Step) -> Option<PreTokenizer> {
    match step {
        Step::ByteLevel { add_prefix_space: false, use_regex: true } => Some(PreTokenizer::Gpt2),
        Step::Sequence { pretokenizers } => match pretokenizers.as_slice() {
            [
                Step::Split { pattern: Pattern::Regex(pattern), behavior, invert: false },
                Step::ByteLevel { add_prefix_space: false, use_regex: false },
            ] if behavior == "Isolated" => {
                PreTokenizer::ALL.into_iter().find(|pre| pre.published_pattern() == *pattern)
            }
            _ => None,
        },
        _ => None,
    }
}
