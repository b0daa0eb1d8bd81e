//! Whole models, most of all against logits that HF transformers computed in f32 from the same dequantized weights.

#![allow(clippy::unwrap_used, reason = "a test that cannot load its model has failed")]

mod engine;
mod memory;
mod mixed;
mod mutations;
mod random;
mod reference;
mod regression;
mod rewind;
