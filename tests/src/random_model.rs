//! Files with random weights and a published model's exact shapes, types and vocabulary size.
//!
//! Speed and memory do not depend on what the weights are, so such a file stands in for one that is not at hand, beside
//! llama.cpp too, which reads it as well. What such a model writes is noise.

use std::fs::{self, File as Output};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use chacha20::ChaCha8Rng;
use gpt_gamma::gguf::TensorType;
use half::f16;
use rand::{Rng, SeedableRng};
use rayon::prelude::*;

use crate::write::{File, Val, text};

/// The models that [`RandomModel::published`] knows.
pub const NAMES: [&str; 5] = ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "gpt-oss-20b"];
/// The most layers a file may be asked to have: what both engines take.
pub const MAX_LAYERS: usize = 512;

/// How many bytes are made and written at a time, about: enough to be fast, and few beside what a thread has of caches.
const CHUNK_BYTES: usize = 1 << 20;
/// `llama_ftype` of files in Q4_K_M.
const Q4_K_M: Val = Val::U32(15);
/// `llama_ftype` of files with experts in MXFP4.
const MXFP4_MOE: Val = Val::U32(38);
/// The standard deviation of biases, which is not to matter beside that of products, 1.
const BIAS: f32 = 0.02;

/// Sizes of a GPT-2 model.
#[derive(Debug, Clone, Copy)]
#[expect(missing_docs, reason = "named as everywhere")]
pub struct Gpt2 {
    pub n_vocab: usize,
    pub n_ctx: usize,
    pub n_layer: usize,
    pub d_model: usize,
    pub n_head: usize,
}

/// Sizes of a gpt-oss model.
#[derive(Debug, Clone, Copy)]
#[expect(missing_docs, reason = "named as everywhere")]
pub struct GptOss {
    pub n_vocab: usize,
    pub n_ctx: usize,
    pub n_layer: usize,
    pub d_model: usize,
    pub n_head: usize,
    pub n_head_kv: usize,
    pub d_head: usize,
    /// The width inside one expert.
    pub d_ff: usize,
    pub n_expert: usize,
    pub n_used: usize,
    pub window: usize,
}

/// What a file will hold.
#[derive(Debug, Clone)]
pub struct RandomModel {
    /// Its keys, and its tensors without their data.
    pub file: File,
    /// For each tensor, what its data is to be.
    contents: Vec<Contents>,
}

#[derive(Debug, Clone, Copy)]
enum Contents {
    Ones,
    /// Mean 0 and this standard deviation.
    Spread(f32),
}

impl RandomModel {
    /// The published model `name`, one of [`NAMES`], with `n_layer` layers if it is not to have its own number. `None` for
    /// other names.
    ///
    /// Sizes: Radford et al., *Language Models are Unsupervised Multitask Learners*, table 2; OpenAI, *gpt-oss-120b &
    /// gpt-oss-20b Model Card*, arXiv:2508.10925.
    pub fn published(name: &str, n_layer: Option<usize>) -> Option<Self> {
        let gpt2 = |layers: usize, d_model, n_head| {
            let n_layer = n_layer.unwrap_or(layers);
            Self::gpt2(name, Gpt2 { n_vocab: 50_257, n_ctx: 1024, n_layer, d_model, n_head })
        };
        Some(match name {
            "gpt2" => gpt2(12, 768, 12),
            "gpt2-medium" => gpt2(24, 1024, 16),
            "gpt2-large" => gpt2(36, 1280, 20),
            "gpt2-xl" => gpt2(48, 1600, 25),
            "gpt-oss-20b" => {
                let sizes = GptOss {
                    n_vocab: 201_088,
                    n_ctx: 131_072,
                    n_layer: n_layer.unwrap_or(24),
                    d_model: 2880,
                    n_head: 64,
                    n_head_kv: 8,
                    d_head: 64,
                    d_ff: 2880,
                    n_expert: 32,
                    n_used: 4,
                    window: 128,
                };
                Self::gpt_oss(name, sizes)
            }
            _ => return None,
        })
    }

    /// A GPT-2 model in the types that llama.cpp's converter and its Q4_K_M give one.
    pub fn gpt2(name: &str, sizes: Gpt2) -> Self {
        let Gpt2 { n_vocab, n_ctx, n_layer, d_model: d, n_head } = sizes;
        let (d_ff, number) = (4 * d, |n: usize| Val::U32(n as u32));
        let file = File::new()
            .key("general.architecture", text("gpt2"))
            .key("general.name", text(name))
            .key("gpt2.block_count", number(n_layer))
            .key("gpt2.context_length", number(n_ctx))
            .key("gpt2.embedding_length", number(d))
            .key("gpt2.feed_forward_length", number(d_ff))
            .key("gpt2.attention.head_count", number(n_head))
            .key("gpt2.attention.layer_norm_epsilon", Val::F32(1e-5))
            .key("general.quantization_version", Val::U32(2))
            .key("general.file_type", Q4_K_M);
        let end = number(n_vocab - 1);
        let file = vocabulary(file, "gpt-2", n_vocab, &["<|endoftext|>"])
            .key("tokenizer.ggml.bos_token_id", end.clone())
            .key("tokenizer.ggml.eos_token_id", end);
        let mut model = Self { file, contents: Vec::new() };

        // The head is the embedding too, and the quantizer takes it as a head.
        model.weight("token_embd.weight", or_smaller_blocks(TensorType::Q6_K, d), &[d, n_vocab], spread(d));
        model.weight("position_embd.weight", TensorType::F32, &[d, n_ctx], spread(d));
        model.layer_norm("output_norm", d);
        for i in 0..n_layer {
            let more = if takes_more_bits(i, n_layer) { TensorType::Q6_K } else { TensorType::Q4_K };
            let residual = (2.0 * n_layer as f32).sqrt();
            model.layer_norm(&format!("blk.{i}.attn_norm"), d);
            model.layer_norm(&format!("blk.{i}.ffn_norm"), d);
            for (part, wanted, n_in, n_out, spread) in [
                ("attn_qkv", more, d, 3 * d, spread(d)),
                ("attn_output", TensorType::Q4_K, d, d, spread(d) / residual),
                ("ffn_up", TensorType::Q4_K, d, d_ff, spread(d)),
                ("ffn_down", more, d_ff, d, spread(d_ff) / residual),
            ] {
                let ty = or_smaller_blocks(wanted, n_in);
                model.linear(&format!("blk.{i}.{part}"), ty, &[n_in, n_out], spread);
            }
        }
        model
    }

    /// A gpt-oss model in the types of the published conversions: experts MXFP4, other matrices Q8_0.
    pub fn gpt_oss(name: &str, sizes: GptOss) -> Self {
        let GptOss { n_vocab, n_ctx, n_layer, d_model: d, n_head, n_head_kv, d_head, d_ff, n_expert, n_used, window } =
            sizes;
        let (key, number) = (|name: &str| format!("gpt-oss.{name}"), |n: usize| Val::U32(n as u32));
        let file = File::new()
            .key("general.architecture", text("gpt-oss"))
            .key("general.name", text(name))
            .key(key("block_count"), number(n_layer))
            .key(key("context_length"), number(n_ctx))
            .key(key("embedding_length"), number(d))
            .key(key("feed_forward_length"), number(d_ff))
            .key(key("expert_feed_forward_length"), number(d_ff))
            .key(key("attention.head_count"), number(n_head))
            .key(key("attention.head_count_kv"), number(n_head_kv))
            .key(key("attention.key_length"), number(d_head))
            .key(key("attention.value_length"), number(d_head))
            .key(key("attention.layer_norm_rms_epsilon"), Val::F32(1e-5))
            .key(key("attention.sliding_window"), number(window))
            .key(key("expert_count"), number(n_expert))
            .key(key("expert_used_count"), number(n_used))
            .key(key("rope.dimension_count"), number(d_head))
            .key(key("rope.freq_base"), Val::F32(150_000.0))
            .key(key("rope.scaling.type"), text("yarn"))
            .key(key("rope.scaling.factor"), Val::F32(32.0))
            .key(key("rope.scaling.original_context_length"), number(n_ctx / 32))
            .key("general.quantization_version", Val::U32(2))
            .key("general.file_type", MXFP4_MOE);
        let specials = ["<|startoftext|>", "<|endoftext|>", "<|return|>", "<|start|>", "<|end|>", "<|message|>"];
        let id = |i: usize| number(n_vocab - specials.len() + i);
        let file = vocabulary(file, "gpt-4o", n_vocab, &specials)
            .key("tokenizer.ggml.bos_token_id", id(0))
            .key("tokenizer.ggml.padding_token_id", id(1))
            .key("tokenizer.ggml.eos_token_id", id(2));
        let mut model = Self { file, contents: Vec::new() };

        let (d_q, d_kv, residual) = (n_head * d_head, n_head_kv * d_head, (2.0 * n_layer as f32).sqrt());
        model.weight("token_embd.weight", TensorType::Q8_0, &[d, n_vocab], 1.0);
        model.weight("output.weight", TensorType::Q8_0, &[d, n_vocab], spread(d));
        model.ones("output_norm.weight", d);
        for i in 0..n_layer {
            let part = |name: &str| format!("blk.{i}.{name}");
            model.ones(&part("attn_norm.weight"), d);
            model.ones(&part("post_attention_norm.weight"), d);
            for (name, n_out) in [("attn_q", d_q), ("attn_k", d_kv), ("attn_v", d_kv)] {
                model.linear(&part(name), TensorType::Q8_0, &[d, n_out], spread(d));
            }
            model.linear(&part("attn_output"), TensorType::Q8_0, &[d_q, d], spread(d_q) / residual);
            model.weight(&part("attn_sinks.weight"), TensorType::F32, &[n_head], 1.0);
            model.linear(&part("ffn_gate_inp"), TensorType::F32, &[d, n_expert], spread(d));
            for (name, n_in, n_out, spread) in [
                ("ffn_gate_exps", d, d_ff, spread(d)),
                ("ffn_up_exps", d, d_ff, spread(d)),
                ("ffn_down_exps", d_ff, d, spread(d_ff) / residual),
            ] {
                model.linear(&part(name), TensorType::MXFP4, &[n_in, n_out, n_expert], spread);
            }
        }
        model
    }

    /// A matrix, or one for each expert, with its bias.
    fn linear(&mut self, name: &str, ty: TensorType, dims: &[usize], spread: f32) {
        self.weight(&format!("{name}.weight"), ty, dims, spread);
        self.weight(&format!("{name}.bias"), TensorType::F32, &dims[1..], BIAS);
    }

    fn layer_norm(&mut self, name: &str, width: usize) {
        self.ones(&format!("{name}.weight"), width);
        self.weight(&format!("{name}.bias"), TensorType::F32, &[width], BIAS);
    }

    fn ones(&mut self, name: &str, width: usize) {
        self.tensor(name, TensorType::F32, &[width], Contents::Ones);
    }

    fn weight(&mut self, name: &str, ty: TensorType, dims: &[usize], spread: f32) {
        self.tensor(name, ty, dims, Contents::Spread(spread));
    }

    fn tensor(&mut self, name: &str, ty: TensorType, dims: &[usize], contents: Contents) {
        let dims: Vec<u64> = dims.iter().map(|&dim| dim as u64).collect();
        self.file = std::mem::take(&mut self.file).tensor(name, ty, &dims);
        self.contents.push(contents);
    }

    /// The size of the file.
    pub fn n_bytes(&self) -> u64 {
        let data = self.file.places().last().map_or(0, |place| place.end);
        self.data_offset() + data.next_multiple_of(self.file.alignment as u64)
    }

    fn data_offset(&self) -> u64 {
        self.file.head().len().next_multiple_of(self.file.alignment) as u64
    }

    /// Writes the file on all cores, with little memory; the same seed gives the same bytes. Until it is whole it is called
    /// `PATH.part`, so that nothing takes half a model for one.
    ///
    /// # Errors
    ///
    /// What the system says; what was written is removed then. [`io::ErrorKind::AlreadyExists`] if `path` is there and no file.
    pub fn write(&self, path: &Path, seed: u64) -> io::Result<()> {
        // A device would be replaced, and a folder found in the way when all is written.
        if fs::metadata(path).is_ok_and(|found| !found.is_file()) {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "is there and no file"));
        }
        let mut part = path.as_os_str().to_owned();
        part.push(".part");
        let part = PathBuf::from(part);
        let written = self.write_all(&Output::create(&part)?, seed).and_then(|()| fs::rename(&part, path));
        if written.is_err() {
            // The first error is the one to tell.
            let _ = fs::remove_file(&part);
        }
        written
    }

    fn write_all(&self, output: &Output, seed: u64) -> io::Result<()> {
        output.set_len(self.n_bytes())?;
        output.write_all_at(&self.file.head(), 0)?;
        let data_offset = self.data_offset();
        let mut chunks = Vec::new();
        for ((tensor, place), &contents) in self.file.tensors.iter().zip(self.file.places()).zip(&self.contents) {
            let ty = TensorType::from_id(tensor.ty).expect("the builder takes types");
            let step = CHUNK_BYTES / ty.block_bytes() * ty.block_bytes();
            let ends = place.clone().step_by(step).map(|start| (start, place.end.min(start + step as u64)));
            chunks.extend(ends.map(|(start, end)| Chunk {
                ty,
                contents,
                at: data_offset + start,
                len: (end - start) as usize,
            }));
        }
        let memory = || vec![0; CHUNK_BYTES];
        // A chunk's numbers are a stream of their own, so that the order in which threads take chunks does not matter.
        (0_u64..).zip(chunks).par_bridge().try_for_each_init(memory, |memory, (stream, chunk)| {
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            random.set_stream(stream);
            let bytes = &mut memory[..chunk.len];
            chunk.fill(&mut random, bytes);
            output.write_all_at(bytes, chunk.at)
        })
    }
}

/// The standard deviation that keeps the magnitude of what has `n_in` elements.
fn spread(n_in: usize) -> f32 {
    (n_in as f32).sqrt().recip()
}

/// Whether Q4_K_M gives layer `i` the larger type where it has two: `use_more_bits` of llama.cpp's `llama-quant.cpp`, b11434.
fn takes_more_bits(i: usize, n_layer: usize) -> bool {
    i < n_layer / 8 || i >= 7 * n_layer / 8 || (i - n_layer / 8) % 3 == 2
}

/// The type that llama.cpp takes for rows of `width` that `wanted` does not divide: `tensor_type_fallback`, same file. The
/// embedding's rule there, Q8_0 for such rows, comes to the same.
fn or_smaller_blocks(wanted: TensorType, width: usize) -> TensorType {
    match wanted {
        _ if width.is_multiple_of(wanted.block_len()) => wanted,
        TensorType::Q4_K => TensorType::Q5_0,
        TensorType::Q6_K => TensorType::Q8_0,
        _ => unreachable!("Q4_K_M makes no {wanted} of these tensors"),
    }
}

/// Adds a vocabulary of `n_vocab` tokens: each byte, each pair of them as far as there is room, then threes, all made by
/// merges as a trained one's are, and `specials` at the end.
fn vocabulary(file: File, pre: &str, n_vocab: usize, specials: &[&str]) -> File {
    let n_merges = (n_vocab - specials.len()).checked_sub(256).expect("a token for each byte");
    let mut tokens: Vec<String> = (0..=u8::MAX).map(|byte| letter(byte).to_string()).collect();
    let mut merges = Vec::with_capacity(n_merges);
    for rank in 0..n_merges {
        // Each token continued by each byte, in order: no two are alike.
        let (left, right) = (rank / 256, rank % 256);
        merges.push(Val::Str(format!("{} {}", tokens[left], tokens[right]).into()));
        tokens.push(format!("{}{}", tokens[left], tokens[right]));
    }
    let types = |n: usize, kind: i32| std::iter::repeat_n(Val::I32(kind), n);
    let types = types(tokens.len(), 1).chain(types(specials.len(), 3)).collect();
    let tokens = tokens.iter().map(String::as_str).chain(specials.iter().copied()).map(text).collect();
    file.key("tokenizer.ggml.model", text("gpt2"))
        .key("tokenizer.ggml.pre", text(pre))
        .key("tokenizer.ggml.tokens", Val::Array(8, tokens))
        .key("tokenizer.ggml.token_type", Val::Array(5, types))
        .key("tokenizer.ggml.merges", Val::Array(8, merges))
        .key("tokenizer.ggml.add_bos_token", Val::Bool(0))
}

/// The letter that stands for `byte` in GPT-2's alphabet: itself where it can be seen, else the next of U+0100 on.
fn letter(byte: u8) -> char {
    let is_own = |byte: u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    if is_own(byte) {
        return char::from(byte);
    }
    let n_before = (0..byte).filter(|&before| !is_own(before)).count();
    char::from_u32(0x100 + n_before as u32).expect("68 letters")
}

/// Some blocks of a tensor, and where in the file they go.
struct Chunk {
    ty: TensorType,
    contents: Contents,
    at: u64,
    len: usize,
}

impl Chunk {
    /// Makes whole blocks: random bytes, then scales that give them their spread.
    ///
    /// Where quants reach further to one side, half of the blocks have a negative scale, so that the mean is 0 all the same:
    /// a mean would add up over a row. Scales of one tensor are within a factor of 2, so that none of them is lost where
    /// rows share one.
    fn fill(&self, random: &mut ChaCha8Rng, bytes: &mut [u8]) {
        let spread = match self.contents {
            Contents::Ones => {
                return bytes.chunks_exact_mut(4).for_each(|one| one.copy_from_slice(&1_f32.to_le_bytes()));
            }
            Contents::Spread(spread) => spread,
        };
        random.fill_bytes(bytes);
        let blocks = bytes.chunks_exact_mut(self.ty.block_bytes());
        // σ of n whole numbers in a row is √((n² − 1) / 12); where their mean is ±½, its square comes on top.
        match self.ty {
            TensorType::F32 => blocks.for_each(|block| {
                let bits = u32::from_le_bytes([block[0], block[1], block[2], block[3]]);
                let in_one = (bits >> 8) as f32 / (1 << 23) as f32 - 1.0;
                block.copy_from_slice(&(in_one * 3_f32.sqrt() * spread).to_le_bytes());
            }),
            // σ of −128..=127: 73.9.
            TensorType::Q8_0 => blocks.for_each(|block| signed_scale(block, spread / 73.9)),
            // σ of −16..=15: 9.25.
            TensorType::Q5_0 => blocks.for_each(|block| signed_scale(block, spread / 9.25)),
            // d · s · q − dmin · m with s = m in 32..=63 (√mean(s²): 48.4), q in 0..=15 (σ: 4.61) and dmin = 7.5 d.
            TensorType::Q4_K => blocks.for_each(|block| {
                let d = spread / (48.4 * 4.61);
                block[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
                block[2..4].copy_from_slice(&f16::from_f32(7.5 * d).to_le_bytes());
                equal_scales_and_minima(&mut block[4..16]);
            }),
            // d · s · q with |s| in 16..=31 (√mean(s²): 23.9) and q in −32..=31 (σ: 18.5).
            TensorType::Q6_K => blocks.for_each(|block| {
                for scale in &mut block[192..208] {
                    let magnitude = 16 + (*scale & 15) as i8;
                    *scale = if *scale & 128 == 0 { magnitude } else { -magnitude } as u8;
                }
                block[208..].copy_from_slice(&f16::from_f32(spread / (23.9 * 18.5)).to_le_bytes());
            }),
            // √mean of 0, ½, 1, 1½, 2, 3, 4, 6 squared: 2.93. The nearest power of two.
            TensorType::MXFP4 => {
                let exponent = 127 + (spread / 2.93).log2().round() as i32;
                let exponent = u8::try_from(exponent).expect("spreads are near 1");
                blocks.for_each(|block| block[0] = exponent);
            }
            ty => unreachable!("no model here has {ty}"),
        }
    }
}

/// Gives a block that starts with an f16 scale this one, with the sign of a random bit.
fn signed_scale(block: &mut [u8], scale: f32) {
    let scale = if block[0] & 1 == 0 { scale } else { -scale };
    block[..2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
}

/// Makes 12 random bytes the 8 scales and 8 minima of Q4_K, six bits each: 32 to 63, a minimum as its scale.
fn equal_scales_and_minima(bytes: &mut [u8]) {
    for j in 0..4 {
        // Of sub-blocks j and j + 4. The upper two bits of the latter's are 2 or 3.
        let (first, second) = (32 | bytes[j] & 31, 32 | bytes[j + 4] & 31);
        bytes[j] = first | second >> 4 << 6;
        bytes[j + 4] = bytes[j];
        bytes[j + 8] = second & 15 | (second & 15) << 4;
    }
}
