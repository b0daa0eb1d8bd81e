//! gpt-gamma: GPT inference from GGUF files on one NVIDIA GPU, every line of device code in Rust.
//!
//! Dependencies point one way: `cli → engine → (adapter → gguf), tokenizer, sampler, device → kernels → cuda_std`.
//! The pure modules (`gguf`, `tokenizer`, `adapter`, `chat`, `sampler`, `weights`) do no I/O, know no device and hold no `unsafe`; only `cli`
//! reads arguments or prints; `engine` never names CUDA.

#![deny(unsafe_code)]

pub mod adapter;
pub mod chat;
pub mod device;
pub mod engine;
pub mod gguf;
pub mod model_file;
pub mod sampler;
pub mod tokenizer;
pub mod weights;
