//! Cuts text into the pieces that BPE never merges across, and spells bytes in GPT-2's alphabet.
//!
//! The published patterns end in `\s+(?!\S)|\s+`. A lookahead needs a backtracking engine, which can give up on long
//! input; here both alternatives are one `\s+`, and [`Splitter::pieces`] gives the last character of such a match back
//! where the lookahead would have. What remains runs in linear time and cannot fail.

use regex::Regex;

/// `'s|'t|… ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+` of GPT-2, the lookahead folded into `\s+`.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+";

/// The o200k pattern, the lookahead folded into `\s+`.
const GPT4O: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|",
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+"
);

/// How text is cut before merging, by the name that `tokenizer.ggml.pre` gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PreTokenizer {
    /// `gpt-2`: the original GPT-2 pattern (HF's `ByteLevel`).
    Gpt2,
    /// `gpt-4o`: OpenAI's o200k pattern, used by gpt-oss. Evaluated as published; llama.cpp's simplification cuts
    /// non-ASCII camel case and combining marks differently.
    Gpt4o,
}

impl PreTokenizer {
    /// All that this engine knows.
    pub const ALL: [PreTokenizer; 2] = [PreTokenizer::Gpt2, PreTokenizer::Gpt4o];

    /// The name in `tokenizer.ggml.pre`.
    pub const fn name(self) -> &'static str {
        match self {
            PreTokenizer::Gpt2 => "gpt-2",
            PreTokenizer::Gpt4o => "gpt-4o",
        }
    }

    /// The pre-tokenizer of that name.
    pub fn from_name(name: &str) -> Option<PreTokenizer> {
        PreTokenizer::ALL.into_iter().find(|pre| pre.name() == name)
    }

    /// The pattern as published, lookahead included.
    pub(super) fn published_pattern(self) -> String {
        let folded = self.folded_pattern();
        let head = folded.strip_suffix(r"\s+").expect("both patterns end so");
        format!(r"{head}\s+(?!\S)|\s+")
    }

    const fn folded_pattern(self) -> &'static str {
        match self {
            PreTokenizer::Gpt2 => GPT2,
            PreTokenizer::Gpt4o => GPT4O,
        }
    }
}

/// A pre-tokenizer with its compiled pattern.
#[derive(Debug)]
pub(super) struct Splitter {
    kind: PreTokenizer,
    regex: Regex,
}

impl Splitter {
    pub(super) fn new(kind: PreTokenizer) -> Splitter {
        Splitter { kind, regex: Regex::new(kind.folded_pattern()).expect("a constant, compiled by every test") }
    }

    pub(super) fn kind(&self) -> PreTokenizer {
        self.kind
    }

    /// The pieces of `text` in order; concatenated they are `text`.
    pub(super) fn pieces<'t>(&self, text: &'t str) -> impl Iterator<Item = &'t str> {
        let mut at = 0;
        std::iter::from_fn(move || {
            if at == text.len() {
                return None;
            }
            // Every character starts some alternative, so a match begins at `at`; were one ever to begin later, the
            // piece would still hold all text up to its end.
            let end = self.regex.find_at(text, at).map_or(text.len(), |found| self.give_back(text, at, found.end()));
            let piece = &text[at..end];
            at = end;
            Some(piece)
        })
    }

    /// The end that `\s+(?!\S)|\s+` has where `\s+` matched `text[start..end]`: one character earlier if more text
    /// follows and a whitespace character remains. Other alternatives keep their end.
    ///
    /// Which alternative matched shows in the last character. Only `\s+` and, in gpt-4o, those with `[\r\n]` can end
    /// in whitespace; the latter end in a line break, which `\s+` never does there, since `\s*[\r\n]+` comes first.
    fn give_back(&self, text: &str, start: usize, end: usize) -> usize {
        let last = text[start..end].chars().next_back();
        let Some(last) = last.filter(|last| last.is_whitespace()) else { return end };
        let line_break = self.kind == PreTokenizer::Gpt4o && matches!(last, '\r' | '\n');
        let before = end - last.len_utf8();
        if line_break || end == text.len() || before == start { end } else { before }
    }
}

/// The byte that `letter` stands for in GPT-2's alphabet, which has a printable character for each: printable ASCII and most of
/// Latin-1 stand for themselves, the other 68 bytes for U+0100 on, in byte order (so space is U+0120, `Ġ`).
pub(super) const fn byte_of(letter: char) -> Option<u8> {
    let code = letter as u32;
    if code < 0x100 && is_own_letter(code as u8) {
        return Some(code as u8);
    }
    // The 68 others, in byte order: 0–32, 127–160, 173.
    match code {
        0x100..=0x120 => Some((code - 0x100) as u8),
        0x121..=0x142 => Some((code - 0x121) as u8 + 127),
        0x143 => Some(173),
        _ => None,
    }
}

const fn is_own_letter(byte: u8) -> bool {
    matches!(byte, 33..=126 | 161..=172 | 174..=255)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_byte_has_its_letter() {
        let mut moved = 0x100;
        for byte in 0..=255 {
            let code = if is_own_letter(byte) { u32::from(byte) } else { moved };
            moved += u32::from(!is_own_letter(byte));
            assert_eq!(byte_of(char::from_u32(code).unwrap()), Some(byte));
        }
        let n_letters = (0..=0x10FFFF).filter_map(char::from_u32).filter(|&letter| byte_of(letter).is_some()).count();
        assert_eq!(n_letters, 256);
    }

    #[test]
    fn pieces_are_those_of_the_published_pattern() {
        // `tokenizers` carries an engine with lookahead; alternatives and blanks are what the folding must keep.
        let texts = [
            "  a",
            " a",
            "   ",
            "a  ",
            "a \n\n b",
            "\t\t\n  x",
            "a\u{a0}\u{a0}b",
            "'S's",
            "//\n\n  /",
            "\r\n\r",
            "1234 5",
            "",
        ];
        for kind in PreTokenizer::ALL {
            let published = tokenizers::utils::SysRegex::new(&kind.published_pattern()).unwrap();
            for text in texts {
                let expected: Vec<&str> = published.find_iter(text).map(|(start, end)| &text[start..end]).collect();
                assert_eq!(
                    Splitter::new(kind).pieces(text).collect::<Vec<_>>(),
                    expected,
                    "{} on {text:?}",
                    kind.name()
                );
            }
        }
    }
}
