//! Token ids to bytes, one at a time, never half a character.

use super::{Error, Tokenizer};

/// Decodes ids as they arrive and holds back the start of a character until its rest is there.
///
/// What [`StreamDecoder::push`] and [`StreamDecoder::finish`] return, concatenated, is [`Tokenizer::decode`] of all ids,
/// byte for byte. Bytes that can no longer become UTF-8 are returned as they are, as soon as that is certain (by the
/// rule of `str::from_utf8`, Unicode's maximal subparts); so each result is whole characters and such bytes, and if all
/// of the text is UTF-8, each result is.
///
/// ```
/// # use gpt_gamma::tokenizer::{Error, StreamDecoder, Tokenizer};
/// # fn print(tokenizer: &Tokenizer, ids: &[u32]) -> Result<(), Error> {
/// let mut decoder = StreamDecoder::new(tokenizer);
/// for &id in ids {
///     print!("{}", String::from_utf8_lossy(decoder.push(id)?));
/// }
/// print!("{}", String::from_utf8_lossy(&decoder.finish()));
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct StreamDecoder<'t> {
    tokenizer: &'t Tokenizer,
    /// `bytes[..n_emitted]` went out at the last call; the rest is the incomplete start of one character.
    bytes: Vec<u8>,
    n_emitted: usize,
}

impl<'t> StreamDecoder<'t> {
    /// A decoder that has seen no token.
    pub fn new(tokenizer: &'t Tokenizer) -> StreamDecoder<'t> {
        StreamDecoder { tokenizer, bytes: Vec::new(), n_emitted: 0 }
    }

    /// The bytes that became certain with `id`; empty while a character is incomplete.
    ///
    /// # Errors
    ///
    /// [`Error::IdOutsideVocabulary`] if `id` is not below [`Tokenizer::n_vocab`]; the decoder is then as before.
    pub fn push(&mut self, id: u32) -> Result<&[u8], Error> {
        let token = self.tokenizer.token_bytes(id)?;
        self.bytes.drain(..self.n_emitted);
        self.bytes.extend_from_slice(token);
        self.n_emitted = self.bytes.len() - incomplete_tail(&self.bytes);
        Ok(&self.bytes[..self.n_emitted])
    }

    /// The bytes still held back, at most three: the start of a character that never ended.
    pub fn finish(mut self) -> Vec<u8> {
        self.bytes.split_off(self.n_emitted)
    }
}

/// Length of the longest end of `bytes` that more bytes could complete to a character.
fn incomplete_tail(bytes: &[u8]) -> usize {
    let mut at = 0;
    while let Err(error) = str::from_utf8(&bytes[at..]) {
        match error.error_len() {
            None => return bytes.len() - at - error.valid_up_to(),
            Some(n_invalid) => at += error.valid_up_to() + n_invalid,
        }
    }
    0
}
