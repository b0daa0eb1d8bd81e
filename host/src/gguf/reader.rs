//! The cursor that every read of the parser goes through.

use super::Error;

/// The longest string and the longest array: llama.cpp's limits, in bytes and elements.
pub(super) const MAX_LENGTH: usize = 1 << 30;

/// A cursor over the bytes of a file. Invariant: `at <= bytes.len()`.
#[derive(Clone)]
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// How many bytes were read.
    pub(super) fn at(&self) -> usize {
        self.at
    }

    /// The next `n` bytes: the one bounds check of the parser.
    pub(super) fn take(&mut self, n: u64, what: &'static str) -> Result<&'a [u8], Error> {
        let have = self.bytes.len() - self.at;
        match usize::try_from(n) {
            Ok(n) if n <= have => {
                let taken = &self.bytes[self.at..self.at + n];
                self.at += n;
                Ok(taken)
            }
            _ => Err(Error::Truncated { what, offset: self.at, need: n, have }),
        }
    }

    pub(super) fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], Error> {
        Ok(self.take(N as u64, what)?.try_into().expect("take returned N bytes"))
    }

    pub(super) fn u32(&mut self, what: &'static str) -> Result<u32, Error> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    pub(super) fn u64(&mut self, what: &'static str) -> Result<u64, Error> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// Checks a count of items of at least `min_bytes` each before anything is allocated for them.
    pub(super) fn count(&self, what: &'static str, found: u64, min_bytes: usize, most: usize) -> Result<usize, Error> {
        let (have, need) = (self.bytes.len() - self.at, found.saturating_mul(min_bytes as u64));
        if need > have as u64 {
            return Err(Error::Truncated { what, offset: self.at, need, have });
        }
        // What fits the file fits its index type.
        Some(found as usize).filter(|&found| found <= most).ok_or(Error::TooMany { what, found, most })
    }

    /// A length, then as many bytes, of which at most `most`.
    pub(super) fn string(&mut self, what: &'static str, most: usize) -> Result<&'a [u8], Error> {
        let offset = self.at;
        let found = self.u64(what)?;
        if found > most as u64 {
            return Err(Error::TooLong { what, offset, found, most });
        }
        self.take(found, what)
    }

    /// A string that must be UTF-8.
    pub(super) fn name(&mut self, what: &'static str, most: usize) -> Result<&'a str, Error> {
        let offset = self.at;
        std::str::from_utf8(self.string(what, most)?).map_err(|_| Error::NotUtf8 { what, offset })
    }

    /// Skips to the next multiple of `alignment`, a power of two.
    pub(super) fn pad(&mut self, alignment: usize) -> Result<(), Error> {
        let padding = self.at.wrapping_neg() & (alignment - 1);
        self.take(padding as u64, "padding before the tensor data").map(|_| ())
    }

    /// The bytes from `start` to here.
    pub(super) fn since(&self, start: usize) -> &'a [u8] {
        &self.bytes[start..self.at]
    }
}
