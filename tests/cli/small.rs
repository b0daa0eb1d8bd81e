//! A model so small that a test can have hundreds of tokens of it: one layer, 64 wide, random weights.

use std::fs;

use crate::bundled_metadata;
use gamma_tests::write::{File, Val, text};
use gpt_gamma::gguf::{Strings, TensorType};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

const N_CTX: u64 = 4096;
const D_MODEL: u64 = 64;
const N_VOCAB: u64 = 2048;

/// What a test can choose.
#[derive(Default)]
pub struct Small<'a> {
    /// Renames harmony's `<|channel|>`, so that the vocabulary is not harmony's any more.
    pub without_markers: bool,
    pub template: Option<&'a str>,
    pub adds_bos: bool,
}

impl Small<'_> {
    /// Writes it where it is gone after the test.
    pub fn write(&self) -> tempfile::TempPath {
        let file = self.file();
        let mut bytes = file.bytes();
        let start = file.head().len().next_multiple_of(file.alignment);
        let mut random = StdRng::seed_from_u64(1);
        for weight in bytes[start..].chunks_exact_mut(4) {
            weight.copy_from_slice(&random.random_range(-0.2_f32..0.2).to_le_bytes());
        }
        let path = tempfile::NamedTempFile::new().unwrap().into_temp_path();
        fs::write(&path, bytes).unwrap();
        path
    }

    fn file(&self) -> File {
        let metadata = bundled_metadata();
        let texts = |key: &str| {
            let texts: Strings = metadata.required(key).unwrap();
            Val::Array(8, texts.map(|text| Val::Str(self.rename(text))).collect())
        };
        let types: Vec<i32> = metadata.required("tokenizer.ggml.token_type").unwrap();
        let id = |key: &str| Val::U32(metadata.required(key).unwrap());
        let mut file = File::new()
            .key("general.architecture", text("gpt2"))
            .key("gpt2.block_count", Val::U32(1))
            .key("gpt2.context_length", Val::U32(N_CTX as u32))
            .key("gpt2.embedding_length", Val::U32(D_MODEL as u32))
            .key("gpt2.feed_forward_length", Val::U32(D_MODEL as u32))
            .key("gpt2.attention.head_count", Val::U32(1))
            .key("gpt2.attention.layer_norm_epsilon", Val::F32(1e-5))
            .key("tokenizer.ggml.model", text("gpt2"))
            .key("tokenizer.ggml.pre", text("gpt-4o"))
            .key("tokenizer.ggml.tokens", texts("tokenizer.ggml.tokens"))
            .key("tokenizer.ggml.token_type", Val::Array(5, types.into_iter().map(Val::I32).collect()))
            .key("tokenizer.ggml.merges", texts("tokenizer.ggml.merges"))
            .key("tokenizer.ggml.bos_token_id", id("tokenizer.ggml.bos_token_id"))
            .key("tokenizer.ggml.add_bos_token", Val::Bool(self.adds_bos.into()));
        if let Some(template) = self.template {
            file = file.key("tokenizer.chat_template", text(template));
        }
        let d = D_MODEL;
        file = file.tensor("token_embd.weight", TensorType::F32, &[d, N_VOCAB]);
        file = file.tensor("position_embd.weight", TensorType::F32, &[d, N_CTX]);
        let layer = |name: &str| format!("blk.0.{name}");
        for name in ["output_norm".to_owned(), layer("attn_norm"), layer("ffn_norm")] {
            file = file.tensor(&format!("{name}.weight"), TensorType::F32, &[d]);
            file = file.tensor(&format!("{name}.bias"), TensorType::F32, &[d]);
        }
        for (name, n_out) in [("attn_qkv", 3 * d), ("attn_output", d), ("ffn_up", d), ("ffn_down", d)] {
            file = file.tensor(&layer(&format!("{name}.weight")), TensorType::F32, &[d, n_out]);
            file = file.tensor(&layer(&format!("{name}.bias")), TensorType::F32, &[n_out]);
        }
        file
    }

    fn rename(&self, token: &[u8]) -> Vec<u8> {
        if self.without_markers && token == b"<|channel|>" { b"<|unused|>".to_vec() } else { token.to_vec() }
    }
}
