//! The vocabulary in a GGUF file's metadata.

use super::Vocabulary;
use crate::gguf::{Metadata, MetadataError, Strings};

impl Vocabulary {
    /// A file's `tokenizer.*` keys, unchecked.
    ///
    /// # Errors
    ///
    /// [`MetadataError`] if a key that every vocabulary has is missing, or one is of another type.
    pub fn from_metadata(metadata: &Metadata) -> Result<Vocabulary, MetadataError> {
        let texts = |key| Ok(metadata.required::<Strings>(key)?.map(<[u8]>::to_vec).collect());
        let model: &str = metadata.required("tokenizer.ggml.model")?;
        let mut vocabulary = Vocabulary {
            model: model.to_owned(),
            pre: metadata.optional::<&str>("tokenizer.ggml.pre")?.map(str::to_owned),
            tokens: texts("tokenizer.ggml.tokens")?,
            token_types: metadata.optional("tokenizer.ggml.token_type")?,
            ..Vocabulary::default()
        };
        // Other models have no merges; the tokenizer is to say that it does not support them.
        if model == "gpt2" {
            vocabulary.merges = texts("tokenizer.ggml.merges")?;
        }
        vocabulary.name_specials(metadata)?;
        Ok(vocabulary)
    }

    /// Takes over what a file's metadata says of single tokens and of chats; a `tokenizer.json` does not.
    ///
    /// # Errors
    ///
    /// [`MetadataError`] if a key is of another type.
    pub fn name_specials(&mut self, metadata: &Metadata) -> Result<(), MetadataError> {
        let id = |name| metadata.optional(&format!("tokenizer.ggml.{name}_token_id"));
        let flag = |key| Ok(metadata.optional(key)?.unwrap_or(false));
        (self.bos, self.eos, self.eot, self.eom) = (id("bos")?, id("eos")?, id("eot")?, id("eom")?);
        (self.unknown, self.padding) = (id("unknown")?, id("padding")?);
        self.add_bos = flag("tokenizer.ggml.add_bos_token")?;
        self.add_eos = flag("tokenizer.ggml.add_eos_token")?;
        self.chat_template = metadata.optional::<&str>("tokenizer.chat_template")?.map(str::to_owned);
        Ok(())
    }
}
