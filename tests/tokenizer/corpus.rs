//! Text on which tokenizers differ.

use proptest::prelude::*;

/// Pieces that are hostile alone and more so side by side.
pub const FRAGMENTS: [&str; 62] = [
    "Hello world",
    " ",
    "  ",
    "   ",
    "\t",
    "\n",
    "\r\n",
    "\r",
    "\n\n",
    " \n ",
    "\u{a0}",
    "\u{2003}",
    "\u{3000}",
    "\u{200b}",
    "\u{feff}",
    "\0",
    "\u{7f}",
    "\u{85}",
    "\u{2028}",
    "'s",
    "'S",
    "'ſ",
    "'ll",
    "'RE",
    "’s",
    "don't",
    "I'VE",
    "1",
    "12",
    "1234567",
    "½",
    "٣٤٥",
    "Ⅷ",
    "e\u{301}",
    "\u{301}",
    "né",
    "ß",
    "ﬁ",
    "日本語",
    "。",
    "ไทย",
    "नमस्ते",
    "क्षि",
    "مرحبا",
    "שָׁלוֹם",
    "ПриветМир",
    "camelCaseHTTPServer",
    "Ǆǅǆ",
    "ʰ",
    "👩‍👩‍👧‍👦",
    "🇩🇪",
    "👍🏽",
    "😀",
    "fn main() {",
    "    return x;\n}",
    "//\n\n",
    "/",
    "...",
    "—",
    "<|start|>",
    "<|endoftext|>",
    "_",
];

/// Whole texts: every fragment after every kind of blank, and runs that are long.
pub fn texts() -> Vec<String> {
    let mut texts = vec![String::new(), FRAGMENTS.concat(), FRAGMENTS.join(" "), FRAGMENTS.join("\n  ")];
    for first in FRAGMENTS {
        texts.push(first.to_owned());
        for second in [" ", "x", " x", "\n", "é", "Я", "7", "'s", "\u{a0}y"] {
            texts.extend([format!("{first}{second}"), format!("{second}{first}"), format!("{second}{first}{second}")]);
        }
    }
    for unit in [" ", "\n", " \n", "a", "aB", "1", "é", "!", "क", "\u{301}", "😀", "\t ", "\r"] {
        texts.extend([unit.repeat(3_000), format!("{}x", unit.repeat(3_000)), format!("x{}", unit.repeat(3_000))]);
    }
    texts
}

/// Fragments in any order, with any characters between them.
pub fn hostile_text() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        3 => prop::sample::select(FRAGMENTS.as_slice()).prop_map(str::to_owned),
        1 => any::<char>().prop_map(String::from),
        1 => "[ -~]{0,12}",
    ];
    prop::collection::vec(piece, 0..24).prop_map(|pieces| pieces.concat())
}

/// Bytes that are UTF-8 in part: text, cut anywhere, with anything between.
pub fn hostile_bytes() -> impl Strategy<Value = Vec<u8>> {
    let cut = (hostile_text(), any::<prop::sample::Index>()).prop_map(|(text, cut)| {
        let bytes = text.into_bytes();
        bytes[..cut.index(bytes.len() + 1)].to_vec()
    });
    let piece = prop_oneof![cut, prop::collection::vec(any::<u8>(), 0..6)];
    prop::collection::vec(piece, 0..6).prop_map(|pieces| pieces.concat())
}
