//! Benches of the engine: decode steps and prompts of whole models.

use std::env;
use std::path::{Path, PathBuf};

use criterion::Throughput;
use gamma_tests::bytes;
use gpt_gamma::adapter::{self, InferenceAdapter, ModelSpec};
use gpt_gamma::engine::{Engine, Options, decode_bytes};
use gpt_gamma::model_file::ModelFile;

use crate::{Gpu, Suite};

/// Tokens that a bench generates before it starts over: the context grows by so many at most.
const N_STEPS: usize = 64;

/// Files of models to time: the bundled ones that the engine runs quantized, and `$GAMMA_BENCH_MODEL`.
pub fn models() -> Vec<PathBuf> {
    let bundled = ["tiny-gpt2-q4_k_m.gguf", "tiny-gpt2-mxfp4.gguf", "tiny-gpt-oss-mxfp4.gguf"];
    let bundled = bundled.map(|name| gamma_tests::models().join(name));
    bundled.into_iter().chain(env::var_os("GAMMA_BENCH_MODEL").map(PathBuf::from)).collect()
}

fn name(model: &Path) -> String {
    model.file_stem().unwrap_or(model.as_os_str()).to_string_lossy().into_owned()
}

fn load(gpu: &Gpu, file: &ModelFile, spec: &ModelSpec, n_ctx: usize) -> Engine {
    let options = Options { n_ctx, ..Options::for_model(spec) };
    Engine::load(gpu.device.clone(), file, spec, options, &mut |_, _| {}).unwrap()
}

/// Random tokens of the whole vocabulary.
fn tokens(seed: u64, n: usize, n_vocab: usize) -> Vec<u32> {
    let random = bytes(seed, 4 * n);
    let words = random.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().expect("4 bytes")));
    // The upper half of the product is uniform below `n_vocab` but for 2⁻³² of it.
    words.map(|word| ((u64::from(word) * n_vocab as u64) >> 32) as u32).collect()
}

impl Suite {
    /// Times decode steps behind `n_past` to `n_past + 64` tokens, each with another token and waited for, as
    /// `engine/decode/MODEL/ctxN`. Nothing if the model's context ends before.
    ///
    /// # Panics
    ///
    /// If the file is no model that runs, or the device fails.
    pub fn decode(&mut self, model: &Path, n_past: usize) {
        let file = ModelFile::open(model).unwrap();
        let adapter = adapter::detect(file.metadata(), file.tensors()).unwrap();
        let spec = adapter.spec();
        if n_past + N_STEPS > spec.n_ctx {
            return;
        }
        let kv = Options::for_model(spec).kv;
        let work = decode_bytes(spec, file.tensors(), kv, n_past + N_STEPS / 2);
        let mut group = self.criterion.benchmark_group(format!("engine/decode/{}", name(model)));
        group.throughput(Throughput::Bytes(work));
        let (gpu, mut loaded) = (&self.gpu, None);
        group.bench_function(format!("ctx{n_past}"), |bencher| {
            let engine = loaded.get_or_insert_with(|| load(gpu, &file, spec, n_past + N_STEPS));
            let (past, steps) = (tokens(1, n_past, spec.n_vocab), tokens(2, N_STEPS, spec.n_vocab));
            bencher.iter_custom(|n_iterations| {
                let mut nanoseconds = 0.0;
                let mut left = n_iterations as usize;
                while left > 0 {
                    engine.reset();
                    if !past.is_empty() {
                        engine.prefill(&past, &mut |_| {}).unwrap();
                    }
                    let start = gpu.mark();
                    for &token in &steps[..left.min(N_STEPS)] {
                        engine.decode(token).unwrap();
                        engine.greedy().unwrap();
                    }
                    nanoseconds += gpu.since(&start);
                    left -= left.min(N_STEPS);
                }
                nanoseconds
            });
        });
        group.finish();
    }

    /// Times a prompt of `n_prompt` tokens in an empty context, as `engine/prefill/MODEL/N`. Nothing if the model's
    /// context is shorter.
    ///
    /// # Panics
    ///
    /// As [`decode`](Self::decode).
    pub fn prefill(&mut self, model: &Path, n_prompt: usize) {
        let file = ModelFile::open(model).unwrap();
        let adapter = adapter::detect(file.metadata(), file.tensors()).unwrap();
        let spec = adapter.spec();
        if n_prompt > spec.n_ctx {
            return;
        }
        let mut group = self.criterion.benchmark_group(format!("engine/prefill/{}", name(model)));
        group.throughput(Throughput::ElementsAndBytes { elements: n_prompt as u64, bytes: 0 });
        let (gpu, mut loaded) = (&self.gpu, None);
        group.bench_function(n_prompt.to_string(), |bencher| {
            let engine = loaded.get_or_insert_with(|| load(gpu, &file, spec, n_prompt));
            let prompt = tokens(1, n_prompt, spec.n_vocab);
            bencher.iter_custom(|n_iterations| {
                let start = gpu.mark();
                for _ in 0..n_iterations {
                    engine.reset();
                    engine.prefill(&prompt, &mut |_| {}).unwrap();
                }
                gpu.since(&start)
            });
        });
        group.finish();
    }
}
